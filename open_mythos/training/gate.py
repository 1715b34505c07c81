"""Training of the halting gate, on labels that the finished model gives itself, at any difficulty.

A halted position changes what others read, so after a first round on runs at fixed depth the gate is also trained on
the states of runs in which it halts (DAgger, Ross et al. 2011, arXiv:1011.0686). Its bias is then calibrated on new
problems.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.evaluation.depth import chunks, device_of, measuring
from open_mythos.evaluation.grid import check_fit
from open_mythos.evaluation.metrics import accuracy_and_loops, halting_gain
from open_mythos.fields import must
from open_mythos.inputs import check_n_loops
from open_mythos.model import OpenMythos
from open_mythos.nn.exits import LoopState
from open_mythos.nn.halting import ACTHalting, converged, gate_cross_entropy, holds_from_here_on
from open_mythos.tasks.base import UNSCORED, Batch, Task
from open_mythos.training.config import GateConfig

ROUNDS = 6
"""Rounds of collecting states from runs of the model and training the gate on them."""
_EARLY_EXIT_WEIGHT = 100.0  # loss weight of stopping too early over too late: others read the state that has stopped
_KEPT = 2**14  # states sampled of each label and each run of a chunk of problems
_BATCH = 4096  # states per optimizer step
_HELD_OUT = 256  # problems on which the bias is calibrated, and as many on which the result is measured
_MAX_ACCURACY_LOSS = 0.001  # accuracy that halting may cost on them
_SHIFTS = range(2, -13, -1)  # candidates for the shift of the bias, in logits, from early exits to late ones
_MARGIN = 1  # logits below the best shift, as a margin for problems other than those

Examples = tuple[Tensor, Tensor, Tensor]
"""States (N, dim), their relative change in the last loop (N,), and whether they may stop there, (N,) bool."""


def train_gate(
    model: OpenMythos, task: Task, cfg: GateConfig, min_difficulty: int, max_difficulty: int,
    generator: torch.Generator, progress: Callable[[str], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train ``model.recurrent.act`` to tell when a position may stop, and set ``model.cfg.halting``; nothing else.

    A position may stop at a loop if from there on its prediction stays within ``cfg.tolerance`` nats (KL divergence)
    of its final one. At unscored positions, where predictions are not trained, the state has to stay within
    ``model.cfg.halting_tolerance`` of the final one instead. Positions whose final answer is wrong give examples of
    states that may not stop, but none that may: more loops might have corrected them.

    Args:
        model, task: a trained model, whose training or eval mode is kept; and its problems.
        cfg: number of steps, and ``loops``, the depth whose predictions are the labels.
        min_difficulty, max_difficulty: problems are drawn uniformly between them; the hardest should be solved in
            ``cfg.loops``.
        generator, progress: random state, on the CPU; called with a message for each stage.

    Returns:
        Values of a :class:`~open_mythos.evaluation.metrics.HaltingGain`, on new problems of mixed difficulty.

    Raises:
        ValueError: if ``cfg.steps`` is 0, the difficulties are in the wrong order or do not exist, or the model's gate
            is that of another ``recurrence``, which is trained with the model.
    """
    must(cfg.steps > 0, "steps=0 trains no gate; use at least 1")
    must(
        model.cfg.recurrence == "injected",
        f"the gate of recurrence={model.cfg.recurrence!r} weights the outputs of the loops and is trained with the "
        f"model, never separately; set model.cfg.halting = True and it also stops positions early",
    )
    must(
        min_difficulty <= max_difficulty,
        f"min_difficulty={min_difficulty} is above max_difficulty={max_difficulty}; lower the former or raise the "
        f"latter",
    )
    check_fit(model, task, [max_difficulty], cfg.batch_size)
    n_loops = check_n_loops(cfg.loops or None, model.cfg.max_loop_iters)
    say = progress or (lambda what: None)

    def problems(n: int) -> Batch:
        drawn = torch.randint(min_difficulty, max_difficulty + 1, (n,), generator=generator)
        return task.mixed(drawn.tolist(), generator)

    act = model.recurrent.act.requires_grad_()
    act.reset()  # a gate that is sure of itself no longer learns
    optimizer = torch.optim.Adam(act.parameters(), lr=cfg.lr)
    seen: list[Examples] = []
    n_rounds = min(ROUNDS, cfg.steps)
    for i in range(n_rounds):
        say(f"gate: round {i + 1} of {n_rounds}, {cfg.batch_size} problems at {n_loops} loops")
        for part in chunks(problems(cfg.batch_size), device_of(model)):
            seen += examples(model, part, n_loops, cfg.tolerance, generator, closed=i > 0)
        n_steps = cfg.steps * (i + 1) // n_rounds - cfg.steps * i // n_rounds
        _fit(act, optimizer, seen, n_steps, generator)
    say(f"gate: calibrating on {_HELD_OUT} problems")
    calibrate(model, task, problems(_HELD_OUT), n_loops)
    say(f"gate: measuring on {_HELD_OUT} problems")
    gain = halting_gain(model, task, problems(_HELD_OUT), n_loops)
    model.cfg.halting = True
    return gain._asdict()


def examples(
    model: OpenMythos, batch: Batch, n_loops: int, tolerance: float, generator: torch.Generator, closed: bool
) -> list[Examples]:
    """Sample labelled states from the loops on ``batch``: those that may stop and those that may not, balanced.

    With ``closed`` also states of a run in which the gate halts positions, labelled by the same predictions, those of
    the full run after ``n_loops``. ``generator`` samples the states, and ``batch`` is on the model's device.
    """
    found = []
    with measuring(model, halting=False) as model:
        e, ctx = model.encode(batch.ids, attention_mask=batch.valid)

        def run(model: OpenMythos) -> list[LoopState]:
            return list(model.recurrent.iterate(model.first_state(e, ctx), e, ctx, n_loops))

        def predict(h: Tensor) -> Tensor:
            return model.head(model.decode(h, ctx)).float().log_softmax(-1)

        runs = [run(model)]
        if closed:
            with measuring(model, halting=True) as gated:
                runs.append(run(gated))
        end = runs[0][-1].h
        final = predict(end)
        supervised = batch.targets != UNSCORED
        wrong = supervised & (final.argmax(-1) != batch.targets)
        for states in runs:
            h = torch.stack([state.h for state in states])
            change = torch.stack([state.change for state in states if state.change is not None])  # all, in eval mode
            divergence = [F.kl_div(predict(state), final, reduction="none", log_target=True).sum(-1) for state in h]
            stable = holds_from_here_on(torch.stack(divergence) <= tolerance)
            may_stop = torch.where(supervised, stable, converged(h, model.cfg.halting_tolerance, end))
            labelled = torch.stack([state.ran for state in states]) & ~(may_stop & wrong)
            # Most states have long converged: sampling each label apart keeps the others from being outnumbered.
            for chosen in (labelled & may_stop, labelled & ~may_stop):
                kept = torch.randperm(int(chosen.sum()), generator=generator)[:_KEPT].to(h.device)
                found.append((h[chosen][kept], change[chosen][kept], may_stop[chosen][kept]))
    return found


def calibrate(model: OpenMythos, task: Task, problems: Batch, n_loops: int) -> None:
    """Shift the gate's bias to the fewest loops at an accuracy loss of at most ``_MAX_ACCURACY_LOSS``, less a margin.

    A gate that halts too early costs loops as well: positions that read one which stopped wrongly never converge. So
    from early exits to late ones the mean number of loops first falls, and rises again once accuracy is safe.
    """
    act = model.recurrent.act
    bias, learned = act.halt.bias.detach(), act.halt.bias.detach().clone()
    full, fewest = accuracy_and_loops(model, task, problems, n_loops, halting=False)
    best = _SHIFTS[-1]
    for shift in _SHIFTS:
        bias.copy_(learned + shift * act.std)  # the bias is stored in units of 1 / act.std logits
        accuracy, loops = accuracy_and_loops(model, task, problems, n_loops, halting=True)
        if accuracy >= full - _MAX_ACCURACY_LOSS:
            if loops > fewest:
                break
            best, fewest = shift, loops
    bias.copy_(learned + (best - _MARGIN) * act.std)


def _fit(
    act: ACTHalting, optimizer: torch.optim.Optimizer, seen: list[Examples], n_steps: int, generator: torch.Generator
) -> None:
    states, change, may_stop = (torch.cat(parts) for parts in zip(*seen, strict=True))
    if not len(states):
        return
    for _ in range(n_steps):
        drawn = torch.randint(len(states), (_BATCH,), generator=generator).to(states.device)
        with torch.enable_grad():
            loss = gate_cross_entropy(act(states[drawn], change[drawn]), may_stop[drawn], _EARLY_EXIT_WEIGHT).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
