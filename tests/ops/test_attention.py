"""Masks, and every code path of attention, against loops and an explicit softmax."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, left_padding
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from open_mythos.ops import attention as attention_module
from open_mythos.ops import reference
from open_mythos.ops.attention import AttentionMask, as_mask, attend


def seen(mask: AttentionMask, B: int, n_heads: int = 1, n_local: int = 0, window: int = 0) -> Tensor:
    """(B, H, T, S) whether a query sees a key, decided one pair at a time."""
    T, S = mask.n_queries, mask.n_keys
    far, near = (torch.zeros(B, 1, T, S, dtype=torch.bool) for _ in range(2))
    valid, documents, positions = (
        None if x is None else x.tolist() for x in (mask.valid, mask.documents, mask.positions)
    )
    for b, t, s in product(range(B), range(T), range(S)):
        at = S - T + t if positions is None else positions[b][t]
        real = valid is None or valid[b][s]
        same = documents is None or documents[b][s] == documents[b][at]
        before = not mask.causal or s <= at
        far[b, 0, t, s] = s == at or (real and same and before)
        near[b, 0, t, s] = far[b, 0, t, s] and abs(s - at) < max(window, 1)
    return torch.cat([near.expand(-1, n_local, -1, -1), far.expand(-1, n_heads - n_local, -1, -1)], 1)


@st.composite
def masks(draw, B: int, S: int):
    """Causal or not, with padding or not, with documents or not, of the last tokens or of scattered ones."""
    T = draw(st.integers(1, S))
    torch.manual_seed(draw(st.integers(0, 1000)))
    valid = left_padding([draw(st.integers(0, S)) for _ in range(B)], S) if draw(st.booleans()) else None
    documents = torch.rand(B, S).lt(0.4).cumsum(1) if draw(st.booleans()) else None
    positions = None
    if draw(st.booleans()):
        positions = torch.stack([torch.randperm(S)[:T].sort().values for _ in range(B)])
    return AttentionMask(T, S, valid, documents, positions, causal=draw(st.booleans()))


@st.composite
def problems(draw):
    """q, kv, a mask and its window: any split of keys into past and new, any head grouping."""
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    mask = draw(masks(B, S))
    G, R, D = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    V = draw(st.integers(1, D))
    q, kv = torch.randn(B, mask.n_queries, G * R, D), torch.randn(B, S, G, D + V)
    return q, kv, mask, draw(st.integers(0, G * R)), draw(st.integers(1, 11))


def check(q: Tensor, kv: Tensor, mask: AttentionMask, n_local: int, window: int, is_both: bool = False) -> None:
    """Compare outputs and gradients with an explicit softmax."""
    D = q.shape[-1]
    inputs = [x.requires_grad_() for x in (q, kv)]
    fast = attend(q, kv, mask, 0.3, n_local, window)
    k, v = (kv, kv) if is_both else (kv[..., :D], kv[..., D:])
    slow = reference.attention(q, k, v, seen(mask, len(q), q.shape[2], n_local, window), 0.3)
    assert_near(fast, slow)
    cotangent = torch.randn_like(slow)
    expected = torch.autograd.grad(slow, inputs, cotangent)
    for name, actual, wanted in zip(("q", "kv"), torch.autograd.grad(fast, inputs, cotangent), expected, strict=True):
        assert_near(actual, wanted, what=name)


@given(problems())
def test_attend_equals_an_explicit_softmax(problem):
    check(*problem)


@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_every_form_of_a_mask_equals_the_double_loop(B, S, data):
    mask, window = data.draw(masks(B, S)), data.draw(st.integers(1, 6))
    q = torch.empty(B, mask.n_queries, 3, 1)
    for width, expected in ((None, seen(mask, B)), (window, seen(mask, B, 1, 1, window))):
        bias, is_causal = mask.sdpa(q, width)
        if bias is None:
            full = torch.ones(mask.n_queries, S, dtype=torch.bool)
            bias = torch.zeros(full.shape).masked_fill(~(full.tril() if is_causal else full), float("-inf"))
        else:
            assert not is_causal
        assert torch.equal((bias == 0).expand_as(expected), expected)
    by_head = mask.by_head(q, 2, window)
    assert torch.equal((by_head == 0).expand(B, -1, -1, -1), seen(mask, B, 3, 2, window))
    assert not by_head.isnan().any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["plain", "padding", "documents", "packed"])
def test_the_predicate_of_a_block_mask_equals_the_dense_mask(kind, causal):
    """FlexAttention's mask, of which it computes only the blocks that are not empty."""
    torch.manual_seed(0)
    B, T, S = 2, 24, 32
    valid = left_padding([32, 17], S) if kind == "padding" else None
    documents = torch.rand(B, S).lt(0.2).cumsum(1) if kind == "documents" else None
    positions = torch.stack([torch.randperm(S)[:T].sort().values for _ in range(B)]) if kind == "packed" else None
    mask = AttentionMask(T, S, valid, documents, positions, causal=causal)
    for window, n_local in ((None, 0), (5, 0), (5, 2)):
        # The predicate itself, pair by pair; `BlockMask.to_dense` shows whole blocks only.
        n_heads = 3
        predicate = mask.block_mask(window, n_local, n_heads).mask_mod
        at = torch.cartesian_prod(*map(torch.arange, (B, n_heads, T, S)))
        found = torch.stack([predicate(*index) for index in at]).view(B, n_heads, T, S)
        n_near = 0 if window is None else n_local or n_heads
        assert torch.equal(found, seen(mask, B, n_heads, n_near, window or 0)), (window, n_local)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("n_local, window", [(0, None), (0, 5), (2, 5)])
def test_flex_attention_with_a_block_mask_equals_attend(n_local, window):
    from torch.nn.attention.flex_attention import flex_attention

    mask = AttentionMask(24, 32, left_padding([32, 17], 32))
    q, kv = torch.randn(2, 24, 4, 8), torch.randn(2, 32, 4, 16)
    block_mask = mask.block_mask(window, n_local, n_heads=4)
    out = flex_attention(*(x.transpose(1, 2) for x in (q, *kv.chunk(2, -1))), block_mask=block_mask, scale=0.5)
    n_near = 0 if window is None else n_local or 4
    assert_near(out.transpose(1, 2), attend(q, kv, mask, 0.5, n_near, window or 0))


# -- code paths


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_local", [0, 3, 6, 8])
@pytest.mark.parametrize("T, S, window", [
    (1, 40, 6), (5, 40, 6),  # one call with a bias
    (5, 300, 6),  # two calls, few queries
    (70, 70, 6), (64, 64, 33), (65, 90, 50),  # in chunks of queries
], ids=str)  # fmt: skip
def test_local_and_global_heads_can_share_a_kv_group(T, S, window, n_local, padded):
    """Eight heads in two groups: of six local heads, two read the same keys as the two global ones."""
    torch.manual_seed(0)
    B = 2
    valid = left_padding([S, S // 3], S) if padded else None
    check(torch.randn(B, T, 8, 6), torch.randn(B, S, 2, 6 + 4), AttentionMask(T, S, valid), n_local, window)


@pytest.mark.parametrize("T, S", [(1, 40), (70, 80)])
def test_rows_can_be_both_keys_and_values(T, S):
    """As with latents: one row for all heads."""
    check(torch.randn(2, T, 4, 7), torch.randn(2, S, 1, 7), AttentionMask(T, S), 3, 5, is_both=True)


@pytest.mark.parametrize("heads", [1, 6], ids=["one bias", "a bias for each head"])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("G", [1, 2])
def test_ungrouped_heads_for_gpu_kernels_equal_grouped_heads(T, G, heads):
    """With a bias, GPU kernels support no groups: outputs and gradients have to be the same without them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 4, requires_grad=True) for n, h in ((T, 6), (7, G), (7, G)))
    bias, found = torch.randn(2, heads, T, 7), []
    plain = [x.transpose(1, 2) for x in (q, k, v)]
    for out in (
        attention_module._ungrouped(q, k, v, bias, 0.5),
        F.scaled_dot_product_attention(*plain, attn_mask=bias, scale=0.5, enable_gqa=True).transpose(1, 2),
    ):
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs)


def test_documents_with_queries_in_chunks():
    documents = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)).lt(0.1).cumsum(1)
    check(torch.randn(2, 70, 4, 6), torch.randn(2, 70, 2, 9), AttentionMask(70, 70, documents=documents), 3, 6)


def test_attention_without_causality():
    check(torch.randn(2, 70, 4, 6), torch.randn(2, 70, 2, 9), AttentionMask(70, 70, causal=False), 3, 6)


def test_a_window_does_not_compute_the_scores_of_all_pairs(monkeypatch):
    sizes = []
    plain = attention_module.sdpa
    monkeypatch.setattr(
        attention_module, "sdpa", lambda q, kv, *a: sizes.append(q.shape[1] * kv.shape[1]) or plain(q, kv, *a)
    )
    attend(torch.randn(1, 1024, 2, 4), torch.randn(1, 1024, 2, 8), AttentionMask(1024, 1024), 1.0, 2, 6)
    assert max(sizes) < 64 * 64  # the scores of one chunk


def test_bfloat16_gradients_are_close_to_those_of_float32():
    q, kv = torch.randn(2, 9, 4, 6), torch.randn(2, 9, 2, 12)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in (q, kv)]
        out = attend(*inputs, AttentionMask(9, 9), 0.4, 3, 4)
        assert out.dtype == dtype
        grads[dtype] = torch.autograd.grad(out.float().square().sum(), inputs)
    for half, whole in zip(grads[torch.bfloat16], grads[torch.float32], strict=True):
        assert_near(half.float(), whole, 0.05)


def test_huge_scores_have_finite_gradients():
    """As in a model whose training has diverged."""
    q, kv = torch.randn(1, 90, 2, 16).mul(1e4), torch.randn(1, 90, 2, 32).mul(1e4)
    out = attend(q.requires_grad_(), kv.requires_grad_(), AttentionMask(90, 90), 0.25, 1, 5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, kv)))


def test_the_reference_maps_query_heads_to_their_kv_heads():
    """Four query heads on two kv heads: 0 and 1 read the first, 2 and 3 the second."""
    v = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1).expand(1, 3, 2, 1)
    out = reference.attention(torch.randn(1, 3, 4, 5), torch.randn(1, 3, 2, 5), v, torch.ones(3, 3).tril().bool(), 1.0)
    assert_near(out[0, :, :, 0], torch.tensor([1.0, 1.0, 2.0, 2.0]).expand(3, 4))


@pytest.mark.parametrize("valid", [None, left_padding([4, 2, 0], 4)], ids=["no padding", "padding"])
def test_plain_masks_are_left_to_the_kernel_without_a_bias(valid):
    like = torch.empty(3, 1, 1, 1)
    for T in (1, 4):
        assert (AttentionMask(T, 4, valid).sdpa(like)[0] is None) == (valid is None)
    assert AttentionMask(2, 4, valid).sdpa(like)[0] is not None


def test_a_row_of_padding_only_has_finite_outputs():
    valid = torch.zeros(2, 5, dtype=torch.bool)
    q, kv = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 8)
    mask = AttentionMask(5, 5, valid)
    for n_local in (0, 1, 2):
        assert_near(attend(q, kv, mask, 1.0, n_local, 3), kv[..., 4:])  # each query sees only itself


# -- masks given by the caller


@given(st.integers(1, 2), st.integers(1, 6), st.sampled_from([2, 3, 4]), st.booleans())
def test_a_given_mask_replaces_the_causal_mask(B, S, n_axes, is_bool):
    q, kv = torch.randn(B, S, 4, 3), torch.randn(B, S, 2, 6)
    allowed = torch.rand((B, 4, S, S)[-n_axes:] if n_axes != 3 else (4, S, S)).lt(0.5) | torch.eye(S).bool()
    given = allowed if is_bool else torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    mask = as_mask(given, S, S)
    near = (torch.arange(S) - torch.arange(S).unsqueeze(1)).abs() < 2
    for n_local in (0, 3, 4):
        local = torch.arange(4).lt(n_local).view(1, 4, 1, 1)
        expected = reference.attention(q, kv[..., :3], kv[..., 3:], allowed & (near | ~local), 0.5)
        assert_near(attend(q, kv, mask, 0.5, n_local, 2), expected)


def test_a_float_mask_is_added_to_the_scores():
    q, kv, bias = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 8), torch.randn(2, 1, 5, 5)
    scores = torch.einsum("bthd,bshd->bhts", q, kv[..., :4]) * 0.5 + bias
    expected = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), kv[..., 4:])
    assert_near(attend(q, kv, as_mask(bias, 5, 5), 0.5), expected)


@pytest.mark.parametrize("mask, what", [(torch.ones(4, 5), r"\(4, 5\)"), (torch.ones(5), r"\(5,\)"), ("causal", "str")])
def test_a_given_mask_that_does_not_fit_is_refused(mask, what):
    with pytest.raises(ValueError, match=rf"mask is {what}; pass a bool or additive mask whose shape ends in \(5, 5\)"):
        as_mask(mask, 5, 5)


def test_a_given_mask_can_be_cut_to_rows_and_packed_queries():
    given = torch.randn(3, 1, 6, 6)
    whole, q = as_mask(given, 6, 6), torch.empty(3, 2, 4, 1)
    assert torch.equal(whole.rows(slice(1, 3)).sdpa(q)[0], given[1:])
    assert torch.equal(as_mask(given[:1], 6, 6).rows(slice(2)).sdpa(q)[0], given[:1])
    positions = torch.tensor([[0, 4], [1, 2], [3, 5]])
    packed = replace(whole, n_queries=2, positions=positions, first=0)
    expected = torch.stack([rows[:, at] for rows, at in zip(given, positions, strict=True)])
    assert torch.equal(packed.sdpa(q)[0], expected)
    assert packed.by_head(q, 2, 3).shape == (3, 4, 2, 6)


@given(st.integers(1, 3), st.integers(2, 9), st.data())
def test_a_mask_can_be_cut_to_rows_or_to_the_last_queries(B, S, data):
    mask = data.draw(masks(B, S))
    expected, q = seen(mask, B), torch.empty(B, mask.n_queries, 1, 1)

    def dense(part: AttentionMask, like: Tensor) -> Tensor:
        bias, is_causal = part.sdpa(like)
        if bias is None:
            whole = torch.ones(part.n_queries, S, dtype=torch.bool)
            return whole.tril() if is_causal else whole
        return bias == 0

    rows = torch.tensor([B - 1, 0])
    assert torch.equal(dense(mask.rows(rows), q[rows]).expand_as(expected[rows]), expected[rows])
    assume(mask.positions is None)
    n = data.draw(st.integers(1, mask.n_queries))
    last = mask.ending(n)
    assert last.n_queries == n and last.first == mask.first
    assert torch.equal(dense(last, q[:, -n:]).expand_as(expected[:, :, -n:]), expected[:, :, -n:])
