"""What a looped model has to be compared with: models without a loop, of as many parameters or as much arithmetic."""

from __future__ import annotations

from dataclasses import replace

from open_mythos.model import OpenMythos, UnrolledMythos
from open_mythos.training.config import TrainConfig


def build(cfg: TrainConfig) -> OpenMythos:
    """The model that a run trains: :class:`OpenMythos`, or one of the baselines if ``cfg.kind`` says so.

    A looped model is built as it is trained here, by the run's own loop counts: its gate comes afterwards, and it
    explores no depths by itself.
    """
    model_cfg = replace(cfg.model, halting=False, warm_start=False)
    if cfg.kind == "single":
        return OpenMythos(replace(model_cfg, max_loop_iters=1))
    if cfg.kind == "unrolled":
        return UnrolledMythos(replace(model_cfg, max_loop_iters=cfg.loops.maximum))
    return OpenMythos(model_cfg)


def model_class(cfg: TrainConfig) -> type[OpenMythos]:
    """The class whose ``from_pretrained`` reads what such a run saves."""
    return UnrolledMythos if cfg.kind == "unrolled" else OpenMythos
