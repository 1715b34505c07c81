"""A cache in which several loops share a slot: later tokens read the rows of the deepest of them."""

from dataclasses import replace

import pytest
import torch
from helpers import ATTENTION, assert_near, chunkings, in_chunks, left_padding, loops_used, tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import KVCache, OpenMythos
from open_mythos.cache import Slot
from open_mythos.dict_cache import as_cache
from open_mythos.nn.exits import Exit, PredictionKL

T = 12
MODELS = {attn_type: tiny_model(attn_type) for attn_type in ATTENTION}
HALTLESS = {attn_type: tiny_model(attn_type, halting=False) for attn_type in ATTENTION}


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cache_loops", [5, 8])
@pytest.mark.parametrize("gate_bias", [-20.0, -1.0], ids=["none halts", "some halt"])
def test_as_many_slots_as_loops_equal_a_full_cache(attn_type, cache_loops, gate_bias):
    model, ids, mask = tiny_model(attn_type, gate_bias=gate_bias), tokens(2, T), left_padding([T, 7], T)
    for sizes in ([1] * T, [6, 1, 5]):
        whole, shared = (in_chunks(model, ids, sizes, 5, cache, mask) for cache in (KVCache(), KVCache(cache_loops)))
        assert torch.equal(shared, whole)


@torch.no_grad()
def in_chunks_by_hand(
    model: OpenMythos, ids: Tensor, sizes: list[int], n_loops: int, cache_loops: int, mask: Tensor
) -> Tensor:
    """As :func:`in_chunks` with ``cache_loops``, written out: each loop reads the rows of the slot that it shares."""
    out, start, outside, held = [], 0, KVCache(), {}
    for size in sizes:
        span = slice(start, start + size)
        e, ctx = model.encode(ids[:, span], outside, attention_mask=mask[:, span], n_loops=0)
        h = model.first_state(e, ctx)
        for loop in range(n_loops):
            slot = f"recurrent_loop_{loop}"
            mine = {slot: dict(held[loop % cache_loops])} if start else {}
            h = model.recurrent.step(h, e, loop, replace(ctx, cache=as_cache(mine)))
            if loop + cache_loops >= n_loops:  # otherwise the next loop of this slot overwrites the new rows
                held[loop % cache_loops] = mine[slot]
        out.append(model.head(model.decode(h, ctx)))
        start += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cache_loops", [1, 2, 3])
@given(sizes=chunkings(T), padding=st.integers(0, 5))
def test_loops_read_the_deepest_rows_of_earlier_tokens_in_a_shared_slot(attn_type, cache_loops, sizes, padding):
    model, ids, mask = HALTLESS[attn_type], tokens(2, T), left_padding([T, T - padding], T)
    cache = KVCache(cache_loops)
    actual = in_chunks(model, ids, sizes, 5, cache, mask)
    expected = in_chunks_by_hand(model, ids, sizes, 5, cache_loops, mask)
    assert_near(actual[mask], expected[mask])
    assert sum(name.startswith("recurrent") for name in cache.lengths()) == cache_loops


@pytest.mark.parametrize("cache_loops", [1, 2, 3])
def test_a_position_that_halts_early_fills_every_slot_with_its_last_rows(cache_loops):
    model, ids, whole, shared = MODELS["gqa"], tokens(2, T), KVCache(), KVCache(cache_loops)
    assert len(loops_used(model, ids, 7).unique()) > 1
    with torch.no_grad():
        assert torch.equal(model(ids, 7, shared), model(ids, 7, whole))  # all in one call
    for slot in range(cache_loops):
        deepest = max(loop for loop in range(7) if loop % cache_loops == slot)
        held = shared.slot(Slot("core", 0, slot)).rows
        assert torch.equal(held, whole.slot(Slot("core", 0, deepest)).rows)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_one_slot_is_exact_if_every_position_halts_after_one_loop(attn_type):
    model, ids = tiny_model(attn_type, gate_bias=20.0), tokens(2, T)
    with torch.no_grad():
        whole = model(ids, 5)
    assert_near(in_chunks(model, ids, [3, 1, 1, 7], 5, KVCache(1)), whole)


def test_cache_memory_grows_with_slots_and_not_with_loops():
    model, sizes = HALTLESS["gqa"], {}
    for cache_loops in (None, 1, 2, 4):
        cache = KVCache(cache_loops)
        with torch.no_grad():
            model(tokens(2, 10), 8, cache)
        sizes[cache_loops] = cache.nbytes
    of_a_slot = sizes[None] // (8 + 2)  # one slot for each loop, one for the prelude, one for the coda
    assert {k: size // of_a_slot for k, size in sizes.items()} == {None: 10, 1: 3, 2: 4, 4: 6}


@pytest.mark.parametrize("attn_type", ATTENTION)
@given(keep=st.integers(1, 8))
def test_truncate_with_shared_slots(attn_type, keep):
    model, ids, cache, fresh = HALTLESS[attn_type], tokens(2, 10), KVCache(2), KVCache(2)
    with torch.no_grad():
        model(ids[:, :keep], 5, fresh)
        model(torch.cat([ids[:, :keep], tokens(2, 8, seed=1)], 1), 5, cache)
        cache.truncate(keep)
        assert_near(model(ids[:, keep:], 5, cache), model(ids[:, keep:], 5, fresh))


@pytest.mark.parametrize("exit", [None, PredictionKL(1e-9)], ids=str)
def test_calls_may_differ_in_loops_once_every_shared_slot_is_filled(exit):
    model, ids = HALTLESS["gqa"], tokens(2, 12)
    with torch.no_grad():
        cache = KVCache(2)
        for i, n_loops in enumerate((7, 2, 5, 3) if exit is None else (7, 7)):
            assert model(ids[:, i : i + 1], n_loops, cache, exit=exit).shape == (2, 1, 23)
        cache = KVCache(3)
        model(ids[:, :4], 2, cache, exit=exit)
        with pytest.raises(ValueError, match=r"n_loops=3.*at most 2" if exit is None else "loop 3 of n_loops=3"):
            model(ids[:, 4:], 3, cache, exit=exit)
        assert model(ids[:, 4:], 2, cache, exit=exit).shape == (2, 8, 23)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_invalid_cache_loops_are_refused(bad):
    with pytest.raises(ValueError, match="cache_loops="):
        KVCache(bad)
    with pytest.raises(ValueError, match="cache_loops="):
        MODELS["gqa"].generate(tokens(1, 3), 2, cache_loops=bad)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_generation_with_shared_slots_matches_stepwise_decoding(attn_type):
    model, ids, cache = HALTLESS[attn_type], tokens(2, 5), KVCache(2)
    expected, new = [ids], ids
    with torch.no_grad():
        for _ in range(12):
            new = model(new, 6, cache)[:, -1:].argmax(-1)
            expected.append(new)
    assert torch.equal(model.generate(ids, 12, n_loops=6, temperature=0, cache_loops=2), torch.cat(expected, 1))
    assert len(list(model.stream(ids, 3, cache_loops=1))) == 3


@pytest.mark.parametrize("loops", [(2, 1, 3), (3, 1, 4), (3, 2, 4)])
def test_more_loops_than_the_shared_slots_hold_are_refused(loops):
    n_slots, first, then = loops
    model, ids, cache = tiny_model(), tokens(1, 8), KVCache(cache_loops=n_slots)
    model(ids[:, :5], first, cache)
    with pytest.raises(ValueError, match=f"n_loops={then}, but loop {first + 1} of the cache holds 0"):
        model(ids[:, 5:], then, cache)


class PromptsStopAtOnce(Exit):
    """Prompts stop after one loop, single tokens run all loops."""

    def init(self, h):
        return ()

    def check(self, carried, state):
        return torch.full(state.h.shape[:2], state.h.shape[1] > 1), ()


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("n_first", [0, 6])
@torch.no_grad()
def test_a_shared_slot_that_skipped_a_prompt_can_be_truncated_as_far_as_any(attn_type, n_first):
    model, ids, rule = tiny_model(attn_type, max_seq_len=128, conv_taps=4), tokens(1, 101), PromptsStopAtOnce()
    found = {}
    for cache_loops in (2, None):
        for cut in (60, 62, 64):
            cache = KVCache(cache_loops)
            for i in range(n_first):
                model(ids[:, i : i + 1], 4, cache, exit=rule)
            model(ids[:, n_first:100], 4, cache, exit=rule)
            cache.truncate(100 - cut)
            found[cache_loops, cut] = model(ids[:, 100 - cut : 101 - cut], 4, cache, exit=rule)
            assert found[cache_loops, cut].isfinite().all()
    if not n_first:  # then every slot has the same rows
        for cut in (60, 62, 64):
            assert_near(found[2, cut], found[None, cut])
