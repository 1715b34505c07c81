"""Two processes that train one model end with one model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import new_model, train

HERE = Path(__file__).parent


def results(way: str, n: int, folder: Path) -> list[dict[str, list]]:
    """What each of ``n`` processes ends with."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    workers = [
        subprocess.Popen(
            [sys.executable, HERE / "distributed_worker.py", str(rank), folder / "store", way],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(n)
    ]  # fmt: skip
    found = []
    for worker in workers:
        out, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
        found.append(json.loads(out))
    return found


@pytest.mark.parametrize("way", ["replicated", "sharded", "no halting"])
def test_processes_stay_one_model(way, tmp_path):
    """DistributedDataParallel, FSDP2 of every block, and a gate that gets no gradient."""
    first, second = results(way, 2, tmp_path)
    assert first == second
    if way == "sharded":  # experts are balanced over the tokens of all
        assert first["bias"] == pytest.approx(train(new_model(), slice(None))["bias"])
