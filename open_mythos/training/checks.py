"""Whether a run can be what its config says: the device is there, and model, task and processes fit each other."""

from __future__ import annotations

import torch

from open_mythos.fields import must
from open_mythos.tasks import Task
from open_mythos.tasks.text import Text
from open_mythos.training import distributed
from open_mythos.training.config import TrainConfig


def find_device(name: str) -> torch.device:
    """``cuda`` where there is one for "auto", or the device of that name.

    Raises:
        ValueError: for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        return distributed.local_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r} cannot be used ({first_line}); use 'auto' or 'cpu'") from error
    return device


def check_fit(cfg: TrainConfig, task: Task) -> None:
    """Refuse now what would otherwise fail at the first step, or after the last.

    Raises:
        ValueError: naming what does not fit, and what would.
    """
    must(
        task.vocab_size <= cfg.model.vocab_size,
        f"model.vocab_size={cfg.model.vocab_size}, but {cfg.task.name} has {task.vocab_size} tokens; "
        f"use model.vocab_size={task.vocab_size}",
    )
    n, share = distributed.world_size(), cfg.batch_size // cfg.accumulate
    must(
        share % n == 0,
        f"batch_size={cfg.batch_size} in accumulate={cfg.accumulate} parts does not divide among {n} processes; use a "
        f"multiple of {n * cfg.accumulate}",
    )
    if isinstance(task, Text) and task.separate:
        low, high = cfg.task.min_difficulty, cfg.task.max_difficulty
        must(
            low == high,
            f"task.min_difficulty={low} and task.max_difficulty={high}, but rows of text have one length; "
            f"use task.min_difficulty={high}",
        )
    trained = (cfg.task.min_difficulty, cfg.task.max_difficulty, cfg.hardest_for_gate)
    difficulties = (*trained, *cfg.evaluation.difficulties)
    for difficulty in difficulties:
        task.check(difficulty)
    hardest = max(difficulties)
    longest = task.length(hardest)
    must(
        longest <= cfg.model.max_seq_len,
        f"{hardest} {task.unit} are {longest} tokens, more than model.max_seq_len={cfg.model.max_seq_len}; "
        f"use model.max_seq_len={longest}, or easier problems to train on and measure",
    )
