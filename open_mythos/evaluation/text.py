"""Bits per byte of held-out text, at each depth."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch.nn.functional as F

from open_mythos.evaluation.depth import chunks, device_of, measuring, readings
from open_mythos.evaluation.grid import check_fit
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import Exit
from open_mythos.tasks.base import UNSCORED
from open_mythos.tasks.text import Text


def bits_per_byte(
    model: OpenMythos, task: Text, loops: Iterable[int], length: int, windows: int = 256, exit: Exit | None = None
) -> dict[int, float]:
    """Bits that the model needs for a byte of text, at each number of loops, all from one run.

    Unlike loss per token it can be compared between tokenizers. Tokens near the start of a window see little context
    and count like the others.

    Args:
        model: run in eval mode; mode and config are put back after.
        task: text; make it with ``split="held_out"`` for text that training has not seen.
        loops: numbers of loops to measure at.
        length: tokens of context.
        windows: how many stretches of that length, evenly spaced over the text.
        exit: when a position stops looping; with None, every position runs all loops.

    Returns:
        ``{loops: bits}`` in rising order.

    Raises:
        ValueError: for text that does not fit the model, or ``loops`` that do not exist.
    """
    check_fit(model, task, [length], windows)
    batch, nats = task.windows(length, windows), dict.fromkeys(sorted(set(loops)), 0.0)
    with measuring(model, halting=False):
        for part in chunks(batch, device_of(model)):
            for reading in readings(model, part.ids, nats, part.valid, exit=exit):
                nats[reading.loops] += float(F.cross_entropy(
                    reading.logits.flatten(0, 1).float(), part.targets.flatten(), ignore_index=UNSCORED, reduction="sum"
                ))  # fmt: skip
    n_bytes = int(task.bytes_of(batch.targets[batch.targets != UNSCORED]).sum())
    return {n: found / math.log(2) / n_bytes for n, found in nats.items()}
