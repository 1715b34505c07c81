"""``evaluate`` measures everything in one call, and one file stores the results."""

from __future__ import annotations

from pathlib import Path

import pytest
from counting import Copy, Counting
from helpers import tiny_config, tiny_model

from open_mythos import tasks
from open_mythos.evaluation import Evaluation, evaluate
from open_mythos.evaluation.summary import FILE, n_steps
from open_mythos.nn.exits import Gate, StateChange
from open_mythos.training.baselines import UnrolledMythos


class Hasty(Counting):
    """Stops every position after the first loop if there is an exit."""

    def iterate(self, h, e, ctx, n_loops, exit, readout):
        halts = self.cfg.halting or exit is not None
        self.cfg.halting = False
        yield from super().iterate(h, e, ctx, 1 if halts else n_loops, None, readout)


@pytest.fixture
def model() -> Counting:
    model = Counting(forgets=40)
    model.cfg.halting = True
    return model


def test_evaluate_with_a_gate_measures_depth_and_halting(model: Counting) -> None:
    told: list[str] = []
    found = evaluate(model, Copy(), [2, 4], [1, 4, 64], examples=6, seeds=(0, 5), exit=Gate(), progress=told.append)
    assert [grid.seed for grid in found.grids] == [0, 5] and len(told) == n_steps([2, 4], [0, 5], Gate())
    assert [grid.exit for grid in found.grids] == ["gate:0.99"] * 2
    easy, hard = found.metrics["difficulties"]
    assert (easy["difficulty"], easy["best_loops"], easy["deepest"]) == (2, 4, 64)
    assert easy["damage"] == hard["damage"] == 1, "measured without the exit, which would hide it"
    assert hard["best"] == 1 and hard["settle_rate"] == 0 and hard["from_start"]["zeros"]["differing"] == 0
    assert hard["from_start"]["own"]["accuracy"] == 0, "64 loops without halting are more than it remembers"
    gain = found.metrics["halting"]
    assert gain["loops_fixed"] == 4 and gain["saved"] == pytest.approx(1 - 13 / 6 / 4) and gain["accuracy_halting"] == 1
    matched = found.metrics["compute_matched"]
    assert matched["difficulty"] == 4
    for point in matched["halting"]["0.5"][1:]:  # at one loop the gate only adds its cost
        assert 0 < point["fixed_accuracy"] <= point["accuracy"] <= 1


def test_an_exit_is_compared_with_all_loops_on_the_same_problems() -> None:
    """Without halting position t is right from loop t + 1 on; ``Hasty`` stops all of them after the first."""
    found = evaluate(Hasty(), Copy(), [2, 4], [1, 64], examples=6, seeds=(0, 5), exit=StateChange(0.5, 2))
    costs = [dict(all_loops=1, accuracy=right, lost=1 - right, loops_used=1) for right in (0.5, 0.25)]
    assert found.metrics["exit"] == [{"difficulty": n} | cost for n, cost in zip((2, 4), costs, strict=True)]
    assert found.exit_in_words() == "the exit change:0.5:2 loses up to 0.750 of accuracy (4 tokens, 64 loops)"
    gain = found.metrics["halting"]
    assert gain["exit"] == "change:0.5:2" and found.metrics["compute_matched"] is None, "the model's gate is not used"
    assert (gain["accuracy_fixed"], gain["accuracy_halting"]) == (1, (0.5 + 0.25) / 2)
    assert gain["loops_fixed"] == 4, "what the hardest needs with all loops, not with this exit"


def test_exit_in_words_describes_an_exit_without_loss() -> None:
    found = evaluate(Counting(), Copy(), [2], [4], examples=3, exit=Gate())
    assert found.exit_in_words() == "the exit gate:0.99 loses nothing (2 tokens, 4 loops)"
    assert evaluate(Counting(), Copy(), [2], [4], examples=3).exit_in_words() == "every position runs all loops"


def test_the_grid_runs_all_loops_and_halting_is_measured_separately(model: Counting) -> None:
    found = evaluate(model, Copy(), [4], [1, 32], examples=6)
    assert found.grids[0].loops_used.tolist() == [[1, 32]] and found.grids[0].exit is None
    assert found.metrics["exit"] is None
    assert found.metrics["halting"]["loops_fixed"] == 4, "not 32, which no problem needs"


def test_a_model_without_halting_has_no_halting_metrics(model: Counting) -> None:
    model.cfg.halting = False
    found = evaluate(model, Copy(), [2], [1], examples=3)
    assert found.metrics["halting"] is None and found.metrics["compute_matched"] is None
    assert found.metrics["difficulties"][0]["settle_rate"] is None, "undefined for one loop"


@pytest.mark.parametrize("changes, said", [
    (dict(seeds=(0, 1, 0)), "seeds 0, 1, 0: give each value only once"),
    (dict(difficulties=[2, 2]), "difficulties 2, 2: give each value only once"),
])  # fmt: skip
def test_repeated_seeds_and_difficulties_are_refused(model: Counting, changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate(model, Copy(), **dict(difficulties=[2], loops=[1], examples=2) | changes)


def test_a_baseline_is_evaluated_at_one_depth() -> None:
    model = UnrolledMythos(tiny_config(vocab_size=3, max_loop_iters=3))
    found = evaluate(model, Copy(), [4], [3], examples=4)
    assert found.grids[0].loops_used.tolist() == [[3]] and found.metrics["halting"] is None


def test_an_evaluation_round_trips_through_its_file(model: Counting, tmp_path) -> None:
    found = evaluate(model, Copy(), [2], [1, 4], examples=3)
    assert found.save(tmp_path / "new") == tmp_path / "new" / FILE
    assert Evaluation.load(tmp_path / "new").to_dict() == found.to_dict()


@pytest.mark.parametrize("content", ["{", "[]", '{"grids": []}', '{"grids": [{}], "metrics": {}}'])
def test_a_file_that_is_not_an_evaluation_is_refused(content: str, tmp_path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=FILE):
        Evaluation.load(tmp_path)


def test_a_mixed_task_is_also_evaluated_per_kind(tmp_path: Path) -> None:
    task = tasks.load("words", split="held_out", weights={"relations": 1, "registers": 1})
    model = tiny_model(vocab_size=task.vocab_size, max_seq_len=512, halting=False)
    found = evaluate(model, task, [1, 2], [1, 2], examples=4)
    assert [(grid.task, grid.difficulties) for grid in found.kinds] == [("relations", [1]), ("registers", [2, 4])]
    assert all(grid.options["split"] == "held_out" for grid in found.kinds)
    found.save(tmp_path)
    again = Evaluation.load(tmp_path)
    assert again.to_dict() == found.to_dict() and len(again.kinds) == 2
