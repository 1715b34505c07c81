"""The short convolution of keys and values, with a cache and within documents."""

import pytest
import torch
from helpers import ATTENTION, assert_near, tiny_config, tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import KVCache
from open_mythos.context import Context
from open_mythos.nn.attention import GQAttention, MLAttention
from open_mythos.ops import reference
from open_mythos.ops.attention import AttentionMask
from open_mythos.ops.rope import rope_table


class Rows(GQAttention):
    """Attention that attends to nothing and records the rows that it would read."""

    def read(self, queries, rows, mask):
        self.seen = rows
        return queries[0]


def convolved(attn: Rows, x: Tensor, cache: KVCache | None = None, **mask) -> Tensor:
    past = cache.length if cache is not None else 0
    T = x.shape[1]
    rotary = rope_table(torch.arange(past, past + T), attn.head_dim)
    attn(x, Context(torch.view_as_complex(rotary), AttentionMask(T, past + T, **mask), cache), cache_key="slot")
    return attn.seen


def raw_rows(attn: Rows, x: Tensor) -> Tensor:
    taps, attn.n_taps = attn.n_taps, 0
    try:
        return convolved(attn, x)
    finally:
        attn.n_taps = taps


@given(K=st.integers(1, 6), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_convolution_equals_a_double_loop_for_any_split_of_the_tokens(K, sizes, seed):
    torch.manual_seed(seed)
    attn, x = Rows(tiny_config(conv_taps=K)), torch.randn(2, sum(sizes), 32)
    raw, kernel = raw_rows(attn, x), attn.kernel()
    expected = reference.causal_conv(raw.flatten(2), kernel.flatten(1)).view_as(raw)
    assert_near(convolved(attn, x), expected)
    with torch.no_grad():
        cache = KVCache()
        for part in x.split(sizes, 1):
            found = convolved(attn, part, cache)
    assert_near(found, expected)


@given(K=st.integers(1, 6), T=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_convolution_does_not_cross_documents(K, T, seed):
    torch.manual_seed(seed)
    attn, x, documents = Rows(tiny_config(conv_taps=K)), torch.randn(1, T, 32), torch.rand(1, T).lt(0.3).cumsum(1)
    raw, found = raw_rows(attn, x), convolved(attn, x, documents=documents)
    lengths = documents[0].unique_consecutive(return_counts=True)[1].tolist()
    parts = [reference.causal_conv(part.flatten(2), attn.kernel().flatten(1)) for part in raw.split(lengths, 1)]
    assert_near(found.flatten(2), torch.cat(parts, 1))


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_the_convolution_is_centred_without_causality(K):
    attn, x = Rows(tiny_config(conv_taps=K)), torch.randn(2, 8, 32)
    raw, kernel, ahead = raw_rows(attn, x).flatten(2), attn.kernel().flatten(1), (K - 1) // 2
    shifted = torch.cat([raw, raw.new_zeros(2, ahead, raw.shape[2])], 1)
    expected = reference.causal_conv(shifted, kernel)[:, ahead:]
    assert_near(convolved(attn, x, causal=False).flatten(2), expected)


def test_rotary_keys_of_mla_are_not_convolved():
    attn = MLAttention(tiny_config("mla"))
    kernel = attn.kernel()
    assert kernel.shape == (3, 1, 12 + 6)
    assert kernel[0, 0, 12:].eq(1).all() and kernel[1:, 0, 12:].eq(0).all()


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_one_context_can_be_used_for_two_backward_passes(attn_type):
    """The taps may be computed once for all loops, but not once for both losses: each has its own backward pass."""
    model, ids = tiny_model(attn_type, halting=False).train(), tokens(2, 6)
    with torch.no_grad():
        e, ctx = model.encode(ids)
        model.decode(model.recurrent(e, e, ctx, n_loops=1), ctx)

    def grads() -> list[Tensor | None]:
        model.zero_grad()
        model.decode(model.recurrent(e, e, ctx, n_loops=2), ctx).square().sum().backward()
        return [p.grad for name, p in model.named_parameters() if "taps" in name and "prelude" not in name]

    first, second = grads(), grads()
    assert first and all(grad is not None and grad.abs().sum() > 0 for grad in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
