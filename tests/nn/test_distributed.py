"""Two processes that train one model end with the same weights, with DDP and with FSDP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import WAYS, new_model, train

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, list]]]:
    """The final router bias and gate of each of two processes, for each of ``WAYS``."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    store, found = tmp_path_factory.mktemp("distributed") / "store", []
    workers = [
        subprocess.Popen(
            [sys.executable, HERE / "distributed_worker.py", str(rank), store],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        out, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
        found.append(json.loads(out))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_end_with_the_same_router_bias_and_gate(way, results):
    """DistributedDataParallel, FSDP2 of every block, and a gate that gets no gradient."""
    first, second = (found[way] for found in results)
    assert first == second
    if way == "sharded":  # experts are balanced over the tokens of all processes
        assert first["bias"] == pytest.approx(train(new_model(), slice(None))["bias"])
