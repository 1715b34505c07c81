"""Bits per byte of held-out text, at each depth."""

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
    model: OpenMythos, task: Text, loops: Iterable[int], length: int, windows: int = 256
) -> dict[int, float]:
    """Bits per byte by number of loops, as of :func:`text_scores` without an exit."""
    return text_scores(model, task, loops, length, windows)[0]


def text_scores(
    model: OpenMythos, task: Text, loops: Iterable[int], length: int, windows: int = 256, exit: Exit | None = None
) -> tuple[dict[int, float], dict[int, float]]:
    """Bits per byte of text at each number of loops, from a single run, comparable between tokenizers; and loops run,
    mean over positions.

    Tokens near the start of a window, with little context, count like the others.

    Args:
        model: run in eval mode; its own mode and config are restored.
        task: text; with ``split="held_out"`` for text not seen in training.
        loops: numbers of loops to evaluate, ascending in the result.
        length, windows: tokens of context, and number of windows of that length, evenly spaced over the text.
        exit: when a position stops looping; None runs all loops.

    Raises:
        ValueError: for text that does not fit the model, or ``loops`` below 1.
    """
    check_fit(model, task, [length], windows)
    batch, nats = task.windows(length, windows), dict.fromkeys(sorted(set(loops)), 0.0)
    used = dict.fromkeys(nats, 0.0)
    with measuring(model, halting=False) as model:
        for part in chunks(batch, device_of(model)):
            for reading in readings(model, part.ids, nats, part.valid, exit=exit):
                nats[reading.loops] += float(F.cross_entropy(
                    reading.logits.flatten(0, 1).float(), part.targets.flatten(), ignore_index=UNSCORED, reduction="sum"
                ))  # fmt: skip
                used[reading.loops] += float(reading.used.sum())
    n_bytes = int(task.bytes_of(batch.targets[batch.targets != UNSCORED]).sum())
    positions = batch.ids.numel() if batch.valid is None else int(batch.valid.bool().sum())
    bits = {n: total / math.log(2) / n_bytes for n, total in nats.items()}
    return bits, {n: total / positions for n, total in used.items()}
