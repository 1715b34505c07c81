"""The training objective: initial states, loop counts, and the loss of a step, at one depth or at several."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos.context import Context
from open_mythos.model import OpenMythos
from open_mythos.nn.schedule import Among, Schedule, Stage, take
from open_mythos.ops.dispatch import shapes_follow_values
from open_mythos.ops.draws import row_keys
from open_mythos.tasks.base import UNSCORED, Batch
from open_mythos.training.allocator import give_back_here
from open_mythos.training.config import ONE_PASS, LoopConfig, LossConfig, TrainConfig
from open_mythos.training.growth import Growth

TERMS = ("cross_entropy", "z", "distillation", "change")
_TRIM_EVERY = 4  # recomputed loops between releases of free pages to the system; more: faster, but more memory
MAX_LOGITS = 2**26  # logits held in memory at one time, unless ``loss.chunk`` says otherwise


@dataclass
class Plan:
    """The random draws of one step, made before it begins. Tensors are (n,), one entry per sequence, on the CPU."""

    n_loops: Tensor  # loops to run
    n_grad: Tensor  # how many of these, the last ones, run with gradient
    short_loops: Tensor  # the same for the second run of the progressive loss
    short_grad: Tensor
    stale: Tensor  # whether it starts from the final state of the same row in the last batch, another problem
    outcome: Tensor  # whether only the final answer is supervised, and not the steps of the solution
    row: Tensor  # its index in the batch of all processes
    keys: Tensor | None  # seeds of its dropout and noise; None for a model without either
    rope_factor: Tensor | None  # of the rotary embedding, equal for all sequences of a step; None: the model's
    rests: Tensor  # whether ``loss.fixed_point`` applies: its state should no longer change at its last loop
    among: "Plan | None" = None  # the plan of all rows that run in lock-step with these, on any process
    meet: Callable[[Tensor, int], None] | None = None  # called with those of them that run a loop, see :class:`Among`

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return replace(self, **{name: part[rows] for name, part in vars(self).items() if part is not None})

    def schedules(self, progressive: float) -> list[tuple[Tensor, Tensor]]:
        """Loops, and loops with gradient, of each run; the short run has ``progressive`` of the loss's weight."""
        whole, short = (self.n_loops, self.n_grad), (self.short_loops, self.short_grad)
        return [whole] * (progressive < 1) + [short] * (progressive > 0)


@dataclass
class Outcome:
    """The loss of a micro-batch and what went into it."""

    loss: Tensor  # scalar, to be differentiated
    n_right: Tensor  # tokens supervised after the last loop that are predicted correctly, an integer
    n_asked: Tensor  # tokens supervised after the last loop: all scored ones, or those that are known by then
    n_loops: float  # loops run, mean over sequences
    parts: dict[str, Tensor]  # the terms of the loss, detached, before their weights


class Objective:
    """The loss of a looped model on a batch, as a :class:`TrainConfig` describes it.

    Args:
        cfg: reads ``loops``, ``loss``, ``kind``, ``steps``, ``checkpoint_loops``.
        teacher: in eval mode; see ``cfg.loss.teacher``.
    """

    def __init__(self, cfg: TrainConfig, teacher: OpenMythos | None = None) -> None:
        self.cfg, self.teacher = cfg, teacher
        self.terms = [term for term in TERMS if term != "distillation" or teacher is not None]
        self.short = cfg.loss.progressive if cfg.loss.depth == "progressive" else 0.0  # weight of the second run
        self.left = dict[int, Tensor]()  # by row: the final state of its last batch, (T, dim)

    def plan(
        self, step: int, n: int, length: int, generator: torch.Generator, n_steps: int = 1,
        growth: Growth | None = None,
    ) -> Plan:  # fmt: skip
        """Make the random draws of optimizer step ``step``, for ``n`` sequences of ``length`` tokens.

        Their solutions take ``n_steps``. While problems still grow, ``growth`` limits the loops, and the fixed-point
        loss is off, since it only slows growth down.
        """
        loops = self.cfg.loops if growth is None else growth.loops(self.cfg.loops)
        progress, rests = step / self.cfg.steps, torch.full((n,), growth is None or growth.is_full)
        most = loops.maximum
        outcome = torch.full((n,), progress >= 1 - self.cfg.loss.outcome)
        model = self.cfg.model
        is_noisy = model.dropout or model.state_noise or model.state_init == "noise"
        keys = row_keys(self.cfg.seed, step, n) if is_noisy else None
        each = outcome, torch.arange(n), keys, self._rope_factor(n, generator), rests
        if self.cfg.kind != "looped":  # the baselines have one depth, and gradient through all of it
            n_loops = torch.full((n,), min(self.cfg.depths[0], most))
            return Plan(n_loops, n_loops, n_loops, n_loops, torch.zeros(n, dtype=torch.bool), *each)
        n_loops = draw_loops(loops, progress, n, length, generator, n_steps)
        # Any number of loops without gradient, then any number with it that stays within the maximum (Bansal et al.)
        no_grad = torch.randint(0, most, (1,), generator=generator)
        with_grad = 1 + (torch.rand(1, generator=generator) * (most - no_grad)).long()
        # two numbers a row, of which one is used: earlier versions drew as many
        stale = torch.rand(2, n, generator=generator)[1] < loops.stale
        n_grad = n_loops.clamp(max={"all": most, "each": most, "one_step": 1}.get(loops.gradient, loops.grad_loops))
        return Plan(n_loops, n_grad, (no_grad + with_grad).expand(n), with_grad.expand(n), stale, *each)

    def _rope_factor(self, n: int, generator: torch.Generator) -> Tensor | None:
        if self.cfg.stretch == 1:
            return None
        return (1 + (self.cfg.stretch - 1) * torch.rand(1, generator=generator, dtype=torch.float64)).expand(n)

    def __call__(self, model: OpenMythos, batch: Batch, plan: Plan, n_scored: int) -> Outcome:
        """The loss of a micro-batch; ``plan`` holds its rows of the step's plan.

        ``batch.valid`` may stay on the CPU, so that reading it does not synchronise with a GPU. ``n_scored`` is the
        number of scored tokens of the whole step: each micro-batch's loss is its sum divided by this number, so that
        these losses add up to the step's.
        """
        cfg = self.cfg.loss
        run = _Run(model, batch, self.cfg, self.teacher, plan)
        short = self.short
        h = self._first_state(model, run.e, run.ctx, plan)
        schedules = plan.schedules(short)
        among = list[Among | None]([None] * len(schedules))
        if plan.among is not None and plan.meet is not None:
            among = [Among(*loops, plan.meet) for loops in plan.among.schedules(short)]
        ran = [run(h, *loops, plan.outcome, others) for loops, others in zip(schedules, among, strict=True)]
        if self.cfg.loops.stale:
            self.left = self.left | dict(zip(plan.row.tolist(), ran[0][2], strict=True))
        shares = [share for share in (1 - short, short) if share > 0]
        sums = torch.stack([share * sums for share, (sums, _, _) in zip(shares, ran, strict=True)]).sum(0)
        parts = {term: part for term, part in zip(TERMS, sums / n_scored, strict=True) if term in self.terms}
        distill = cfg.distill if self.teacher is not None else 0.0
        weights = {"cross_entropy": 1 - distill, "z": cfg.z, "distillation": distill, "change": cfg.fixed_point}
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        n_loops = schedules[0][0]
        detached = {name: part.detach() for name, part in parts.items()}
        n_right, n_asked = ran[0][1].unbind()
        return Outcome(loss, n_right, n_asked, float(n_loops.float().mean()), detached)

    def _first_state(self, model: OpenMythos, e: Tensor, ctx: Context, plan: Plan) -> Tensor:
        h = model.first_state(e, ctx)
        pairs = enumerate(zip(plan.row.tolist(), plan.stale.tolist(), strict=True))
        left = {i: self.left[row] for i, (row, is_stale) in pairs if is_stale and row in self.left}
        if not left:
            return h
        picked, rows = torch.stack(list(left.values())).to(e.device, h.dtype), torch.tensor(list(left))
        T = min(h.shape[1], picked.shape[1])
        h = h.clone()
        h[rows.to(e.device, non_blocking=True), :T] = picked[:, :T]
        return ctx.mask.without_padding(h)


class _Run:
    """Runs of the loop over one encoded batch."""

    def __init__(
        self, model: OpenMythos, batch: Batch, cfg: TrainConfig, teacher: OpenMythos | None, plan: Plan
    ) -> None:
        self.model, self.targets, self.cfg, self.teacher = model, batch.targets, cfg, teacher
        self.steps, self.rests = steps_asked(batch, cfg), plan.rests
        if teacher is not None:
            with torch.no_grad():
                self.teacher_hidden = teacher.hidden(batch.ids, attention_mask=batch.valid)
        factor = None if plan.rope_factor is None else float(plan.rope_factor[0])
        self.e, self.ctx = model.encode(batch.ids, attention_mask=batch.valid, keys=plan.keys, rope_factor=factor)

    def __call__(
        self, h: Tensor, n_loops: Tensor, n_grad: Tensor, outcome: Tensor, among: Among | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over scored tokens, (4,) as ``TERMS``; tokens right and supervised, (2,); final states, detached."""
        cfg = self.cfg
        sums, change = self.e.new_zeros(3, dtype=torch.float32), self.e.new_zeros((), dtype=torch.float32)
        hits, final = self.e.new_zeros(2, dtype=torch.long), torch.empty_like(h, requires_grad=False)
        damping = cfg.loops.damping if cfg.loops.gradient == "phantom" else 1.0
        schedule = Schedule(
            n_loops,
            n_grad,
            damping,
            cfg.checkpoint_loops,
            lambda h, loop: h if loop % _TRIM_EVERY else give_back_here(h),
            cfg.loops.gradient == "each" and cfg.kind == "looped",
            among,
        )
        for stage in self.model.recurrent.scheduled(h, self.e, self.ctx, schedule):
            if len(stage.rows) == 0:  # only other processes' rows run this loop; this one must join their backward pass
                sums = sums + 0 * stage.after.sum()
            weights = depth_weights(cfg.loss, stage, n_grad[stage.rows])
            supervised, ends = weights.nonzero().squeeze(1), (stage.left == 0).nonzero().squeeze(1)
            if len(supervised):
                rows = stage.rows[supervised]
                due = self._due(rows, int(n_loops[rows[0]] - stage.left[supervised[0]]), outcome[rows])
                inputs = take(stage.after, supervised), rows, due, weights[supervised]
                if cfg.checkpoint_loops and cfg.loss.supervises_every_loop:  # else the head's activations dominate
                    found, right = checkpoint(self._loss_terms, *inputs, use_reentrant=False)
                else:
                    found, right = self._loss_terms(*inputs)
                is_end = (stage.left[supervised] == 0).to(right.device, non_blocking=True)
                asked = (due != UNSCORED).sum(1).to(right.device, non_blocking=True)
                sums, hits = sums + found, hits + (torch.stack([right, asked]) * is_end).sum(1)
            if len(ends):
                rows, before, after = stage.rows[ends], take(stage.before, ends), take(stage.after, ends)
                if cfg.loss.fixed_point:
                    moved = (after - before).float().square().sum(-1)
                    moved = moved / after.float().square().sum(-1).clamp(min=1e-12)
                    scored = (take(self.targets, rows) != UNSCORED).sum(1)
                    rests = take(self.rests, rows).to(scored.device, non_blocking=True)
                    change = change + (moved.mean(1) * scored * rests).sum()
                final[rows.to(h.device, non_blocking=True)] = after.detach()
        return torch.cat([sums, change.view(1)]), hits, final

    def _due(self, rows: Tensor, n_run: int, outcome: Tensor) -> Tensor:
        """Targets of some rows after ``n_run`` loops, (R, T)."""
        targets = take(self.targets, rows)
        if self.steps is None:
            return targets
        steps = take(self.steps, rows)
        due = steps[..., min(n_run, steps.shape[2]) - 1]
        early = outcome.to(due.device, non_blocking=True).unsqueeze(1) & (due != targets)
        return due.masked_fill(early, UNSCORED)

    def _loss_terms(self, h: Tensor, rows: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums as of :func:`readout`, (3,), and correct tokens of each row, (R,)."""
        ctx = self.ctx if len(rows) == len(self.e) else self.ctx.rows(rows.to(h.device, non_blocking=True))
        x, asked = self.model.decode(h, ctx).flatten(0, 1), targets.flatten()
        weight = (weights.to(h.device, non_blocking=True).unsqueeze(1) * (targets != UNSCORED)).flatten()
        theirs = None if self.teacher is None else take(self.teacher_hidden, rows).flatten(0, 1)
        row = torch.arange(targets.numel(), device=h.device) // targets.shape[1]
        if shapes_follow_values(h):  # scored positions may be few: the head need not read the others
            scored = (asked != UNSCORED).nonzero().squeeze(1)
            x, asked, weight, row = x[scored], asked[scored], weight[scored], row[scored]
            theirs = None if theirs is None else theirs[scored]
        teacher = None if self.teacher is None or theirs is None else (self.teacher.head, theirs)
        chunk = self.cfg.loss.chunk or max(1, MAX_LOGITS // self.model.cfg.vocab_size)
        sums, hits = readout(self.model.head, x, asked, weight, chunk, teacher)
        return sums, row.new_zeros(len(targets)).index_add(0, row, hits.long())


def draw_loops(
    cfg: LoopConfig, progress: float, n: int, length: int, generator: torch.Generator, n_steps: int = 1
) -> Tensor:
    """Draw loop counts for ``n`` sequences of ``length`` tokens, (n,) int64; all equal if ``cfg.per`` is "batch".

    ``progress`` is the completed share of the run, 0 to 1; ``generator`` is on the CPU; solutions take ``n_steps``.
    """
    shape = (n if cfg.per == "sequence" else 1,)
    low, high = cfg.minimum, cfg.maximum
    if cfg.schedule == "fixed":
        drawn = torch.full(shape, cfg.mean).round()
    elif cfg.schedule == "by_length":
        drawn = torch.full(shape, math.ceil(length * cfg.per_token))
    elif cfg.schedule == "by_steps":
        drawn = n_steps + torch.randint(0, cfg.spare + 1, shape, generator=generator)
    elif cfg.schedule == "poisson":
        drawn = torch.poisson(torch.full(shape, cfg.mean), generator=generator)
    elif cfg.schedule == "lognormal":
        noise = torch.randn(shape, generator=generator)
        rate = cfg.mean * (cfg.sigma * noise - cfg.sigma**2 / 2).exp()  # log-normal with mean cfg.mean
        drawn = torch.poisson(rate, generator=generator)
    else:
        if cfg.schedule == "curriculum":
            high = low + round((high - low) * min(1.0, progress / cfg.ramp))
        drawn = torch.randint(low, high + 1, shape, generator=generator)
    return drawn.clamp(low, high).to(torch.int64).expand(n)


def steps_asked(batch: Batch, cfg: TrainConfig) -> Tensor | None:
    """Targets of each solution step, (n, T, S); None where only the answer is supervised, as for one-pass models."""
    return batch.steps if cfg.loss.depth == "steps" and cfg.kind not in ONE_PASS else None


def n_supervised(batch: Batch, cfg: TrainConfig) -> int:
    """Number of supervised positions of a batch: those with a target, or with step targets where these are used."""
    if batch.n_scored is not None:
        return batch.n_scored
    steps = steps_asked(batch, cfg)
    return int(((batch.targets if steps is None else steps[..., -1]) != UNSCORED).sum())


def depth_weights(cfg: LossConfig, stage: Stage, n_grad: Tensor) -> Tensor:
    """Loss weight of each sequence at this loop, (R,); they sum to one over its ``n_grad`` (R,) loops with gradient."""
    if cfg.depth in ("uniform", "steps"):
        return 1.0 / n_grad
    if cfg.depth == "geometric" and cfg.ratio < 1:
        return cfg.ratio**stage.left * (1 - cfg.ratio) / (1 - cfg.ratio**n_grad)
    return 1.0 / n_grad if cfg.depth == "geometric" else (stage.left == 0).float()


def statistics(logits: Tensor, targets: Tensor, theirs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce logits (N, vocab_size) to what the loss needs, (N,) each.

    Log-partition, logit of the target, KL divergence from the teacher's log-probabilities ``theirs``, likeliest token.
    """
    log_partition, divergence = logits.logsumexp(-1), logits.new_zeros(len(logits))
    if theirs is not None:
        divergence = F.kl_div(logits - log_partition[:, None], theirs, reduction="none", log_target=True).sum(-1)
    return log_partition, logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1), divergence, logits.argmax(-1)


def readout(
    head: torch.nn.Module, x: Tensor, targets: Tensor, weights: Tensor, chunk: int = 0,
    teacher: tuple[torch.nn.Module, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Terms of the loss, computed in chunks so that not all logits are in memory at once.

    Args:
        head, x: (N, dim) -> (N, vocab_size), and its input, (N, dim).
        targets, weights: (N,); ``UNSCORED`` and 0 at unscored positions.
        chunk: rows whose logits are in memory at one time, recomputed in the backward pass; 0: all.
        teacher: its head, and the input of that, (N, its dim).

    Returns:
        Weighted sums, (3,) of at least float32, of cross-entropy, of the squared log-partition and of the divergence
        from the teacher's predictions (0 without one), and (N,) bool, whether the likeliest token is the target.
    """
    teacher_head, others = (None, []) if teacher is None else (teacher[0], [teacher[1]])

    def terms(x: Tensor, targets: Tensor, weights: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        logits, theirs = head(x), None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if teacher_head is not None:
            with torch.no_grad():
                theirs = teacher_head(*others).to(logits.dtype).log_softmax(-1)
        of_all = getattr(head, "statistics", statistics)  # a head that is divided among processes brings its own
        log_partition, of_target, divergence, likeliest = of_all(logits, targets.clamp(min=0), theirs)
        sums = [(weights * x).sum() for x in (log_partition - of_target, log_partition.square(), divergence)]
        return torch.stack(sums), likeliest == targets

    inputs = x, targets, weights, *others
    if chunk == 0 or len(x) <= chunk:
        return terms(*inputs)
    by_chunk = zip(*(rows.split(chunk) for rows in inputs), strict=True)
    sums, hits = zip(*(checkpoint(terms, *part, use_reentrant=False) for part in by_chunk), strict=True)
    return torch.stack(sums).sum(0), torch.cat(hits)
