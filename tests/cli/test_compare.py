"""`mythos compare` prints a table, draws plots and states a verdict."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from open_mythos.cli import app

TINY = [
    "steps=2", "batch_size=4", "gate.steps=0", "loops.maximum=2", "model.max_loop_iters=2",
    "evaluation.difficulties=4,6", "evaluation.loops=1,4", "evaluation.examples=8",
]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_compare_writes_results_that_reports_include(tmp_path):
    done = run("debug", *TINY, "--seeds", "3", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "compare.json").read_text())
    assert all(line in " ".join(done.stdout.split()) for line in found["verdicts"])
    assert all(f"{mean:.1%}" in done.stdout for entry in found["entries"] for mean in entry["mean"])
    assert all((tmp_path / f"compare-{n}.png").read_bytes().startswith(b"\x89PNG") for n in (4, 6))
    assert f"mythos report {tmp_path / 'looped-seed3'}" in done.stdout
    assert "10 runs" not in done.stderr and "5 runs: 5 kinds × 1 seeds" in done.stderr
    assert "lr: the recipe's for all" in done.stdout
    assert all(line in " ".join(done.stdout.split()) for line in found["worth"]) and len(found["worth"]) == 2
    for kind in ("looped", "unrolled", "plain"):
        report = CliRunner().invoke(app, ["report", str(tmp_path / f"{kind}-seed3")])
        assert report.exit_code == 0, report.output
        page = (tmp_path / f"{kind}-seed3" / "report.html").read_text()
        assert found["verdicts"][0] in page and found["worth"][0] in page
    report = CliRunner().invoke(app, ["report", str(tmp_path / "unrolled-seed3"), "--loops", "3"])
    assert report.exit_code == 2 and "2 blocks and no more; leave --loops out" in report.stderr


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path):
    done = run("debug", *TINY, "--seeds", "3,4", "--rates", "1e-3,3e-3", "--dry-run", "--out", tmp_path / "out")
    assert done.exit_code == 0 and "15 runs: 5 kinds × (2 rates on seed 3 + 1 more seeds at the best)" in done.stderr
    assert "Nothing was written" in done.stdout and not (tmp_path / "out").exists()


def test_invalid_arguments_are_one_line_on_stderr(tmp_path):
    for arguments, message in (
        (["partiy"], "did you mean 'parity'?"),
        (["debug", "step=3"], "did you mean 'steps'?"),
        (["debug", "--seeds", "one"], "--seeds 'one' should be whole numbers"),
        (["debug", "--rates", "1e-3,fast"], "--rates '1e-3,fast' should be positive numbers"),
        (["debug", "--rates", "1e-3,0"], "--rates '1e-3,0' should be positive numbers"),
        (["debug", "--rates", "1e-3,.001"], "give each value only once"),
    ):
        done = run(*arguments, "--out", tmp_path)
        assert done.exit_code == 2 and not done.stdout
        assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1
