"""Grouped-query attention by itself, and the split into local and global heads."""

import pytest
import torch
from helpers import assert_near, tiny_config
from torch import Tensor

from open_mythos.nn.attention import GQAttention, ShortConv
from open_mythos.ops.attention import AttentionMask
from open_mythos.ops.rope import rope_table


def far_influence(attn: GQAttention, T: int = 10) -> Tensor:
    """(H,) how much a change of the first token's value moves each head's output at the last."""
    q = torch.randn(1, T, attn.n_heads, attn.head_dim)
    rows = torch.randn(1, T, attn.n_kv_heads, 2 * attn.head_dim)
    changed = rows.clone()
    changed[:, 0, :, attn.head_dim :] += 10
    before, after = (attn.read([q], x, AttentionMask(T, T)) for x in (rows, changed))
    return (before - after)[0, -1].abs().amax(-1)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (2, 1), (4, 2), (6, 3), (6, 2), (5, 5), (3, 1)])
def test_the_first_heads_are_local_and_at_least_one_is_global(n_heads, n_kv_heads):
    torch.manual_seed(0)
    cfg = tiny_config(n_heads=n_heads, n_kv_heads=n_kv_heads, dim=8 * n_heads, local_window=4)
    n_local = cfg.n_local_heads
    assert n_local < n_heads and (n_local > 0 or n_heads == 1)
    moved = far_influence(GQAttention(cfg, local_window=4))
    assert moved[:n_local].eq(0).all() and moved[n_local:].gt(0).all()
    assert far_influence(GQAttention(cfg)).gt(0).all()
    assert far_influence(GQAttention(cfg, local_window=10)).gt(0).all()


def test_outputs_depend_on_relative_positions_only():
    torch.manual_seed(0)
    attn, x = GQAttention(tiny_config(), local_window=3), torch.randn(2, 6, 32)
    out = [attn(x, rope_table(torch.arange(start, start + 6), 8)) for start in (0, 500)]
    assert_near(out[1], out[0], 1e-4)


def test_short_conv_shares_taps_between_channels_and_starts_near_identity():
    torch.manual_seed(0)
    conv = ShortConv(6, 3, share=2)
    assert_near(conv(), conv.taps.repeat_interleave(2, 1) / conv.std, 0.0)
    mean = torch.stack([ShortConv(200, 3).taps / conv.std for _ in range(4)]).mean((0, 2))
    assert_near(mean, torch.tensor([1.0, 0.3, 0.0]), 0.05)
