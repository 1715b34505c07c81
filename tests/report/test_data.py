"""The data of a report is that of the run's files and of the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from fabricated import fabricate_run
from helpers import tiny_model
from typer.testing import CliRunner

from open_mythos import tasks
from open_mythos.checkpoint import FIGURES, SHIPPED
from open_mythos.cli import app
from open_mythos.diagnostics import trace
from open_mythos.evaluation.summary import Evaluation
from open_mythos.report import gather
from open_mythos.report.data import _baselines
from open_mythos.report.example import MAX_CELLS, PROBLEMS, trace_example
from open_mythos.tasks import pad
from open_mythos.training import runs
from open_mythos.training.recipes import configured

COMPARISON = {
    "recipe": "parity", "unit": "bits", "measure": "accuracy", "difficulties": [], "trained_loops": 4, "seeds": [1],
    "contenders": [], "entries": [], "verdicts": [],
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    fabricate_run(tmp_path / "run")
    return tmp_path / "run"


def test_evaluation_and_training_curves_are_those_of_the_run(run):
    found = gather(run)
    grid = Evaluation.load(run).grids[0].to_dict()
    assert {key: found["grid"][key] for key in grid} == grid
    assert (found["grid"]["trained_difficulty"], found["grid"]["trained_loops"]) == (8, 4)
    training = found["training"]
    assert training["steps"] == [10, 20, 30, 40]
    curves = {curve["title"]: curve["values"] for curve in training["curves"]}
    assert curves["Loss"] == [0.2, 0.1, 2 / 30, 0.05]
    assert "Norm of the gradient, before clipping" not in curves, "it was never finite"
    assert ("loops that the exit gate:0.99 saves; accuracy that it loses", "25%; 0.125") in found["facts"]
    assert found["facts"][0] == ("parameters", f"{sum(p.numel() for p in runs.load_model(run).parameters()):,}")


def test_the_exit_used_is_named_with_its_cost(run):
    assert "; every position runs all loops." in gather(run)["grid"]["lead"]
    command = ["eval", str(run), "--loops", "1,8", "--examples", "3", "--exit", "change:9"]
    assert CliRunner().invoke(app, command).exit_code == 0
    found, evaluation = gather(run), Evaluation.load(run / "evaluation")
    assert evaluation.exit_in_words() in found["grid"]["lead"] and "change:9:1 loses" in found["grid"]["lead"]
    assert found["facts"][1][0].startswith("accuracy, exit change:9:1, 16 bits")
    assert "at most 8 loops, the halting gate on." in found["example"]["lead"], "the example always uses the gate"


def test_long_training_curves_are_subsampled_and_keep_both_ends(run):
    lines = [{"step": step, "loss": 1.0, "skipped": 0} for step in range(1, 2001)]
    (run / runs.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = gather(run)["training"]["steps"]
    assert len(steps) <= 601 and steps[0] == 1 and steps[-1] == 2000
    assert "One line in 4 is shown." in gather(run)["training"]["lead"]


def test_missing_results_are_measured_or_omitted(tmp_path):
    cfg = fabricate_run(tmp_path / "run", evaluated=False)
    (tmp_path / "run" / runs.METRICS).unlink()
    found = gather(tmp_path / "run")
    assert found["training"] is None and found["baselines"] is None
    assert (found["grid"]["difficulties"], found["grid"]["loops"]) == (
        cfg.evaluation.difficulties,
        cfg.evaluation.loops,
    )
    assert not (tmp_path / "run" / runs.EVALUATION).exists(), "a report writes nothing into the run"


def test_bits_per_byte_are_shown_instead_of_the_grid(run):
    (run / runs.EVALUATION).write_text(json.dumps({"bits_per_byte": {"1": 2.5, "8": 2.0}}))
    found = gather(run)
    assert found["grid"] is None
    assert (found["bits"]["loops"], found["bits"]["values"]) == ([1, 8], [2.5, 2.0])
    assert "every position running all loops" in found["bits"]["lead"]
    assert ("bits per byte, 8 loops", "2.0000") in found["facts"]


def test_the_latest_evaluation_is_shown_if_it_is_of_the_runs_task(run):
    own = gather(run)["grid"]["examples"]
    command = ["eval", str(run), "--loops", "1,2", "--difficulties", "8"]
    assert CliRunner().invoke(app, [*command, "--examples", "3"]).exit_code == 0
    shown = gather(run)["grid"]
    assert (shown["examples"], shown["loops"], shown["difficulties"]) == (3, [1, 2], [8]) and own != 3
    os.utime(run / runs.EVALUATION)  # as if training had measured it later
    assert gather(run)["grid"]["examples"] == own
    assert CliRunner().invoke(app, [*command, "--examples", "3", "--task", "prefix_sums"]).exit_code == 0
    assert gather(run)["grid"]["examples"] == own


def test_a_comparison_is_found_in_the_run_or_beside_it(run):
    (run.parent / "compare.json").write_text(json.dumps(COMPARISON))
    assert gather(run)["baselines"]["seeds"] == [1]
    (run / "compare.json").write_text(json.dumps(COMPARISON | {"seeds": [2]}))
    assert gather(run)["baselines"]["seeds"] == [2]
    (run / "compare.json").write_text(json.dumps(COMPARISON | {"contenders": [3]}))
    with pytest.raises(ValueError, match=r"compare\.json: contenders\[0\] is 3; expected an object"):
        gather(run)
    (run / "compare.json").write_text("{")
    with pytest.raises(ValueError, match=r"compare\.json is not JSON"):
        gather(run)


def test_a_comparison_of_the_working_folder_is_not_that_of_a_shipped_model_but_of_a_run_in_it(run, monkeypatch):
    monkeypatch.chdir(run)
    (run / "compare.json").write_text(json.dumps(COMPARISON | {"contenders": [3]}))
    assert _baselines(Path("parity-tiny")) is None
    (run / "compare.json").unlink()
    (run.parent / "compare.json").write_text(json.dumps(COMPARISON))
    assert _baselines(Path(".")) is not None


def test_the_shown_command_reproduces_the_config(run):
    cfg = runs.training_config(run)
    (command,) = gather(run)["commands"]
    program, train, recipe, *assignments = command.split()
    assert (program, train) == ("mythos", "train")
    assert configured(recipe, assignments) == cfg


def test_a_run_without_a_recipe_has_no_command(tmp_path):
    fabricate_run(tmp_path / "run", recipe="mine")
    found = gather(tmp_path / "run")
    assert found["title"] == "mine: parity" and all(line.startswith("#") for line in found["commands"])


def test_the_example_shows_the_models_predictions():
    model, task = tiny_model(vocab_size=3, gate_bias=0.5), tasks.load("parity")
    example, experts = trace_example(model, task, 12, 4, seed=5)
    problems = task.batch(PROBLEMS, 12, torch.Generator().manual_seed(5))
    traced = trace(model, problems.ids, 4)
    assert example["tokens"] == problems.ids[0].tolist() and example["targets"] == problems.targets[0].tolist()
    assert example["used"] == traced.loops_used[0].tolist() and len(set(example["used"])) > 1
    with torch.no_grad():
        for loop, (predicted, percent) in enumerate(zip(example["predictions"], example["probability"], strict=True)):
            probability = model(problems.ids[:1], n_loops=loop + 1)[0].softmax(-1)
            assert predicted == probability.argmax(-1).tolist()
            assert percent == pytest.approx((100 * probability.amax(-1)).tolist(), abs=0.51)
    assert example["words"] == {token: task.vocab[token] for token in example["words"]} and {1, 2} <= set(
        example["words"]
    )
    assert torch.tensor(example["change"]) == pytest.approx(traced.delta[:, 0], rel=1e-2, abs=1e-6)
    assert torch.tensor(experts["share"]).sum(1) == pytest.approx(torch.ones(len(experts["share"])))
    assert experts["share"][0] == pytest.approx((traced.expert_load[0] / traced.expert_load[0].sum()).tolist())


def test_the_example_ends_when_all_positions_have_halted():
    example, _ = trace_example(tiny_model(vocab_size=3, gate_bias=9.0), tasks.load("parity"), 6, 4)
    assert example["used"] == [1] * 6 and len(example["predictions"]) == len(example["gate"]) == 1
    example, _ = trace_example(tiny_model(vocab_size=3, halting=False), tasks.load("parity"), 6, 4)
    assert example["used"] == [4] * 6 and example["gate"] is None and not example["halting"]


def test_the_example_marks_unscored_positions_and_drops_padding():
    task = tasks.load("chain_sum")
    example, _ = trace_example(tiny_model(), task, 4, 2)
    assert example["targets"][:-1] == [None] * (len(example["tokens"]) - 1) and example["targets"][-1] is not None

    class Padded(type(task)):
        def batch(self, n, difficulty, generator=None):
            problems = [super(Padded, self).batch(1, difficulty + (row > 0), generator) for row in range(n)]
            return pad(problems)

    example, _ = trace_example(tiny_model(), Padded(), 4, 2)
    assert len(example["tokens"]) == task.length(4) == len(example["predictions"][0])


def test_an_example_too_large_for_a_page_is_refused():
    with pytest.raises(ValueError, match=rf"use --loops of at most {MAX_CELLS // 20}, or a lower --difficulty"):
        trace_example(tiny_model(vocab_size=3), tasks.load("parity"), 20, MAX_CELLS)


def test_the_default_example_is_harder_than_training_if_it_fits_a_screen(run):
    assert gather(run)["example"]["difficulty"] == 16
    cfg = runs.training_config(run)
    cfg.evaluation.difficulties = [8, 500]
    cfg.save(run / runs.MODEL / runs.TRAINING_FILE)
    assert gather(run)["example"]["difficulty"] == cfg.task.max_difficulty


@pytest.mark.parametrize("name", ["words-tiny", "text-tiny"])
def test_a_report_of_a_shipped_model_uses_the_figures_of_its_card(name, monkeypatch):
    for measure in ("depth_grid", "bits_per_byte"):
        monkeypatch.setattr(f"open_mythos.report.data.{measure}", None)
    card, shown = json.loads((SHIPPED / name / FIGURES).read_text()), gather(name)
    if name == "text-tiny":
        assert shown["bits"]["values"] == list(card["bits_per_byte"].values())
        assert f"{card['windows']} windows of {card['length']} tokens" in shown["bits"]["lead"]
    else:
        assert shown["grid"]["accuracy"] == card["accuracy"] and "with the exit gate" in shown["grid"]["lead"]
