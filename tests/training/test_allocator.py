"""Freed memory that stays with the process, or is returned to the system."""

import ctypes
import os
import platform
import subprocess
import sys

import memory
import pytest
import torch

from open_mythos.training.allocator import give_back_here, keep_freed_memory

FAULTS = """
import resource, torch
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

trainer = Trainer(configured("parity", []))

def step():
    kept = [torch.ones(2**22) for _ in range(3)]  # 16 MB each
    del kept

for _ in range(8):  # the placement of a step's blocks is settled after four at most
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="settings of other C libraries are not changed"
)


@needs_glibc
def test_a_training_step_reuses_the_memory_freed_by_the_last_one():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, "page faults of four steps; 12288 each if no freed memory is kept"


def test_malloc_settings_of_the_user_are_respected(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library's settings were changed"))
    keep_freed_memory()


@needs_glibc
def test_memory_hardly_grows_with_the_number_of_recomputed_loops():
    few, many = memory.measured(4, recompute=True), memory.measured(32, recompute=True)
    assert many < 1.5 * few, "28 MB are states; with glibc's defaults the heap is three times as large"


def test_give_back_here_changes_neither_values_nor_gradients():
    x = torch.randn(3, requires_grad=True)
    (give_back_here(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(give_back_here(x), x) and x.grad.tolist() == [1.0, 2.0, 3.0]
