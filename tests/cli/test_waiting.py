"""Long stages report progress, run times are estimated in full, and other libraries print nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fabricated import fabricate_run
from in_turn import in_turn
from typer.testing import CliRunner

from open_mythos import install
from open_mythos.cli import app, console
from open_mythos.cli.watch import watching
from open_mythos.training.fit import fit, stages
from open_mythos.training.recipes import configured

TINY = ["steps=2", "batch_size=4", "evaluation.examples=2", "gate.batch_size=4"]


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return done.stdout + done.stderr


@pytest.mark.parametrize("gate", [0, 2, 10])
def test_stages_after_training_are_counted(tmp_path: Path, gate: int) -> None:
    cfg, begun = configured("debug", [*TINY, f"gate.steps={gate}"]), list[str]()
    with watching(cfg) as watch:
        watch.begin, begin = begun.append, watch.begin
        fit(cfg, tmp_path, watch=watch)
        for stage in begun:
            begin(stage)
    assert stages(cfg) >= len(begun) >= stages(cfg) - 3 * (gate == 0)


def test_a_dry_run_estimates_the_time_of_gate_and_evaluation(tmp_path: Path) -> None:
    def times(*settings: str) -> dict[str, int]:
        text = run("train", "debug", *settings, "--dry-run")
        found = re.findall(r"time of (?:the )?(\w+)[\w ]*│ +(\d+):(\d+):(\d+)", text)
        return {name: 3600 * int(hours) + 60 * int(minutes) + int(seconds) for name, hours, minutes, seconds in found}

    deep = times("steps=1", "evaluation.loops=1,1024", "evaluation.examples=512")
    assert deep["evaluation"] >= 3 and abs(deep["run"] - deep["training"] - deep["halting"] - deep["evaluation"]) <= 2
    assert times("evaluation.loops=1,8", "gate.steps=0")["evaluation"] < deep["evaluation"]


def test_a_long_stage_prints_elapsed_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "SILENCE", 0.05)
    with console.progress(2) as begin:
        begin("thinking [hard]")
        time.sleep(0.3)
    said = capsys.readouterr().err
    assert said.count("thinking [hard] (0 s)") >= 3
    time.sleep(0.1)
    assert not capsys.readouterr().err, "no output after the stage"
    with console.live(2, "what another process shows", is_shown=False):
        time.sleep(0.2)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("line", [["train", "text", "data=hf:no/such-text"], ["retrofit", "no/such-model"]])
def test_an_unreachable_hub_fails_within_5_seconds(
    line: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in ("transformers", "datasets"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(sys.modules.get(name) or __import__(name, fromlist=["x"]), "HF_HUB_OFFLINE", False)

    def nowhere(*address: object) -> None:
        time.sleep(60)  # as if packets were dropped
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", nowhere)
    monkeypatch.setattr(install.socket, "create_connection", nowhere)
    started = time.monotonic()
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2 and "no/such" in done.stderr, done.output
    assert time.monotonic() - started < 5


def test_other_libraries_print_nothing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    fabricate_run(tmp_path / "run")
    lines = "diagnose run --plots pictures", "export run e", "chat text-tiny --max-tokens 2"
    shown, screen = in_turn(*lines, said="hi\n", here=tmp_path)
    ours = r"(\$ .*\n|.* \(\d+ s\)\n)*"  # the latter: progress, on a slow machine
    assert re.fullmatch(ours, screen), screen
    assert (tmp_path / "pictures").is_dir() and (tmp_path / "e").is_dir() and "text-tiny" in shown


def test_ctrl_c_during_startup_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "open_mythos", "--help"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(install.__file__).parent.parent}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT and not done.stdout + done.stderr
