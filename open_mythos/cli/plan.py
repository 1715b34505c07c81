"""``mythos plan``: how to distribute the training of a model over GPUs, and its estimated cost; needs no GPU."""

import json as json_text
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_mythos.cli.console import console, mythos, note, si, table
from open_mythos.cli.info import find_config, training_at
from open_mythos.config import MythosConfig
from open_mythos.fields import must
from open_mythos.planning.job import Job, Settings

if TYPE_CHECKING:
    from open_mythos.planning.search import Found
    from open_mythos.planning.sheet import Sheet
    from open_mythos.training.config import TrainConfig

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def plan(
    variant: Annotated[
        str, typer.Argument(help="A variant such as 1b, a recipe, a run, a model's directory, or a config.json.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings such as device=h200 length=8192 parallel.expert=8 watts=650."
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(help="Total number of GPUs; each machine has node=8 of them.")] = 8,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Memory of one GPU; default: that of the device.")
    ] = None,
    interconnect: Annotated[
        str, typer.Option(help="Links within and between machines, as in nvlink, pcie,ethernet or 25 (GB/s).")
    ] = "",
    tokens: Annotated[
        str | None, typer.Option(help="Training tokens, as in 300B: also show days, energy and price.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="PER_HOUR", help="Hourly price of one GPU, in any currency.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
) -> None:
    """Plan the training of a model on many GPUs: layout, memory, traffic, time."""
    must(
        memory is None or 0 < memory < math.inf,
        f"--memory {memory}: give the memory of one GPU in GB, above 0, as in 80",
    )
    usable = price is None or 0 < price < math.inf
    must(usable, f"--price {price}: give the hourly price of one GPU, above 0, as in --price 2.50")
    must(price is None or tokens is not None, f"--price {price} needs the number of --tokens, as in --tokens 300B")
    n_tokens = None if tokens is None else count(tokens)
    from open_mythos.diagnostics import parameters
    from open_mythos.planning.search import search, would_fit
    from open_mythos.training.overrides import override

    cfg, settings = find_job(variant)
    settings = override(settings, overrides or [])
    job = Job(cfg, gpus, settings, 1e9 * (memory or 0), interconnect, parameters(cfg).total)
    found = search(job)
    if found.best is None:
        raise ValueError(f"{refusal(variant, found)}; use {would_fit(job)}")
    bill = None if n_tokens is None else costs(found.best, n_tokens, price)
    if json:
        print(json_text.dumps(as_data(variant, found.best, found, bill)))
        return
    show(variant, found.best, found)
    if bill is not None:
        rows = [(name, f"{value:,.3g}") for name, value in bill.items()]
        console.print(table(f"{tokens} tokens", "", "", rows=rows))
    given = {"--memory": memory and f"{memory:g}", "--interconnect": interconnect}
    again = [word for option, value in given.items() if value for word in (option, value)]
    alone = mythos("train", variant, "--dry-run") if is_recipe(variant) else mythos("info", variant)
    note(
        f"Settings for mythos train, run with torchrun: {' '.join(found.best.layout.settings)}",
        f"Next: {alone} shows what it costs on this machine, and "
        f"{mythos('plan', variant, *(overrides or []), '--gpus', 2 * gpus, *again)} what more GPUs gain.",
    )


def find_job(name: str) -> tuple[MythosConfig, Settings]:
    """The model's config by name or path, and its training settings if that is a recipe or a run, else defaults.

    Raises:
        ValueError: if there is no such model, or its config is invalid.
    """
    from open_mythos.training import runs
    from open_mythos.training.recipes import configured

    if is_recipe(name):
        return of_training(configured(name))
    path = Path(name)
    path = path / runs.RUN_CONFIG if path.is_dir() else path
    if path.is_file() and (job := training_at(path)) is not None:
        return of_training(job)
    return find_config(name), Settings()


def is_recipe(name: str) -> bool:
    """Whether ``name`` is a recipe's, and not an existing path."""
    from open_mythos.training.recipes import RECIPES

    return name in RECIPES and not Path(name).exists()


def of_training(cfg: "TrainConfig") -> tuple[MythosConfig, Settings]:
    """Model and settings of a run, at its maximum difficulty and number of trained loops."""
    from open_mythos import tasks

    hardest, loops = cfg.task.max_difficulty, cfg.loops.trained
    is_text = cfg.task.name == "text"  # its difficulty is the length; loading it would read the corpus
    length = hardest if is_text else tasks.load(cfg.task.name, **cfg.task.options).length(hardest)
    grad = {"all": loops, "each": loops, "one_step": 1}.get(cfg.loops.gradient, min(cfg.loops.grad_loops, loops))
    return cfg.model, Settings(
        batch_size=cfg.batch_size, length=length, loops=loops, grad_loops=grad, optimizer=cfg.optim.optimizer,
        ema=cfg.optim.ema > 0, precision=cfg.precision, checkpoint_loops="true" if cfg.checkpoint_loops else "",
    )  # fmt: skip


def count(text: str) -> float:
    """Parse a number of tokens such as ``3e11`` or ``300B``; ValueError for anything else."""
    digits, factor = (text[:-1], _SUFFIXES[text[-1].upper()]) if text[-1:].upper() in _SUFFIXES else (text, 1.0)
    try:
        number = float(digits) * factor
    except ValueError:
        number = math.nan
    must(0 < number < math.inf, f"--tokens {text!r} should be a number above 0, as in 300B or 3e11")
    return number


def refusal(name: str, found: "Found") -> str:
    """Why no layout fits."""
    least, job = found.least, found.least.job
    most = max(asdict(least.memory).items(), key=lambda kind: kind[1])
    said = (
        f"{name} does not fit {job.gpus} x {si(job.device.memory, 'B')}, of which {job.settings.usable:.0%} are taken "
        f"as usable: the smallest of {found.n_layouts} layouts needs {si(least.memory.total, 'B')} of each GPU, "
        f"{si(most[1], 'B')} of it {most[0]}"
    )
    alone = sharded_alone(found)
    return f"{said}; {alone}" if alone and least is found.sharded else said


def sharded_alone(found: "Found") -> str:
    """A phrase on the memory of FSDP alone if that does not fit, else ``""``."""
    sheet = found.sharded
    if sheet is None or sheet.layout.shard == 1 or sheet.memory.total <= sheet.job.room:
        return ""
    block = sum(unit.numel for unit in sheet.units if unit.name.startswith("recurrent"))
    whole = sum(unit.numel for unit in sheet.units)
    return (
        f"FSDP alone (expert=1, tensor=1) needs {si(sheet.memory.total, 'B')} of each GPU, however many there are: it "
        f"gathers the whole recurrent block, {block / whole:.0%} of the model, on each"
    )


def costs(sheet: "Sheet", tokens: float, price: float | None) -> dict[str, float]:
    """The cost of training on ``tokens`` tokens: steps, days, GPU-hours, energy of the GPUs alone, and price."""
    job, hours = sheet.job, tokens / sheet.tokens_per_second / 3600
    steps = tokens / (job.batch_size * job.length)
    bill = {"steps": steps, "days": hours / 24, "GPU-hours": hours * job.gpus}
    bill["kWh"] = bill["GPU-hours"] * job.device.watts / 1000
    return bill if price is None else bill | {"price": bill["GPU-hours"] * price}


def kept_and_recomputed(sheet: "Sheet") -> "dict[str, Sheet]":
    """Two versions of a sheet: with the activations of loops kept, and with loops recomputed."""
    kinds = {"loops kept": False, "recomputed": True}
    return {kind: type(sheet)(sheet.job, replace(sheet.layout, recompute=again)) for kind, again in kinds.items()}


def as_data(name: str, sheet: "Sheet", found: "Found", bill: dict[str, float] | None) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, tokens."""
    job = sheet.job
    memory = {kind: asdict(one.memory) for kind, one in kept_and_recomputed(sheet).items()}
    return {
        "model": name,
        "parameters": job.n_parameters,
        "gpus": job.gpus,
        "device": asdict(job.device),
        "layout": asdict(sheet.layout) | {"settings": sheet.layout.settings},
        "batch_size": job.batch_size,
        "length": job.length,
        "loops": job.loops,
        "grad_loops": job.grad_loops,
        "memory": memory | {"total": sheet.memory.total, "room": job.room},
        "collectives": [asdict(one) | {"seconds": sheet.seconds(one)} for one in sheet.collectives],
        "flops_per_gpu": sheet.flops,
        "seconds": sheet.times | {"step": sheet.step_seconds},
        "bound": sheet.bound,
        "tokens_per_second": sheet.tokens_per_second,
        "fsdp_alone": None if found.sharded is None else found.sharded.memory.total,
        "run": bill,
    }


def show(name: str, sheet: "Sheet", found: "Found") -> None:
    """Print memory by kind, collectives and times."""
    job, layout = sheet.job, sheet.layout
    both = kept_and_recomputed(sheet)
    shown = table(f"{name} on {job.gpus} x {job.settings.device}: memory of each", "", *both)
    for kind in asdict(sheet.memory):
        shown.add_row(kind, *(si(getattr(one.memory, kind), "B") for one in both.values()))
    shown.add_row("together", *(si(one.memory.total, "B") for one in both.values()))
    shown.add_row("room", *[si(job.room, "B")] * 2)
    console.print(shown)
    shown = table("collectives of a step", "", "group", "GPUs", "calls", "bytes of all", "seconds")
    merged: dict[tuple[str, str, int], list[float]] = {}
    for one in sheet.collectives:
        sums = merged.setdefault((one.kind, one.group, one.size), [0, 0, 0])
        for i, value in enumerate((one.count, one.count * one.bytes, sheet.seconds(one))):
            sums[i] += value
    for (kind, group, size), (calls, size_of_all, seconds) in merged.items():
        shown.add_row(kind, group, str(size), f"{calls:g}", si(size_of_all, "B"), f"{seconds:.3g}")
    if merged:
        console.print(shown)
    degrees = ", ".join(f"{key} {getattr(layout, key)}" for key in ("replicate", "shard", "expert", "tensor"))
    loops = "recomputed" if layout.recompute else "kept"
    peak = sheet.flops / sheet.step_seconds / job.device.flops
    rows = (
        ("layout", f"{degrees}; loops {loops}"),
        ("batch", f"{job.batch_size} x {job.length} tokens: {layout.accumulate} x {layout.rows} per data-parallel GPU"),
        ("loops", f"{job.loops}, {job.grad_loops} with gradient"),
        *((f"{kind} alone", f"{seconds:.3g} s") for kind, seconds in sheet.times.items()),
        ("a step", f"{sheet.step_seconds:.3g} s, bound by {sheet.bound}"),
        ("tokens/s", f"{sheet.tokens_per_second:,.0f}, {sheet.tokens_per_second / job.gpus:,.0f} per GPU"),
        ("operations", f"{peak:.0%} of the peak, including recomputation"),
    )
    console.print(table(f"the fastest of {found.n_layouts} layouts", "", "", rows=rows, left=""))
    alone = sharded_alone(found)
    console.print(
        f"{alone + '. ' if alone else ''}Estimates: matrix products at {job.settings.efficiency:.0%} of the peak "
        "(efficiency=), rates from data sheets; no GPU was measured. See docs/scale.md",
        style="dim",
    )
