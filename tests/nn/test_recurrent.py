"""The loop: it stops where the gate says so, and then really computes less."""

from itertools import pairwise

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, loops_used, tiny_model, tokens

from open_mythos import KVCache, OpenMythos
from open_mythos.nn.active import ActiveTokens
from open_mythos.nn.exits import StateChange
from open_mythos.ops import reference
from open_mythos.ops.mask import CausalMask
from open_mythos.ops.rope import precompute_rope_freqs, rope_table


def set_gate(model: OpenMythos, probability: float) -> None:
    """Make the gate answer ``probability`` to everything."""
    model.recurrent.act.forward = lambda h: h.new_full(h.shape[:2], probability)


@pytest.fixture
def ffn_tokens(monkeypatch):
    """A list that collects how many tokens each call of a model's expert layer gets."""

    def watch(model: OpenMythos) -> list[int]:
        seen: list[int] = []
        original = model.recurrent.block.ffn.forward

        def forward(x):
            seen.append(x.shape[:-1].numel())
            return original(x)

        monkeypatch.setattr(model.recurrent.block.ffn, "forward", forward)
        return seen

    return watch


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("padded", [False, True])
def test_halted_positions_are_not_computed(attn_type, padded, ffn_tokens):
    model, ids = tiny_model(attn_type), tokens(3, 8)
    inputs = dict(attention_mask=left_padding([8, 5, 2], 8)) if padded else {}
    used = loops_used(model, ids, 6, **inputs)
    seen = ffn_tokens(model)
    with torch.no_grad():
        model(ids, 6, **inputs)
    assert seen[0] <= ids.numel()  # the first loop may run padding too
    assert seen[1:] == [int(used.ge(loop).sum()) for loop in range(2, int(used.max()) + 1)]
    assert sum(seen) < 6 * ids.numel() and len(set(seen)) > 2
    if padded:
        assert used[~inputs["attention_mask"]].eq(0).all()


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("probability, loops", [(1.0, 1), (0.9, 1), (0.5, 2), (0.25, 4), (0.0, 7)])
def test_a_constant_gate_stops_all_at_once(attn_type, probability, loops, ffn_tokens):
    model, ids = tiny_model(attn_type, act_threshold=0.9), tokens(2, 5)
    set_gate(model, probability)
    seen = ffn_tokens(model)
    with torch.no_grad():
        halted = model(ids, 7)
        assert seen == [10] * loops
        model.cfg.halting = False
        assert_near(halted, model(ids, loops), 0.0)


@pytest.mark.parametrize("setting", ["off", "training"])
def test_all_loops_run_with_halting_off_and_in_training(setting, ffn_tokens):
    model, ids = tiny_model(halting=setting != "off").train(setting == "training"), tokens(2, 5)
    set_gate(model, 1.0)
    seen = ffn_tokens(model)
    with torch.no_grad():  # with gradients, training also teaches the gate, on loops of its own
        model(ids, 6)
    assert seen == [10] * 6


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("halting", [False, True])
def test_a_replaced_gate_is_called_once_a_loop_with_all_states(attn_type, halting):
    model, ids = tiny_model(attn_type, gate_bias=-20.0, halting=halting), tokens(2, 5)
    original, calls = model.recurrent.act.forward, []

    def traced(h):
        p = original(h)
        calls.append(p.detach())
        assert h.shape == (2, 5, 32) and p.shape == (2, 5)
        return p

    model.recurrent.act.forward = traced
    model(ids, 6)
    assert len(calls) == 6


def test_a_replaced_gate_decides():
    model, ids = tiny_model(act_threshold=0.99), tokens(1, 6)
    model.recurrent.act.forward = lambda h: torch.tensor([[1.0, 0.5, 0.34, 0.25, 0.2, 0.0]])
    assert loops_used(model, ids, 8).tolist() == [[1, 2, 3, 4, 5, 8]]


@pytest.mark.parametrize("training", [False, True])
def test_a_replaced_feed_forward_is_used(training):
    model, ids = tiny_model(gate_bias=-20.0).train(training), tokens(2, 5)
    calls = []
    model.recurrent.block.ffn.forward = lambda x: calls.append(1) or torch.zeros_like(x)
    with torch.no_grad():
        silent = model(ids, 4)
    assert len(calls) == 4
    del model.recurrent.block.ffn.forward
    model.recurrent.block.ffn.gate_up.data.zero_()
    model.recurrent.block.ffn.shared.down.weight.data.zero_()
    with torch.no_grad():
        assert_near(silent, model(ids, 4))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_output_is_the_state_at_the_loop_where_a_position_halted(attn_type):
    model, ids = tiny_model(attn_type), tokens(2, 8)
    with torch.no_grad():
        e, freqs, mask = model.encode(ids)
        states = list(model.recurrent.iterate(e, e, freqs, mask, 6))
        out = model.recurrent(e, e, freqs, mask, 6)
    h, p = torch.stack([s.h for s in states]), torch.stack([s.halting for s in states])
    expected, _, used = reference.halting(h, p, model.cfg.act_threshold)
    assert len(used.unique()) > 1
    assert torch.equal(out, expected)
    assert torch.equal(torch.stack([s.ran.long() for s in states]).sum(0), used)
    for before, after in pairwise(states):
        assert torch.equal(after.h[~after.ran], before.h[~after.ran])


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_each_loop_is_numbered_and_the_last_may_come_early(attn_type):
    model, ids = tiny_model(attn_type), tokens(1, 4)
    set_gate(model, 0.3)
    with torch.no_grad():
        states = [state for state, _ in model.iterate(ids, 9)]
    assert [state.loop for state in states] == [0, 1, 2]


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("training", [False, True])
def test_the_block_runs_by_itself_with_a_table_of_phasors(attn_type, training):
    """As in the reference implementation: whole tables, no mask object."""
    model = tiny_model(attn_type).train(training)
    e = torch.randn(2, 6, 32)
    table = precompute_rope_freqs(model.cfg.rope_dim, 32, model.cfg.rope_theta)
    with torch.no_grad():
        out = model.recurrent(e, e, table, None, 4)
        assert_near(
            out, model.recurrent(e, e, rope_table(torch.arange(6), model.cfg.rope_dim, model.cfg.rope_theta), None, 4)
        )
        for cache in (KVCache(), {}):
            parts = [model.recurrent(x, x, table, None, 4, cache) for x in (e[:, :4], e[:, 4:5], e[:, 5:])]
            assert_near(torch.cat(parts, 1), out)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_transformer_block_runs_by_itself(attn_type):
    block = tiny_model(attn_type).recurrent.block
    cfg = tiny_model(attn_type).cfg
    x, table = torch.randn(2, 6, 32), precompute_rope_freqs(cfg.rope_dim, 32, cfg.rope_theta)
    with torch.no_grad():
        whole = block(x, table)
        for cache in (KVCache(), {}):
            parts = [block(x[:, i : i + 2], table, None, cache, "slot") for i in (0, 2, 4)]
            assert_near(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match="mask is a Tensor"):
        block(x, table, torch.ones(6, 6))


def test_loop_index_changes_what_each_loop_does():
    plain, coded = tiny_model(loop_index_dim=0), tiny_model(loop_index_dim=8)
    with torch.no_grad():
        assert not torch.equal(plain(tokens(1, 4), 2), coded(tokens(1, 4), 2))
        assert coded(tokens(1, 4), 60).isfinite().all()


def test_active_tokens_bring_back_what_they_took():
    running = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    active, x = ActiveTokens(running), torch.randn(3, 4, 5)
    assert len(active) == 4 and active.width == 3 and not active.is_everything
    gathered = active.gather(x)
    assert gathered.shape == (1, 4, 5) and torch.equal(gathered[0], x[running])
    assert torch.equal(active.scatter(gathered, into=x), x)
    assert torch.equal(active.scatter(gathered + 1, into=x), x + running[..., None])
    packed = active.pack(gathered)
    assert packed.shape == (3, 3, 5) and torch.equal(active.unpack(packed), gathered)
    assert packed[1].eq(0).all() and packed[2, 1:].eq(0).all()


def test_active_tokens_hand_everything_through_while_all_run():
    active, x = ActiveTokens(torch.ones(2, 3, dtype=torch.bool)), torch.randn(2, 3, 5)
    assert active.gather(x) is active.pack(x) is active.unpack(x) is active.scatter(x, into=x) is x


def test_halted_positions_keep_their_last_rows():
    all_run, some = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, False, True]])
    first, second = torch.randn(1, 3, 2), torch.randn(1, 2, 2)
    rows = ActiveTokens(some, {0: ActiveTokens(all_run).merge({"k": first})}).merge({"k": second})["k"]
    assert torch.equal(rows, torch.stack([second[0, 0], first[0, 1], second[0, 1]]).unsqueeze(0))


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("first_loop", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_loops_go_on_where_they_left_off(attn_type, first_loop, padded):
    """States, keys and values of the first loops, made one token at a time; the others for all tokens at once."""
    model, ids = tiny_model(attn_type, halting=False, state_init="zero"), tokens(2, 6)
    mask = left_padding([6, 4], 6) if padded else None
    cache = KVCache()
    with torch.no_grad():
        whole = model.states(ids, 5, attention_mask=mask)[0]
        now = None if mask is None else mask[:, :3]
        model(ids[:, :3], 5, cache, attention_mask=now)
        states = [model.states(ids[:, i : i + 1], first_loop, cache)[0] for i in range(3, 6)]
        e, freqs, _ = model.encode(ids, attention_mask=mask)
        h = model.recurrent(
            torch.cat(states, 1),
            e[:, 3:],
            freqs[..., 3:, :, :],
            CausalMask(3, 6, mask),
            5,
            cache,
            first_loop=first_loop,
        )
    assert_near(h, whole[:, 3:])


def test_loops_that_cannot_go_on():
    model, ids = tiny_model(halting=False), tokens(2, 5)
    e, freqs, mask = model.encode(ids)
    for first_loop in (-1, 4):
        with pytest.raises(ValueError, match=f"first_loop={first_loop} of n_loops=4"):
            model.recurrent(e, e, freqs, mask, 4, first_loop=first_loop)
    with pytest.raises(ValueError, match=r"StateChange.*first_loop=2"):
        model.recurrent(e, e, freqs, mask, 4, exit=StateChange(), first_loop=2)
