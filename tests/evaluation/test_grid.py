"""The depth grid of a model whose accuracy is known, and several grids combined."""

from __future__ import annotations

import json

import pytest
import torch
from counting import Copy, Counting
from helpers import loops_used, tiny_model

from open_mythos.evaluation import DepthGrid, combine, depth, depth_grid
from open_mythos.nn.exits import Exit, StableArgmax, StateChange, parse


def test_the_grid_has_the_known_accuracy() -> None:
    model = Counting(forgets=9).train()
    grid = depth_grid(model, Copy(), [2, 4], [8, 1, 3, 16], examples=5)
    assert grid.difficulties == [2, 4] and grid.loops == [1, 3, 8, 16]
    assert grid.accuracy.tolist() == [[0.5, 1, 1, 0], [0.25, 0.75, 1, 0]]
    assert grid.exact.tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]
    assert grid.loops_used.tolist() == [[1, 3, 8, 16]] * 2
    assert grid.low.equal(grid.accuracy) and grid.high.equal(grid.accuracy), "all problems have the same accuracy"
    assert grid.curve(4) == {1: 0.25, 3: 0.75, 8: 1, 16: 0}
    assert (grid.task, grid.unit, grid.examples, grid.seed, grid.exit) == ("copy", "tokens", 5, 0, None)
    assert model.training


def test_halting_is_enabled_for_the_grid_and_then_restored() -> None:
    model = Counting()
    grid = depth_grid(model, Copy(), [4], [1, 2, 8], examples=3, halting=True)
    assert grid.exit == f"gate:{model.cfg.act_threshold}" and not model.cfg.halting
    assert grid.loops_used.tolist() == [[1, 1.75, 2.5]], "position t stops after t + 1 loops"
    assert grid.accuracy.tolist() == [[0.25, 0.5, 1]], "after the last loop that ran, accuracy stays the same"


@pytest.mark.parametrize("exit", [StateChange(0.06), StableArgmax(2)], ids=str)
def test_an_exit_stops_positions_as_in_the_model(exit: Exit) -> None:
    model, task = tiny_model(halting=False), Copy()
    grid = depth_grid(model, task, [6], [2, 7], examples=9, exit=exit)
    ids, targets, _ = task.batch(9, 6, torch.Generator().manual_seed(0))
    assert parse(grid.exit) == exit and 1 < grid.loops_used[0, 1] < 7
    assert grid.loops_used[0, 1] == pytest.approx(loops_used(model, ids, 7, exit=exit).double().mean().item())
    right = (model(ids, n_loops=7, exit=exit).argmax(-1) == targets).double().mean().item()
    assert grid.curve(6)[7] == pytest.approx(right)


@pytest.mark.parametrize("halting", [False, True])
def test_the_grid_equals_separate_passes(halting: bool) -> None:
    model, task = tiny_model(), Copy()
    grid = depth_grid(model, task, [6], [1, 2, 7], examples=9, seed=3, halting=halting)
    ids, targets, _ = task.batch(9, 6, torch.Generator().manual_seed(3))
    model.cfg.halting = halting
    for n, accuracy in grid.curve(6).items():
        right = (model(ids, n_loops=n).argmax(-1) == targets).double()
        assert accuracy == pytest.approx(right.mean().item())
        j = grid.loops.index(n)
        reach = 1.96 * right.mean(1).std().item() / 3
        assert grid.low[0, j].item() == pytest.approx(max(0, accuracy - reach))
        assert grid.high[0, j].item() == pytest.approx(min(1, accuracy + reach))


def test_wilson_interval_of_exact() -> None:
    """Textbook values for 10 of 10, where the normal interval has no width."""
    grid = depth_grid(Counting(), Copy(), [1], [1], examples=10)
    assert grid.exact.item() == 1 and grid.exact_high.item() == pytest.approx(1)
    assert grid.exact_low.item() == pytest.approx(0.7225, abs=1e-4)


def test_chunking_bounds_memory_without_changing_results(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = depth_grid(Counting(forgets=3), Copy(), [8], [2], examples=7)
    monkeypatch.setattr(depth, "CHUNK", 20)
    model = Counting(forgets=3)
    assert depth_grid(model, Copy(), [8], [2], examples=7).to_dict() == whole.to_dict()
    assert model.most_tokens == 16, "two rows of 8"
    depth_grid(model, Copy(), [25], [2], examples=3)
    assert model.most_tokens == 25, "one row at least"


def test_problems_of_a_difficulty_do_not_depend_on_the_other_difficulties() -> None:
    model = tiny_model()
    alone = depth_grid(model, Copy(), [9], [2], examples=16)
    assert depth_grid(model, Copy(), [5, 9], [1, 2], examples=16).curve(9)[2] == alone.curve(9)[2]
    assert depth_grid(model, Copy(), [9], [2], examples=16, seed=1).curve(9) != alone.curve(9)


def test_a_grid_round_trips_through_json() -> None:
    data = depth_grid(Counting(), Copy(), [2], [1, 2], examples=3).to_dict()
    again = DepthGrid.from_dict(json.loads(json.dumps(data)))
    assert again.to_dict() == data and again.accuracy.shape == (1, 2)
    with pytest.raises(ValueError, match=r"missing: \['low'\], unknown: \['lwo'\]"):
        DepthGrid.from_dict({**{key: data[key] for key in data if key != "low"}, "lwo": 0})


def test_an_older_file_with_a_halting_flag_is_read() -> None:
    data = depth_grid(Counting(), Copy(), [2], [1], examples=3).to_dict()
    del data["exit"]
    assert [DepthGrid.from_dict(data | {"halting": was}).exit for was in (True, False)] == ["gate", None]


def test_progress_is_reported_per_difficulty() -> None:
    told: list[str] = []
    depth_grid(Counting(), Copy(), [2, 4], [1], examples=1, progress=told.append)
    assert told == ["2 tokens", "4 tokens"]


@pytest.mark.parametrize(
    ("difficulties", "loops", "examples", "message"),
    [
        ([], [1], 1, "at least one"),
        ([2], [1], 0, "at least one"),
        ([2], [], 1, "loops="),
        ([0], [1], 1, "the difficulty of copy is its number of tokens"),
    ],
)
def test_empty_measurements_are_refused(difficulties: list[int], loops: list[int], examples: int, message: str) -> None:
    model = Counting().train()
    with pytest.raises(ValueError, match=message):
        depth_grid(model, Copy(), difficulties, loops, examples, halting=True)
    assert model.training and not model.cfg.halting


def test_a_task_with_more_tokens_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="copy has 3 tokens and the model 2"):
        depth_grid(tiny_model(vocab_size=2), Copy(), [2], [1])


def test_combine_gives_mean_worst_and_interval_over_seeds() -> None:
    grids = [depth_grid(Counting(forgets), Copy(), [2], [1, 2], examples=2) for forgets in (9, 2, 9)]
    accuracy = combine(grids)["accuracy"]
    assert accuracy.worst.tolist() == [[0.5, 0]]
    assert accuracy.mean.tolist() == [[0.5, pytest.approx(2 / 3)]]
    reach = 4.30 * (1 / 3) ** 0.5 / 3**0.5  # Student's t of two degrees of freedom
    assert 2 / 3 - reach < 0 and accuracy.low.tolist() == [[0.5, 0]] and accuracy.high.tolist() == [[0.5, 1]]
    close = [depth_grid(Counting(), Copy(), [2], [1], examples=2) for _ in range(3)]
    for grid, value in zip(close, (0.50, 0.51, 0.52), strict=True):
        grid.accuracy.fill_(value)
    assert combine(close)["accuracy"].low.item() == pytest.approx(0.51 - 4.30 * 0.01 / 3**0.5)


def test_combining_one_grid_gives_the_widest_interval() -> None:
    one = combine([depth_grid(Counting(), Copy(), [2], [1], examples=2)])["exact"]
    assert (one.mean.item(), one.low.item(), one.high.item()) == (0, 0, 1)


def test_combine_refuses_grids_that_do_not_match() -> None:
    grids = [depth_grid(Counting(), Copy(), [2], [n], examples=1) for n in (1, 2)]
    with pytest.raises(ValueError, match=r"differ in loops: \[1\] and \[2\]"):
        combine(grids)
    with pytest.raises(ValueError, match="at least one"):
        combine([])
