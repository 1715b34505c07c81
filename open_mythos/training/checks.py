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
    vocab_size, name, known = task.vocab_size, cfg.task.name, cfg.model.vocab_size
    fix = f"use model.vocab_size={vocab_size}"
    must(vocab_size <= known, f"model.vocab_size={known}, but {name} has {vocab_size} tokens; {fix}")
    n, batch_size, parts = distributed.world_size(), cfg.batch_size, cfg.accumulate
    parted = f"batch_size={batch_size} in accumulate={parts} parts"
    must(batch_size // parts % n == 0, f"{parted} does not divide among {n} processes; use a multiple of {n * parts}")
    low, high = cfg.task.min_difficulty, cfg.task.max_difficulty
    if isinstance(task, Text) and task.separate:
        given, fix = f"task.min_difficulty={low} and task.max_difficulty={high}", f"use task.min_difficulty={high}"
        must(low == high, f"{given}, but rows of text have one length; {fix}")
    difficulties = low, high, cfg.hardest_for_gate, *cfg.evaluation.difficulties
    for difficulty in difficulties:
        task.check(difficulty)
    hardest, limit = max(difficulties), cfg.model.max_seq_len
    longest = task.length(hardest)
    must(
        longest <= limit,
        f"{hardest} {task.unit} are {longest} tokens, more than model.max_seq_len={limit}; "
        f"use model.max_seq_len={longest}, or lower difficulties in training and evaluation",
    )
