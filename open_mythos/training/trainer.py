"""The state of a training run and its optimizer step. Files and output are handled elsewhere."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_mythos import tasks
from open_mythos.diagnostics import parameters
from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.nn.auxiliary import balance, experts
from open_mythos.nn.injection import LTIInjection
from open_mythos.ops.dispatch import use_tf32
from open_mythos.tasks import Batch, Task
from open_mythos.tasks.text import Text
from open_mythos.training import baselines, distributed
from open_mythos.training.ahead import rows_ahead
from open_mythos.training.allocator import keep_freed_memory, memory
from open_mythos.training.config import ONE_PASS, TrainConfig
from open_mythos.training.growth import Growth, due, wait_with_dropout
from open_mythos.training.objective import Objective, Plan, n_supervised
from open_mythos.training.optim import EMA, Optimizer, lr_factor
from open_mythos.training.parallel.grid import Grid
from open_mythos.training.parallel.parallel import Parallel

# random streams beside torch's global one, which draws weights, and the keys of rows, which decide dropout and noise
_DATA, _LOOPS = 1, 2
_STATES, _PROBLEM = 3, 16  # values stored per trained weight: gradient, two moments; bytes of a token and its target


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what to change."""


class Lost(TrainingError):
    """Another process did not join a collective in time; the message names both."""


@dataclass
class StepResult:
    """What one step did."""

    loss: float
    accuracy: float  # share of the tokens supervised after the last loop that were right
    loops: float  # run, mean over sequences
    grad_norm: float  # of the whole gradient, before clipping
    tokens: int  # that went in
    skipped: bool  # loss or gradient were not finite, and nothing was updated
    parts: dict[str, float]  # each term of the loss before its weight
    by_task: list[float]  # accuracy on each task of which the step had a batch
    # of each process: the number from its ``say``, and the seconds since the last step in which it waited for no other
    heard: list[tuple[float, float]] = field(default_factory=list)


class Drawn(NamedTuple):
    """The batch that a step has of one task.

    Attributes:
        batch: problems of all processes; of text that is read in order, only the rows of this process.
        weight: share of the step's loss.
        growth: how far its problems have grown, None if they do not grow.
    """

    batch: Batch
    weight: float = 1.0
    growth: Growth | None = None


class Trainer:
    """A model, its data and its optimizer, with everything that decides the next step.

    :meth:`state_dict` holds all of it: a trainer that loads it makes the same further steps, bit for bit on the same
    machine. The constructor seeds torch's global generator and, on the CPU, has the process keep freed memory
    (:mod:`open_mythos.training.allocator`).

    With several processes (:mod:`open_mythos.training.distributed`), each has a trainer and runs its share of every
    batch; gradients are summed over processes, so that up to rounding the steps are those of one process.

    Attributes:
        step_number: steps made so far, skipped ones included.
        skipped, skipped_in_a_row: number of skipped steps, in all and up to the last step.
        expert_load: for each sparse layer, how many tokens each expert got in the last step.

    Raises:
        ValueError: for a task, a device or difficulties that do not fit.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg
        self.device = distributed.find_device(cfg.device)
        use_tf32(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        grid = Grid(cfg)
        with distributed.first_process_first():
            self.task = tasks.load(cfg.task.name, **cfg.task.options)
        self.shares = self.task.shares()
        check_fit(cfg, self.task)
        grid.connect(self.device, cfg.parallel.timeout)
        torch.manual_seed(cfg.seed)
        self.model = baselines.build(cfg)
        if cfg.start:
            baselines.start_from(self.model, cfg)
        baselines.train_only(self.model, cfg.optim.only)
        self.model.to(self.device).train()
        if cfg.compile:
            baselines.compile_blocks(self.model, cfg)
        self.rows = grid.share(cfg.batch_size)  # of this process
        self.ahead = rows_ahead(self.task, cfg, self.device, self.rows) if isinstance(self.task, Text) else None
        self.objective = Objective(cfg, baselines.load_teacher(cfg, self.device))
        self.parallel = Parallel(self.model, self.objective, cfg, grid)
        self.optimizer = Optimizer(self.model, cfg.optim, self.parallel.pieces)
        self.ema = EMA(self.parallel.held, cfg.optim.ema)
        self.data_rng = torch.Generator().manual_seed(1000 * cfg.seed + _DATA)
        self.loops_rng = torch.Generator().manual_seed(1000 * cfg.seed + _LOOPS)
        # one-pass baselines may never master even the smallest problems, so theirs are of full size from the start
        grows = cfg.task.growth > 0 and cfg.kind not in ONE_PASS
        self.growths = {share.name: Growth() for share in self.shares} if grows else {}
        self.step_number = self.skipped = self.skipped_in_a_row = 0
        self.expert_load = list[Tensor]()
        self._met = 0.0  # time at which the processes were last synchronised

    def step(self, say: Callable[[], float] = float) -> StepResult:
        """Draw a batch, run it, and update the weights, unless loss or gradient are not finite.

        ``say`` is called at its end; its number reaches all processes with those of the step (``StepResult.heard``).
        """
        drawn = self.draw()
        if self.growths:
            wait_with_dropout(self.model, self.growths, self.cfg.model.dropout)
        before = self._carried()
        try:
            result = self.forward_backward(drawn, say)
        except RuntimeError as error:
            if said := distributed.said_by_others(error, say):
                patience = f"parallel.timeout={self.cfg.parallel.timeout:g}"
                fix = f"see whether it has ended or hangs, and raise {patience} if it is only slow"
                raise Lost(f"{said}, in step {self.step_number + 1} ({error}); {fix}") from error
            raise
        self.step_number += 1
        if result.skipped:
            self._restore(before)
            self.skipped += 1
            self.skipped_in_a_row += 1
            return result
        self.skipped_in_a_row = 0
        for each, accuracy in zip(drawn, result.by_task, strict=True):
            if each.growth is not None:
                each.growth.add(accuracy, self.cfg.task.growth)
        self.optimizer.scale_lr(lr_factor(self.cfg.optim, self.step_number - 1, self.cfg.steps))
        self.optimizer.step()
        self.expert_load = [module.expert_load.clone() for module in experts(self.model)]
        balance(self.model)
        self.ema.update()
        return result

    def draw(self) -> list[Drawn]:
        """The next problems of all processes: a batch of each of the tasks that are :func:`due`.

        Each batch has one difficulty, drawn between minimum and maximum. Text of separate documents is not drawn but
        read in order, by the number of the step alone; of it only the rows of this process are made.
        """
        cfg, drawn = self.cfg.task, list[Drawn]()
        if self.ahead is not None:
            return [Drawn(self.ahead(self.step_number))]
        shares = due(self.shares, self.growths, cfg.growth, self.step_number) if self.growths else self.shares
        total = sum(share.weight for share in shares)
        for name, weight, task in shares:
            growth, hardest = self.growths.get(name), cfg.max_difficulty
            if growth is not None:
                task, hardest = growth.of(task, cfg)
            difficulty = int(torch.randint(min(cfg.min_difficulty, hardest), hardest + 1, (), generator=self.data_rng))
            drawn.append(Drawn(task.batch(self.cfg.batch_size, difficulty, self.data_rng), weight / total, growth))
        return drawn

    def forward_backward(self, drawn: list[Drawn], say: Callable[[], float] = float) -> StepResult:
        """Compute the gradients of one step, clipped, in ``self.model``; micro-batch by micro-batch.

        A GPU is synchronised with only at the end, when all numbers of the step are read at once.
        """
        self.parallel.step.zero_grad()
        torch.manual_seed(hash((self.cfg.seed, self.step_number, self.rows.start)))  # for modules that are not ours
        plans, loops, seen = list[Plan](), 0.0, list[Tensor]()
        alone = time.perf_counter()
        with self.parallel.counting():
            for each in drawn:
                plan, n_loops, numbers = self._add_gradients(each)
                plans.append(plan)
                loops += n_loops / len(drawn)
                seen.append(numbers)
            alone = alone if self.parallel.waits_inside else time.perf_counter()
        own = say(), alone - (self._met or alone)
        norm, sums, heard = self.parallel.add_up(torch.cat(seen), loops, plans, own)
        self._met = time.perf_counter()
        loops, *rest = sums
        of_tasks = torch.tensor(rest, dtype=torch.float64).view(len(drawn), -1)
        right, asked = of_tasks[:, 0], of_tasks[:, 1]
        weights = torch.tensor([each.weight for each in drawn], dtype=torch.float64)
        loss, *terms = (weights @ of_tasks[:, 2:]).tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:  # else scaling by the norm would make all gradients non-finite
            self.parallel.clip(norm)
        return StepResult(
            loss, float(right.sum() / asked.sum().clamp(min=1)), loops, norm,
            sum(self.cfg.batch_size * each.batch.ids.shape[1] for each in drawn), not finite,
            dict(zip(self.objective.terms, terms, strict=True)), (right / asked.clamp(min=1)).tolist(), heard,
        )  # fmt: skip

    def _add_gradients(self, drawn: Drawn) -> tuple[Plan, float, Tensor]:
        """Add the gradients of this process's rows of a task to those of the step.

        Returns:
            The plan; the contribution of these rows to the mean number of loops; and sums over these rows: tokens that
            were right, tokens that were supervised, loss, and its terms.
        """
        cfg, batch = self.cfg, drawn.batch
        n_scored = n_supervised(batch, cfg)
        length, n_steps = batch.ids.shape[1], 1 if batch.steps is None else batch.steps.shape[2]
        plan = self.objective.plan(self.step_number, cfg.batch_size, length, self.loops_rng, n_steps, drawn.growth)
        first, end = self.rows.start, self.rows.stop
        size = (end - first) // cfg.accumulate
        elsewhere = first if len(batch.ids) < cfg.batch_size else 0  # rows of other processes that `batch` leaves out
        loops, seen = 0.0, list[Tensor]()
        for start in range(first, end, size):
            rows = slice(start, start + size)
            micro = _move(batch, slice(start - elsewhere, start - elsewhere + size), self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                outcome = self.parallel.run(micro, plan, rows, n_scored)
            (drawn.weight * outcome.loss).backward()
            loops += outcome.n_loops * len(micro.ids) / cfg.batch_size
            numbers = outcome.n_right.float(), outcome.n_asked.float(), outcome.loss.detach()
            seen.append(torch.stack([*numbers, *outcome.parts.values()]))
        return plan, loops, torch.stack(seen).sum(0)

    def check_going(self, result: StepResult) -> None:
        """Raise TrainingError if ``cfg.max_bad_steps`` steps in a row have been skipped; ``result`` is the last one."""
        cfg = self.cfg
        if (bad := self.skipped_in_a_row) >= cfg.max_bad_steps:
            loss, norm = result.loss, result.grad_norm
            numbers = f"up to step {self.step_number} (loss {loss:g}, gradient norm {norm:g}{self._not_finite()})"
            fix = f"lower optim.lr={cfg.optim.lr:g} or lengthen optim.warmup={cfg.optim.warmup}, and start again"
            raise TrainingError(f"{bad} steps in a row had non-finite loss or gradient, {numbers}; {fix}")

    def _not_finite(self) -> str:
        """Name the first few weights, or if all are finite gradients, that are not finite."""
        for kind in ("weights", "gradients"):
            tensors = {name: p if kind == "weights" else p.grad for name, p in self.parallel.held.items()}
            names = [name for name, tensor in tensors.items() if tensor is not None and not tensor.isfinite().all()]
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                return f"; non-finite {kind} of {', '.join(names[:3])}{more}"
        return ""

    def gauges(self) -> dict[str, float | None]:
        """State of the run: learning rate, largest decay of the loop's linear part, balance of the experts' load.

        To be called by all processes. ``expert_balance`` is the least used expert's share of tokens times the number of
        experts, over the last step: 1 when all are used equally, 0 when one is not used. ``size`` is how far problems
        have grown, 0 to 1; with several tasks, the smallest of them, and ``size_NAME`` is that of each.
        """
        decays = list[float]()
        for path, module in self.model.named_modules():
            if isinstance(module, LTIInjection):
                decays.append(float(module.get_A(self.parallel.whole(f"{path}.raw_A")).max()))
        loads = [load.float() for load in self.expert_load]
        balance = [float(len(load) * load.min() / load.sum()) for load in loads if load.sum() > 0]
        return {
            "lr": self.cfg.optim.lr * lr_factor(self.cfg.optim, max(0, self.step_number - 1), self.cfg.steps),
            "spectral_radius": max(decays, default=None),
            "expert_balance": min(balance, default=None),
            "size": min((growth.size for growth in self.growths.values()), default=1.0),
            **({f"size_{name}": growth.size for name, growth in self.growths.items()} if len(self.growths) > 1 else {}),
        }

    def averaged(self) -> OpenMythos:
        """A copy of the model with the averaged weights, in eval mode: what a run saves; called by all processes."""
        state = self.parallel.model_state(self.ema.average)
        model = baselines.counted(self.cfg)
        if distributed.rank() == 0:  # the others hold only their shards
            at = distributed.device_with_room(self.device, sum(tensor.nbytes for tensor in state.values()))
            copied = {id(tensor): tensor.to(at, copy=True) for tensor in state.values()}  # a tied head stays tied
            model.load_state_dict({name: copied[id(tensor)] for name, tensor in state.items()}, assign=True)
        return model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, ``config`` among them. Tensors are not copied: each step changes them in place.

        With several processes, tensors that they divide are :class:`~open_mythos.training.checkpoints.Part`.
        """
        return {
            "config": self.cfg.to_dict(),
            "step": self.step_number,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "expert_load": self.expert_load,
            "growth": {name: vars(growth) for name, growth in self.growths.items()},
            "model": self.parallel.shared(self.parallel.held),
            "ema": {"updates": self.ema.updates, "average": self.parallel.shared(self.ema.average)},
            "optimizer": self.optimizer.state_dict(),
            "text": self.task.fingerprint() if isinstance(self.task, Text) else None,
            "data": self.data_rng.get_state(),
            "loops": self.loops_rng.get_state(),
            "buffers": self._carried()["buffers"],
            "left": self.parallel.of_rows(self.objective.left),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the ``state`` of a trainer of the same config.

        Raises:
            ValueError: if the text that it trains on has changed.
        """
        if isinstance(self.task, Text):
            changed = f"the text at source={self.task.source!r} has changed since the checkpoint was saved"
            must(state["text"] == self.task.fingerprint(), f"{changed}; restore it, or start a new run")
        self.step_number = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.expert_load = state.get("expert_load", [])  # earlier versions did not save it
        grown = state.get("growth") or {}
        if "size" in grown:  # of one task, as earlier versions had it
            grown = {self.task.name: grown}
        self.growths |= {name: Growth(**grown[name]) for name in self.growths if name in grown}
        self.parallel.load(self.parallel.held, state["model"])
        self.parallel.load(self.ema.average, state["ema"]["average"])
        self.ema.updates = state["ema"]["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.data_rng.set_state(state["data"])
        self.loops_rng.set_state(state["loops"])
        if "processes" in state:  # of earlier versions: other noise, and rows started from the state of any other row
            state = state["processes"][0]["carried"] | {"left": {}}
        mine = range(self.rows.start, self.rows.stop)  # other processes load the states of their rows
        left = {row: ended[()] for row, ended in state["left"].items() if row in mine}
        self._restore({"buffers": state["buffers"], "left": left})

    def _carried(self) -> dict[str, Any]:
        """What a forward pass changes and a later one reads: the model's buffers, the final states of rows."""
        return {"buffers": {n: b.clone() for n, b in self.model.named_buffers()}, "left": self.objective.left}

    def _restore(self, carried: dict[str, Any]) -> None:
        for name, buffer in carried["buffers"].items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, buffer.to(self.device))
        self.objective.left = carried["left"]


def check_fit(cfg: TrainConfig, task: Task) -> None:
    """Raise ValueError, with a fix, for settings that would fail at the first step or in the final evaluation."""
    n, known = task.vocab_size, cfg.model.vocab_size
    must(n <= known, f"model.vocab_size={known}, but {cfg.task.name} has {n} tokens; use model.vocab_size={n}")
    low, high = cfg.task.min_difficulty, cfg.task.max_difficulty
    if isinstance(task, Text) and task.separate:
        given, fix = f"task.min_difficulty={low} and task.max_difficulty={high}", f"use task.min_difficulty={high}"
        must(low == high, f"{given}, but all rows of text have one length; {fix}")
    for key, value in (("loss.depth", cfg.loss.depth), ("loops.schedule", cfg.loops.schedule)):
        unknown = f"{key}={value!r} needs the steps of a solution, which {task.name} does not have; use 'uniform'"
        must(task.has_steps or value not in ("steps", "by_steps"), unknown)
    check_room(cfg, task)
    difficulties = low, high, cfg.hardest_for_gate, *cfg.evaluation.difficulties
    for difficulty in difficulties:
        task.check(difficulty)
    if isinstance(task, Text):  # of which there may be less
        held_out = task.held_out()
        for difficulty in cfg.evaluation.difficulties:
            held_out.check(difficulty)
    hardest, limit = max(difficulties), cfg.model.max_seq_len
    longest = task.length(hardest)
    fix = f"use model.max_seq_len={longest}, or lower difficulties in training and evaluation"
    must(longest <= limit, f"{hardest} {task.unit} are {longest} tokens, more than model.max_seq_len={limit}; {fix}")


def check_room(cfg: TrainConfig, task: Task) -> None:
    """Raise ValueError if memory cannot hold the weights, or beside them the problems, or one state per token."""
    room, rows, length = memory(), cfg.batch_size // cfg.accumulate, task.length(cfg.task.max_difficulty)
    weights = 4 * (parameters(cfg.model).total + _STATES * baselines.n_trained(cfg))
    fix = "use a smaller model.dim, model.expert_dim or model.vocab_size, or fewer model.n_experts"
    must(weights <= room, f"training takes {weights / 1e9:,.0f} GB, but there are only {room / 1e9:,.0f}; {fix}")
    evaluated = max(map(task.length, cfg.evaluation.difficulties))
    for key, n, tokens, size in (
        ("batch_size", cfg.batch_size, length, _PROBLEM),
        ("batch_size", rows, length, 4 * cfg.model.dim),
        ("evaluation.examples", cfg.evaluation.examples, evaluated, _PROBLEM),
    ):
        most, said = int((room - weights) // (tokens * size)), f"{key}={n:,} of {tokens:,} tokens"
        fix = f"use {key}={min(most, 1 << 10)}, or less" if most else "lower the difficulty"
        must(n <= most, f"{said} takes {n * tokens * size / 1e9:,.0f} GB, but there are only {room / 1e9:,.0f}; {fix}")


def _move(batch: Batch, rows: slice, device: torch.device) -> Batch:
    """Rows of a batch, copied asynchronously to ``device``. ``valid`` stays: reading it there would synchronise."""
    is_gpu = device.type != "cpu"

    def move(part: Tensor) -> Tensor:
        return (part[rows].pin_memory() if is_gpu else part[rows]).to(device, non_blocking=is_gpu)

    return replace(replace(batch, valid=None).map(move), valid=None if batch.valid is None else batch.valid[rows])
