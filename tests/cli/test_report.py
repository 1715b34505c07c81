"""`mythos report` writes one page where it says."""

from __future__ import annotations

from fabricated import fabricate_run
from typer.testing import CliRunner

from open_mythos.cli import app
from open_mythos.report import gather, render


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_report_writes_the_page_to_the_run(tmp_path):
    fabricate_run(tmp_path / "run")
    done = run(tmp_path / "run")
    assert done.exit_code == 0, done.output
    page = tmp_path / "run" / "report.html"
    assert f"Page: {page}" in done.output and "Next: " in done.output
    assert page.read_text("utf-8") == render(gather(tmp_path / "run"))


def test_options_select_output_file_and_example(tmp_path):
    fabricate_run(tmp_path / "run")
    page = tmp_path / "new" / "page.html"
    done = run(tmp_path / "run", "--out", page, "--difficulty", 5, "--loops", 3, "--seed", 7)
    assert done.exit_code == 0, done.output
    assert page.read_text("utf-8") == render(gather(tmp_path / "run", 5, 3, 7))
    assert "A new problem of 5 bits (seed 7), at most 3 loops, the halting gate on." in page.read_text("utf-8")


def test_invalid_arguments_are_one_line_on_stderr(tmp_path):
    fabricate_run(tmp_path / "run")
    for arguments, message in (
        ([tmp_path / "nowhere"], "nowhere"),
        ([tmp_path / "run", "--difficulty", 200], "200 positions"),
        ([tmp_path / "run", "--loops", 10**6], "use --loops of at most"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and not done.stdout
        assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1
