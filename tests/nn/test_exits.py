"""Exits: each rule on sequences with known results, and in the model against a plain loop over all positions."""

import math

import pytest
import torch
from helpers import assert_near, left_padding, loops_used, tiny_model, tokens
from torch import Tensor

from open_mythos import KVCache, OpenMythos, reference
from open_mythos.nn import exits
from open_mythos.nn.exits import Acceleration, Exit, Gate, LoopState, PredictionKL, StableArgmax, StateChange
from open_mythos.nn.halting import halting_probability

LOOPS = 7
# Settings at which a tiny model's positions stop at different loops, some of them never.
RULES = [
    Gate(0.9), StateChange(0.06), StateChange(0.08, 2), Acceleration(0.05), Acceleration(0.1, 2),
    PredictionKL(5e-3), PredictionKL(3e-2, 2), StableArgmax(3),
]  # fmt: skip
each_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def stops(rule: Exit, first: list[float], states: list[list[float]], logits: bool = False) -> list[bool]:
    """Whether the rule stops one position after each loop; ``states`` are its states, or its logits."""
    before = torch.tensor([[first]])
    carried, found = rule.init(before), []
    for loop, values in enumerate(states):
        value = torch.tensor([[values]])
        h = torch.zeros(1, 1, len(first)) if logits else value
        state = LoopState(loop, h, torch.ones(1, 1, dtype=torch.bool), before, logits=value if logits else None)
        may_stop, carried = rule.check(carried, state)
        before = h
        found.append(bool(may_stop))
    return found


# -- rules


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_state_change_is_relative_and_counts_consecutive_loops(scale):
    states = [[scale * x, 0.0] for x in (2.0, 2.02, 3.0, 3.01, 3.02)]
    first = [scale, 0.0]
    assert stops(StateChange(0.03), first, states) == [False, True, False, True, True]
    assert stops(StateChange(0.03, patience=2), first, states) == [False, False, False, False, True]


def test_state_change_applies_from_the_first_loop_and_detects_rotations():
    assert stops(StateChange(0.03), [1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]) == [True, False]


def test_acceleration_stops_at_constant_velocity_and_needs_three_states():
    states = [[2.0], [3.0], [4.0], [6.0], [8.0]]
    assert stops(Acceleration(0.03), [1.0], states) == [False, True, True, False, True]
    assert not any(stops(StateChange(0.03), [1.0], states))


def test_prediction_kl_compares_the_predictions_of_consecutive_loops():
    def odds(p: float) -> list[float]:
        return [math.log(p) + 5, math.log(1 - p) + 5]  # logits are known up to a constant

    divergence = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    predictions = [odds(0.5), odds(0.9), [x - 7 for x in odds(0.9)]]
    assert stops(PredictionKL(divergence * 1.01), [0.0], predictions, logits=True) == [False, True, True]
    assert stops(PredictionKL(divergence * 0.99), [0.0], predictions, logits=True) == [False, False, True]


def test_stable_argmax_counts_loops_with_an_unchanged_argmax():
    first, second = [1.0, 0.0], [0.2, 0.3]
    predictions = [first, [9.0, 0.0], second, second, [0.0, 5.0], second]
    found = stops(StableArgmax(3), [0.0], predictions, logits=True)
    assert found == [False, False, False, False, False, True]


# -- in the model


def plain(rule: Exit, past_h: list[Tensor], past_logits: list[Tensor], mass: float, cell: tuple[int, int]) -> bool:
    """Whether one position may stop, given its states so far, with the initial one, and its predictions."""

    def rest(now: int) -> bool:
        if isinstance(rule, PredictionKL):
            if now < 1:
                return False
            p, q = (past_logits[i][cell].double().softmax(-1) for i in (now, now - 1))
            return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)) < rule.threshold
        if isinstance(rule, StableArgmax):
            return now >= 1 and bool(past_logits[now][cell].argmax() == past_logits[now - 1][cell].argmax())
        after = now + 1  # in past_h, which begins with the first state
        size = past_h[after][cell].norm()
        if isinstance(rule, Acceleration):
            if after < 2:
                return False
            moved = past_h[after][cell] - 2 * past_h[after - 1][cell] + past_h[after - 2][cell]
        else:
            moved = past_h[after][cell] - past_h[after - 1][cell]
        return bool(moved.norm() / size < rule.threshold)

    if isinstance(rule, Gate):
        return mass >= rule.threshold
    last = len(past_h) - 2
    return last + 1 >= rule.patience and all(rest(last - i) for i in range(rule.patience))


def slow(model: OpenMythos, ids: Tensor, rule: Exit, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits and loops used; all positions are computed at every loop, and stopped ones keep their last state."""
    real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    where = reference.Positions(real, (real.cumsum(1) - 1).clamp(min=0), model.cfg.rope[1:], causal=True)
    x = torch.where(real[..., None], model.embed.weight[ids] * math.sqrt(model.cfg.dim), 0.0)
    for block in model.prelude:
        x, _ = reference._block(block, x, where)
    e = reference._norm(model.input_norm, x)

    def predict(h: Tensor) -> Tensor:
        for block in model.coda:
            h, _ = reference._block(block, h, where)
        return reference._norm(model.norm, h) @ model.embed.weight.T

    block = model.recurrent
    past_h, past_logits, mass = [e], [], torch.zeros(ids.shape)
    running, used, rows = real.clone(), torch.zeros_like(ids), None
    for loop in range(LOOPS):
        u = block.injection.get_A() * past_h[-1] + block.injection.B * e
        u, rows = reference._block(block.block, u, where, running, rows)
        u = reference._norm(block.norm, u + reference._lora(block.lora, e, loop))
        past_h.append(torch.where(running[..., None], u, past_h[-1]))
        past_logits.append(predict(past_h[-1]))
        mass = mass + reference._gate(block.act, *past_h[-2:])
        used += running
        for cell in map(tuple, running.nonzero().tolist()):
            running[cell] = not plain(rule, past_h, past_logits, float(mass[cell]), cell)
    return past_logits[-1], used


@torch.no_grad()
@pytest.mark.parametrize("attn_type, padded", [("gqa", False), ("mla", True)])
@each_rule
def test_logits_and_loops_used_equal_a_plain_loop_over_all_positions(attn_type, rule, padded):
    model, ids = tiny_model(attn_type, halting=False), tokens(2, 8)
    mask = left_padding([8, 5], 8) if padded else torch.ones(2, 8, dtype=torch.bool)
    expected, used = slow(model, ids, rule, mask)
    assert len(used[mask].unique()) > 1, f"this rule should stop positions at different loops: {used}"
    assert torch.equal(loops_used(model, ids, LOOPS, exit=rule, attention_mask=mask), used)
    assert_near(model(ids, LOOPS, attention_mask=mask, exit=rule)[mask], expected[mask])


@torch.no_grad()
@each_rule
def test_stopped_positions_are_not_computed(rule, monkeypatch):
    model, ids, seen = tiny_model(halting=False), tokens(3, 8), []
    used = loops_used(model, ids, LOOPS, exit=rule)
    original = model.recurrent.block.ffn.forward
    monkeypatch.setattr(model.recurrent.block.ffn, "forward", lambda x: seen.append(x[..., 0].numel()) or original(x))
    model(ids, LOOPS, exit=rule)
    assert seen == [int((used >= loop).sum()) for loop in range(1, int(used.max()) + 1)]
    assert sum(seen) < LOOPS * ids.numel()


@torch.no_grad()
@each_rule
def test_predictions_are_computed_only_for_exits_that_need_them(rule, monkeypatch):
    model, calls = tiny_model(halting=False), []
    original = model.decode
    monkeypatch.setattr(model, "decode", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    model(tokens(2, 6), 3, exit=rule)
    assert len(calls) == (4 if isinstance(rule, PredictionKL | StableArgmax) else 1)


@torch.no_grad()
@pytest.mark.parametrize("rule", [None, *RULES], ids=str)
def test_the_gate_is_called_only_for_exits_that_use_it(rule, monkeypatch):
    model, calls = tiny_model(halting=False), []
    monkeypatch.setattr(exits, "halting_probability", lambda *args: calls.append(1) or halting_probability(*args))
    model(tokens(2, 6), 3, exit=rule)
    assert len(calls) == (3 if isinstance(rule, Gate) else 0)


@torch.no_grad()
@pytest.mark.parametrize("attn_type, cache_type", [("gqa", KVCache), ("mla", dict)])
@each_rule
def test_a_cache_does_not_change_the_logits(attn_type, rule, cache_type):
    model, ids, mask = tiny_model(attn_type, halting=False), tokens(2, 9), left_padding([9, 5], 9)
    whole = model(ids, LOOPS, attention_mask=mask, exit=rule)
    cache, parts = cache_type(), []
    for part, real in zip(ids.split([4, 1, 1, 3], 1), mask.split([4, 1, 1, 3], 1), strict=True):
        parts.append(model(part, LOOPS, cache, attention_mask=real, exit=rule))
    assert_near(torch.cat(parts, 1)[mask], whole[mask])


@torch.no_grad()
@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_tokens_may_run_more_loops_than_the_cached_prompt(cache_type):
    model, ids, rule, cache = tiny_model(halting=False, coda_layers=2), tokens(1, 6), PredictionKL(0.01), cache_type()
    used = loops_used(model, ids, LOOPS, exit=rule)
    assert used[:, :3].max() < used[:, 3:].max()
    parts = [model(part, LOOPS, cache, exit=rule) for part in ids.split(3, 1)]
    assert_near(torch.cat(parts, 1), model(ids, LOOPS, exit=rule))


@torch.no_grad()
def test_rows_of_a_batch_stop_as_they_do_alone():
    model, ids = tiny_model(halting=False), tokens(4, 8)
    for rule in (StateChange(0.06), PredictionKL(5e-3)):
        together = loops_used(model, ids, LOOPS, exit=rule)
        alone = [loops_used(model, row.unsqueeze(0), LOOPS, exit=rule) for row in ids]
        assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("halting", [False, True])
def test_without_an_exit_the_gate_decides_if_halting_is_on(halting):
    model, ids = tiny_model(halting=halting, act_threshold=0.7), tokens(2, 8)
    with_gate = model(ids, LOOPS, exit=Gate(0.7))
    assert torch.equal(model(ids, LOOPS), with_gate) is halting


@torch.no_grad()
@pytest.mark.parametrize("rule", [StateChange(0.06), PredictionKL(5e-3)], ids=str)
def test_generate_and_stream_accept_an_exit(rule):
    model, ids = tiny_model(halting=False), tokens(2, 5)
    by_hand = ids
    for _ in range(3):
        by_hand = torch.cat([by_hand, model(by_hand, LOOPS, exit=rule)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 3, LOOPS, temperature=0, exit=rule), by_hand)
    streamed = list(model.stream(ids, 3, LOOPS, temperature=0, exit=rule))
    assert torch.equal(torch.stack(streamed, 1), by_hand[:, 5:])


@torch.no_grad()
def test_iterate_yields_the_predictions_that_the_exit_used():
    model, ids = tiny_model(halting=False), tokens(2, 5)
    for state, logits in model.iterate(ids, 3, exit=StableArgmax(9)):
        assert logits is state.logits
        assert_near(logits, model(ids, state.loop + 1))


# -- errors


def test_an_exit_in_training_mode_is_refused():
    model, cache = tiny_model().train(), KVCache()
    with pytest.raises(ValueError, match=r"StateChange.*training mode.*eval\(\)"):
        model(tokens(1, 4), 2, cache, exit=StateChange())
    assert cache.length == 0


def test_exits_on_predictions_are_refused_for_a_block_alone():
    model, e = tiny_model(), torch.randn(1, 4, 32)
    _, ctx = model.encode(tokens(1, 4))
    with pytest.raises(ValueError, match="reads predictions"):
        model.recurrent(e, e, ctx, n_loops=3, exit=PredictionKL())


@torch.no_grad()
@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_a_cache_filled_without_predictions_is_refused(cache_type):
    model, cache = tiny_model(), cache_type()
    model(tokens(1, 4), 3, cache)
    with pytest.raises(ValueError, match="lacks those of its 4 tokens"):
        model(tokens(1, 1), 3, cache, exit=PredictionKL())
    model(tokens(1, 1), 3, cache, exit=StateChange())  # needs no predictions


@pytest.mark.parametrize("text, expected", [
    ("gate", Gate()), ("gate:0.5", Gate(0.5)), ("change", StateChange()), ("change:.01:4", StateChange(0.01, 4)),
    ("kl:5e-4", PredictionKL(5e-4)), ("kl:1e-3:2", PredictionKL(1e-3, 2)), ("argmax:5", StableArgmax(5)),
    ("acceleration:0.2", Acceleration(0.2)),
])  # fmt: skip
def test_exits_are_parsed_from_their_names(text, expected):
    assert exits.parse(text) == expected
    assert exits.parse(exits.spell(expected)) == expected


@pytest.mark.parametrize(
    "rule", [Gate(0.9999999), Gate(1 / 3), StateChange(0.12345678, 2), StateChange(1e-12)], ids=str
)
def test_a_spelled_exit_is_parsed_as_the_same(rule):
    assert exits.parse(exits.spell(rule)) == rule


def test_an_exit_is_spelled_as_on_the_command_line():
    class Mine(Gate):
        pass

    assert exits.spell(StateChange(0.001, 4)) == "change:0.001:4" and exits.spell(PredictionKL()) == "kl:0.0005:1"
    assert "Mine" in exits.spell(Mine()), "a class of the user has no name there"


@pytest.mark.parametrize("text, message", [
    ("agmax", "no exit 'agmax'; did you mean 'argmax'"), ("kl:x", "not a number; use kl:threshold:patience"),
    ("argmax:1.5", "use argmax:patience"), ("gate:1:2", "2 settings; use gate:threshold"),
    ("kl:-1", "'kl:-1': threshold=-1.0; use a number above 0"), ("change:.1:0", "patience=0"),
    ("gate:2", r"threshold=2.0; use a number in \(0, 1\]"),
])  # fmt: skip
def test_unknown_exits_and_invalid_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        exits.parse(text)
