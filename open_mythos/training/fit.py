"""A whole run in a directory: trained, stopped and gone on with, averaged, given its gate, measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from open_mythos.evaluation.summary import Evaluation, evaluate
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.tasks import Task
from open_mythos.tasks.text import Text
from open_mythos.training import checkpoints, distributed, runs
from open_mythos.training.config import TrainConfig
from open_mythos.training.gate import train_gate
from open_mythos.training.loggers import Record, open_loggers
from open_mythos.training.overrides import differences
from open_mythos.training.trainer import StepResult, Trainer

# What may differ when a run is gone on with: it does not touch what is trained.
FREE = ("device", "compile", "log_every", "save_every", "keep", "max_bad_steps", "loggers")
GATE_SEED = 3
MEANS = ("loss", "accuracy", "loops", "grad_norm")


@dataclass
class Watch:
    """Where a run reports to.

    Attributes:
        record: takes each line of metrics.
        say: takes messages for people: a checkpoint that was skipped, a disk that is full.
        begin: takes what begins after training: the gate, measuring.
    """

    record: Callable[[Record], None] = lambda record: None
    say: Callable[[str], None] = print
    begin: Callable[[str], None] = lambda what: None


def fit(cfg: TrainConfig, run: Path, resume: str = "never", watch: Watch | None = None) -> Path:
    """Train as ``cfg`` says, and leave in ``run`` what :mod:`open_mythos.training.runs` lists.

    Of several processes, the first writes and measures.

    Args:
        cfg: the run.
        run: its directory, made if need be.
        resume: "never" refuses a directory that holds a run; "auto" goes on from its newest whole checkpoint, or
            starts if there is none; a path goes on from that checkpoint, in its own run or a new directory.
        watch: where to report.

    Returns:
        The directory of the trained model.

    Raises:
        ValueError: for a config that does not fit its task, a directory that holds a run, or a checkpoint of a run
            with other settings, naming them.
        TrainingError: if too many steps in a row are not finite.
        OSError: if the last checkpoint or the model cannot be written.
    """
    watch = watch or Watch()
    first = distributed.rank() == 0
    if not first:
        watch = Watch(say=lambda message: None)
    with distributed.processes():
        state = find_state(cfg, run, resume, watch.say)
        with distributed.first_process_first():
            trainer, meter = Trainer(cfg), Meter()
        if state is not None:
            trainer.load_state_dict(state["trainer"])
            meter = Meter(**state["meter"])
        if isinstance(trainer.task, Text) and trainer.task.store is not None:
            watch.say(trainer.task.described(cfg.task.max_difficulty))
        distributed.wait()  # until all have looked at what was there
        if first:
            run.mkdir(parents=True, exist_ok=True)
            cfg.save(run / runs.RUN_CONFIG)
        train(trainer, meter, run, watch)
    if first:
        finish(trainer, cfg, run, watch.begin)
    return run / runs.MODEL


# -- starting


def find_state(cfg: TrainConfig, run: Path, resume: str, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The state to go on from, None to start afresh; arguments and errors as :func:`fit`."""
    known = run / runs.RUN_CONFIG
    own = resume == "auto" or Path(resume).resolve().is_relative_to(run.resolve())
    if known.exists() and (resume == "never" or not own):
        raise ValueError(f"{run} holds a run; go on with it by --resume auto, or choose another --out")
    if resume == "never":
        return None
    if resume == "auto":
        if known.exists():
            check_same(TrainConfig.load(known), cfg, run)
        found = checkpoints.newest(run / runs.CHECKPOINTS, say)
        if found is None:
            say("no checkpoint to go on from: starting at step 1")
            return None
        path, state = found
    else:
        path = Path(resume)
        must(path.is_dir(), f"there is no checkpoint {path}; use auto, never or the path of one (RUN/checkpoints/...)")
        state = checkpoints.load(path)
    check_same(TrainConfig.from_dict(state["trainer"]["config"]), cfg, path)
    say(f"going on from {path}")
    return state


def check_same(old: TrainConfig, new: TrainConfig, where: Path) -> None:
    """Raise ValueError if what decides the training differs."""
    differing = {key: pair for key, pair in differences(old, new).items() if not _free(key)}
    if differing:
        listed = ", ".join(f"{key} was {a!r} and is {b!r}" for key, (a, b) in differing.items())
        raise ValueError(f"{where} is of a run with other settings: {listed}; use the same, or another --out")


def _free(key: str) -> bool:
    return key in FREE or key.startswith("evaluation.")


# -- the loop


@dataclass
class Meter:
    """Sums over the steps since the last line of metrics; goes into checkpoints, so that a resumed line is the same."""

    seconds: float = 0.0  # of the whole run
    since: float = 0.0  # seconds since the last line
    steps: int = 0
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # over steps that were not skipped
    counted: int = 0

    def add(self, result: StepResult, seconds: float) -> None:
        self.seconds, self.since = self.seconds + seconds, self.since + seconds
        self.steps, self.tokens = self.steps + 1, self.tokens + result.tokens
        if result.skipped:
            return
        self.counted += 1
        numbers = {name: getattr(result, name) for name in MEANS} | result.parts
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + number

    def record(self, trainer: Trainer) -> Record:
        """Means since the last call, and where the run stands; starts anew."""
        means = {name: total / self.counted for name, total in self.sums.items()}
        left = trainer.cfg.steps - trainer.step_number
        line: Record = {
            "step": trainer.step_number,
            **dict.fromkeys(MEANS),  # null if all steps were skipped
            **means,
            **trainer.gauges(),
            "skipped": trainer.skipped,
            "tokens_per_second": self.tokens / self.since,
            "seconds": self.seconds,
            "eta_seconds": left * self.since / self.steps,
        }
        self.since, self.steps, self.tokens, self.sums, self.counted = 0.0, 0, 0, {}, 0
        return line


def train(trainer: Trainer, meter: Meter, run: Path, watch: Watch) -> None:
    """The steps that are left, with metrics and checkpoints on the way."""
    cfg = trainer.cfg
    first = distributed.rank() == 0
    loggers = open_loggers(cfg.loggers, run, cfg.to_dict(), trainer.step_number) if first else []

    def report() -> None:
        line = meter.record(trainer)
        for logger in loggers:
            logger.log(line)
        watch.record(line)

    try:
        while trainer.step_number < cfg.steps:
            started = time.perf_counter()
            result = trainer.step()
            meter.add(result, time.perf_counter() - started)
            last = trainer.step_number == cfg.steps
            if last or trainer.step_number % cfg.log_every == 0:
                report()
            trainer.check_going(result)
            if last or trainer.step_number % cfg.save_every == 0:
                save(trainer, meter, run, watch.say)
    finally:
        for logger in loggers:
            logger.close()


def save(trainer: Trainer, meter: Meter, run: Path, say: Callable[[str], None]) -> None:
    """Write a checkpoint. One that cannot be written is reported, and training goes on; the last one has to be."""
    state = {"trainer": trainer.state_dict(), "meter": asdict(meter)}
    if distributed.rank() > 0:
        return
    try:
        checkpoints.save(run / runs.CHECKPOINTS, trainer.step_number, state, trainer.cfg.keep)
    except OSError as error:
        if trainer.step_number == trainer.cfg.steps:
            raise OSError(f"the last checkpoint was not written ({error}); make room, then --resume auto") from error
        say(f"step {trainer.step_number}: checkpoint not written ({error}); earlier ones are kept, training goes on")


# -- after the last step


def finish(trainer: Trainer, cfg: TrainConfig, run: Path, begin: Callable[[str], None]) -> None:
    """Average, teach the gate, write the model with its tokenizer, measure."""
    model = trainer.averaged()
    if cfg.kind == "looped" and cfg.gate.steps > 0:
        add_gate(model, trainer.task, cfg, begin)
    directory = runs.save_model(model, cfg, run)
    if isinstance(trainer.task, Text):
        trainer.task.save_tokenizer(directory)
    measure(model, trainer.task, cfg, run, begin)


def add_gate(model: OpenMythos, task: Task, cfg: TrainConfig, begin: Callable[[str], None]) -> None:
    """Teach the finished model when to halt, and let it."""
    begin("halting gate")
    generator = torch.Generator().manual_seed(1000 * cfg.seed + GATE_SEED)
    train_gate(model, task, cfg.gate, cfg.task.min_difficulty, cfg.hardest_for_gate, generator, begin)


def measure(model: OpenMythos, task: Task, cfg: TrainConfig, run: Path, begin: Callable[[str], None]) -> None:
    """Measure what ``cfg.evaluation`` asks for into RUN/evaluation.json. A baseline has one depth."""
    asked = cfg.evaluation
    if not isinstance(task, Text):
        evaluate(model, task, asked.difficulties, cfg.depths, asked.examples, progress=begin).save(run)
        return
    begin("held-out text")
    bits = bits_per_byte(model, replace(task, split="held_out"), cfg.depths, asked.difficulties[0], asked.examples)
    (run / runs.EVALUATION).write_text(json.dumps({"bits_per_byte": bits}, indent=1) + "\n")


def load_evaluation(run: Path) -> Evaluation | dict[int, float]:
    """What :func:`measure` wrote: an evaluation, or bits per byte by loops."""
    data = json.loads((run / runs.EVALUATION).read_text())
    if "bits_per_byte" in data:
        return {int(n): bits for n, bits in data["bits_per_byte"].items()}
    return Evaluation.from_dict(data)
