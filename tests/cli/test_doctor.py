"""``mythos doctor`` reports what is installed and what is missing, and checks the files of runs and models."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from fabricated import fabricate_run
from in_turn import in_turn
from typer.testing import CliRunner

from open_mythos.cli import app, doctor
from open_mythos.cli.console import console
from open_mythos.generation.native import build
from open_mythos.install import EXTRAS
from open_mythos.training import checkpoints

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 240)


def words(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_extras_match_pyproject() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, (_, packages) in EXTRAS.items():
        asked = [name for line in said[extra] for name in (said["hf"] if line.startswith("open-mythos") else [line])]
        assert [re.split(r"[<>=]", name)[0] for name in asked] == packages
    assert set(said) == {*EXTRAS, "notebooks", "docs", "dev"}, "extras for developers are not reported"


def test_json_output_describes_the_machine() -> None:
    facts = json.loads(words("--json"))
    assert facts["torch"] == torch.__version__ and facts["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert facts["threads"] == torch.get_num_threads() and facts["free_disk"] > 0 and facts["demo_seconds"] > 0
    assert facts["extras"]["plots"]["matplotlib"] == importlib.metadata.version("matplotlib")


def test_missing_packages_are_listed_with_an_install_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "version", none)
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("OPEN_MYTHOS_CACHE", str(tmp_path / "file" / "below"))  # not writable, even by root
    build.library.cache_clear()
    try:
        said = words()
    finally:
        build.library.cache_clear()
    for extra, (_, packages) in EXTRAS.items():
        assert f'{", ".join(packages)} missing: pip install ".[{extra}]"' in said
    assert "no AVX-512" in said and "no C compiler was found; install gcc or clang" in said
    assert "NOT WRITABLE: set OPEN_MYTHOS_CACHE" in said and "Next: mythos eval parity-tiny" in said


def test_a_missing_avx512_or_compiler_is_reported_in_at_most_one_line(tmp_path: Path) -> None:
    """In a subprocess, since PyTorch detects the CPU's instructions when it is imported. Only chat decodes."""
    poor = {
        "PATH": str(tmp_path),
        "OPEN_MYTHOS_CACHE": str(tmp_path),
        "ATEN_CPU_CAPABILITY": "avx2",
        "CC": "no-such-cc",
    }
    eval = "eval parity-tiny --difficulties 6 --loops 2 --examples 2 --out out"
    chat = "chat text-tiny --loops 2 --max-tokens 3"
    options = ("-W", "error::UserWarning")
    _, screen = in_turn(eval, chat, said="one\ntwo\n", here=tmp_path, options=options, **poor)
    *begun, said = screen.splitlines()
    assert begun == [f"$ {eval}", f"$ {chat}"] and "no C compiler was found; install gcc" in said


def test_doctor_reports_an_intact_run_and_names_damaged_files(tmp_path: Path) -> None:
    fabricate_run(tmp_path / "run")
    checkpoint = checkpoints.save(tmp_path / "run" / "checkpoints", 3, {"step": 3}, keep=1)

    def said(code: int) -> str:
        done = CliRunner().invoke(app, ["doctor", str(tmp_path / "run")])
        assert done.exit_code == code, done.output
        return done.stdout

    assert "is intact." in said(0) and "DAMAGED" not in said(0)
    for name in ("model/model.safetensors", "metrics.jsonl", "evaluation.json", "model/training.json", "config.json"):
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + b"\0" + whole[-8:])
        assert [line.split()[1] for line in said(1).splitlines() if line.startswith("DAMAGED")] == [f"{path}:"]
        path.write_bytes(whole)
    state = checkpoint / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    assert f"DAMAGED  {checkpoint}" in said(1)
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 1 and not json.loads(done.stdout)["whole"]


def test_shipped_models_are_intact() -> None:
    for name in ("parity-tiny", "text-tiny"):
        assert CliRunner().invoke(app, ["doctor", name]).exit_code == 0
