"""Text at scale: speed of tokenising by number of processes, time that a step waits for rows, memory of a process.

    python benchmarks/data.py            # a minute; docs/text.md has the results of a machine with two cores

Each folder of tokens is measured in a process of its own.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from open_mythos.cli.console import si
from open_mythos.tasks.filling import fill
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

SIZES = (1, 22)  # multiples of the standard library's source code
ROWS, LENGTH, BATCH = 60_000, 256, 64
SMALL = ("model.dim=16", "model.n_heads=2", "model.n_kv_heads=2", "loops.maximum=1", "evaluation.loops=1")


def tokenised(folder: Path, kind: str, workers: int) -> None:
    begun = list[float]()
    fill(folder, ["stdlib"], kind, 0, workers, lambda done: begun.append(time.perf_counter()))
    seconds, size = time.perf_counter() - begun[0], sum(path.stat().st_size for path in folder.glob("*.bin"))
    print(f"{kind} by {workers or 'this process'}: {seconds:.1f} s, {si(size / 2 / seconds)} tokens/s", flush=True)


def measured(folder: str) -> None:
    """Print the memory of this process, and how long its steps wait for their rows."""
    trainer = Trainer(configured("text", [f"data={folder}", f"length={LENGTH}", f"batch_size={BATCH}", *SMALL]))
    ahead = trainer.ahead
    assert ahead is not None
    for name, draw in (("ahead", ahead), ("when asked", ahead._make)):
        waits = list[float]()
        trainer.ahead = partial(timed, draw, waits)
        for _ in range(8):
            trainer.step()
        print(f"  rows made {name}: a step waits {1000 * statistics.median(waits[1:]):.2f} ms")
    before = resident()
    for start in range(0, ROWS, BATCH):
        trainer.task.rows(range(start, start + BATCH), LENGTH)
    print(f"  {si(before, 'B')} resident, after {ROWS:,} rows {si(resident(), 'B')}", flush=True)


def timed(draw, waits: list[float], step: int):
    started = time.perf_counter()
    batch = draw(step)
    waits.append(time.perf_counter() - started)
    return batch


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measured(sys.argv[1])
        sys.exit()
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("bytes", "bpe:4096"):
            for workers in (0, 1, 2):
                tokenised(Path(scratch, f"{kind}-{workers}"), kind, workers)
        for times in SIZES:
            folder = Path(scratch, str(times))
            fill(folder, ["stdlib"] * times, "bytes")
            print(f"{si(sum(path.stat().st_size for path in folder.glob('*.bin')), 'B')} of tokens:", flush=True)
            subprocess.run([sys.executable, __file__, folder], check=True)
