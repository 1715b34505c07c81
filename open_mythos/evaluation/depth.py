"""Accuracy against loop count, the curve of this field."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from open_mythos.model import OpenMythos
from open_mythos.nn.modes import eval_mode


@torch.no_grad()
def accuracy_by_loops(model: OpenMythos, ids: Tensor, targets: Tensor, loops: Iterable[int]) -> dict[int, float]:
    """Share of positions whose likeliest token is the target, for each number of loops, all from one run.

    Args:
        model: run in eval mode, restored after.
        ids: (B, T) tokens.
        targets: (B, T) tokens that should follow from each position; -100 where none is scored.
        loops: numbers of loops to measure at.

    Returns:
        ``{loops: accuracy}`` in rising order.

    Raises:
        ValueError: if ``loops`` is empty or holds a number below 1, or nothing is scored.
    """
    wanted, scored = sorted(set(loops)), targets != -100
    if not wanted or wanted[0] < 1:
        raise ValueError(f"loops={wanted}; give one or more integers of at least 1")
    if not scored.any():
        raise ValueError("targets scores no position; give a token other than -100 somewhere")
    found: dict[int, float] = {}
    with eval_mode(model):
        e, freqs, mask = model.encode(ids)
        for state in model.recurrent.iterate(model.first_state(e), e, freqs, mask, wanted[-1]):
            last = state
            if state.loop + 1 in wanted:
                found[state.loop + 1] = _accuracy(model.head(model.decode(state.h, freqs, mask)), targets, scored)
        if wanted[-1] not in found:  # every position halted early: deeper counts all see these states
            final = _accuracy(model.head(model.decode(last.h, freqs, mask)), targets, scored)
            found |= {n: final for n in wanted if n not in found}
    return found


def _accuracy(logits: Tensor, targets: Tensor, scored: Tensor) -> float:
    return (logits.argmax(-1) == targets)[scored].float().mean().item()
