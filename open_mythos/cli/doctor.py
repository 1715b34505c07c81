"""``mythos doctor``: what this machine has, what it lacks, and what to expect of it."""

import json
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from open_mythos import __version__
from open_mythos.cli.console import console, mythos, note, progress, si, table
from open_mythos.install import EXTRAS, cache_dir, install_line

VECTORS = {
    "AVX512": "the widest vector instructions of x86",
    "AVX2": "no AVX-512: matrix products may take twice as long",
    "DEFAULT": "slow if this is x86, which lacks AVX2; normal elsewhere",
}


def doctor(
    path: Annotated[str | None, typer.Argument(help="A run, a model's directory, or a shipped model to check.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON and nothing else.")] = False,
) -> None:
    """Show what this machine has, lacks, and can do; or check that the files of a model or run are intact."""
    if path is not None:
        check_files(path, as_json)
        return
    with progress(n_steps=3) as begin:
        begin("looking around")
        facts = hardware() | places()
        begin("compiling the C decoder")
        facts |= decoder()
        begin("training for a second")
        facts |= {"extras": extras(), "demo_seconds": demo_seconds()}
    if as_json:
        print(json.dumps(facts))
        return
    shown = table("this machine", "", "here", "what it means", rows=rows(facts), left="what it means")
    shown.columns[1].justify = "left"
    console.print(shown)
    shown = table("extras", "name", "for", "here", left="here")
    shown.columns[1].justify = "left"
    for name, packages in facts["extras"].items():
        lacking = [package for package, found in packages.items() if found is None]
        state = f"{', '.join(lacking)} missing: {install_line(name)}" if lacking else "installed"
        shown.add_row(name, EXTRAS[name][0], state)
    console.print(shown)
    note(*expectations(facts))


def check_files(source: str, as_json: bool) -> None:
    """Say of each file of a model or run whether it is whole; exit with code 1 if one is not."""
    from open_mythos.cli.whole import examine

    with progress(n_steps=1) as begin:
        begin("reading")
        found = list(examine(source))
    is_whole = all(whole for _, whole, _ in found)
    if as_json:
        said = [{"file": str(path), "whole": whole, "said": said} for path, whole, said in found]
        print(json.dumps({"whole": is_whole, "files": said}))
    else:
        for path, whole, text in found:
            console.print(
                f"{'intact ' if whole else 'DAMAGED'}  {path}: {text.removeprefix(f'{path}: ')}", soft_wrap=True
            )
        console.print(f"{source} is {'intact' if is_whole else 'damaged'}.", soft_wrap=True)
    if not is_whole:
        raise typer.Exit(1)


def hardware() -> dict[str, Any]:
    """Versions, processor and accelerators; a warning of PyTorch's about a driver is kept as one line."""
    import torch

    from open_mythos.diagnostics.machine import describe, free_memory

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(count)}
        free = {name: torch.cuda.mem_get_info(i)[0] for i, name in enumerate(gpus)}
    found = describe(torch.device("cpu")) | {"open_mythos": __version__, "free_memory": free_memory()}
    trouble = str(said[0].message).partition("\n")[0] if said else None
    return found | {"built_for": torch.version.cuda or torch.version.hip, "gpus": gpus, "free_gpu_memory": free,
                    "gpu_trouble": trouble}  # fmt: skip


def places() -> dict[str, Any]:
    """The cache folder, which may not exist yet, and the free space on its disk and on the current folder's."""
    cache = cache_dir().absolute()
    nearest = next(place for place in (cache, *cache.parents) if place.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    here, there = (shutil.disk_usage(place).free for place in (Path.cwd(), nearest))
    found = {"cache": str(cache), "cache_exists": cache.is_dir(), "cache_writable": writable}
    return found | {"free_disk_of_cache": there, "free_disk": here}


def decoder() -> dict[str, Any]:
    """The C compiler that was found, and why there is no C decoder, if there is none."""
    from open_mythos.generation.native.build import compiler, library

    code = library()
    return {"compiler": shlex.join(compiler() or []) or None, "no_decoder": code if isinstance(code, str) else None}


def extras() -> dict[str, dict[str, str | None]]:
    """Versions of the packages of every extra; None for one that is missing."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {name: {package: found(package) for package in packages} for name, (_, packages) in EXTRAS.items()}


def demo_seconds() -> float:
    """Estimated seconds of ``mythos demo`` on this machine, from a few of its steps."""
    from open_mythos.training.cost import run_cost
    from open_mythos.training.recipes import configured

    cfg = configured("demo", [])
    return run_cost(cfg).seconds_per_step * cfg.steps


def rows(facts: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows of the table: a part of the machine, what is there, and what that means."""
    build = facts["built_for"]
    yield "torch", f"{facts['torch']}, Python {facts['python']}", f"built for {f'GPUs, {build}' if build else 'CPUs'}"
    for name, called in facts["gpus"].items():
        yield name, called, f"{si(facts['free_gpu_memory'][name], 'B')} free"
    if not facts["gpus"]:
        cpu_only = "not needed; if there is one, install a CUDA build of torch"
        yield "GPU", "none", facts["gpu_trouble"] or ("none that this torch can use" if build else cpu_only)
    yield "processor", f"{facts['name']}, {facts['instructions']}", VECTORS.get(facts["instructions"], "")
    yield "threads", f"{facts['threads']} of {facts['cores']}", "set by OMP_NUM_THREADS"
    why = facts["no_decoder"]
    yield (
        "C compiler",
        facts["compiler"] or "none",
        f"decoding works without it: {why}" if why else "decoding uses C code",
    )
    room = f"{si(facts['free_disk_of_cache'], 'B')} free"
    state = "exists" if facts["cache_exists"] else "created when needed"
    yield (
        "cache",
        facts["cache"],
        f"{state}, {room if facts['cache_writable'] else 'NOT WRITABLE: set OPEN_MYTHOS_CACHE'}",
    )
    memory = facts["free_memory"]
    yield (
        "memory",
        "unknown" if memory is None else f"{si(memory, 'B')} free",
        "mythos train … --dry-run shows what a run needs",
    )
    yield "disk", f"{si(facts['free_disk'], 'B')} free", "for this folder, where runs/ is written"


def expectations(facts: dict[str, Any]) -> Iterator[str]:
    """What to expect, in plain words, and what to do next: lines for :func:`note`."""
    gpu = next(iter(facts["gpus"]), None)
    yield f"Training and decoding run on {gpu}, mythos demo on the CPU." if gpu else "Everything runs on the CPU."
    draws = facts["extras"]["plots"]["matplotlib"] is not None
    yield (
        f"mythos demo trains for about {timedelta(seconds=round(facts['demo_seconds']))}, at the present load."
        + ("" if draws else f" Its plot needs the extra plots: {install_line('plots')}")
    )
    yield f"Next: {mythos(*(['demo'] if draws else ['eval', 'parity-tiny']))}."
