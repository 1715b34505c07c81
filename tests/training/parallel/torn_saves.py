"""``kill -9`` while two processes write checkpoints in the background; a complete checkpoint has to load then.

``python torn_saves.py FOLDER [MOMENTS] [SEED]`` prints how many kills passed. One process imports everything; each kill
needs two forks of it, which save after every step, and of which one or both are killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[i]) for i in range(3)]

import torch
import torch.distributed as dist
import worker

from open_mythos.training import checkpoints

STEPS, OPTIONS = 10, ("parallel.shard=2", "parallel.expert=2", "optim.optimizer=muon")


def train(rank: int, folder: Path, keep: int | None) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    trainer, saving = worker.new_trainer(*OPTIONS), checkpoints.Saving(folder / "checkpoints")
    for _ in range(STEPS):
        trainer.step()
        saving.end()
        (folder / "ended").write_text(str(trainer.step_number - 1))
        saving.begin(trainer.step_number, trainer.state_dict(), keep)
        (folder / "begun").write_text(str(trainer.step_number))
    saving.end()


def started(folder: Path, keep: int | None) -> list[int]:
    folder.mkdir()
    found = []
    for rank in range(2):
        process = os.fork()
        if not process:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            try:
                train(rank, folder, keep)
            except BaseException:
                os._exit(1)
            os._exit(0)
        found.append(process)
    return found


def number(path: Path) -> int:
    return int(path.read_text() or 0) if path.exists() else 0


def digest(state: dict[str, Any]) -> int:
    checksum = 0
    for name, value in sorted(worker.leaves(state), key=lambda leaf: leaf[0]):
        content = value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        checksum = zlib.crc32(name.encode() + content, checksum)
    return checksum


def main(folder: Path, moments: int, seed: int) -> int:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    draw, passed, torn, old = random.Random(seed), 0, 0, 0
    start = first = time.monotonic()
    whole = started(folder / "whole", None)
    while os.waitpid(whole[0], os.WNOHANG)[0] == 0:
        first = first if (folder / "whole/checkpoints").exists() else time.monotonic()
        time.sleep(0.001)
    os.waitpid(whole[1], 0)
    last = time.monotonic()
    states = map(checkpoints.load, checkpoints.newest_first(folder / "whole/checkpoints"))
    expected = {state["step"]: digest(state) for state in states}
    assert sorted(expected) == list(range(1, STEPS + 1))
    for i in range(moments):
        place = folder / f"{i}"
        processes = started(place, 2)
        time.sleep(draw.uniform(first - start, last - start))
        for process in processes if i % 2 else [draw.choice(processes)]:
            os.kill(process, signal.SIGKILL)
        deadline = time.monotonic() + 5
        for process in processes:
            while os.waitpid(process, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(process, signal.SIGKILL)
                time.sleep(0.01)
        torn += any(place.glob("checkpoints/*.partial"))
        found = checkpoints.newest(place / "checkpoints", print)
        step, is_same = (found[1]["step"], digest(found[1]) == expected[found[1]["step"]]) if found else (0, True)
        ended, begun = number(place / "ended"), number(place / "begun")
        old += step < begun
        if ended <= step <= begun + 1 and is_same:  # ``begun`` is written shortly after a save has begun
            passed += 1
        else:
            print(f"moment {i}: step {step} loads, {ended} had ended and {begun} begun; the same: {is_same}")
    print(f"{passed} of {moments} passed; {torn} left a partial checkpoint, in {old} the previous one loads")
    return int(passed != moments)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    numbers = [*map(int, sys.argv[2:]), 50, 0]
    sys.exit(main(place, numbers[0], numbers[1] if len(sys.argv) > 3 else 0))
