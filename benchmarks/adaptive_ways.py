"""Ways of decoding that ``adaptive.py`` times, with a fixed number of loops and with an exit.

The models answer at the positions of a given sequence. So a problem is fed token by token through a cache, and the
model answers at each position; the next token is the problem's, not the answer. This costs as much as generation does.
With PyTorch operators, a single row is decoded by the fused engine, and several rows in a plain batch, where each token
waits for the row that runs most loops, or by depth batching (``DepthBatch``), where no row waits. In compiled code, by
the native engine, no row waits for another either.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from open_mythos import KVCache, OpenMythos
from open_mythos.generation.depth_batching import DepthBatch
from open_mythos.generation.engine import Depth
from open_mythos.generation.engines import make_engine
from open_mythos.generation.sampling import Sampling
from open_mythos.nn.exits import Exit
from open_mythos.tasks import Batch

Timed = tuple[float, Tensor]
"""Seconds, and answers (n, T)."""


class Replay(Sampling):
    """Takes the place of sampling: records the top-1 token, and returns the next token of the problem."""

    def __init__(self, given: Sequence[int]) -> None:
        super().__init__()
        vars(self).update(given=iter([*given, 0]), answers=list[int]())

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> int:
        self.answers.append(int(logits.argmax(-1)))
        return next(self.given)


def plain(model: OpenMythos, batch: Batch, n_loops: int, exit: Exit | None) -> Timed:
    """All rows advance by one token at a time; padding, after the end of a row, runs no loops."""
    start, cache, answers = time.perf_counter(), KVCache(), []
    for t, column in enumerate(batch.ids.split(1, 1)):
        real = None if batch.valid is None else batch.valid[:, t : t + 1]
        answers.append(model(column, n_loops, cache, attention_mask=real, exit=exit).argmax(-1))
    return time.perf_counter() - start, torch.cat(answers, 1)


def by_engine(name: str, model: OpenMythos, batch: Batch, n_loops: int, exit: Exit | None, rows: int) -> Timed:
    """``rows`` rows at a time, token by token, by the engine of this name; its construction is not timed."""
    seconds, found = 0.0, []
    for part in batch.ids.split(rows):
        engine = make_engine(name, model, Depth(n_loops, exit), part.shape[1])
        start = time.perf_counter()
        found.append(torch.cat([engine.step(column).argmax(-1, keepdim=True) for column in part.split(1, 1)], 1))
        seconds += time.perf_counter() - start
    return seconds, torch.cat(found)


def depth_batched(model: OpenMythos, batch: Batch, n_loops: int, exit: Exit | None) -> Timed:
    """Each row continues as soon as its token is done; answers are 0 at padding."""
    start, engine, replays = time.perf_counter(), DepthBatch(model, exit, len(batch.ids)), []
    lengths = [batch.ids.shape[1]] * len(batch.ids) if batch.valid is None else batch.valid.sum(1).tolist()
    for row, length in zip(batch.ids.tolist(), lengths, strict=True):
        replays.append(Replay(row[1:length]))
        engine.add(torch.tensor(row[:1]), length, n_loops, replays[-1])  # type: ignore[arg-type]
    while engine.busy:
        engine.step()
    answers = torch.zeros_like(batch.ids)
    for row, (replay, length) in enumerate(zip(replays, lengths, strict=True)):
        answers[row, :length] = torch.tensor(replay.answers)
    return time.perf_counter() - start, answers


def race(model: OpenMythos, n_loops: int, batch: Batch, exit: Exit, rounds: int, one_by_one: bool) -> dict[str, Any]:
    """For every way: tokens per second, speedup over the fixed count, and share of answers that differ from "plain".

    Args:
        model: as returned by :func:`measuring`, without halting.
        one_by_one: decode the rows one after the other rather than at once.
    """
    rows = 1 if one_by_one else len(batch.ids)
    by_operations = partial(by_engine, "fused", rows=1) if one_by_one else plain
    compiled = partial(by_engine, "native", model, batch, n_loops, rows=rows)
    ways: dict[str, Callable[[], Timed]] = {
        "fixed": lambda: by_operations(model, batch, n_loops, None),
        "plain": lambda: by_operations(model, batch, n_loops, exit),
    }
    if not one_by_one:
        ways["depth-batched"] = lambda: depth_batched(model, batch, n_loops, exit)
    if batch.valid is None:
        ways["compiled fixed"] = lambda: compiled(exit=None)
        ways["compiled"] = lambda: compiled(exit=exit)
    real = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    by_operations(model, Batch(batch.ids[:, :4], batch.targets[:, :4]), n_loops, exit)  # warm-up
    for _ in range(rounds):
        for way, run in ways.items():
            took, answers[way] = run()
            seconds[way].append(took)
    found: dict[str, Any] = {"tokens_per_s": {way: int(real.sum()) / median(took) for way, took in seconds.items()}}
    found["speedup"] = {
        way: median(f / a for f, a in zip(seconds[beside], took, strict=True))
        for way, took in seconds.items()
        if (beside := "compiled fixed" if way == "compiled" else "fixed") != way
    }
    found["differing"] = {
        way: float((answers[way] != answers["plain"])[real].float().mean())
        for way in ways
        if way in ("depth-batched", "compiled")
    }
    return found
