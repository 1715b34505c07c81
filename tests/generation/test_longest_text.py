"""The last generated token is never processed, so a prompt of ``max_seq_len`` tokens can be continued by one.

Every way to generate is tested with the longest text that a model of 12 positions allows, against the same weights with
a larger ``max_seq_len``; one more token is refused before anything is computed.
"""

import copy

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, tiny_model, tokens

from open_mythos.cache import KVCache
from open_mythos.generation import generate
from open_mythos.generation.conversation import Conversation
from open_mythos.generation.depth_batching import DepthBatch
from open_mythos.generation.engine import Depth, ModuleEngine
from open_mythos.generation.graph import GraphEngine
from open_mythos.generation.native.build import library
from open_mythos.generation.sampling import Sampling
from open_mythos.generation.speculative import Draft
from open_mythos.nn.exits import StateChange
from open_mythos.tasks.tokenizer import Tokenizer

ROOM = 12
NEW = (1, 2, 5, 12)  # new tokens; 12 follow a prompt of one token
MODELS = {attn_type: tiny_model(attn_type, max_seq_len=ROOM, halting=False) for attn_type in ATTENTION}
ENGINES = ["auto", "modules", "fused", "native"] if not isinstance(library(), str) else ["auto", "modules", "fused"]
LONGER = r"but only 13 fit \(max_seq_len=12; the last new token is not fed back\); use max_new_tokens="


def larger(model):
    other = copy.deepcopy(model)
    other.cfg.max_seq_len = 64
    return other


def longest_prompt(n_new, rows=3):
    return tokens(rows, ROOM + 1 - n_new)


@pytest.mark.parametrize("n_new", NEW)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_every_engine_fills_max_seq_len_and_adds_one_token(attn_type, engine, n_new):
    model, ids = MODELS[attn_type], longest_prompt(n_new)
    options = dict(n_loops=4, temperature=0, engine=engine)
    found = model.generate(ids, n_new, **options)
    assert found.shape == (3, ROOM + 1)
    assert torch.equal(found, larger(model).generate(ids, n_new, **options))
    assert torch.equal(torch.stack(list(model.stream(ids, n_new, **options)), 1), found[:, -n_new:])
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=f"={n_new + 1} make 14.*{LONGER}{n_new} or less, or raise max_seq_len"):
            call(ids, n_new + 1, **options)


@pytest.mark.parametrize("cache_loops, exit", [(2, None), (None, StateChange(0.06))], ids=str)
def test_padding_exits_and_shared_slots_fill_max_seq_len(cache_loops, exit):
    model, ids = MODELS["mla"], longest_prompt(5)
    mask = left_padding([8, 3, 1], 8)
    options = dict(n_loops=4, temperature=0, attention_mask=mask, cache_loops=cache_loops, exit=exit)
    assert torch.equal(model.generate(ids, 5, **options), larger(model).generate(ids, 5, **options))
    with pytest.raises(ValueError, match=LONGER):
        model.generate(ids, 6, **options)


@pytest.mark.parametrize("n_new", NEW)
@pytest.mark.parametrize("n_drafted", [1, 4, 63])
def test_drafting_stays_within_max_seq_len(n_drafted, n_new, monkeypatch):
    model, ids, held = MODELS["gqa"], longest_prompt(n_new), []
    options = dict(n_loops=4, temperature=0, draft=Draft(2, n_drafted))
    verify = ModuleEngine.verify
    monkeypatch.setattr(ModuleEngine, "verify", lambda self: held.append(self.cache.length) or verify(self))
    found = model.generate(ids, n_new, **options)
    assert max(held, default=0) <= ROOM
    assert torch.equal(found, larger(model).generate(ids, n_new, n_loops=4, temperature=0))
    with pytest.raises(ValueError, match=LONGER):
        model.generate(ids, n_new + 1, **options)


@torch.no_grad()
@pytest.mark.parametrize("extra", [-1, 0, 1, 64])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_graph_buffers_of_any_size_reach_the_last_position(attn_type, extra):
    """Buffers start at the given size and double when they are full, also at the last position."""
    model, ids = MODELS[attn_type], tokens(3, ROOM)
    graph = GraphEngine(model, Depth(4), ROOM + extra)
    graph.extend(ids[:, :8])
    for at in range(8, ROOM):
        logits = graph.step(ids[:, at : at + 1])
    assert_near(logits, model(ids, 4)[:, -1])
    assert graph.cache.length == ROOM


@pytest.mark.parametrize("new_before_growing", [1, 3, 512])
@pytest.mark.parametrize("engine", ENGINES)
def test_caches_that_grow_while_decoding_fill_max_seq_len(engine, new_before_growing, monkeypatch):
    monkeypatch.setattr(generate, "ROOM", new_before_growing)
    model, options = MODELS["mla"], dict(n_loops=4, temperature=0)
    expected = larger(model).generate(longest_prompt(12), 12, engine="modules", **options)
    assert torch.equal(model.generate(longest_prompt(12), 12, engine=engine, **options), expected)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_generate_many_fills_max_seq_len_at_mixed_prompt_lengths(attn_type):
    model, prompts = MODELS[attn_type], [tokens(n, seed=n) for n in (8, 3, 8, 1)]
    found = model.generate_many(prompts, 5, [4, 1, 3, 2], temperature=0, max_rows=2)
    for row, expected in zip(found, larger(model).generate_many(prompts, 5, [4, 1, 3, 2], temperature=0), strict=True):
        assert torch.equal(row, expected)
    assert [len(row) for row in found] == [13, 8, 13, 6]
    assert len(model.generate_many([tokens(ROOM)], 1)[0]) == 13
    with pytest.raises(ValueError, match=LONGER):
        model.generate_many(prompts, 6)
    with pytest.raises(ValueError, match=LONGER):
        DepthBatch(model).add(tokens(ROOM), 2)


def test_a_conversation_keeps_its_latest_max_seq_len_tokens():
    model = tiny_model(vocab_size=257, max_seq_len=ROOM, halting=False)
    small, large = (Conversation(m, Tokenizer(False), 3, Sampling(temperature=0)) for m in (model, larger(model)))
    assert "".join(small.reply("a long question", 4)) == "".join(large.reply(" question", 4))
    assert small.ids == large.ids and len(small.ids) == ROOM + 1
    assert small.trace(2)[0] == small.ids[-2:]
    for talk in (small, large):
        talk.reset()
    list(small.reply("a long question", 1)), list(large.reply("ong question", 1))
    assert small.ids == large.ids and len(small.ids) == ROOM + 1
    list(small.reply("and", 6))
    assert len(small.ids) == ROOM + 1


def test_a_prompt_longer_than_max_seq_len_is_refused():
    for n_new in (0, 1, 5):
        with pytest.raises(ValueError, match=r"13 prompt tokens.*; shorten the prompt, or raise max_seq_len"):
            MODELS["gqa"].generate(tokens(1, ROOM + 1), n_new)
    assert MODELS["gqa"].generate(tokens(1, ROOM), 0).shape == (1, ROOM)
    with pytest.raises(ValueError, match="do not fit max_seq_len=12"):
        MODELS["gqa"](tokens(1, ROOM + 1), 1, KVCache())
