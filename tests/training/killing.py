"""``kill -9`` at random moments of training, saving, exporting and compiling; run again, each ends as if undisturbed.

``python tests/training/killing.py FOLDER [MOMENTS] [SEED]`` prints how many kills were tried and how many of the
runs recovered. One process imports everything; each kill needs two forks of it, the second to run the same again.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from tiny import tiny_run

from open_mythos import OpenMythos
from open_mythos.generation.native import build
from open_mythos.training import checkpoints
from open_mythos.training.fit import Watch, fit

CFG = tiny_run("steps=6", "save_every=2", "evaluation.examples=2", "evaluation.loops=1")
CFG.evaluation.difficulties = [2]


def train(run: Path) -> None:
    fit(CFG, run, "auto", Watch(log=lambda message: None))


def save(folder: Path) -> None:
    """Save three models to the same folder, which has to hold a complete model at any time."""
    if folder.exists() and any(folder.glob("config.json")):
        OpenMythos.from_pretrained(folder)
    for seed in range(3):
        torch.manual_seed(seed)
        OpenMythos(CFG.model).save_pretrained(folder)


def export(folder: Path) -> None:
    from open_mythos.integrations.hf.export import export

    assert not folder.exists() or (folder / "model.safetensors").is_file(), "a partial export was left"
    if not folder.exists():
        export(folder.parent / "training", folder)


def compile_(folder: Path) -> None:
    """Compile with a script in place of a compiler, which writes its output in several parts."""
    folder.mkdir(exist_ok=True)
    build.NATIVE = ([],)
    found = build._compiled([str(folder.parent / "cc")], folder)
    assert isinstance(found, Path) and found.stat().st_size == 400_000, found


WORKS: dict[str, Callable[[Path], None]] = {"training": train, "saving": save, "compiling": compile_}
if importlib.util.find_spec("transformers"):
    import transformers  # noqa: F401

    import open_mythos.integrations.hf.export  # noqa: F401

    WORKS["exporting"] = export


def forked(work: Callable[[Path], None], folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    try:
        work(folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finished(work: Callable[[Path], None], folder: Path) -> bool:
    return os.waitpid(forked(work, folder), 0)[1] == 0


def content(folder: Path) -> dict[str, object]:
    """Files by name, except temporary ones: the content, a checkpoint's trainer state, or nothing if it has timings."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name == "state.pt":
            found[name] = repr(checkpoints.load(path.parent)["trainer"])
        elif path.is_file() and not any(part.startswith((".", "tmp")) for part in path.relative_to(folder).parts):
            found[name] = b"" if path.name in ("metrics.jsonl", "manifest.json") else path.read_bytes()
    return found


def main(folder: Path, moments: int, seed: int) -> int:
    torch.set_num_threads(1)
    torch.set_printoptions(profile="full", precision=9)
    draw, tried, recovered = random.Random(seed), Counter[str](), Counter[str]()
    compiler = folder / "cc"
    compiler.write_text(
        '#!/bin/sh\nfor word; do [ "$last" = -o ] && out=$word; last=$word; done\n'
        'for part in 1 2 3 4; do head -c 100000 /dev/zero >> "$out"; sleep 0.02; done\n'
    )
    compiler.chmod(0o755)
    whole, seconds = {}, {}
    for name, work in WORKS.items():
        start = time.monotonic()
        assert finished(work, folder / name), name
        whole[name], seconds[name] = content(folder / name), time.monotonic() - start
    for i in range(moments):
        name = list(WORKS)[i % len(WORKS)]
        place = folder / f"{name}-{i}"
        victim = forked(WORKS[name], place)
        time.sleep(draw.uniform(0, seconds[name]))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        tried[name] += 1
        if finished(WORKS[name], place) and content(place) == whole[name]:
            recovered[name] += 1
        else:
            print(f"moment {i}: {name} did not end as it does undisturbed", file=sys.stderr)
    print(", ".join(f"{name}: {recovered[name]} of {n} resumed bit for bit" for name, n in tried.items()))
    return int(recovered != tried)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    numbers = [*map(int, sys.argv[2:]), 30, 0]
    sys.exit(main(place, numbers[0], numbers[1] if len(sys.argv) > 3 else 0))
