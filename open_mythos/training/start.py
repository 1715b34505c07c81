"""Other models that a run needs: the one it starts from, and the one it follows."""

from __future__ import annotations

import torch

from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.models import load_model
from open_mythos.training.config import TrainConfig
from open_mythos.training.overrides import differences


def start_from(model: OpenMythos, cfg: TrainConfig) -> None:
    """Give ``model`` the weights of ``cfg.start``.

    Raises:
        ValueError: if there is no such model, or it is of another shape, naming what differs.
    """
    must(
        cfg.kind != "unrolled",
        f"start={cfg.start!r} has one block for all loops and kind='unrolled' many; leave it out",
    )
    start = load_model(cfg.start)
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError as error:
        pairs = differences(start.cfg, cfg.model).items()
        changed = ", ".join(f"model.{key}={new!r} for {old!r}" for key, (old, new) in pairs)
        raise ValueError(
            f"start={cfg.start!r} is not of the run's model ({changed}); leave out what changes it"
        ) from error


def load_teacher(cfg: TrainConfig, device: torch.device) -> OpenMythos | None:
    """The model of ``cfg.loss.teacher``, in eval mode and without gradients; None if there is none.

    Raises:
        ValueError: if it cannot be found, or has other tokens.
    """
    if not cfg.loss.teacher:
        return None
    teacher = load_model(cfg.loss.teacher)
    must(
        teacher.cfg.vocab_size == cfg.model.vocab_size,
        f"loss.teacher={cfg.loss.teacher!r} has {teacher.cfg.vocab_size} tokens and the model {cfg.model.vocab_size}; "
        f"use a teacher of the same tokens",
    )
    return teacher.to(device).requires_grad_(False)
