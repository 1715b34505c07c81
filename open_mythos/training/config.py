"""TrainConfig: everything that decides a training run. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from open_mythos.config import MythosConfig
from open_mythos.fields import MAX_SEED, Checked, choice, flag, must, options, part, real, size, sizes, text

ONE_PASS, UNTIED = ("single", "wide"), ("unrolled", "plain")
"""Kinds of baselines: those that run their block once, and those with separate blocks for every loop."""


@dataclass
class TaskConfig(Checked):
    """Which problems to train on."""

    name: str = text("parity")
    options: dict[str, Any] = options()  # keyword arguments of the task
    # difficulties trained on; each step draws one between them
    min_difficulty: int = size(1)
    max_difficulty: int = size(24)
    # problems start small, with two loops, and grow a step towards full size and all loops whenever mean accuracy
    # reaches this; 0: full size from the start. Dropout and loss.fixed_point are off until full size
    growth: float = real(0.0, 0.0, 1.0)


@dataclass
class LoopConfig(Checked):
    """How many loops a training step runs, and through how many of them its gradient flows."""

    # fixed: mean. uniform: minimum to maximum. poisson: mean. lognormal: Poisson of a log-normal rate of that mean
    # (Huginn, 2502.05171). curriculum: uniform, its greatest growing from minimum to maximum over the first `ramp` of
    # the run. by_length: per_token loops for each token of the problem. by_steps: a loop for each step of the solution,
    # and 0 to `spare` more at random. All are clipped to minimum .. maximum
    schedule: str = choice("uniform", "fixed", "uniform", "poisson", "lognormal", "curriculum", "by_length", "by_steps")
    mean: float = real(8.0, 0.0, low_open=True)
    minimum: int = size(1)
    maximum: int = size(24)
    sigma: float = real(0.5, 0.0)  # lognormal only: standard deviation of the rate's logarithm
    ramp: float = real(0.5, 0.0, 1.0, low_open=True)  # curriculum only: share of the run
    per_token: float = real(0.5, 0.0, low_open=True)  # by_length only
    spare: int = size(2, minimum=0)  # by_steps only; with task.growth at most two until problems are of full size
    grown: float = real(0.4, 0.0, 1.0, low_open=True)  # task.growth only: size with all but spare loops
    per: str = choice("batch", "batch", "sequence")  # one loop count for the whole batch, or one for each sequence
    # all: through every loop. last: the last `grad_loops`. one_step: the last alone (2111.05177's limit). phantom: the
    # last `grad_loops`, each damped (2111.05177). each: every loop starts from a detached state, so that its own loss
    # alone trains it; for loss.depth="steps", which gives every loop a target
    gradient: str = choice("last", "all", "last", "one_step", "phantom", "each")
    grad_loops: int = size(6)
    damping: float = real(0.5, 0.0, 1.0, low_open=True)  # phantom only: share of the new state
    # share of a batch that starts from the final states of an earlier batch, so of other problems: a model that finds
    # its answer from there finds it from any state (path independence, 2211.09961)
    stale: float = real(0.0, 0.0, 1.0)

    def validate(self) -> None:
        super().validate()
        low, high = self.minimum, self.maximum
        must(low <= high, f"minimum={low} is above maximum={high}; lower minimum or raise maximum")

    @property
    def trained(self) -> int:
        """The loop count that baselines match: ``mean`` for schedules that have one, else ``maximum``."""
        keeps = self.schedule in ("fixed", "poisson", "lognormal")
        return min(max(round(self.mean), self.minimum), self.maximum) if keeps else self.maximum


@dataclass
class LossConfig(Checked):
    """The loss: cross-entropy at one depth or several, and regularisers."""

    # final: after the last loop. uniform, geometric: weighted mean over the loops with gradient. progressive: final,
    # with `progressive` of its weight on a second run of fewer loops from a detached state (2202.05826). steps: as
    # uniform, but the targets of loop k are what the task knows after k - 1 steps of the solution
    depth: str = choice("final", "final", "uniform", "geometric", "progressive", "steps")
    ratio: float = real(0.5, 0.0, 1.0, low_open=True)  # geometric only: weight of a loop over that of the next
    progressive: float = real(0.5, 0.0, 1.0)
    outcome: float = real(0.0, 0.0, 1.0)  # steps only: last share of the run, which supervises the final answer alone
    # weight of the last loop's squared relative state change, from full size on: a mean over the loss's targets, of
    # which only the final ones count, so that depth="steps" has less of it
    fixed_point: float = real(0.0, 0.0)
    z: float = real(0.0, 0.0)  # weight of the squared log-partition of the logits (PaLM, 2204.02311)
    chunk: int = size(0, minimum=0)  # tokens whose logits are in memory at one time; 0: about a quarter of a GB of them
    # model directory of a teacher of the same vocabulary, run at its own max_loop_iters: `distill` is the weight of the
    # KL divergence from its predictions, and cross-entropy has the rest (Hinton et al. 2015, 1503.02531); "": none
    teacher: str = text("")
    distill: float = real(0.5, 0.0, 1.0)  # with a teacher only

    @property
    def supervises_every_loop(self) -> bool:
        """Whether every loop with gradient has a loss, not only the last of a run."""
        return self.depth in ("uniform", "geometric", "steps")


@dataclass
class OptimConfig(Checked):
    """Optimizer, learning-rate schedule, weight averaging."""

    optimizer: str = choice("adamw", "adamw", "muon")  # muon: for matrices inside blocks; AdamW for the rest
    only: str = text("")  # train only parameters whose names contain this, and freeze the others; "": all
    lr: float = real(1e-3, 0.0, low_open=True)
    muon_lr: float = real(5e-3, 0.0, low_open=True)
    weight_decay: float = real(0.01, 0.0)  # matrices only; never norms, injection, router, halting
    beta1: float = real(0.9, 0.0, 1.0, high_open=True)
    beta2: float = real(0.95, 0.0, 1.0, high_open=True)
    clip: float = real(1.0, 0.0, low_open=True)  # greatest norm of the whole gradient
    schedule: str = choice("wsd", "wsd", "cosine")  # warm-up, stable, linear decay; or warm-up, cosine
    warmup: int = size(100, minimum=0)  # steps
    decay: float = real(0.2, 0.0, 1.0)  # wsd only: share of the run over which the rate falls
    floor: float = real(0.02, 0.0, 1.0)  # share of the learning rate that is left at the end
    ema: float = real(0.99, 0.0, 1.0, high_open=True)  # decay of the averaged weights, the ones saved; 0: no averaging


@dataclass
class GateConfig(Checked):
    """Training of the halting gate, after that of the model, whose weights are then frozen."""

    steps: int = size(1000, minimum=0)  # 0: no gate, and a model that does not halt
    lr: float = real(1e-3, 0.0, low_open=True)
    batch_size: int = size(64)
    loops: int = size(0, minimum=0)  # depth whose predictions are its labels; 0: model.max_loop_iters
    max_difficulty: int = size(0, minimum=0)  # of the problems it is trained on; 0: task.max_difficulty
    # a position may stop once its prediction stays within so many nats (KL divergence) of the final one
    tolerance: float = real(0.001, 0.0, low_open=True)


@dataclass
class EvalConfig(Checked):
    """What is evaluated at the end of a run, and by default by ``mythos eval``."""

    difficulties: list[int] = sizes(24, 96)
    loops: list[int] = sizes(1, 2, 4, 8, 16, 32, 64)
    examples: int = size(256)

    def validate(self) -> None:
        super().validate()
        for name, example in (("difficulties", "24,96"), ("loops", "1,8")):
            must(len(getattr(self, name)) > 0, f"{name} is empty; give at least one, as in {name}={example}")


@dataclass
class ParallelConfig(Checked):
    """How a model and its batches are laid out over the processes that ``torchrun`` starts; see docs/scale.md."""

    replicate: int = size(0, minimum=0)  # groups that each hold a whole model; 0: as many as the processes make up
    shard: int = size(1)  # processes that divide weights, gradients and optimizer states (FSDP2)
    expert: int = size(1)  # processes that divide the routed experts, and exchange the tokens for them
    tensor: int = size(1)  # processes that divide each dense feed-forward and the shared experts, and run the same rows
    timeout: float = real(600.0, 0.0, low_open=True)  # seconds that a process waits for the others in a step


@dataclass
class TrainConfig(Checked):
    """A whole run. Recipes (:mod:`open_mythos.training.recipes`) are functions that return one."""

    recipe: str = text("custom")
    model: MythosConfig = part(MythosConfig)
    task: TaskConfig = part(TaskConfig)
    loops: LoopConfig = part(LoopConfig)
    loss: LossConfig = part(LossConfig)
    optim: OptimConfig = part(OptimConfig)
    gate: GateConfig = part(GateConfig)
    parallel: ParallelConfig = part(ParallelConfig)
    evaluation: EvalConfig = part(EvalConfig)
    # looped: the model itself. The baselines it is compared with, at r = loops.trained: single: the same model at one
    # loop. wide: one loop of a model so wide that it takes as many FLOPs as r loops. unrolled: r blocks, each with
    # weights of its own. plain: as deep, without input injection and without norms between blocks
    kind: str = choice("looped", "looped", *ONE_PASS, *UNTIED)
    # model to continue training from, found as by `mythos eval`; `model` is then its config. "": new weights
    start: str = text("")
    # rope_factor of the saved model, for prompts so many times longer than those of training, which have
    # model.rope_context tokens; each training step draws a factor of its own from 1 to this
    stretch: float = real(1.0, 1.0)
    steps: int = size(1000, maximum=10**9)
    batch_size: int = size(64)  # sequences of one optimizer step; of each task, where a task is made of several
    accumulate: int = size(1)  # micro-batches that a step is split into
    seed: int = size(0, minimum=0, maximum=MAX_SEED)
    device: str = text("auto")  # auto: cuda where there is one
    precision: str = choice("fp32", "fp32", "bf16")  # bf16: autocast; weights stay fp32
    compile: bool = flag(False)  # train through torch.compile, block by block; same results up to rounding
    checkpoint_loops: bool = flag(False)  # recompute each loop in the backward pass instead of keeping it
    log_every: int = size(10)  # steps
    save_every: int = size(200)  # steps
    keep: int = size(2)  # newest checkpoints that are kept
    keep_hours: float = real(0.0, 0.0)  # also keep the first checkpoint of every so many hours of training; 0: none
    max_bad_steps: int = size(10)  # non-finite steps in a row after which training stops
    loggers: str = text("")  # besides metrics.jsonl: tensorboard, trackio, wandb, separated by commas

    @property
    def hardest_for_gate(self) -> int:
        """The greatest difficulty that the halting gate is trained on."""
        return self.gate.max_difficulty or self.task.max_difficulty

    @property
    def depths(self) -> list[int]:
        """The numbers of loops at which the model is measured; a baseline has one depth."""
        if self.kind == "looped":
            return self.evaluation.loops
        return [1 if self.kind in ONE_PASS else self.loops.trained]

    def validate(self) -> None:
        super().validate()
        steps, recurrence, size, parts = self.gate.steps, self.model.recurrence, self.batch_size, self.accumulate
        own = f"that of recurrence={recurrence!r} is trained with the model; use gate.steps=0"
        must(steps == 0 or recurrence == "injected", f"gate.steps={steps} trains a gate after the model, but {own}")
        stretched = self.model.rope_factor
        twice = (
            f"stretch={self.stretch:g} sets model.rope_factor after training, but it is already {stretched:g}; use "
            f"model.rope_factor=1"
        )
        must(self.stretch == 1 or stretched == 1, twice)
        undivided = f"batch_size={size} is not divisible by accumulate={parts}; use a multiple of {parts}"
        must(size % parts == 0, undivided)
        grows = f"task.growth={self.task.growth:g} depends on the share of correct answers, which text does not have"
        must(self.task.growth == 0 or self.task.name != "text", f"{grows}; use 0, or loops.schedule=curriculum")
        low, high = self.task.min_difficulty, self.task.max_difficulty
        must(low <= high, f"task.min_difficulty={low} is above task.max_difficulty={high}; use at most that")
        taught, fix = self.hardest_for_gate, "raise it, or use 0 for task.max_difficulty"
        too_easy = f"gate.max_difficulty={taught} is below task.min_difficulty={low}; {fix}"
        must(low <= taught or self.kind != "looped" or steps == 0, too_easy)
