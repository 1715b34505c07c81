"""Settings for all tests: one thread, deterministic property tests, a separate cache directory.

Processes that tests start use one thread as well: tests share the cores, and threads that wait for each other spin.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # set before any import reads it: no test may depend on a network
settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("suite")

_cache = tempfile.TemporaryDirectory()
os.environ["OPEN_MYTHOS_CACHE"] = _cache.name

ROOT = Path(__file__).parent.parent
REFERENCE = "open-mythos==0.5.0"
NO_NETWORK = r"No matching distribution|[Cc]onnection|timed out|resolution"


@pytest.fixture
def threads():
    """A function that sets the number of PyTorch's threads; the number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference_checkpoints(tmp_path_factory):
    """Folder of models created and saved by the reference package, with the logits that it computes for them."""
    package = ROOT / "runs" / "reference-package"  # kept; in its own folder, since its import name is ours
    if not (package / "open_mythos").is_dir():
        fresh = package.with_name(f"reference-package.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", fresh, REFERENCE]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode and re.search(NO_NETWORK, done.stdout + done.stderr):
            pytest.skip(f"{REFERENCE} is not available: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        if package.is_dir():  # another process was faster
            shutil.rmtree(fresh)
        else:
            fresh.rename(package)
    out = tmp_path_factory.mktemp("reference")
    worker = Path(__file__).parent / "integrations" / "reference_worker.py"
    environment = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, worker, out], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return out
