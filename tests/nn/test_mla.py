"""Multi-head latent attention: the absorbed and the expanded form agree, and the cheaper one is used."""

import pytest
import torch
from helpers import assert_near, left_padding, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from open_mythos.nn.attention import MLAttention
from open_mythos.ops import reference
from open_mythos.ops.attention import AttentionMask
from open_mythos.ops.rope import rope_table


@st.composite
def problems(draw):
    """A layer of odd sizes, queries, cached rows and a mask."""
    cfg = tiny_config(
        "mla", n_heads=draw(st.sampled_from([1, 2, 4])), n_kv_heads=1, kv_lora_rank=draw(st.integers(1, 13)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)), qk_nope_head_dim=draw(st.integers(1, 9)),
        v_head_dim=draw(st.integers(1, 9)),
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 1000)))
    attn = MLAttention(cfg, local_window=draw(st.integers(0, 4)))
    S = draw(st.integers(1, 8))
    T = draw(st.integers(1, S))
    q_nope = torch.randn(2, T, cfg.n_heads, attn.nope_dim, requires_grad=True)
    q_rope = torch.randn(2, T, cfg.n_heads, attn.rope_dim, requires_grad=True)
    rows = torch.randn(2, S, 1, attn.latent_dim + attn.rope_dim, requires_grad=True)
    valid = left_padding([S, draw(st.integers(1, S))], S) if draw(st.booleans()) else None
    return attn, q_nope, q_rope, rows, AttentionMask(T, S, valid)


def plain(attn: MLAttention, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: AttentionMask) -> Tensor:
    T, S = mask.n_queries, mask.n_keys
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    causal = (key <= query) & (torch.ones(2, 1, S, dtype=torch.bool) if mask.valid is None else mask.valid[:, None])
    near = causal & (key > query - attn.local_window)
    itself = key == query
    allowed = torch.stack([(near if h < attn.n_local_heads else causal) | itself for h in range(attn.n_heads)], 1)
    up = (attn.kv_up.weight * attn.kv_up.scale).unflatten(0, (attn.n_heads, -1))
    c_kv, k_rope = rows.squeeze(2).split([attn.latent_dim, attn.rope_dim], -1)
    return reference.mla_expanded(
        q_nope, q_rope, c_kv, k_rope,
        up[:, : attn.nope_dim], up[:, attn.nope_dim :], allowed, (attn.nope_dim + attn.rope_dim) ** -0.5,
    )  # fmt: skip


@given(problems())
def test_outputs_and_gradients_of_both_forms_equal_the_reference(problem):
    attn, q_nope, q_rope, rows, mask = problem
    inputs = [q_nope, q_rope, rows, attn.kv_up.weight]
    expected = plain(attn, q_nope, q_rope, rows, mask)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for read in (attn.read_expanded, attn.read_absorbed, lambda *parts: attn.read([*parts[:2]], *parts[2:])):
        out = read(q_nope, q_rope, rows, mask)
        assert_near(out, expected, what=read.__name__)
        for got, want in zip(torch.autograd.grad((out * cotangent).sum(), inputs), wanted, strict=True):
            assert_near(got, want, 5e-5, read.__name__)


@pytest.mark.parametrize("n_new, n_all, form", [(64, 64, "expanded"), (1, 64, "absorbed"), (2, 512, "absorbed")])
def test_long_prompts_use_the_expanded_form_and_decoding_the_absorbed_one(monkeypatch, n_new, n_all, form):
    cfg = tiny_config("mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    attn, taken = MLAttention(cfg), []
    monkeypatch.setattr(attn, "read_expanded", lambda *a: taken.append("expanded"))
    monkeypatch.setattr(attn, "read_absorbed", lambda *a: taken.append("absorbed"))
    queries = [torch.randn(1, n_new, 4, 16), torch.randn(1, n_new, 4, 8)]
    attn.read(queries, torch.randn(1, n_all, 1, 40), AttentionMask(n_new, n_all))
    assert taken == [form]


def test_one_rope_key_serves_all_heads_and_latents_are_normalised():
    attn, x = MLAttention(tiny_config("mla")), torch.randn(2, 5, 32) * 50
    _, rows = attn.project(x, rope_table(torch.arange(5), 6))
    assert rows.shape == (2, 5, 1, 12 + 6)
    assert_near(rows[:, :, 0, :12].square().mean(-1), torch.ones(2, 5), 1e-3)
