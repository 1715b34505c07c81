"""benchmarks/gpu.py runs from end to end, so that it is likely to when there is a GPU; its operators agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_ops
import torch
from helpers import assert_near

from open_mythos.ops.experts import swiglu_experts

CPU = torch.device("cpu")


def run(path: Path, *options: str) -> dict:
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--tiny", "--out", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_every_part_runs_at_toy_sizes(tmp_path: Path) -> None:
    found = run(tmp_path / "gpu.json")
    assert set(found["results"]) == {"machine", *gpu.parts(gpu.Bench(CPU, tiny=True))}
    for name, part in found["results"].items():
        assert "failed" not in part, name
        assert "share" in part or name.startswith(("machine", "decode graph", "waits", "experts", "attention")), name
    assert "graphs are for CUDA" in found["results"]["decode graph gqa-dense, batch 1"]["skipped"]
    assert found["results"]["waits"] | {"took": 0} == {"1 micro-batches": 0, "4 micro-batches": 0, "took": 0}
    assert isinstance(found["results"]["attention gqa decode"]["flex"], float)
    assert found["conditions"]["tiny"]  # invented rates must not pass for real ones


def test_no_part_is_begun_when_time_is_over(tmp_path: Path) -> None:
    found = run(tmp_path / "gpu.json", "--minutes", "0", "--only", "train")["results"]
    assert all(part["skipped"] == "0 minutes are over" for part in found.values()) and len(found) == 5


def test_models_are_of_the_class_they_are_said_to_be() -> None:
    for cfg in gpu.models(tiny=False).values():
        assert 60e6 < gpu.parameters(cfg).total < 160e6 and not cfg.halting


def test_the_loop_over_experts_is_the_grouped_product() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(7, 8), torch.randn(3, 8, 8), torch.randn(3, 8, 4)
    chosen, weights = torch.tensor([[0, 2]] * 6 + [[2, 0]]), torch.rand(7, 2)  # expert 1 has no token
    expected = swiglu_experts(x, gate_up, down, chosen, weights)
    assert_near(gpu_ops.looped_swiglu(x, gate_up, down, chosen, weights), expected)


def test_a_kernel_that_is_not_there_says_why() -> None:
    def missing() -> None:
        raise RuntimeError("No available kernel.\nMore.")

    assert gpu_ops.milliseconds_or_why(missing, CPU, tiny=True) == "No available kernel."
