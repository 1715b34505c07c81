"""`mythos eval` evaluates a run, a model or a shipped model, and writes results and a plot where it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fabricated import fabricate_run
from helpers import tiny_config, tiny_model
from typer.testing import CliRunner, Result

from open_mythos import models
from open_mythos.cli import app
from open_mythos.cli.own_tasks import share, show_halting
from open_mythos.evaluation import Evaluation
from open_mythos.training import runs
from open_mythos.training.baselines import UnrolledMythos
from open_mythos.training.config import EvalConfig, LoopConfig, TaskConfig, TrainConfig


def run_eval(*args: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    fabricate_run(tmp_path / "run", evaluated=False)
    return tmp_path / "run"


def test_a_run_is_evaluated_with_its_own_settings(run: Path) -> None:
    done = run_eval(run)
    assert done.exit_code == 0, done.output
    found = Evaluation.load(run / "evaluation")
    (grid,) = found.grids
    assert (grid.task, grid.difficulties, grid.loops, grid.examples) == ("parity", [8, 16], [1, 2, 4, 8], 8)
    assert grid.exit is None and found.metrics["halting"] is not None, "the gate is measured separately from the grid"
    assert (run / "evaluation" / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert f"Results: {run}/evaluation/evaluation.json" in done.output and f"mythos report {run}" in done.output
    assert "depth metrics" in done.output and "at matched FLOPs" in done.output
    assert "no early exit" in " ".join(done.output.split()) and "costs" not in done.output
    assert "exit gate:" in done.output.split("difficulties mixed")[1], "the savings of the gate are shown by default"


def test_options_override_the_settings_of_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_eval(
        run, "--task", "prefix_sums", "--option", "modulus=2", "--difficulties", "5", "--loops", "3,1",
        "--examples", "4", "--seeds", "3,4", "--exit", "change:0.5", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    first, second = Evaluation.load(out).grids
    assert (first.task, first.options, first.difficulties, first.loops) == ("prefix_sums", {"modulus": 2}, [5], [1, 3])
    assert (first.seed, second.seed, first.examples, first.exit) == (3, 4, 4, "change:0.5:1")
    assert "8 problems each" in " ".join(done.output.split())


@pytest.mark.parametrize("exit, harms", [("change:1e-6", False), ("change:9", True)])
def test_an_exit_is_reported_with_the_accuracy_it_costs(tmp_path: Path, exit: str, harms: bool) -> None:
    """A strict exit stops no position, a loose one stops all after one loop, where this model only guesses."""
    settings = "--difficulties", "24,48", "--loops", "1,32", "--examples", "8", "--out", tmp_path
    done = run_eval("parity-tiny", *settings, "--exit", exit)
    assert done.exit_code == 0, done.output
    text, found = " ".join(done.output.split()), Evaluation.load(tmp_path)
    grid, costs = found.grids[0], found.metrics["exit"]
    assert grid.exit and f"accuracy by loops, exit {grid.exit}" in text
    assert [cost["accuracy"] for cost in costs] == grid.accuracy[:, -1].tolist()
    assert all(cost["all_loops"] == 1 and cost["lost"] == 1 - cost["accuracy"] for cost in costs)
    assert ("stops positions too early" in text) == harms == (max(cost["lost"] for cost in costs) > 0.3)
    rows = text.split(f"cost of the exit {grid.exit}")[1].split("depth metrics, every position running all loops")
    assert f"│ 48 │ 1.00 │ {share(costs[1]['accuracy'])} │ {costs[1]['lost']:.2%} │" in rows[0]
    mixed, gain = text.split("difficulties mixed in one batch")[1], found.metrics["halting"]
    assert f"│ exit {grid.exit} │ {share(gain['accuracy_halting'])} │ {gain['loops_halting']:.1f} │" in mixed
    assert "at matched FLOPs" not in text, "this table is shown for the gate only"


def test_a_model_without_training_json_needs_a_task(tmp_path: Path) -> None:
    tiny_model(vocab_size=3, max_seq_len=128).save_pretrained(tmp_path / "m")
    done = run_eval(tmp_path / "m")
    assert done.exit_code == 2 and "training.json is missing" in " ".join(done.output.split())
    done = run_eval(tmp_path / "m", "--task", "parity", "--difficulties", "4", "--loops", "1,2", "--examples", "2")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m" / "evaluation" / "evaluation.json").is_file()
    assert f"mythos diagnose {tmp_path}/m" in done.output


def test_results_of_a_shipped_model_go_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabricate_run(tmp_path / "shipped" / "tiny", evaluated=False)
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped" / "tiny" / "model").rename(tmp_path / "shipped" / "tiny-model")
    monkeypatch.chdir(tmp_path)
    done = run_eval("tiny-model", "--difficulties", "4", "--loops", "1", "--examples", "2")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "runs" / "eval-tiny-model" / "evaluation.json").is_file()


def test_a_baseline_is_evaluated_at_its_only_depth(tmp_path: Path) -> None:
    model = UnrolledMythos(tiny_config(vocab_size=3, max_loop_iters=3, max_seq_len=128))
    cfg = TrainConfig(
        model=model.cfg, task=TaskConfig("parity"), kind="unrolled", loops=LoopConfig(maximum=3),
        evaluation=EvalConfig([4], [1, 8], 2),
    )  # fmt: skip
    runs.save_model(model, cfg, tmp_path)
    done = run_eval(tmp_path)
    assert done.exit_code == 0, done.output
    assert Evaluation.load(tmp_path / "evaluation").grids[0].loops == [3]


def test_text_is_measured_in_bits_per_byte(tmp_path: Path) -> None:
    for i in range(120):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(f"The {i}th of many short documents. " * 3)
    model = tiny_model(vocab_size=257)
    task = TaskConfig("text", {"source": str(tmp_path / "texts")})
    runs.save_model(
        model, TrainConfig(model=model.cfg, task=task, evaluation=EvalConfig([16, 8], [8, 32], 3)), tmp_path
    )
    done = run_eval(tmp_path)
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert data["options"]["split"] == "held_out", "held-out text, not the training data"
    assert data["by_length"]["16"] == data["bits_per_byte"] and set(data["by_length"]["8"]) == {"8", "32"}
    bits = data["bits_per_byte"]
    assert f"{bits['8']:.4f}" in done.output and f"{bits['32'] / bits['8'] - 1:+.2%}" in done.output


def test_text_with_an_exit_is_compared_with_all_loops(tmp_path: Path) -> None:
    settings = "--difficulties", "32", "--loops", "1,8", "--examples", "4", "--out", tmp_path
    done = run_eval("text-tiny", *settings, "--exit", "change:9")
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "evaluation.json").read_text())
    (left,), (full,) = data["by_length"].values(), data["all_loops"].values()
    assert left["8"] == left["1"] == full["1"] > full["8"], "all stop after the first loop"
    text = " ".join(done.output.split())
    assert "bits per byte of held-out text, exit change:9" in text
    assert f"│ 32 │ {full['8']:.4f} │ {left['8']:.4f} │ {left['8'] / full['8'] - 1:.2%} │ 1.0 │" in text


def test_seeds_are_refused_for_text() -> None:
    done = run_eval("text-tiny", "--seeds", "0")
    assert done.exit_code == 2 and "--seeds 0: text is measured on evenly spaced windows" in " ".join(
        done.output.split()
    )


def test_without_matplotlib_no_plot_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run_eval(run, "--difficulties", "4", "--loops", "1", "--examples", "2")
    assert done.exit_code == 0 and 'pip install ".[plots]"' in " ".join(done.output.split())
    assert not (run / "evaluation" / "grid.png").exists() and "plot:" not in done.output.split("Results")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "pariti"], "did you mean 'parity'?"),
        (["--exit", "gates"], "there is no exit 'gates'; did you mean 'gate'?"),
        (["--loops", "0"], "evaluation.loops=0 is too small"),
        (["--seeds", "one"], "--seeds 'one' should be whole numbers"),
        (["--option", "bits=3"], "parity has no option 'bits'"),
        (["--difficulties", "0"], "too small"),
        (["--difficulties", "4000"], "do not fit max_seq_len=128"),
    ],
)
def test_invalid_options_are_refused(run: Path, args: list[str], message: str) -> None:
    done = run_eval(run, *args)
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert not (run / "evaluation").exists()


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    assert run_eval(tmp_path / "nothing").exit_code == 2


@pytest.mark.parametrize("saved, fixed, matched, is_said", [
    (0.007, 13.0, True, True), (0.4, 13.0, True, False), (0.0, 1.0, True, False), (0.0, 13.0, False, False),
])  # fmt: skip
def test_a_gate_that_saves_nothing_gets_a_hint(
    capsys: pytest.CaptureFixture[str], saved: float, fixed: float, matched: bool, is_said: bool
) -> None:
    halting = {
        "accuracy_fixed": 1.0,
        "accuracy_halting": 1.0,
        "loops_fixed": fixed,
        "loops_halting": fixed * (1 - saved),
    }
    curves = {"difficulty": 8, "halting": {}} if matched else None  # measured for a gate only, not for another exit
    metrics = {"halting": halting | {"saved": saved}, "compute_matched": curves}
    show_halting(SimpleNamespace(metrics=metrics, grids=[SimpleNamespace(unit="bits")]))  # type: ignore[arg-type]
    assert ("loss.fixed_point=1" in capsys.readouterr().out) == is_said
