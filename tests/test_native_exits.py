"""Compiled decoding stops every row where the modules stop it, and leaves the cache that they leave."""

import pytest
import torch
from helpers import assert_near, left_padding
from test_decoder import a_model
from test_native import ids, needs_compiler

from open_mythos import KVCache, OpenMythos
from open_mythos.generation.native.decoder import CompiledDecoder
from open_mythos.nn.exits import Gate, StateChange

pytestmark = needs_compiler
KINDS = {
    "gqa": dict(attn_type="gqa"),
    "mla": dict(attn_type="mla"),
    "mla, two blocks in the core": dict(attn_type="mla", core_layers=2),
    "three dense blocks, no prelude": dict(attn_type="gqa", core_layers=3, n_experts=0, dense_dim=19, prelude_layers=0),
    "a gate of 256": dict(attn_type="gqa", dim=264, n_heads=4, n_experts=2),
}
WAYS = (
    (None, 1, None),  # the model's own gate
    (Gate(0.6), 3, None),
    (Gate(0.6), 3, 3),
    (StateChange(0.2), 3, 3),
    (StateChange(0.4, patience=2), 1, 20),
)


def a_halting_model(**changes) -> OpenMythos:
    """One whose gate stops some positions at every loop."""
    model = a_model(**dict(max_loop_iters=8, halting=True, act_threshold=0.7) | changes)
    act = model.recurrent.act
    torch.nn.init.normal_(act.motion, std=0.01)
    torch.nn.init.normal_(act.halt.weight, std=0.05)
    torch.nn.init.constant_(act.halt.bias, -0.03)
    return model


def by_modules(model, tokens, cache, exit):
    """State and logits after tokens (B, 1), and the loops of each row."""
    e, freqs, mask = model.encode(tokens, cache)
    used = torch.zeros(len(tokens), dtype=torch.long)
    for state in model.recurrent.iterate(model.first_state(e), e, freqs, mask, kv_cache=cache, exit=exit):
        used += state.ran[:, 0]
    return state.h, model.head(model.decode(state.h, freqs, mask, cache)[:, -1]), used.tolist()


@pytest.mark.parametrize("exit, n_threads, cache_loops", WAYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_stop_where_the_modules_stop_them(kind, exit, n_threads, cache_loops, threads):
    threads(n_threads)
    padding = left_padding([4, 2, 3], 4) if n_threads > 1 else None
    model, text, caches = a_halting_model(**KINDS[kind]), ids(3, 24), (KVCache(cache_loops), KVCache(cache_loops))
    for cache in caches:
        model(text[:, :4], kv_cache=cache, exit=exit, attention_mask=padding)
    decoder, seen = CompiledDecoder(model, 8, model.recurrent.choose_exit(exit)), set()
    for i in range(4, 24):
        tokens = text[:, i : i + 1]
        h, logits, used = by_modules(model, tokens, caches[0], exit)
        found = decoder.step(tokens, caches[1])
        assert decoder.used == used, f"token {i}"
        assert_near(found[0], h, 1e-4)
        assert_near(found[1], logits, 1e-4)
        seen.add(tuple(used))
    assert max(len(set(used)) for used in seen) == 3, "three rows, each at a loop of its own"
    for name, length in caches[0].lengths().items():
        rows, expected = (cache.slot(name).rows for cache in reversed(caches))
        for part in expected:
            assert length == 24
            assert_near(rows[part], expected[part], 1e-4, f"{name}, {part}")


@torch.no_grad()
def test_no_row_waits_for_another():
    """What a row gets, and the loops it runs, are the same in any company."""
    model, text = a_halting_model(attn_type="gqa"), ids(3, 20)
    together, alone = KVCache(), [KVCache() for _ in text]
    model(text[:, :4], kv_cache=together)
    for row, cache in zip(text, alone, strict=True):
        model(row[None, :4], kv_cache=cache)
    decoder = CompiledDecoder(model, 8, Gate(0.7))
    for i in range(4, 20):
        _, logits = decoder.step(text[:, i : i + 1], together)
        used = decoder.used
        for row, cache in enumerate(alone):
            assert_near(decoder.step(text[row : row + 1, i : i + 1], cache)[1], logits[row : row + 1])
            assert decoder.used == used[row : row + 1]


@torch.no_grad()
def test_more_patience_than_loops_runs_them_all():
    model, cache = a_model(attn_type="gqa"), KVCache()
    model(ids(2, 4), kv_cache=cache)
    decoder = CompiledDecoder(model, 5, StateChange(100.0, patience=2**70))
    decoder.step(ids(2, 1), cache)
    assert decoder.used == [5, 5]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, dict(exit=StateChange(0.3)), dict(cache_loops=2), dict(warm_start=True)], ids=str
)
def test_generation_gives_the_same_tokens(n, options):
    model = a_halting_model(attn_type="gqa", state_init="noise").train()
    expected = model.generate(ids(n, 7), 30, temperature=0, **options)
    assert model.generate(ids(n, 7), 30, temperature=0, compile=True, **options).equal(expected)
    assert model.training


@pytest.mark.parametrize("name, exit", [("parity-tiny", None), ("text-tiny", StateChange(0.1, patience=2))])
def test_shipped_models_say_the_same(name, exit):
    model = OpenMythos.from_pretrained(name).float()
    prompt = ids(2, 9, high=model.cfg.vocab_size)
    expected = model.generate(prompt, 24, temperature=0, exit=exit)
    assert model.generate(prompt, 24, temperature=0, exit=exit, compile=True).equal(expected)


def test_a_gate_of_ones_own_hinders_no_other_exit():
    model = a_model(attn_type="gqa")
    expected = model.generate(ids(1, 7), 9, temperature=0, exit=StateChange(0.3))
    model.recurrent.act.register_forward_hook(lambda *_: pytest.fail("asked"))
    assert model.generate(ids(1, 7), 9, temperature=0, exit=StateChange(0.3), compile=True).equal(expected)
