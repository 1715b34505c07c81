"""Measured peak rates of this machine, to which a model's speed is compared, and its description."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

MATMULS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (2048, 1024, 4096), (8192, 8192, 8192))
"""Rows, inner width and columns of the products tried; the last is for accelerators, which the others do not fill."""
_READ_BYTES = {"cpu": 2**28, "cuda": 2**32}  # far more than a processor's own cache holds


def repeat(work: Callable[[], Any], device: torch.device, seconds: float, warm_up: int = 1) -> list[float]:
    """Time repetitions of ``work``: seconds of each, at least three, after ``warm_up`` ones that do not count.

    The device is synchronised before each reading of the clock. After ``seconds`` in all, warm-up included, no
    repetition beyond the third is started.
    """
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < warm_up + 3 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times[warm_up:]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished; on a CPU, operations are already done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 2.0) -> float:
    """FLOP/s of matrix products: the best repetition of the best of several sizes.

    On a CPU, with the threads that torch is set to. It takes ``seconds`` in all.
    """
    shapes = MATMULS[:-1] if device.type == "cpu" else MATMULS
    best = 0.0
    for rows, inner, columns in shapes:
        x, weight = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))
        fastest = min(repeat(partial(F.linear, x, weight), device, seconds / len(shapes)))
        best = max(best, 2 * rows * inner * columns / fastest)
    return best


@torch.no_grad()
def read_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Memory read bandwidth in bytes/s: the best repetition of summing a long float32 vector, ``seconds`` in all."""
    x = torch.ones(_READ_BYTES[device.type] // 4, device=device)
    return x.nbytes / min(repeat(x.sum, device, seconds))


@torch.no_grad()
def copy_rate(device: torch.device, seconds: float = 1.0) -> float:
    """As :func:`read_rate`, bytes read and written per second while a vector is copied to another."""
    x = torch.ones(_READ_BYTES[device.type] // 4, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(repeat(partial(y.copy_, x), device, seconds))


def describe(device: torch.device) -> dict[str, Any]:
    """Conditions of a measurement: device, threads, vector instructions and versions."""
    found = {"device": device.type, "name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        found["name"], found["cuda"] = torch.cuda.get_device_name(device), torch.version.cuda
        found["driver"] = _driver()
    return found | {"torch": torch.__version__, "python": platform.python_version()}


def _driver() -> str | None:
    """Version of NVIDIA's driver, by nvidia-smi; None without it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """The processor's model by ``lscpu``, or else by Python's ``platform``."""
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return platform.processor() or platform.machine()


def free_memory() -> int | None:
    """Available memory in bytes, by Linux's /proc/meminfo; None elsewhere."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
