"""Checks of a run's config against devices, task and processes."""

from __future__ import annotations

import torch

from open_mythos.fields import must
from open_mythos.tasks import Task
from open_mythos.tasks.text import Text
from open_mythos.training import distributed
from open_mythos.training.config import TrainConfig


def find_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is ``cuda`` if available, else ``cpu``.

    Raises:
        ValueError: for a device that is unknown or not available.
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
    """Raise ValueError, with a fix, for settings that would fail at the first step or in the final evaluation."""
    must(
        task.vocab_size <= cfg.model.vocab_size,
        f"model.vocab_size={cfg.model.vocab_size}, but {cfg.task.name} has {task.vocab_size} tokens; "
        f"use model.vocab_size={task.vocab_size}",
    )
    n, micro_batch = distributed.world_size(), cfg.batch_size // cfg.accumulate
    must(
        micro_batch % n == 0,
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
    limits = cfg.task.min_difficulty, cfg.task.max_difficulty, cfg.hardest_for_gate
    difficulties = (*limits, *cfg.evaluation.difficulties)
    for difficulty in difficulties:
        task.check(difficulty)
    hardest = max(difficulties)
    longest = task.length(hardest)
    must(
        longest <= cfg.model.max_seq_len,
        f"{hardest} {task.unit} are {longest} tokens, more than model.max_seq_len={cfg.model.max_seq_len}; "
        f"use model.max_seq_len={longest}, or lower difficulties in training and evaluation",
    )
