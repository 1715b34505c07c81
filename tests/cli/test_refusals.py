"""Impossible requests are refused at once, with an error that says what to type."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from fabricated import fabricate_run
from typer.testing import CliRunner, Result

from open_mythos.cli import app
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer


def run(line: str) -> tuple[Result, str]:
    done = CliRunner().invoke(app, line.split())
    return done, " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train parity steps 500", "'steps' is not an override; write key=value, as in steps=500"),
        ("train parity steps", "write key=value, as in steps=..."),
        ("train parity --steps 500", "No such option: --steps. Settings are written without dashes: steps=500"),
        ("train parity --optim.lr=3e-4", "without dashes: optim.lr=3e-4"),
        ("train steps=500", "name a recipe before it, as in parity steps=500"),
        ("train parity resume=auto", "resume is an option, not a setting; write --resume auto"),
        ("compare parity seeds=0", "seeds is an option, not a setting; write --seeds 0"),
        ("compare parity --steps 500", "without dashes: steps=500"),
        ("train parity steps=1e23", "steps='1e23' is not a whole number; use an int of at least 1 and at most 1,000"),
        ("train parity steps=99999999999999999999999", "is too large; use an int of at least 1 and at most 1,000,"),
        ("train text data=nowhere/*.txt", "matches no text file; use 'stdlib', 'hf:NAME', or the path or glob"),
        ("train text data=a.bin", "is not a text file; use 'stdlib', 'hf:NAME', or the path or glob of text files"),
        ("train text data=binary", "binary' contains no text; use 'stdlib', 'hf:NAME', or the path or glob"),
    ],
)  # fmt: skip
def test_errors_say_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").mkdir()
    for file in ("a.bin", "binary/b.txt"):
        (tmp_path / file).write_bytes(bytes(range(256)) * 9)
    done, text = run(line)
    assert done.exit_code == 2 and said in text, text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "line",
    ["train debug --out", "compare debug --out", "demo --out", "eval run --out", "train-gate run --out",
     "diagnose run --plots", "retrofit run --out"],
)  # fmt: skip
def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    done, text = run(f"{line} file")
    assert done.exit_code == 2 and "is a file; give a directory, which does not have to exist" in text, text
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "folder").mkdir()
    done, text = run("report run --out folder")
    assert done.exit_code == 2 and "is a directory; give a file, such as folder/report.html" in text, text


@pytest.mark.parametrize(
    "setting",
    ["batch_size=99999999", "evaluation.examples=999999999", "model.dim=9999992", "task.max_difficulty=9999999999",
     "evaluation.difficulties=24,5000", "gate.max_difficulty=9999"],
)  # fmt: skip
def test_impossible_sizes_are_refused_at_once_with_valid_advice(setting: str, tmp_path: Path) -> None:
    started = time.monotonic()
    done, text = run(f"train parity {setting} --out {tmp_path / 'run'}")
    assert done.exit_code == 2 and ("; use " in text or "; lower the difficulty" in text), text
    assert time.monotonic() - started < 5 and not (tmp_path / "run").exists()
    for advice in re.findall(r"use ([a-z_.]+=\d+)", text):
        same = advice.partition("=")[0] == setting.partition("=")[0]
        Trainer(configured("parity", [advice] if same else [setting, advice]))


def test_a_difficulty_beyond_max_seq_len_of_the_model_is_refused(tmp_path: Path) -> None:
    fabricate_run(tmp_path / "run")
    for line in (f"eval {tmp_path}/run --difficulties 8,4000", f"train-gate {tmp_path}/run --max-difficulty 4000"):
        done, text = run(line)
        assert done.exit_code == 2 and "4000 tokens, which do not fit max_seq_len=128; use a lower difficulty" in text
    assert not (tmp_path / "run-gate").exists() and not (tmp_path / "run" / "evaluation").exists()
