"""Runs functions of worker.py in groups of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
Job = list[Any]


def launch(folder: Path, groups: list[tuple[int, list[Job]]], timeout: float = 280) -> list[list[Any]]:
    """What each job of each group returns in process 0; an error in any process is raised here."""
    places = os.pathsep.join(str(HERE.parents[i]) for i in range(3))
    done = subprocess.run(
        [sys.executable, HERE / "worker.py", folder], input=json.dumps(groups), text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": places}, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = []
    for (_, jobs), by_process in zip(groups, torch.load(folder / "found.pt", weights_only=False), strict=True):
        for found in by_process:
            assert not (found and "Traceback" in str(found[-1])[:40]), found[-1]
        assert by_process and len(by_process[0]) == len(jobs), done.stderr
        results.append(by_process[0])
    return results


def assert_resumed(result: dict[str, Any], losses: list[float]) -> None:
    """The whole state is bit for bit as saved (weights, averages, optimizers, carried states), and the next losses are
    ``losses``."""
    assert not result["differing"] and result["n"] > 100
    assert result["losses"] == pytest.approx(losses, rel=1e-5)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses, norms and weights are those of ``expected``."""
    torch.testing.assert_close(found["steps"], expected["steps"], rtol=tolerance, atol=tolerance)
    for name, weights in expected["weights"].items():
        distance = (found["weights"][name].double() - weights.double()).norm()
        assert distance <= tolerance * weights.double().norm(), (name, float(distance))
    for mine, theirs in zip(found["load"], expected["load"], strict=True):
        assert torch.equal(mine, theirs)
    assert abs(found["size"] - expected["size"]) < tolerance
