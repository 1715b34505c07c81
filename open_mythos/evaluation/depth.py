"""A model's predictions at each depth, all from one run: the basis of every measure of this package."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_mythos.context import Context
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit
from open_mythos.nn.modes import eval_mode
from open_mythos.nn.recurrent import Readout
from open_mythos.tasks.base import UNSCORED, Batch

CHUNK = 8192
"""Tokens per forward pass, so that memory does not grow with the number of problems."""


class Reading(NamedTuple):
    """State and predictions of a model as if its last loop were this one.

    Attributes:
        loops: maximum number of loops.
        state: (B, T, dim).
        logits: (B, T, vocab_size).
        used: (B, T) int64, loops that each position ran: ``loops``, less where halting stopped it, 0 at padding.
    """

    loops: int
    state: Tensor
    logits: Tensor
    used: Tensor


@contextmanager
def measuring(
    model: OpenMythos, halting: bool | None = None, act_threshold: float | None = None
) -> Iterator[OpenMythos]:
    """Context for evaluating ``model``: eval mode, no gradients, and optionally other values in its config.

    Yields ``model`` itself if ``halting`` and ``act_threshold`` are None; otherwise a shallow copy that shares its
    modules and has a config with these values. ``model`` keeps its modes and config, so other threads may use it.
    """
    changed = {"halting": halting, "act_threshold": act_threshold}
    changed = {name: value for name, value in changed.items() if value is not None}
    with eval_mode(model), torch.no_grad():
        yield _with(model, changed) if changed else model


def _with(model: OpenMythos, changed: dict[str, Any]) -> OpenMythos:
    other, core, cfg = copy(model), copy(model.recurrent), copy(model.cfg)
    for name, value in changed.items():
        setattr(cfg, name, value)
    other.cfg = core.cfg = cfg
    other._modules = model._modules | {"recurrent": core}
    return other


def readings(
    model: OpenMythos,
    ids: Tensor,
    loops: Iterable[int],
    valid: Tensor | None = None,
    start: Callable[[Tensor, Context], Tensor] | None = None,
    exit: Exit | None = None,
) -> Iterator[Reading]:
    """Run ``model`` once and yield a reading after each of ``loops``, ascending; use it inside :func:`measuring`.

    Args:
        model, loops: the model, as :func:`measuring` yields it, and the numbers of loops to read at.
        ids, valid: (B, T) tokens, and bool, False at padding; None without padding.
        start: makes the initial state of the encoded input (B, T, dim) and its context; None: the model's own.
        exit: when a position stops looping; None: when the gate says so if ``cfg.halting``, else never.

    Raises:
        ValueError: if ``loops`` is empty or holds a number below 1, and for logits that are not finite.
    """
    wanted = sorted(set(loops))
    if not wanted or wanted[0] < 1:
        raise ValueError(f"loops={wanted}; give one or more integers of at least 1")
    e, ctx = model.encode(ids, attention_mask=valid)
    h, used = (start or model.first_state)(e, ctx), torch.zeros_like(ids)
    predict = finite(model.readout(ctx))
    for state in model.recurrent.iterate(h, e, ctx, wanted[-1], exit, predict):
        h, used = state.h, used + state.ran
        if state.loop + 1 == wanted[0]:
            yield Reading(wanted.pop(0), h, predict(h, state.loop), used)
    if wanted:  # every position halted early, so greater depths have the same states
        last = Reading(wanted[0], h, predict(h, wanted[0]), used)
        yield from (last._replace(loops=n) for n in wanted)


def finite(readout: Readout) -> Readout:
    """Wrap ``readout`` to raise ValueError for non-finite logits, whose argmax would count as the answer token 0."""

    def predict(h: Tensor, loop: int) -> Tensor:
        logits = readout(h, loop)
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "logits are not finite, so nothing can be measured; look for weights that are not finite or too large, "
                "or run the model in a wider dtype"
            )
        return logits

    return predict


def chunks(batch: Batch, device: torch.device) -> Iterator[Batch]:
    """Split ``batch`` into chunks of at most ``CHUNK`` tokens, or of one row, moved to ``device``."""
    rows = max(1, CHUNK // batch.ids.shape[1])
    for first in range(0, len(batch.ids), rows):
        yield batch.map(itemgetter(slice(first, first + rows))).map(lambda part: part.to(device))


def device_of(model: OpenMythos) -> torch.device:
    return next(model.parameters()).device


def accuracy_by_loops(model: OpenMythos, ids: Tensor, targets: Tensor, loops: Iterable[int]) -> dict[int, float]:
    """Share of positions whose likeliest token is the target, for each number of loops, all from one run.

    ``targets`` (B, T) are the correct outputs at each position of ``ids`` (B, T), -100 where none is scored. The model
    runs in eval mode, and its own mode is restored; the loops of the result ascend.

    Raises:
        ValueError: if ``loops`` is empty or holds a number below 1, or nothing is scored.
    """
    scored = targets != UNSCORED
    if not scored.any():
        raise ValueError("targets is -100 everywhere, so no position is scored; set a token at one or more positions")
    with measuring(model):
        return {
            reading.loops: (reading.logits.argmax(-1) == targets)[scored].float().mean().item()
            for reading in readings(model, ids, loops)
        }
