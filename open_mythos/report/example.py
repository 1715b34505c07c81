"""One problem, followed through every loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from open_mythos.diagnostics import trace
from open_mythos.model import OpenMythos
from open_mythos.nn.modes import eval_mode
from open_mythos.tasks import UNSCORED, Batch, Task

MOST_CELLS = 24_000
"""Positions times loops that a page shows, about 0.4 MB of it."""
PROBLEMS = 8
"""Over how many problems expert load is counted; the first of them is the one that is shown."""


@torch.no_grad()
def follow(
    model: OpenMythos, task: Task, difficulty: int, n_loops: int, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What happens to a problem at every position and loop, and which experts are chosen meanwhile.

    Args:
        model: run in eval mode, as it is configured; put back after.
        task: draws the problem.
        difficulty: of the problem.
        n_loops: allowed; fewer are shown where every position of the problem halts earlier.
        seed: of the problem.

    Returns:
        The example: tokens and targets (T), predictions, their probability in percent, and relative state change,
        (loops, T) each, the gate's probability in percent likewise or None without halting, loops used (T). And the
        share of token choices that each expert gets in each loop, (loops, n_experts).

    Raises:
        ValueError: if the problem does not exist, or does not fit the model or the page.
    """
    problems = task.batch(PROBLEMS, difficulty, torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device
    ids, valid = problems.ids.to(device), None if problems.valid is None else problems.valid.to(device)
    length = _length(problems)
    if length * n_loops > MOST_CELLS:
        raise ValueError(
            f"{length} positions and {n_loops} loops are more than a page can show; use --loops of at most "
            f"{MOST_CELLS // length}, or a lower --difficulty"
        )
    found = trace(model, ids, n_loops, valid)
    used = found.loops_used[0, :length]
    n_run = int(used.max())
    shown = slice(0, n_run), slice(0, length)
    predictions, probability = _predictions(
        model, ids[:1, :length], None if valid is None else valid[:1, :length], n_run
    )
    words = {*ids[0, :length].tolist(), *predictions.unique().tolist(), *problems.targets[0, :length].tolist()}
    example = {
        "difficulty": difficulty,
        "seed": seed,
        "allowed": n_loops,
        "halting": model.cfg.halting,
        "words": {token: task.vocab[token] for token in sorted(words - {UNSCORED}) if token < task.vocab_size},
        "tokens": ids[0, :length].tolist(),
        "targets": [None if token == UNSCORED else token for token in problems.targets[0, :length].tolist()],
        "predictions": predictions.tolist(),
        "probability": _percent(probability),
        "change": [[float(f"{x:.3g}") for x in row] for row in found.delta[:, 0][shown].tolist()],
        "gate": _percent(found.halting[:, 0][shown]) if model.cfg.halting else None,
        "used": used.tolist(),
    }
    load = found.expert_load[found.expert_load.sum(1) > 0]
    return example, {"problems": PROBLEMS, "share": (load / load.sum(1, keepdim=True)).tolist()}


def _length(problems: Batch) -> int:
    """Tokens of the first problem, padding left out."""
    return problems.ids.shape[1] if problems.valid is None else int(problems.valid[0].bool().sum())


def _predictions(model: OpenMythos, ids: Tensor, valid: Tensor | None, n_loops: int) -> tuple[Tensor, Tensor]:
    """The likeliest token after each loop and its probability, (n_loops, T) each."""
    with eval_mode(model):
        best = [
            logits[0].float().softmax(-1).max(-1) for _, logits in model.iterate(ids, n_loops, attention_mask=valid)
        ]
    return torch.stack([token for _, token in best]), torch.stack([probability for probability, _ in best])


def _percent(values: Tensor) -> list[list[int]]:
    rounded: list[list[int]] = (100 * values.float()).round().int().tolist()
    return rounded
