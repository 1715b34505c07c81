"""Every metric, on a model for which it is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from counting import Copy, Counting

from open_mythos.diagnostics import flops_per_token
from open_mythos.evaluation import depth_grid
from open_mythos.evaluation.metrics import (
    Damage,
    Point,
    accuracy_at,
    compute_matched,
    fixed_vs_halting,
    initial_state_gap,
    overthinking_damage,
    settle_rate,
)
from open_mythos.nn.exits import StateChange


def test_overthinking_damage() -> None:
    grid = depth_grid(Counting(forgets=9), Copy(), [2, 4, 12], [1, 2, 4, 8, 16, 64], examples=2)
    easy, middle, hard = overthinking_damage(grid, trained_loops=1)
    assert easy == Damage(best=1, best_loops=2, deepest=16, damage=1)
    assert middle == Damage(best=1, best_loops=4, deepest=16, damage=1)
    assert hard.best == hard.damage == pytest.approx(8 / 12) and hard.best_loops == 8
    assert overthinking_damage(grid, trained_loops=4)[0].deepest == 64


def test_no_damage_if_accuracy_holds_at_depth() -> None:
    grid = depth_grid(Counting(), Copy(), [4], [1, 4, 64], examples=2)
    assert overthinking_damage(grid, 4) == [Damage(1, 4, 64, 0)]


def test_damage_is_measured_within_the_grid() -> None:
    grid = depth_grid(Counting(forgets=3), Copy(), [2], [2, 4], examples=2)
    assert overthinking_damage(grid, 100)[0].deepest == 4
    assert overthinking_damage(depth_grid(Counting(), Copy(), [2], [64], examples=2), 1)[0].deepest == 64


def test_best_loops_are_the_fewest_near_the_best_accuracy() -> None:
    grid = depth_grid(Counting(), Copy(), [4], [1, 4, 64], examples=2)
    grid.accuracy[:] = torch.tensor([0.5, 0.9995, 1.0])
    assert overthinking_damage(grid, 4)[0] == Damage(1, 4, 64, 0)


def test_settle_rate() -> None:
    """The state after n loops is (n, token, 0) and changes by 1, so whether a token settles depends on its value."""
    model, task, n = Counting().train(), Copy(), 10
    twos = (task.batch(8, 5, torch.Generator().manual_seed(0)).ids == 2).float().mean().item()
    assert settle_rate(model, task, 5, n, examples=8, tolerance=(n**2 + 2.5) ** -0.5) == pytest.approx(twos)
    assert settle_rate(model, task, 5, 90, examples=8) == 0 and settle_rate(model, task, 5, 110, examples=8) == 1
    assert model.training


def test_halted_positions_do_not_count_as_settled() -> None:
    model = Counting()
    model.cfg.halting = True
    assert settle_rate(model, Copy(), 5, 8, examples=2) == 0 and model.cfg.halting


def test_settle_rate_needs_two_loops() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        settle_rate(Counting(), Copy(), 5, 1)


def test_initial_state_gap() -> None:
    model, task = Counting(), Copy()
    found = initial_state_gap(model, task, 6, 6, examples=50)
    assert found["own"] == (1, 0) and found["zeros"] == (1, 0), "this model's own initial state is zeros too"
    accuracy, differing = found["noise"]
    assert accuracy == pytest.approx(1 - differing) and 0.4 < differing < 0.6, "half of all noise gives wrong answers"
    assert initial_state_gap(model, task, 6, 6, examples=50) == found, "the noise is seeded"


def test_initial_state_gap_at_too_few_loops() -> None:
    own = initial_state_gap(Counting(), Copy(), 6, 3, examples=2)["own"]
    assert own.accuracy == 0.5


def test_fixed_vs_halting() -> None:
    """Position t needs t + 1 loops, while a fixed number runs 4 everywhere; padding is not counted."""
    gain = fixed_vs_halting(Counting(), Copy(), [2, 4], loops=4, examples=6)
    assert gain.accuracy_fixed == gain.accuracy_halting == 1
    assert gain.loops_fixed == 4
    assert gain.loops_halting == pytest.approx((1 + 2 + 1 + 2 + 3 + 4) / 6)
    assert gain.saved == pytest.approx(1 - gain.loops_halting / 4)


def test_fixed_vs_halting_uses_the_given_exit() -> None:
    model, exits = Counting(), []
    model.iterate = lambda *args: (exits.append(args[4]), Counting.iterate(model, *args))[1]
    fixed_vs_halting(model, Copy(), [2, 4], loops=4, examples=6, exit=StateChange(0.5))
    assert exits == [None, StateChange(0.5)]


def test_compute_matched() -> None:
    model = Counting()
    found = compute_matched(model, Copy(), 3, [1, 2, 8], examples=2, thresholds=(0.5,))
    costs = {n: flops_per_token(replace(model.cfg, halting=False), n, context=2) for n in (1, 2, 8)}
    gated = flops_per_token(replace(model.cfg, halting=True), 2, context=2)
    assert gated > costs[2], "the cost of the gate is included"
    assert found.fixed == [Point(pytest.approx(costs[n]), pytest.approx(min(n / 3, 1)), n) for n in (1, 2, 8)]
    last = found.halting[0.5][-1]
    assert (last.accuracy, last.loops) == (1, 2) and last.flops == pytest.approx(gated)
    assert accuracy_at(found.fixed, costs[2]) == pytest.approx(2 / 3), "halting is better by a third at equal cost"


def test_each_threshold_is_applied_and_then_restored() -> None:
    class Seen(Counting):
        def encode(self, *args, **kwargs):
            thresholds.append(self.cfg.act_threshold)
            return super().encode(*args, **kwargs)

    thresholds: list[float] = []
    model = Seen()
    compute_matched(model, Copy(), 3, [1], examples=2, thresholds=(0.2, 0.7))
    assert thresholds == [0.9, 0.2, 0.7] and model.cfg.act_threshold == 0.9


def test_accuracy_at_interpolates_and_clamps() -> None:
    curve = [Point(3.0, 0.8, 3), Point(1.0, 0.4, 1)]
    assert [accuracy_at(curve, flops) for flops in (0, 2, 9)] == pytest.approx([0.4, 0.6, 0.8])
