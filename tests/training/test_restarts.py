"""Worker processes of torchrun are killed at random; the job restarts within seconds and ends with the same result."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from test_fit import metrics

LONG = bool(os.environ.get("OPEN_MYTHOS_LONG"))
KILLS, STEPS = 20, 600
WORDS = [
    "train",
    "debug",
    f"steps={STEPS}",
    "save_every=5",
    "log_every=1",
    "evaluation.loops=1",
    "evaluation.examples=2",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def n_lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def workers(agent: int) -> list[int]:
    """Process ids of the workers that a torchrun agent has started, in the order of ranks."""
    found = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in found}
    ranks = {
        int(word[5:]): int(pid) for pid, words in environments.items() for word in words if word.startswith(b"RANK=")
    }
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.skipif(not LONG, reason="20 restarts of torchrun; OPEN_MYTHOS_LONG=1")
@pytest.mark.timeout(1800)
def test_a_torchrun_job_restarts_after_random_kills_with_the_same_result(tmp_path: Path) -> None:
    draw, times = random.Random(0), list[float]()
    command = [*TORCHRUN, f"--max-restarts={KILLS}", "--nproc-per-node=2", "-m", "open_mythos", *WORDS]
    command += ["parallel.shard=2", "--resume", "auto", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=600)
    run = tmp_path / "run"
    with (tmp_path / "output").open("w") as output:
        agent = subprocess.Popen([*command, str(run)], stdout=output, stderr=output)
        for kill in range(KILLS):
            target = draw.randrange((kill + 1) * STEPS // (KILLS + 2), (kill + 2) * STEPS // (KILLS + 2))
            while n_lines(run) < target:
                assert agent.poll() is None, (tmp_path / "output").read_text()[-3000:]
                time.sleep(0.005)
            os.kill(draw.choice(workers(agent.pid)), signal.SIGKILL)
            start = time.monotonic()
            time.sleep(0.5)  # the other process may still write a line
            before = n_lines(run)
            while (now := n_lines(run)) <= before:
                assert agent.poll() is None, (tmp_path / "output").read_text()[-3000:]
                before = now  # or fewer, once the lines after the checkpoint are dropped
                time.sleep(0.02)
            times.append(time.monotonic() - start)
        assert agent.wait(300) == 0, (tmp_path / "output").read_text()[-3000:]
    print(f"{KILLS} kills; running again after {min(times):.1f} to {max(times):.1f} s, mean {sum(times) / KILLS:.1f} s")
    assert metrics(run) == metrics(tmp_path / "whole")
    for name in ("model/model.safetensors", "evaluation.json"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert median(times) < 15
