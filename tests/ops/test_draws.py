"""The random numbers of a row depend on its key and on the purpose of the draw, not on other rows."""

import torch

from open_mythos.ops.draws import normal, row_keys, uniform


def test_a_row_draws_the_same_at_any_place_in_a_batch():
    keys, like = row_keys(0, 3, 6), torch.empty(6, 4, 5)
    whole = uniform(keys, 7, like)
    assert torch.equal(whole[2:4], uniform(keys[2:4], 7, like[2:4]))
    assert uniform(keys[:0], 7, like[:0]).shape == (0, 4, 5)
    other = [uniform(keys, 8, like), uniform(row_keys(0, 4, 6), 7, like), uniform(row_keys(1, 3, 6), 7, like)]
    assert all((whole != x).float().mean() > 0.99 for x in other)
    assert len(torch.cat([whole, *other]).unique()) > 0.99 * 4 * whole.numel()


def test_draws_are_uniform_and_normal():
    like = torch.empty(64, 4096)
    flat = uniform(row_keys(5, 0, 64), 0, like)
    assert flat.min() > 0 and flat.max() < 1
    counts = torch.histc(flat, 16) / flat.numel()
    assert (counts * 16 - 1).abs().max() < 0.03
    rows = (flat - 0.5) * 12**0.5
    assert (rows @ rows.t() / 4096 - torch.eye(64)).abs().max() < 0.08  # rows are uncorrelated
    x = normal(row_keys(5, 0, 64), 0, like)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1


def test_no_draw_is_0_or_1(monkeypatch):
    """Of the 24 bits of a number, all ones are rounded up, and all zeros are half a step from 0."""
    like = torch.empty(1, 2)
    bits = torch.tensor([[(1 << 63) - 1 - (1 << 63), 0]])
    monkeypatch.setattr("open_mythos.ops.draws._mixed", lambda x: bits.expand(*x.shape) if x.ndim == 2 else x)
    found = uniform(row_keys(0, 0, 1), 0, like)
    assert found.min() > 0 and found.max() < 1 and normal(row_keys(0, 0, 1), 0, like).isfinite().all()


def test_draws_do_not_depend_on_the_default_dtype():
    keys, like = row_keys(0, 1, 2), torch.empty(2, 4096)
    expected = uniform(keys, 1, like)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(uniform(keys, 1, like), expected)
    finally:
        torch.set_default_dtype(torch.float32)
