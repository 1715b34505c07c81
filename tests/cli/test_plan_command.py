"""``mythos plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fabricated import fabricate_run
from typer.testing import CliRunner, Result

from open_mythos.cli import app

QUICK = ["length=64", "batch_size=8"]


def plan(*words: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def test_a_plan_shows_costs_the_settings_and_a_next_command() -> None:
    done = plan("nano", *QUICK, "--gpus", 2, "--memory", 24, "--tokens", "1B", "--price", 2)
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    for part in ("recomputed", "activations", "collectives of a step", "bound by", "tokens/s", "kWh", "price", "Next:"):
        assert part in shown
    assert "parallel.replicate=" in shown and "mythos plan nano length=64 batch_size=8 --gpus 4 --memory 24" in shown
    assert max(map(len, done.output.split("Settings for")[0].splitlines())) <= 80


def test_json_output_is_the_whole_plan() -> None:
    words = "nano", *QUICK, "--gpus", 2, "--tokens", "1e9", "--price", 2, "watts=500", "--json"
    found: dict[str, Any] = json.loads(plan(*words).stdout)
    layout, memory = found["layout"], found["memory"]
    assert layout["replicate"] * layout["shard"] * layout["tensor"] == 2
    chosen = memory["recomputed" if layout["recompute"] else "loops kept"]
    assert sum(chosen.values()) == pytest.approx(memory["total"]) and memory["total"] < memory["room"]
    run, hours = found["run"], 1e9 / found["tokens_per_second"] / 3600
    assert run["GPU-hours"] == pytest.approx(2 * hours) and run["days"] == pytest.approx(hours / 24)
    assert run["kWh"] == pytest.approx(hours) and run["price"] == pytest.approx(4 * hours)
    assert found["bound"] in found["seconds"]


def test_a_recipe_and_a_run_are_planned_with_their_own_settings(tmp_path: Path) -> None:
    fabricate_run(tmp_path / "run")
    for name in ("debug", tmp_path / "run", tmp_path / "run" / "config.json"):
        found = json.loads(plan(name, "--gpus", 1, "--json").stdout)
        assert found["device"]["memory"] == 80e9 and found["layout"]["rows"] * found["layout"]["accumulate"] > 1
    from open_mythos.training.recipes import configured

    cfg = configured("debug")
    found = json.loads(plan("debug", "--gpus", 1, "--json").stdout)
    assert (found["batch_size"], found["loops"]) == (cfg.batch_size, cfg.loops.trained)
    assert found["grad_loops"] <= found["loops"]
    assert "mythos train debug --dry-run" in plan("debug", "--gpus", 1).output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nano", "--gpus", 0], "--gpus 0; give 1 to 1,000,000"),
        (["nano", "--memory", -1], "--memory -1.0: give the memory of one GPU in GB, above 0"),
        (["nano", "--memory", "nan"], "--memory nan: give the memory of one GPU"),
        (["nano", "--interconnect", "nvlnk"], "--interconnect 'nvlnk' is unknown; did you mean 'nvlink'?"),
        (["nano", "--tokens", "many"], "--tokens 'many' should be a number above 0, as in 300B"),
        (["nano", "--price", 0], "--price 0.0: give the hourly price of one GPU"),
        (["nano", "--price", 2], "--price 2.0 needs the number of --tokens, as in --tokens 300B"),
        (["nano", "device=h1000"], "device='h1000' is unknown; use one of 'a100', 'h100'"),
        (["nano", "parallel.experts=2"], "unknown key 'parallel.experts'; did you mean 'parallel.expert'?"),
        (["nano", "--gpus", 3, "batch_size=4", "length=8"], "batch_size=4 cannot be shared by 3 GPUs"),
        (["2b"], "unknown variant '2b'"),
    ],
)
def test_invalid_input_is_one_line_on_stderr(words: list[object], said: str) -> None:
    done = plan(*words)
    assert done.exit_code == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_plan_that_does_not_fit_suggests_gpus_and_memory() -> None:
    done = plan("1b", "length=256", "batch_size=8", "--gpus", 1, "--memory", 16)
    assert done.exit_code == 2 and not done.stdout
    assert "1b does not fit 1 x 16 GB" in done.stderr and "use --gpus " in done.stderr and "--memory " in done.stderr
