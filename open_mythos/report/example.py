"""Per-loop trace of one problem."""

from typing import Any

import torch
from torch import Tensor

from open_mythos.diagnostics import trace
from open_mythos.model import OpenMythos
from open_mythos.nn.modes import eval_mode
from open_mythos.tasks import UNSCORED, Task

MAX_CELLS = 24_000  # maximum positions x loops of an example, about 0.4 MB of the page
PROBLEMS = 8  # problems that expert load is averaged over; the first one is the example


@torch.no_grad()
def trace_example(
    model: OpenMythos, task: Task, difficulty: int, n_loops: int, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trace a problem at every position and loop, up to ``n_loops``, and expert load over several problems.

    Returns:
        The example: tokens and targets (T); predictions, their probability in percent, relative state change and the
        gate's probability in percent (None without halting), (loops, T) each; loops used (T). And the share of tokens
        routed to each expert, (loops, n_experts).

    Raises:
        ValueError: for a difficulty out of range, or a problem too large for the model or the page.
    """
    problems = task.batch(PROBLEMS, difficulty, torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device
    ids, valid = problems.ids.to(device), None if problems.valid is None else problems.valid.to(device)
    length = problems.ids.shape[1] if problems.valid is None else int(problems.valid[0].bool().sum())
    if length * n_loops > MAX_CELLS:
        raise ValueError(
            f"{length} positions and {n_loops} loops are more than a page can show; use --loops of at most "
            f"{MAX_CELLS // length}, or a lower --difficulty"
        )
    traced = trace(model, ids, n_loops, valid)
    used = traced.loops_used[0, :length]
    n_run = int(used.max())
    first = None if valid is None else valid[:1, :length]
    with eval_mode(model):
        steps = model.iterate(ids[:1, :length], n_run, attention_mask=first)
        best = [logits[0].float().softmax(-1).max(-1) for _, logits in steps]
    probability, predictions = (torch.stack(rows) for rows in zip(*best, strict=True))  # (loops, T)
    tokens, targets = ids[0, :length].tolist(), problems.targets[0, :length].tolist()
    words = {*tokens, *targets, *predictions.unique().tolist()}
    example = {
        "difficulty": difficulty,
        "seed": seed,
        "allowed": n_loops,
        "halting": model.cfg.halting,
        "words": {token: task.vocab[token] for token in sorted(words - {UNSCORED}) if token < task.vocab_size},
        "tokens": tokens,
        "targets": [None if token == UNSCORED else token for token in targets],
        "predictions": predictions.tolist(),
        "probability": _percent(probability),
        "change": [[float(f"{x:.3g}") for x in row] for row in traced.delta[:n_run, 0, :length].tolist()],
        "gate": _percent(traced.halting[:n_run, 0, :length]) if model.cfg.halting else None,
        "used": used.tolist(),
    }
    load = traced.expert_load[traced.expert_load.sum(1) > 0]
    return example, {"problems": PROBLEMS, "share": (load / load.sum(1, keepdim=True)).tolist()}


def _percent(values: Tensor) -> Any:
    return (100 * values.float()).round().int().tolist()
