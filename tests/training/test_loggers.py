"""metrics.jsonl has each step once, also after a resume; other loggers get the same metrics."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from open_mythos import files
from open_mythos.training.loggers import MetricsFile, open_loggers, read_metrics


def write(path: Path, after_step: int, *steps: int) -> None:
    file = MetricsFile(path, after_step)
    for step in steps:
        file.log({"step": step, "loss": step / 2})
    file.close()


def test_resuming_drops_the_lines_of_steps_that_are_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2, 3, 4)
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed in the middle of a line
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    write(path, 2, 3, 4, 5)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert path.read_text().endswith("\n")


def test_a_line_is_written_at_once_as_plain_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.log({"step": 1, "loss": float("nan"), "norm": float("inf"), "balance": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    file.close()
    assert json.loads(text) == {"step": 1, "loss": None, "norm": None, "balance": None}


def test_a_line_that_could_not_be_written_is_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            file.log({"step": 1, "loss": 0.5})
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]


def test_a_full_disk_while_damaged_lines_are_dropped_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    path.write_text("damaged\n" + path.read_text())
    content, replacing = path.read_text(), files.write

    def full(target: Path, content: str | bytes) -> None:
        if target == path:
            raise OSError(28, "No space left")
        replacing(target, content)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space left"):
        MetricsFile(path, 2)
    assert path.read_text() == content


def test_an_unknown_logger_suggests_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown logger 'wanbd'; did you mean 'wandb'"):
        open_loggers("tensorboard, wanbd", tmp_path, {}, 0)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ImportError, match=rf'needs {name}; in a checkout .*: pip install "\.\[loggers\]"'):
        open_loggers(name, tmp_path, {}, 0)


def test_wandb_and_tensorboard_get_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def keep(name: str) -> Any:
        return lambda *args, **kwargs: calls.append((name, args, kwargs))

    class Writer:
        def __init__(self, directory: str, purge_step: int) -> None:
            calls.append(("open", Path(directory).name, purge_step))

        add_text, add_scalar, close = (staticmethod(keep(name)) for name in ("text", "scalar", "close"))

    fakes = {
        "wandb": SimpleNamespace(init=keep("init"), log=keep("log"), finish=keep("finish")),
        "torch.utils.tensorboard": SimpleNamespace(SummaryWriter=Writer),
    }
    for name, fake in fakes.items():
        module = ModuleType(name)
        vars(module).update(vars(fake))
        monkeypatch.setitem(sys.modules, name, module)
    loggers = open_loggers("tensorboard,wandb", tmp_path, {"steps": 9}, after_step=4)
    for logger in loggers:
        logger.log({"step": 5, "loss": 0.5, "balance": None})
        logger.close()
    assert ("open", "tensorboard", 5) in calls
    assert ("scalar", ("loss", 0.5, 5), {}) in calls and len([call for call in calls if call[0] == "scalar"]) == 1
    options = {"project": "open-mythos", "name": tmp_path.name, "config": {"steps": 9}, "dir": str(tmp_path)}
    assert ("init", (), options) in calls
    assert ("log", ({"loss": 0.5},), {"step": 5}) in calls
    assert ("finish", (), {}) in calls and ("close", (), {}) in calls
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 0.5, "balance": None}]


REAL = """
import sys
from pathlib import Path
from open_mythos.training.loggers import open_loggers

for logger in (loggers := open_loggers(sys.argv[1], Path.cwd(), {"steps": 2}, 0)):
    for step in (1, 2):
        logger.log({"step": step, "loss": 0.5 / step, "balance": None})
for logger in loggers:
    logger.close()
"""


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_the_real_packages_record_metrics_without_a_network(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name)
    here = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", REAL, name]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | here | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "arning" not in done.stdout, done.stdout + done.stderr
    if name == "tensorboard":
        (events,) = (tmp_path / "tensorboard").iterdir()
        assert b"loss" in events.read_bytes()
    elif name == "trackio":
        with sqlite3.connect(tmp_path / "trackio" / "open-mythos.db") as database:
            rows = database.execute("select step, metrics from metrics order by step").fetchall()
        assert [(step, json.loads(numbers)) for step, numbers in rows] == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    else:
        (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        assert b"loss" in log.read_bytes()
