"""Ways of decoding that ``adaptive.py`` times, with a fixed number of loops and with an exit.

The models answer at the positions of a given sequence, so decoding means: problems are fed token by token through a
cache, each position answered when its token comes, the next token given and not the answer. That is what generation
costs. By the library's operations: one row as in ``model.generate``; several in a plain batch, where a token waits for
the slowest row's, or by depth batching (``DepthBatch``), where none does. Compiled, no row waits for another either.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from open_mythos import KVCache, OpenMythos
from open_mythos.evaluation.depth import measuring
from open_mythos.generation.decoder import Decoder, make_decoder
from open_mythos.generation.depth_batching import DepthBatch
from open_mythos.generation.native.decoder import CompiledDecoder
from open_mythos.nn.exits import Exit
from open_mythos.tasks import Batch

Timed = tuple[float, Tensor]
"""Seconds, and answers (n, T)."""


class Replay:
    """Stands in for sampling: notes the likeliest token, and hands out the one that the problem goes on with."""

    temperature = None

    def __init__(self, given: Sequence[int]) -> None:
        self.given, self.answers = iter([*given, 0]), list[int]()

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> int:
        self.answers.append(int(logits.argmax(-1)))
        return next(self.given)


def plain(model: OpenMythos, batch: Batch, n_loops: int, exit: Exit | None) -> Timed:
    """All rows one token further at a time; padding, behind a row's end, waits for no loop."""
    start, cache, answers = time.perf_counter(), KVCache(), []
    for t, column in enumerate(batch.ids.split(1, 1)):
        real = None if batch.valid is None else batch.valid[:, t : t + 1]
        answers.append(model(column, n_loops, cache, attention_mask=real, exit=exit).argmax(-1))
    return time.perf_counter() - start, torch.cat(answers, 1)


@torch.no_grad()
def alone(model: OpenMythos, batch: Batch, n_loops: int, exit: Exit | None) -> Timed:
    """Row after row, each token by token as ``model.generate`` makes them."""
    start, found = time.perf_counter(), []
    for row in batch.ids.split(1):
        cache, answers = KVCache(room=row.shape[1]), []
        decoder = make_decoder(model, n_loops, padded=False)
        assert isinstance(decoder, Decoder)
        for column in row.split(1, 1):
            e, tokens = decoder.encode(column, cache)
            h = decoder.first_state(e)
            if exit is None:
                h = decoder.loops(h, e, tokens, 0, n_loops)
            else:
                h = decoder.loops_until(exit, h, e, tokens, n_loops)
            answers.append(decoder.decode(h, tokens).argmax(-1))
        found.append(torch.cat(answers, 1))
    return time.perf_counter() - start, torch.cat(found)


def depth_batched(model: OpenMythos, batch: Batch, n_loops: int, exit: Exit | None) -> Timed:
    """Each row going on as soon as it can; 0 at padding."""
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


@torch.no_grad()
def compiled(model: OpenMythos, batch: Batch, n_loops: int, exit: Exit | None, rows: int) -> Timed:
    """So many rows at a time, by compiled code. It needs slots that a prompt has made, so the modules read the first
    token, which is then forgotten again; making ready is not counted."""
    decoder, seconds, found = CompiledDecoder(model, n_loops, exit), 0.0, []
    for part in batch.ids.split(rows):
        cache, answers = KVCache(room=part.shape[1]), []
        model(part[:, :1], n_loops, cache)
        for name in cache.lengths():
            cache.slot(name).truncate(0)
        start = time.perf_counter()
        for column in part.split(1, 1):
            answers.append(decoder.step(column, cache)[1].argmax(-1, keepdim=True))
        seconds += time.perf_counter() - start
        found.append(torch.cat(answers, 1))
    return seconds, torch.cat(found)


def race(model: OpenMythos, n_loops: int, batch: Batch, exit: Exit, rounds: int, one_by_one: bool) -> dict[str, Any]:
    """Every way's tokens per second, times as fast as the fixed count, and share of answers that "plain" has otherwise.

    Args:
        one_by_one: rows after each other, not at once.
    """
    by_operations, rows = (alone, 1) if one_by_one else (plain, len(batch.ids))
    ways: dict[str, Callable[[], Timed]] = {
        "fixed": lambda: by_operations(model, batch, n_loops, None),
        "plain": lambda: by_operations(model, batch, n_loops, exit),
    }
    if not one_by_one:
        ways["depth-batched"] = lambda: depth_batched(model, batch, n_loops, exit)
    if batch.valid is None:
        ways["compiled fixed"] = lambda: compiled(model, batch, n_loops, None, rows)
        ways["compiled"] = lambda: compiled(model, batch, n_loops, exit, rows)
    real = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    with measuring(model, halting=False):
        by_operations(model, Batch(batch.ids[:, :4], batch.targets[:, :4]), n_loops, exit)  # warm
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
