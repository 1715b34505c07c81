"""Search for the fastest layout that fits into memory, and advice on what to change where none does."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from open_mythos.fields import must
from open_mythos.planning.job import Degrees, Job, Layout
from open_mythos.planning.rank import tensor_degrees
from open_mythos.planning.sheet import Sheet

_MOST_GPUS, _MOST_ROWS = 1 << 16, 1 << 10


class Found(NamedTuple):
    """Result of a search.

    Attributes:
        best: the fastest sheet that fits; None if none does.
        least: the one that takes the least memory.
        sharded: the one that takes the least memory with FSDP alone (no expert or tensor parallelism), if there is one.
        n_layouts: number of layouts examined.
    """

    best: Sheet | None
    least: Sheet
    sharded: Sheet | None
    n_layouts: int


def search(job: Job, most_rows: int = _MOST_ROWS) -> Found:
    """Examine every layout of the job's GPUs, with at most ``most_rows`` rows in a micro-batch.

    Raises:
        ValueError: if degrees that are set do not divide GPUs or sizes of the model, or GPUs do not divide the batch.
    """
    sheets = [Sheet(job, layout) for layout in layouts(job, most_rows)]
    fitting = [sheet for sheet in sheets if sheet.memory.total <= job.room]
    alone = [sheet for sheet in sheets if sheet.layout.expert == sheet.layout.tensor == 1]

    def size(sheet: Sheet) -> float:
        return sheet.memory.total

    best = min(fitting, key=lambda sheet: (sheet.step_seconds, size(sheet)), default=None)
    return Found(best, min(sheets, key=size), min(alone, key=size, default=None), len(sheets))


def layouts(job: Job, most_rows: int = _MOST_ROWS) -> list[Layout]:
    """All layouts, each a way to divide the GPUs and the batch.

    Raises:
        ValueError: as :func:`search`.
    """
    cfg, asked, gpus = job.cfg, job.settings.parallel, job.gpus
    widths, experts = tensor_degrees(cfg), max(1, cfg.n_experts)
    degrees = {name: value for name, value in asked.to_dict().items() if value}
    for name, value in degrees.items():
        if name != "expert":
            must(gpus % value == 0, f"parallel.{name}={value} does not divide --gpus {gpus}; use a divisor of {gpus}")
    known = ", ".join(map(str, widths))
    said = f"parallel.tensor={asked.tensor} does not divide every feed-forward"
    must(asked.tensor in (0, *widths), f"{said}; use one of {known}")
    what = f"{experts} experts" if cfg.n_experts else "no experts"
    must(
        experts % (asked.expert or 1) == 0,
        f"parallel.expert={asked.expert}, but the model has {what}; use a divisor of {experts}",
    )
    found = [layout for shares in _shares(job) for layout in _batches(job, shares, most_rows)]
    if not found:
        said = " ".join(f"parallel.{name}={value}" for name, value in degrees.items())
        n, by = job.batch_size, min((s.replicate * s.shard for s in _shares(job)), default=0)
        must(
            by == 0,
            f"batch_size={n} cannot be shared by {by} GPUs with rows of their own; use a multiple of {by}",
        )
        raise ValueError(
            f"{said or 'no layout'} does not fit --gpus {gpus}: replicate * shard * tensor must be the number of GPUs, "
            f"and expert a divisor or a multiple of shard; leave one of them out"
        )
    return found


def _shares(job: Job) -> Iterator[Layout]:
    asked, gpus = job.settings.parallel, job.gpus
    experts = _divisors(max(1, job.cfg.n_experts))
    for tensor in tensor_degrees(job.cfg):
        for shard in _divisors(gpus // tensor) if gpus % tensor == 0 else ():
            replicate = gpus // tensor // shard
            n = replicate * shard
            for expert in (e for e in experts if n % e == 0 and (shard % e == 0 or e % shard == 0)):
                layout = Layout(replicate, shard, expert, tensor)
                slices = layout.slices if expert > 1 else 1
                divides = 2 * job.cfg.expert_dim % slices == 0 and job.cfg.dim % slices == 0
                if not divides or (tensor > 1 and job.cfg.dim % shard):
                    continue  # FSDP could not divide a GPU's part evenly
                if all(value in (0, getattr(layout, name)) for name, value in asked.to_dict().items()):
                    yield layout


def _batches(job: Job, shares: Layout, most_rows: int) -> Iterator[Layout]:
    readers = shares.replicate * shares.shard
    own, recompute = job.batch_size // readers, job.settings.checkpoint_loops
    if job.batch_size % readers:
        return
    for rows in _divisors(own):
        if rows <= most_rows and (rows & (rows - 1) == 0 or rows == own):
            for again in (False, True):
                if recompute in ("", str(again).lower()):
                    yield replace(shares, rows=rows, accumulate=own // rows, recompute=again)


def would_fit(job: Job) -> str:
    """Options for ``mythos plan`` under which a job that does not fit would: layout, more GPUs, or more memory."""
    frugal = replace(job.settings, parallel=Degrees(), checkpoint_loops="true", batch_size=0)
    here = search(job, most_rows=1)
    free = search(replace(job, settings=frugal), most_rows=1)
    if free.best is not None:
        return f"{_degrees(free.best)} or {_memory(here.least)} as it is"
    doubled = [job.gpus << i for i in range(1, _MOST_GPUS.bit_length()) if job.gpus << i <= _MOST_GPUS]
    for gpus in [*doubled[-1:], *doubled]:  # the maximum first: if it does not fit there, it does not on fewer
        found = search(replace(job, gpus=gpus, settings=frugal), most_rows=1)
        if found.best is None and gpus == doubled[-1]:
            more = f"--gpus {gpus} {_memory(found.least)} {_degrees(found.least)}"
            return f"{_memory(free.least)} {_degrees(free.least)} or {more}"
        if found.best is not None and (gpus < doubled[-1] or len(doubled) == 1):
            return f"--gpus {gpus} {_degrees(found.best)} or {_memory(here.least)} as it is"
    return f"{_memory(free.least)} {_degrees(free.least)}"


def _degrees(sheet: Sheet) -> str:
    return " ".join([*sheet.layout.settings[:4], *sheet.layout.settings[5:]])


def _memory(sheet: Sheet) -> str:
    needed = sheet.memory.total / sheet.job.settings.usable / 1e9
    return f"--memory {needed:.3g}" if needed < 10 else f"--memory {math.ceil(needed)}"


def _divisors(n: int) -> list[int]:
    return [degree for degree in range(1, n + 1) if n % degree == 0]
