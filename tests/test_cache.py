"""The key/value cache: logits equal those of one pass without a cache, however the tokens are split into calls."""

from copy import deepcopy

import pytest
import torch
from helpers import (
    ATTENTION,
    assert_near,
    chunkings,
    in_chunks,
    left_padding,
    loops_used,
    tiny_config,
    tiny_model,
    tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import KVCache, OpenMythos
from open_mythos.cache import ROLLBACK, CacheSlot, Slot
from open_mythos.dict_cache import PADDING_SLOT, as_cache
from open_mythos.nn.attention import Attention
from open_mythos.nn.exits import PredictionKL, StateChange

T = 12
MODELS = {attn_type: tiny_model(attn_type) for attn_type in ATTENTION}


@pytest.mark.parametrize("attn_type", ATTENTION)
@given(
    sizes=chunkings(T),
    n_loops=st.integers(1, 7),
    as_dict=st.booleans(),
    # The first row has no padding: chunks of padding only have their own test.
    lengths=st.none() | st.tuples(st.just(T), st.integers(1, T), st.integers(1, T)),
)
def test_cached_logits_equal_uncached_logits(attn_type, sizes, n_loops, as_dict, lengths):
    model, ids = MODELS[attn_type], tokens(3, T)
    mask = None if lengths is None else left_padding(lengths, T)
    with torch.no_grad():
        whole = model(ids, n_loops, attention_mask=mask)
    cached = in_chunks(model, ids, sizes, n_loops, {} if as_dict else KVCache(), mask)
    real = torch.ones(3, T, dtype=torch.bool) if mask is None else mask
    assert_near(cached[real], whole[real])


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("gate_bias", [-20.0, -1.0], ids=["none halts", "some halt"])
@pytest.mark.parametrize("local_share", [0.0, 0.5, 1.0])
def test_cached_rows_are_convolved_only_once(attn_type, gate_bias, local_share, monkeypatch):
    model = tiny_model(attn_type, gate_bias=gate_bias, local_share=local_share, max_seq_len=64)
    ids, mask = tokens(3, 60), left_padding([60, 41, 24], 60)
    with torch.no_grad():
        whole = model(ids, 4, attention_mask=mask)
    convolved: list[int] = []
    plain = Attention._convolve
    monkeypatch.setattr(
        Attention, "_convolve", lambda self, raw, *args: convolved.append(raw.shape[1]) or plain(self, raw, *args)
    )
    cached = in_chunks(model, ids, [52, 1, 3, 1, 1, 2], 4, KVCache(), mask)
    assert_near(cached[mask], whole[mask])
    assert set(convolved) == {52, 1, 3, 2}, "only rows of new tokens are convolved"


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("gate_bias", [-20.0, -1.0, 20.0], ids=["none halts", "some halt", "all halt"])
@pytest.mark.parametrize("sizes", [[1] * T, [T - 1, 1], [5, 1, 1, 4, 1]], ids=str)
def test_cached_logits_equal_uncached_logits_with_halting(attn_type, gate_bias, sizes):
    model, ids = tiny_model(attn_type, gate_bias=gate_bias), tokens(2, T)
    used = loops_used(model, ids, 5)
    expected = {-20.0: used.eq(5).all(), 20.0: used.eq(1).all(), -1.0: len(used.unique()) > 1}
    assert expected[gate_bias], f"the gate should halt differently: {used}"
    with torch.no_grad():
        whole = model(ids, 5)
    for cache in (KVCache(), {}):
        assert_near(in_chunks(model, ids, sizes, 5, cache), whole)


@pytest.mark.parametrize("changes", [
    dict(conv_taps=0), dict(conv_taps=1), dict(local_window=0), dict(local_window=1),
    dict(prelude_layers=0, coda_layers=0),
    dict(prelude_layers=2, coda_layers=0, halting=False), dict(state_norm=False, loop_index_dim=8, lora_rank=0),
    dict(n_heads=1, n_kv_heads=1, dim=16), dict(n_heads=6, n_kv_heads=3, dim=36),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_cached_logits_equal_uncached_logits_for_every_config(attn_type, changes):
    model, ids = tiny_model(attn_type, **changes), tokens(2, 9)
    mask = left_padding([9, 5], 9)
    with torch.no_grad():
        whole = model(ids, 4, attention_mask=mask)
    cached = in_chunks(model, ids, [4, 1, 1, 3], 4, KVCache(), mask)
    assert_near(cached[mask], whole[mask])


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_chunks_of_padding_only(attn_type, cache_type):
    model, ids, mask = MODELS[attn_type], tokens(2, 6), left_padding([3, 2], 6)
    with torch.no_grad():
        whole = model(ids, 3, attention_mask=mask)
    cached = in_chunks(model, ids, [1] * 6, 3, cache_type(), mask)
    assert_near(cached[mask], whole[mask])


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_new_tokens_accept_no_mask_a_partial_mask_or_the_whole_mask(attn_type):
    model, ids, mask = MODELS[attn_type], tokens(2, 8), left_padding([8, 5], 8)
    with torch.no_grad():
        whole = model(ids, 4, attention_mask=mask)[:, 5:]
        for later in (None, mask[:, 5:], mask):
            for cache in (KVCache(), {}):
                model(ids[:, :5], 4, cache, attention_mask=mask[:, :5])
                assert_near(model(ids[:, 5:], 4, cache, attention_mask=later), whole)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_more_loops_than_the_prefill_are_refused_but_fewer_are_allowed(attn_type, cache_type):
    model, ids = MODELS[attn_type], tokens(2, 8)
    cache, twin = cache_type(), cache_type()
    with torch.no_grad():
        for each in (cache, twin):
            model(ids[:, :5], 3, each)
        held = _copy(cache)
        with pytest.raises(ValueError, match=r"n_loops=4.*at most 3"):
            model(ids[:, 5:], 4, cache)
        assert _same(held, _copy(cache))
        assert_near(model(ids[:, 5:6], 3, cache), model(ids[:, 5:6], 3, twin), 0.0)
        assert model(ids[:, 6:7], 2, cache).shape == (2, 1, 23)
        with pytest.raises(ValueError, match="n_loops=3"):
            model(ids[:, 7:], 3, cache)
        assert model(ids[:, 7:], 1, cache).shape == (2, 1, 23)


@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_a_refused_call_leaves_the_cache_unchanged(cache_type):
    model, ids = MODELS["gqa"], tokens(2, 5)
    cache = cache_type()
    with torch.no_grad():
        model(ids, 3, cache)
        held = _copy(cache)
        refused = [
            dict(input_ids=ids.float()),
            dict(input_ids=ids + 100),
            dict(input_ids=ids, n_loops=0),
            dict(input_ids=ids, start_pos=3),
            dict(input_ids=tokens(2, 28)),
            dict(input_ids=ids, attention_mask=torch.ones(2, 3)),
        ]
        for inputs in refused:
            with pytest.raises(ValueError):
                model(**{"n_loops": 3, "kv_cache": cache, **inputs})
            assert _same(held, _copy(cache)), inputs.keys()


@pytest.mark.parametrize("cache_type", [KVCache, dict])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_a_batch_size_that_differs_from_the_cache_is_refused(cache_type, n_rows):
    model, cache = MODELS["gqa"], cache_type()
    with torch.no_grad():
        model(tokens(3, 5), 2, cache)
        model(tokens(3, 1), 2, cache)
        held = _copy(cache)
        with pytest.raises(ValueError, match="3"):
            model(tokens(n_rows, 1), 2, cache)
        assert _same(held, _copy(cache))


@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_start_pos_is_inferred_and_checked(cache_type):
    model, ids = MODELS["gqa"], tokens(1, 6)
    cache = cache_type()
    with torch.no_grad():
        whole = model(ids, 2)
        model(ids[:, :4], 2, cache, start_pos=0)
        assert_near(model(ids[:, 4:5], 2, cache, start_pos=4), whole[:, 4:5])
        with pytest.raises(ValueError, match=r"start_pos=4.*5 tokens"):
            model(ids[:, 5:], 2, cache, start_pos=4)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_dict_cache_holds_tensors_of_used_length_for_each_slot(attn_type):
    model = MODELS[attn_type]
    cache: dict = {}
    with torch.no_grad():
        for n_new in (5, 1, 1):
            model(tokens(2, n_new), 3, cache)
    assert sorted(cache) == sorted(["prelude_0", "coda_0", *(f"recurrent_loop_{loop}" for loop in range(3))])
    row = {"gqa": (2, 2 * 8), "mla": (1, 12 + 6)}[attn_type]
    for held in cache.values():
        assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
            "rows": (2, 7, *row),
            "raw": (2, 2, *row),
        }
        assert held["rows"].untyped_storage().nbytes() == held["rows"].nbytes


def test_mla_caches_only_the_latent_and_one_rope_key():
    dims = dict(dim=128, n_heads=4, n_kv_heads=2, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16,
                qk_nope_head_dim=16, v_head_dim=16, max_seq_len=64)  # fmt: skip
    footprint = {}
    for attn_type in ATTENTION:
        model = OpenMythos(tiny_config(attn_type, **dims)).eval()
        data: dict = {}
        cache = KVCache()
        with torch.no_grad():
            model(tokens(1, 64), 4, data)
            model(tokens(1, 64), 4, cache)
        footprint[attn_type] = sum(held["rows"].nbytes for held in data.values())
        assert cache.nbytes == footprint[attn_type]
        if attn_type == "mla":
            assert {held["rows"].shape for held in data.values()} == {(1, 64, 1, 32 + 16)}
    assert footprint["mla"] == 6 * 64 * (32 + 16) * 4
    assert footprint["gqa"] / footprint["mla"] == pytest.approx(8 / 3)


def test_kv_cache_reports_length_and_nbytes():
    model, cache = MODELS["gqa"], KVCache()
    assert cache.length == 0 and cache.nbytes == 0
    with torch.no_grad():
        for n_new, total in ((3, 3), (1, 4), (1, 5), (2, 7)):
            model(tokens(2, n_new), 2, cache)
            assert cache.length == total
            assert cache.nbytes == 4 * 2 * total * 2 * 16 * 4  # slots, rows, tokens, k and v, channels, bytes
    cache.reset()
    assert cache.length == 0 and cache.nbytes == 0


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_loops_that_no_position_runs_take_no_cache_memory(attn_type):
    """Their slots are filled once a position runs that deep; before and after, truncation applies to them too."""
    model, ids, rule, cache = tiny_model(attn_type, halting=False), tokens(1, 12), StateChange(0.06), KVCache()
    used, shared = loops_used(model, ids, 7, exit=rule)[0], KVCache()
    assert used[:2].max() < used.max(), f"the first tokens should halt earlier: {used}"
    model(ids[:, :1], 1, shared, exit=rule)
    bytes_of_a_row = shared.nbytes / 3  # prelude, one loop, coda
    whole = model(ids, 7, exit=rule)
    for part, held in (slice(2), 2), (slice(2, 5), 5), (slice(5, 12), 12):
        assert_near(model(ids[:, part], 7, cache, exit=rule), whole[:, part])
        assert cache.nbytes <= bytes_of_a_row * held * (2 + int(used[:held].max()))
    cache.truncate(6)
    assert cache.length == 6
    assert_near(model(ids[:, 6:], 7, cache, exit=rule), whole[:, 6:])


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("padded", [False, True])
@given(keep=st.integers(0, 8))
def test_truncate_removes_the_last_tokens(attn_type, padded, keep):
    model, ids, cache = MODELS[attn_type], tokens(2, 10), KVCache()
    mask = left_padding([10, 8], 10) if padded else None
    with torch.no_grad():
        whole = model(ids, 3, attention_mask=mask)
        model(torch.cat([ids[:, :keep], tokens(2, 8 - keep, seed=1)], 1), 3, cache, attention_mask=_head(mask, 8))
        cache.truncate(keep)
        assert cache.length == keep
        again = model(ids[:, keep:], 3, cache, attention_mask=None if mask is None else mask[:, keep:])
    real = slice(None) if mask is None else mask[:, keep:]
    assert_near(again[real], whole[:, keep:][real])


def test_truncate_refuses_lengths_out_of_range():
    cache = KVCache()
    with torch.no_grad():
        MODELS["gqa"](tokens(1, 4), 1, cache)
    for length in (-1, 5):
        with pytest.raises(ValueError, match=f"4 tokens to {length}"):
            cache.truncate(length)


def test_an_emptied_cache_accepts_any_batch_size():
    model, cache = MODELS["gqa"], KVCache()
    with torch.no_grad():
        for empty in (cache.reset, lambda: cache.truncate(0)):
            model(tokens(3, 4), 2, cache)
            empty()
            assert_near(model(tokens(2, 4), 2, cache), model(tokens(2, 4), 2))
            cache.reset()


@pytest.mark.parametrize("cache_type", [KVCache, dict])
@pytest.mark.parametrize("lengths, claimed", [([6, 4], [7, 7]), ([6, 6], [7, 5])], ids=["less padding", "more padding"])
def test_a_whole_mask_that_contradicts_the_cached_mask_is_refused(cache_type, lengths, claimed):
    model, ids, cache = MODELS["gqa"], tokens(2, 6), cache_type()
    with torch.no_grad():
        model(ids, 2, cache, attention_mask=left_padding(lengths, 6))
        held = _copy(cache)
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids[:, :1], 2, cache, attention_mask=left_padding(claimed, 7))
        assert _same(held, _copy(cache))


def test_a_dict_cache_stores_the_padding_mask_in_its_own_slot():
    model = MODELS["gqa"]
    cache: dict = {}
    with torch.no_grad():
        model(tokens(2, 4), 1, cache, attention_mask=left_padding([4, 2], 4))
        model(tokens(2, 1), 1, cache)
    assert torch.equal(cache[PADDING_SLOT]["valid"], left_padding([5, 3], 5))


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_gradients_flow_through_a_cached_call(attn_type, cache_type):
    model, ids = tiny_model(attn_type), tokens(2, 6)
    whole = torch.autograd.grad(model(ids, 3).square().sum(), model.embed.weight)[0]
    cached = torch.autograd.grad(model(ids, 3, cache_type()).square().sum(), model.embed.weight)[0]
    assert_near(cached, whole)
    cache = cache_type()
    loss = model(ids[:, :4], 3, cache).square().sum() + model(ids[:, 4:], 3, cache).square().sum()
    assert torch.autograd.grad(loss, model.embed.weight)[0].isfinite().all()


def test_only_a_kv_cache_or_a_dict_is_accepted_as_cache():
    assert as_cache(None) is None
    with pytest.raises(ValueError, match="list"):
        MODELS["gqa"](tokens(1, 2), 1, [])


# -- slots


def _head(mask: Tensor | None, n: int) -> Tensor | None:
    return None if mask is None else mask[:, :n]


def _copy(cache: KVCache | dict) -> dict[str, Tensor]:
    if isinstance(cache, dict):
        return {f"{slot}.{name}": rows.clone() for slot, named in cache.items() for name, rows in named.items()}
    copied = {str(name): slot.rows.clone() for name, slot in cache._slots.items()}
    if isinstance(cache, KVCache) and cache.valid is not None:
        copied["valid"] = cache.valid.clone()
    return copied


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_preallocated_room_is_used_without_reallocation():
    cache, model, ids = KVCache(room=20), tiny_model(), tokens(1, 20)
    with torch.no_grad():
        model(ids[:, :5], 2, kv_cache=cache)
        before = cache.slot(Slot("prelude", 0)).rows.data_ptr()
        model(ids[:, 5:], 2, kv_cache=cache)
    assert cache.slot(Slot("prelude", 0)).rows.data_ptr() == before


@pytest.mark.parametrize("exit", [None, StateChange(0.3), PredictionKL(0.05)], ids=str)
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_every_core_block_has_its_own_cache_slots(attn_type, exit):
    """Positions stop at different loops, by the gate or another exit, and later tokens read what they have cached."""
    model, ids = tiny_model(attn_type, core_layers=3), tokens(2, T)
    cache, halted = KVCache(), loops_used(model, ids, 5, exit=exit).unique()
    assert len(halted) > 1, halted
    with torch.no_grad():
        whole = model(ids, 5, exit=exit)
        parts = [model(ids[:, span], 5, cache, exit=exit) for span in (slice(0, 5), slice(5, 6), slice(6, T))]
    assert_near(torch.cat(parts, 1), whole)
    lengths = cache.lengths()
    looped = {name for name in lengths if name.startswith("recurrent_loop_")}
    assert len(looped) == 5 * 3 and {lengths[name] for name in looped} == {T}


# -- long texts: the ring buffer of raw rows, and truncation


def long_model(attn_type: str, **changes) -> OpenMythos:
    return tiny_model(attn_type, max_seq_len=400, dim=16, expert_dim=5, **changes)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cache_loops", [None, 3])
@pytest.mark.parametrize("sizes", [
    [200, 1, 1, 90, 1], [1] * 5 + [ROLLBACK - 5, 1, ROLLBACK, 1], [3, ROLLBACK + 2, 2, ROLLBACK + 1, 1],
], ids=str)  # fmt: skip
def test_chunks_longer_than_the_ring_buffer(attn_type, cache_loops, sizes):
    model, ids = long_model(attn_type), tokens(2, sum(sizes))
    with torch.no_grad():
        whole = model(ids, 3)
    assert_near(in_chunks(model, ids, sizes, 3, KVCache(cache_loops)), whole, 5e-5)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("sizes", [[200], [150, 50], [100, 99, 1], [130] + [1] * 70], ids=str)
def test_a_cache_continues_after_truncation_by_up_to_the_rollback(attn_type, sizes):
    """Also to a position inside the last chunk, or to its start."""
    model, ids = long_model(attn_type), tokens(1, 210)
    with torch.no_grad():
        whole = model(ids, 3)
    full = KVCache()
    in_chunks(model, ids[:, :200], sizes, 3, full)
    for cut in (1, 50, ROLLBACK):
        cache = deepcopy(full)
        cache.truncate(200 - cut)
        rest = in_chunks(model, ids[:, 200 - cut :], [1, 2, 7 + cut], 3, cache)
        assert_near(rest, whole[:, 200 - cut :], 5e-5, what=str(cut))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_longer_truncation_is_refused_with_a_convolution(attn_type):
    ids = tokens(1, 200)
    for taps in (0, 1, 3):
        model, cache = long_model(attn_type, conv_taps=taps), KVCache()
        with torch.no_grad():
            whole = model(ids, 3)
            model(ids, 3, cache)
            cache.truncate(100)
            if taps < 2:  # a token reads only its own raw row
                assert_near(model(ids[:, 100:], 3, cache), whole[:, 100:], 5e-5)
                continue
            with pytest.raises(ValueError, match=f"truncated to 100 tokens.*at most {ROLLBACK} tokens"):
                model(ids[:, 100:], 3, cache)
            cache.reset()
            assert_near(model(ids, 3, cache), whole)


@given(
    calls=st.lists(st.tuples(st.integers(1, 150), st.integers(0, ROLLBACK), st.booleans()), min_size=1, max_size=8),
    n_raw=st.integers(0, 4),
)
def test_a_cache_slot_holds_the_last_written_rows(calls, n_raw):
    """Compared with plain tensors: writes, truncation, and filling from the slot before where nothing was written."""
    slots, rows, raws = [CacheSlot(), CacheSlot()], [torch.empty(1, 0, 1, 2)] * 2, [torch.empty(1, 0, 1, 2)] * 2
    most = 0
    for n, cut, both in calls:
        at, new = slots[0].length, torch.randn(2, 1, n, 1, 2)
        for i in (0, 1):
            if i == 1 and not both:
                slots[1].repeat(slots[0])
                rows[1], raws[1] = (torch.cat([x[1], x[0][:, at:]], 1) for x in (rows, raws))
                continue
            before = slots[i].raw_before(at, n_raw)
            if before is not None:
                assert torch.equal(before, torch.cat([torch.zeros(1, n_raw, 1, 2), raws[i]], 1)[:, at : at + n_raw])
            rows[i], raws[i] = torch.cat([rows[i], 10 * new[i]], 1), torch.cat([raws[i], new[i]], 1)
            assert torch.equal(slots[i].update(10 * new[i], new[i], at, n_raw), rows[i])
        most = max(most, at + n)
        end = max(at + n - cut, most - ROLLBACK, 1)  # cuts together go no further back than one may
        for i in (0, 1):
            slots[i].truncate(end)
            rows[i], raws[i] = rows[i][:, :end], raws[i][:, :end]
        if both:  # reading the rows fills the slot
            assert all(torch.equal(slot.rows, held) for slot, held in zip(slots, rows, strict=True))


def test_a_deep_copy_of_a_cache_is_independent():
    model, ids, cache = MODELS["gqa"], tokens(1, 8), KVCache()
    with torch.no_grad():
        whole = model(ids, 4)
        model(ids[:, :5], 4, cache)
        twin = deepcopy(cache)
        model(tokens(1, 3, seed=9), 4, cache)
        assert_near(model(ids[:, 5:], 4, twin), whole[:, 5:])


@torch.no_grad()
def test_a_bidirectional_model_refuses_a_cache():
    model = tiny_model(causal=False)
    for cache in (KVCache(), {}):
        with pytest.raises(ValueError, match="causal=False; leave it out"):
            model(tokens(1, 4), 2, cache)


def test_padding_between_tokens_is_refused_with_convolution_or_local_window():
    ids, mask = tokens(2, 7), torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    hole = torch.tensor([[1] * 7, [0, 1, 1, 0, 1, 1, 1]])
    by_place, by_token = tiny_model(halting=False), tiny_model(halting=False, conv_taps=0, local_window=0)
    with pytest.raises(ValueError, match=r"padding between tokens.*pad on the left"):
        by_place(ids, 3, attention_mask=hole)
    by_place(ids, 3, attention_mask=torch.tensor([[1, 1, 0, 2, 2, 2, 2], [1] * 7]))  # allowed between documents
    for end in (torch.ones(2, 1), torch.cat([mask, torch.ones(2, 1)], 1), None):
        for cache in ({}, KVCache()):
            by_place(ids, 3, cache, attention_mask=mask)
            with pytest.raises(ValueError, match="padding between tokens"):
                by_place(ids[:, :1], 3, cache, attention_mask=end)
        assert isinstance(cache, KVCache)
        cache.truncate(4)
        assert by_place(ids[:, :1], 3, cache).isfinite().all(), "no padding is left between tokens"
        cache = KVCache()
        by_token(ids, 3, cache, attention_mask=mask)
        last = by_token(ids[:, :1], 3, cache, attention_mask=end)[1, -1]
        assert_near(last, by_token(torch.cat([ids[1, :4], ids[1, :1]])[None], 3)[0, -1])
