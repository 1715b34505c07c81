"""One run's state, and the step that moves it on. Files and screens are elsewhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from open_mythos import tasks
from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.nn.injection import LTIInjection
from open_mythos.nn.moe import MoEFFN
from open_mythos.tasks import UNSCORED, Batch
from open_mythos.training import baselines, runs
from open_mythos.training.config import TrainConfig
from open_mythos.training.objective import Objective
from open_mythos.training.optim import EMA, Optimizer, lr_factor
from open_mythos.training.overrides import differences

_DATA, _LOOPS = 1, 2  # streams of random numbers beside torch's own, which draws weights, dropout and noise


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what to change."""


@dataclass
class StepResult:
    """What one step did.

    Attributes:
        loss: its loss, and each term of it before its weight in ``parts``.
        accuracy: share of scored tokens that were right after the last loop.
        loops: run, mean over sequences.
        grad_norm: of the whole gradient, before clipping.
        tokens: that went in.
        skipped: loss or gradient were not finite, and nothing was updated.
    """

    loss: float
    accuracy: float
    loops: float
    grad_norm: float
    tokens: int
    skipped: bool
    parts: dict[str, float]


class Trainer:
    """A model, its data and its optimizer, with everything that decides the next step.

    :meth:`state_dict` holds all of it: a trainer that loads it makes the steps that the other would have made, bit
    for bit on the same machine. Making a trainer seeds torch's own random numbers.

    Args:
        cfg: the run.

    Attributes:
        step_number: steps made so far, skipped ones included.
        skipped, skipped_in_a_row: steps that were skipped so far, and just now.

    Raises:
        ValueError: for a task, a device or difficulties that do not fit.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg
        self.device = find_device(cfg.device)
        self.task = tasks.load(cfg.task.name, **cfg.task.options)
        _check_fit(cfg, self.task)
        torch.manual_seed(cfg.seed)
        self.model = baselines.build(cfg)
        if cfg.start:
            _start_from(self.model, cfg)
        self.model.to(self.device).train()
        self.objective = Objective(cfg, _teacher(cfg, self.device))
        self.optimizer = Optimizer(self.model, cfg.optim)
        self.ema = EMA(self.model, cfg.optim.ema)
        self.data_rng = torch.Generator().manual_seed(1000 * cfg.seed + _DATA)
        self.loops_rng = torch.Generator().manual_seed(1000 * cfg.seed + _LOOPS)
        self.step_number = self.skipped = self.skipped_in_a_row = 0

    # -- one step

    def step(self) -> StepResult:
        """Draw a batch, run it, and update the weights; or leave them, if loss or gradient are not finite."""
        batch = self.draw()
        before = self._carried()
        result = self.forward_backward(batch)
        self.step_number += 1
        if result.skipped:
            self._restore(before)
            self.skipped += 1
            self.skipped_in_a_row += 1
            return result
        self.skipped_in_a_row = 0
        self.optimizer.scale_lr(lr_factor(self.cfg.optim, self.step_number - 1, self.cfg.steps))
        self.optimizer.step()
        self.ema.update(self.model)
        return result

    def draw(self) -> Batch:
        """The next batch: problems of one difficulty, drawn between the least and the greatest."""
        cfg = self.cfg.task
        difficulty = int(torch.randint(cfg.min_difficulty, cfg.max_difficulty + 1, (), generator=self.data_rng))
        return self.task.batch(self.cfg.batch_size, difficulty, self.data_rng)

    def forward_backward(self, batch: Batch) -> StepResult:
        """Gradients of one step, clipped, in ``self.model``; micro-batch by micro-batch."""
        cfg = self.cfg
        n_scored = int((batch.targets != UNSCORED).sum())
        plan = self.objective.plan(self.step_number, cfg.batch_size, batch.ids.shape[1], self.loops_rng)
        self.optimizer.zero_grad()
        loss, right, loops, parts = 0.0, 0, 0.0, dict[str, float]()
        for rows in self._micro_batches():
            micro = _move(batch, rows, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                outcome = self.objective(self.model, micro, plan[rows], n_scored)
            outcome.loss.backward()
            loss += float(outcome.loss.detach())
            right += int(outcome.n_right)
            loops += outcome.n_loops / cfg.accumulate
            for name, part in outcome.parts.items():
                parts[name] = parts.get(name, 0.0) + float(part)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), cfg.optim.clip))
        finite = math.isfinite(loss) and math.isfinite(norm)
        return StepResult(loss, right / max(1, n_scored), loops, norm, batch.ids.numel(), not finite, parts)

    def check_going(self, result: StepResult) -> None:
        """Raise TrainingError if ``cfg.max_bad_steps`` steps in a row have been skipped, ``result`` the last."""
        cfg = self.cfg
        if self.skipped_in_a_row >= cfg.max_bad_steps:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row were not finite, up to step {self.step_number} "
                f"(loss {result.loss:g}, gradient norm {result.grad_norm:g}); lower optim.lr={cfg.optim.lr:g} "
                f"or lengthen optim.warmup={cfg.optim.warmup}, and start again"
            )

    def _micro_batches(self) -> Iterator[slice]:
        size = self.cfg.batch_size // self.cfg.accumulate
        return (slice(start, start + size) for start in range(0, self.cfg.batch_size, size))

    # -- what to show

    def gauges(self) -> dict[str, float | None]:
        """State of the run: learning rate, largest decay of the loop's linear part, evenness of the experts' load.

        ``expert_balance`` is the least used expert's share of tokens times the number of experts, over the last step:
        1 when all are used alike, 0 when one is not used.
        """
        modules = list(self.model.modules())
        decays = [float(module.get_A().detach().max()) for module in modules if isinstance(module, LTIInjection)]
        loads = [module.expert_load.float() for module in modules if isinstance(module, MoEFFN)]
        balance = [float(len(load) * load.min() / load.sum()) for load in loads if load.sum() > 0]
        return {
            "lr": self.cfg.optim.lr * lr_factor(self.cfg.optim, max(0, self.step_number - 1), self.cfg.steps),
            "spectral_radius": max(decays, default=None),
            "expert_balance": min(balance, default=None),
        }

    def averaged(self) -> OpenMythos:
        """A copy of the model with the averaged weights, in eval mode: what a run keeps."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model)
        return model.eval()

    # -- everything that decides the next step

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, ``config`` among them. The tensors are the trainer's own: each step moves them."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "config": self.cfg.to_dict(),
            "step": self.step_number,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "carried": self._carried(),
            "rng": {
                "torch": torch.get_rng_state(),
                "cuda": cuda,
                "data": self.data_rng.get_state(),
                "loops": self.loops_rng.get_state(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where the trainer that gave ``state`` was, one of the same config."""
        self.step_number = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._restore(state["carried"])
        rng = state["rng"]
        torch.set_rng_state(rng["torch"])
        if self.device.type == "cuda" and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.data_rng.set_state(rng["data"])
        self.loops_rng.set_state(rng["loops"])

    def _carried(self) -> dict[str, Any]:
        """What a forward pass changes and a later one reads: the model's buffers, the objective's states."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return {"buffers": buffers, "objective": self.objective.state_dict()}

    def _restore(self, carried: dict[str, Any]) -> None:
        for name, buffer in carried["buffers"].items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, buffer.to(self.device))
        self.objective.load_state_dict(carried["objective"])


def find_device(name: str) -> torch.device:
    """``cuda`` where there is one for "auto", or the device of that name.

    Raises:
        ValueError: for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r} cannot be used ({first_line}); use 'auto' or 'cpu'") from error
    return device


def _start_from(model: OpenMythos, cfg: TrainConfig) -> None:
    """Give ``model`` the weights that the run starts from."""
    must(
        cfg.kind != "unrolled",
        f"start={cfg.start!r} has one block for all loops and kind='unrolled' many; leave it out",
    )
    start = runs.load_model(cfg.start)
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError as error:
        changed = ", ".join(
            f"model.{key}={new!r} for {old!r}" for key, (old, new) in differences(start.cfg, cfg.model).items()
        )
        raise ValueError(
            f"start={cfg.start!r} is not of the run's model ({changed}); leave out what changes it"
        ) from error


def _teacher(cfg: TrainConfig, device: torch.device) -> OpenMythos | None:
    if not cfg.loss.teacher:
        return None
    teacher = runs.load_model(cfg.loss.teacher)
    must(
        teacher.cfg.vocab_size == cfg.model.vocab_size,
        f"loss.teacher={cfg.loss.teacher!r} has {teacher.cfg.vocab_size} tokens and the model {cfg.model.vocab_size}; "
        f"use a teacher of the same tokens",
    )
    return teacher.to(device).requires_grad_(False)


def _move(batch: Batch, rows: slice, device: torch.device) -> Batch:
    valid = None if batch.valid is None else batch.valid[rows].to(device)
    return Batch(batch.ids[rows].to(device), batch.targets[rows].to(device), valid)


def _check_fit(cfg: TrainConfig, task: tasks.Task) -> None:
    """Refuse now what would otherwise fail at the first step, or after the last."""
    must(
        task.vocab_size <= cfg.model.vocab_size,
        f"model.vocab_size={cfg.model.vocab_size}, but {cfg.task.name} has {task.vocab_size} tokens; "
        f"use model.vocab_size={task.vocab_size}",
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
