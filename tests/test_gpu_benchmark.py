"""benchmarks/gpu.py runs end to end without a GPU, on a simulated one that counts launches and synchronisations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_ops
import gpu_train
import pretend
import pytest
import torch
from helpers import assert_near

from open_mythos.ops.experts import swiglu_experts

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--tiny"]
LONG = bool(os.environ.get("OPEN_MYTHOS_LONG"))
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def run(path: Path, *options: str, first: str = "") -> dict:
    """Results of the benchmark in a subprocess, since it registers a device with PyTorch; ``first`` runs before it."""
    command = [sys.executable, "-c", f"{first}\nimport gpu\ngpu.main()", *TINY, "--out", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


PRETENDED = """
import torch
from pretend import Pretend
with Pretend() as gpu:
    x, rows = torch.ones(3, 4, device="pretend"), torch.tensor([0, 2])
    x.sum().item(), x.cpu(), x[rows], rows.to("pretend")
    assert len(gpu.waits) == 4, gpu.waits
    gpu.reset()
    rows.pin_memory().to("pretend", non_blocking=True), x.t().add(1), x.new_zeros(3)
    assert (gpu.waits, sum(gpu.launches.values())) == ([], 3), (gpu.waits, gpu.launches)
    big = x.new_empty(1000)
    assert gpu.peak >= 4000 + 48
    with torch.autocast("pretend", torch.bfloat16):
        assert torch.nn.functional.linear(x, x).dtype == torch.bfloat16
    for wrong in (lambda: x + torch.ones(4), lambda: x.nonzero()):
        try:
            wrong()
        except Exception:
            continue
        raise AssertionError("two devices and data-dependent shapes should raise")
"""


def test_a_simulated_gpu_counts_launches_and_syncs_of_a_step_and_a_token(tmp_path: Path) -> None:
    """PRETENDED and parts of the benchmark run in one subprocess, which takes seconds to start."""
    found = run(tmp_path / "gpu.json", "--only", "pretended gqa", "decode graph gqa-moe, batch 1", first=PRETENDED)
    step, token = (found["results"][name] for name in ("pretended gqa-moe", "decode graph gqa-moe, batch 1"))
    assert step["attention"] == {"flash": 4, "efficient": 2}  # prelude, coda, two loops; local heads of the loops
    assert step["launches"] > 2 * step["launches_a_loop"] > 0
    assert [where.split(":")[0] for where in step["waits"]] == [
        "_local_scalar_dense at training/parallel/parallel.py"  # the metrics of the step are read at its end
    ]
    assert 0 < step["share_of_plan"] < 1
    assert token["waits"] == [] and token["launches_a_loop"] <= 38
    assert found["conditions"]["tiny"]  # results at toy sizes are marked as such


@pytest.mark.skipif(not LONG, reason="half a minute; OPEN_MYTHOS_LONG=1")
def test_every_part_runs_at_toy_size(tmp_path: Path) -> None:
    found = run(tmp_path / "gpu.json")["results"]
    assert set(found) == {"machine", *gpu.parts(gpu.Bench(CPU, tiny=True))}
    assert isinstance(found["kernels gqa decode"]["flex"], float)
    assert all(found[f"train {name}"]["ratio"] > 0 for name in gpu_train.models(tiny=True))


def test_no_part_starts_after_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "register", lambda: None)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *TINY, "--out", str(out), "--minutes", "0", "--only", "train"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0
    found = json.loads(out.read_text())["results"]
    assert all(part["skipped"] == "0 minutes are over" for part in found.values()) and len(found) == 5


def test_a_missed_bar_or_failed_part_is_named_and_the_rest_runs(tmp_path, monkeypatch, capsys) -> None:
    def broken() -> dict:
        raise RuntimeError("no such kernel")

    bars = {"a": gpu.at_most("x", 2, 1), "c": gpu.at_least("y", 2, 1)}
    made = {name: lambda name=name: {"bars": [bars[name]]} for name in bars} | {"b": broken}
    monkeypatch.setattr(gpu, "parts", lambda bench: made)
    monkeypatch.setattr(gpu, "register", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1 and "failed or missed: a, b" in capsys.readouterr().out.replace("\n", " ")
    found = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert "no such kernel" in found["b"]["failed"] and found["c"]["bars"][0]["is_met"]


def test_attention_kernels_are_predicted_by_the_rules_of_cuda() -> None:
    q, k, bias = (torch.empty(1, n, 8, 16, dtype=torch.bfloat16) for n in (4, 2, 1))
    assert pretend.kernel(q, k, k, None, is_causal=True) == "flash"
    assert pretend.kernel(q, k[:, :, :5], k[:, :, :5], None, is_causal=True) == "math"  # not square, and grouped
    assert pretend.kernel(q, q, q, bias, is_causal=False) == "efficient"
    assert pretend.kernel(q, k, k, bias, is_causal=False) == "math"  # grouped heads and a bias
    assert pretend.kernel(q.float(), q.float(), q.float(), None, is_causal=True) == "efficient"
    names = {"void flash_fwd_kernel<x>": 2, "fmha_cutlassF_bf16": 3, "cudnn_generated_sdpa_sm90_flash_fprop": 4}
    assert gpu_train.attention_kernels(names) == {"flash": 2, "efficient": 3, "cudnn": 4}


def test_benchmark_models_have_the_stated_sizes() -> None:
    for cfg in gpu_train.models(tiny=False).values():
        assert 60e6 < gpu_train.parameters(cfg).total < 160e6 and not cfg.halting
    assert 2.5e9 < gpu_train.parameters(gpu_train.large(tiny=False)).total < 3.5e9


def test_the_llama_baseline_has_as_many_flops() -> None:
    for cfg in gpu_train.models(tiny=False).values():
        training = gpu_train.Training(cfg, CPU, 2, 1024)
        llama = 3 * gpu_train.llama_flops(training.llama_shape, (1024 + 1) / 2)
        assert abs(llama / training.flops_per_token - 1) < 0.02
        assert training.llama_shape["intermediate_size"] % 64 == 0  # a size that suits tensor cores


def test_the_loop_over_experts_matches_the_grouped_product() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(7, 8), torch.randn(3, 8, 8), torch.randn(3, 8, 4)
    chosen, weights = torch.tensor([[0, 2]] * 6 + [[2, 0]]), torch.rand(7, 2)  # expert 1 has no token
    expected = swiglu_experts(x, gate_up, down, chosen, weights)
    assert_near(gpu_ops.looped_swiglu(x, gate_up, down, chosen, weights), expected)


def test_an_unavailable_kernel_reports_the_reason() -> None:
    def missing() -> None:
        raise RuntimeError("No available kernel.\nMore.")

    assert gpu_ops.milliseconds_or_why(missing, CPU, tiny=True) == "No available kernel."
