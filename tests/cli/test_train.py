"""`mythos train`, called as a command."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from open_mythos import OpenMythos
from open_mythos.cli import app
from open_mythos.cli.watch import live_line
from open_mythos.training.recipes import RECIPES

SHORT = ("steps=4", "save_every=2", "gate.steps=0", "evaluation.examples=4")


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, args)])


def test_a_recipe_trains_reports_results_and_resumes(tmp_path: Path) -> None:
    done = run("debug", *SHORT, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "accuracy by loops" in done.output and "8 bits (trained)" in done.output and "mythos eval" in done.output
    assert OpenMythos.from_pretrained(tmp_path / "model").cfg.vocab_size == 3
    again = run("debug", *SHORT, "--out", tmp_path)
    assert again.exit_code == 2 and "--resume auto" in again.output
    assert run("debug", *SHORT, "--out", tmp_path, "--resume", "auto").exit_code == 0


def test_a_model_trained_on_own_text_can_be_evaluated_and_chatted_with(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"the same weights, run for {i} loops, think deeper\n" * 5)
    done = run(
        "text", f"data={tmp_path}/*.txt", "length=32", "steps=2", "model.dim=16", "model.n_heads=2", "batch_size=2",
        "model.n_kv_heads=2", "evaluation.examples=2", "evaluation.loops=1,2", "loops.maximum=2",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "reading data=" in done.output and "documents of" in done.output and "mythos chat" in done.output
    for command, said in (("eval", None), ("chat", "the same\n/trace 2\n")):
        done = CliRunner().invoke(app, [command, str(tmp_path / "run")], input=said)
        assert done.exit_code == 0, done.output
    assert run("text", "data=/no/such/folder", "--out", tmp_path / "other").exit_code == 2


def test_a_dry_run_prints_the_cost_and_writes_nothing(tmp_path: Path) -> None:
    done = run("debug", "--dry-run", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    for what in ("parameters", "FLOPs per step", "memory of activations", "time per step"):
        assert what in done.output
    assert not (tmp_path / "run").exists()
    done = run("debug", "steps=9", "--dry-run", "--out", "a b")
    assert "Next: mythos train debug steps=9 --out 'a b'." in done.output, "the command of the planned run"


def test_recipes_are_listed() -> None:
    for done in (run("--list"), run()):
        assert done.exit_code == 0 and all(name in done.output for name in RECIPES)


def test_invalid_settings_and_divergence_end_with_an_error(tmp_path: Path) -> None:
    for args, message in (
        (("pariti",), "did you mean 'parity'"),
        (("debug", "optim.lrr=1"), "did you mean 'optim.lr'"),
        (("debug", "optim.lr=-1"), "optim.lr=-1 is out of range"),
        (
            ("debug", "optim.lr=1e30", "max_bad_steps=1", "gate.steps=0"),
            "steps in a row had non-finite loss or gradient",
        ),
    ):
        done = run(*args, "--out", tmp_path / "run")
        assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output


def test_the_live_line_shows_the_available_metrics() -> None:
    numbers = {"step": 5, "loss": 0.25, "expert_balance": None, "tokens_per_second": 12345.0}
    line = live_line({**numbers, "skipped": 2, "eta_seconds": 61.0}, 10)
    assert line == "step 5/10  loss 0.2500  12.3 k tokens/s  2 steps skipped  0:01:01 left"


def test_the_live_line_shows_the_current_problem_size() -> None:
    numbers = {"step": 1, "tokens_per_second": 10.0, "skipped": 0, "eta_seconds": 61.0}
    assert "size" not in live_line(numbers | {"size": 1.0}, 10)
    assert "  size 0.40  " in live_line(numbers | {"size": 0.4}, 10)
    several = {"size": 0.4, "size_relations": 0.4, "size_registers": 1.0}
    assert "  size 0.40 relations 1.00 registers  " in live_line(numbers | several, 10)
