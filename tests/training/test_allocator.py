"""Freed memory that stays with the process."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from open_mythos.training.allocator import keep_freed_memory

FAULTS = """
import resource, torch
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

trainer = Trainer(configured("parity", []))

def step():
    kept = [torch.ones(2**22) for _ in range(3)]  # 16 MB each
    del kept

for _ in range(8):  # where a step's blocks come to lie is settled after four at most
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_trainer_s_steps_take_the_memory_that_the_last_one_freed():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, "pages of four steps, 12288 each where nothing is kept"


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was told otherwise"))
    keep_freed_memory()
