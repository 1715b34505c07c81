"""A complete run in a directory: training with checkpoints and resume, EMA weights, halting gate, evaluation."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch

from open_mythos import files, tasks
from open_mythos.checkpoint import stored
from open_mythos.evaluation.summary import Evaluation, evaluate, n_steps
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.evaluation.token_kinds import bits_by_kind
from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.models import copy_tokenizer
from open_mythos.tasks import Task
from open_mythos.tasks.english import VOCABULARY, InWords
from open_mythos.tasks.text import Text
from open_mythos.tasks.tokenizer import WordLevel
from open_mythos.tasks.words import Words
from open_mythos.training import baselines, checkpoints, distributed, runs
from open_mythos.training.allocator import is_full
from open_mythos.training.checkpoints import Saving
from open_mythos.training.config import TrainConfig
from open_mythos.training.gate import ROUNDS, train_gate
from open_mythos.training.loggers import Logger, MetricsFile, Record, open_loggers, requested
from open_mythos.training.overrides import differences
from open_mythos.training.owner import owned
from open_mythos.training.parallel.pace import Pace
from open_mythos.training.stopping import Stop
from open_mythos.training.trainer import StepResult, Trainer, TrainingError

# Settings that may change on resume, besides those of evaluation and layout: they do not affect the weights.
RESUMABLE_CHANGES = ("device", "compile", "log_every", "save_every", "keep", "keep_hours", "max_bad_steps", "loggers")
GATE_SEED = 3
MEANS = ("loss", "accuracy", "loops", "grad_norm")


@dataclass
class Watch:
    """Callbacks of a run: for lines of metrics, log messages, and the stages after training (gate, evaluation).

    ``again`` is the call or command that resumes the run, for messages.
    """

    record: Callable[[Record], None] = lambda record: None
    log: Callable[[str], None] = print
    begin: Callable[[str], None] = lambda stage: None
    again: str = 'fit(cfg, run, resume="auto")'


def fit(cfg: TrainConfig, run: Path, resume: str = "never", watch: Watch | None = None) -> Path:
    """Train with ``cfg``, and write to ``run`` the files that :mod:`open_mythos.training.runs` lists.

    With several processes, the first one writes and evaluates. A lock keeps other trainings out of the directory, see
    :func:`~open_mythos.training.owner.owned`. At SIGINT, SIGTERM and SIGHUP the step is finished and its state saved.

    Args:
        cfg, run: the run, and its directory, created if missing.
        resume: "never" raises if the directory holds a run; "auto" resumes from its newest valid checkpoint, or starts
            if there is none; a path resumes from that checkpoint, in its own run or a new directory.
        watch: callbacks.

    Returns:
        The directory of the trained model.

    Raises:
        ValueError: for a config that does not fit its task, a directory that holds a run or that another process
            writes to, or a checkpoint of a run with other settings, naming them.
        TrainingError: if too many steps in a row are not finite, or memory is full.
        OSError: if the last line of metrics, the last checkpoint or the model cannot be written.
        KeyboardInterrupt: for SIGINT, once the state is saved.
        SystemExit: for SIGTERM and SIGHUP, with the code that schedulers expect.
    """
    watch = watch or Watch()
    is_main = distributed.rank() == 0
    requested(cfg.loggers)
    if not is_main:
        watch = Watch(log=lambda message: None)
    with Stop() as stop, owned(run, watch.log) if is_main else nullcontext(), telling(run, watch, stop):
        with distributed.processes():
            state = find_state(cfg, run, resume, watch.log)
            trainer, meter = Trainer(cfg), Meter()
            if state is not None:
                trainer.load_state_dict(state["trainer"])
                meter = Meter(**state["meter"])
            if isinstance(trainer.task, Text) and trainer.task.store is not None:
                watch.log(trainer.task.described(cfg.task.max_difficulty))
            if cfg.optim.warmup >= cfg.steps:
                reached = f"the learning rate rises only to {cfg.steps / cfg.optim.warmup:.0%} of optim.lr"
                watch.log(f"optim.warmup={cfg.optim.warmup}, steps={cfg.steps}: {reached}; lower optim.warmup")
            distributed.wait()  # all processes look for checkpoints before the first one writes
            if is_main:
                if resume not in ("auto", "never"):
                    checkpoints.adopt(Path(resume), run / runs.CHECKPOINTS)
                (run / runs.EVALUATION).unlink(missing_ok=True)  # its difficulties may differ from the new config's
                cfg.save(run / runs.RUN_CONFIG)
            train(trainer, meter, run, watch, stop)
            model = trainer.averaged()
            if isinstance(trainer.task, Text) and trainer.task.store is not None:
                seen = trainer.task.seen(cfg.steps * cfg.batch_size, cfg.task.max_difficulty, cfg.seed)
                for name, tokens, epochs in seen if len(seen) > 1 else ():
                    watch.log(f"{name}: {tokens:,} tokens seen, {epochs:.3g} epochs")
        if is_main:
            finish(model, trainer.task, cfg, run, watch.begin)
    return run / runs.MODEL


@contextmanager
def telling(run: Path, watch: Watch, stop: Stop) -> Iterator[None]:
    """Report, whatever ends the block, which checkpoint remains and how to resume from it."""
    try:
        with stop.telling(watch.log, lambda: left(run, watch)):
            yield
    except TrainingError as error:
        raise type(error)(f"{error}; {left(run, watch)}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_full(error):
            raise
        text = str(error).partition("\n")[0]
        fix = "end other programs, or start again with a larger accumulate or checkpoint_loops=true"
        raise TrainingError(f"out of memory ({text}): {fix}; {left(run, watch)}") from error
    except OSError:
        watch.log(left(run, watch))
        raise


def left(run: Path, watch: Watch) -> str:
    """Message that names the newest checkpoint and how to resume from it."""
    newest = next(iter(checkpoints.newest_first(run / runs.CHECKPOINTS)), None)
    return "nothing was saved" if newest is None else f"{newest} is saved; continue from it with {watch.again}"


def find_state(cfg: TrainConfig, run: Path, resume: str, log: Callable[[str], None]) -> dict[str, Any] | None:
    """The state to resume from, or None; arguments and errors as :func:`fit`."""
    run_config = run / runs.RUN_CONFIG
    is_own = resume == "auto" or files.real(Path(resume)).is_relative_to(files.real(run))
    if run_config.exists() and (resume == "never" or not is_own):
        raise ValueError(f"{run} already holds a run; resume it with --resume auto, or choose another --out")
    if resume == "never":
        return None
    if resume == "auto":
        old = None
        if run_config.exists():
            try:
                old = TrainConfig.load(run_config)
            except ValueError as error:
                log(f"{error}; the file is written anew, and each checkpoint has its own copy of the settings")
        if old is not None:
            check_same(old, cfg, run)
        newest = checkpoints.newest(run / runs.CHECKPOINTS, log)
        if newest is None:
            log("no checkpoint to resume from: starting at step 1")
            return None
        path, state = newest
    else:
        path = Path(resume)
        must(path.is_dir(), f"there is no checkpoint {path}; use auto, never, or a path such as RUN/checkpoints/...")
        is_run = (path / runs.CHECKPOINTS).is_dir()
        must(not is_run, f"{path} is a run; use auto, or one of its checkpoints ({path / runs.CHECKPOINTS}/...)")
        state = checkpoints.load(path)
    check_same(TrainConfig.from_dict(state["trainer"]["config"]), cfg, path)
    log(f"resuming from {path}")
    return state


def check_same(old: TrainConfig, new: TrainConfig, where: Path) -> None:
    """Raise ValueError if settings that affect the weights differ."""
    differing = ", ".join(
        f"{key} was {a!r} and is {b!r}"
        for key, (a, b) in differences(old, new).items()
        if key not in RESUMABLE_CHANGES and not key.startswith(("evaluation.", "parallel."))
    )
    must(
        not differing, f"{where} belongs to a run with other settings: {differing}; use the same ones, or another --out"
    )


@dataclass
class Meter:
    """Sums over the steps since the last line of metrics; checkpoints hold them, so that resuming changes no line."""

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
        for name, value in ({name: getattr(result, name) for name in MEANS} | result.parts).items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def record(self, trainer: Trainer) -> Record:
        """Means since the last call, and progress of the run; resets the sums."""
        means = {name: total / self.counted for name, total in self.sums.items()}
        remaining = trainer.cfg.steps - trainer.step_number
        line: Record = {
            "step": trainer.step_number,
            **dict.fromkeys(MEANS),  # null if all steps were skipped
            **means,
            **trainer.gauges(),
            "skipped": trainer.skipped,
            "tokens_per_second": self.tokens / self.since,
            "seconds": self.seconds,
            "eta_seconds": remaining * self.since / self.steps,
        }
        self.since, self.steps, self.tokens, self.sums, self.counted = 0.0, 0, 0, {}, 0
        return line


def train(trainer: Trainer, meter: Meter, run: Path, watch: Watch, stop: Stop) -> None:
    """Run the remaining steps, with metrics and checkpoints.

    A checkpoint that falls due while steps are skipped waits for the next good step, so that it displaces no good one.
    """
    cfg, is_due = trainer.cfg, False
    is_main = distributed.rank() == 0
    saving, pace = Saving(run / runs.CHECKPOINTS), Pace()
    late: OSError | None = None  # of the last line
    loggers = open_loggers(cfg.loggers, run, cfg.to_dict(), trainer.step_number, watch.log) if is_main else []
    try:
        with stop.held():
            asked = stop.is_asked()
            while trainer.step_number < cfg.steps and not asked:
                start = time.perf_counter()
                result = trainer.step(lambda: stop.asked)
                took = time.perf_counter() - start
                meter.add(result, took)
                stop.hear(signal for signal, _ in result.heard)
                if said := pace.add([seconds for _, seconds in result.heard], took):
                    watch.log(said)
                is_last = trainer.step_number == cfg.steps
                if is_last or trainer.step_number % cfg.log_every == 0:
                    line = meter.record(trainer)
                    try:
                        errors = [log_line(logger, line, watch.log) for logger in loggers]
                        late = next(filter(None, errors), None) if is_last else None
                        watch.record(line)
                    except KeyboardInterrupt:  # raised by a handler other than ours
                        if stop.asked:  # the second signal ends the run at once
                            raise
                        stop.asked = SIGINT
                trainer.check_going(result)
                is_due |= trainer.step_number % cfg.save_every == 0
                asked = stop.is_asked()
                if is_last or asked or (is_due and not trainer.skipped_in_a_row):
                    with nullcontext() if late is None else suppress(OSError):
                        save(saving, trainer, meter, watch.log)
                    is_due = False
            with nullcontext() if late is None else suppress(OSError):
                written(saving, cfg, watch.log)
            if late is not None:
                raise late
            if trainer.skipped and trainer.step_number == cfg.steps:
                watch.log(
                    f"{trainer.skipped} of {cfg.steps} steps were skipped, as the loss or gradient was not finite"
                )
    except BaseException:
        with suppress(Exception):  # a checkpoint that is being written may still complete, to resume from
            saving.end(cfg.parallel.timeout)
        raise
    finally:
        for logger in loggers:
            logger.close()


def log_line(logger: Logger, line: Record, log: Callable[[str], None]) -> OSError | None:
    """Log a line. A failure is logged and training continues; it is returned if it is of the metrics file."""
    try:
        logger.log(line)
    except Exception as error:
        is_file = isinstance(logger, MetricsFile)
        if is_file and not isinstance(error, OSError):
            raise
        later = "they will be written with the next line" if is_file else f"{type(logger).__name__} failed"
        log(f"step {line['step']}: metrics not written ({error}); {later}")
        return error if is_file and isinstance(error, OSError) else None
    return None


def save(saving: Saving, trainer: Trainer, meter: Meter, log: Callable[[str], None]) -> None:
    """Start writing a checkpoint, once the last one is written."""
    written(saving, trainer.cfg, log)
    state = {"trainer": trainer.state_dict(), "meter": asdict(meter)}
    keep = None if trainer.skipped_in_a_row else trainer.cfg.keep  # a state after skipped steps displaces no good one
    saving.begin(trainer.step_number, state, keep, trainer.cfg.keep_hours)
    if saving.is_over:
        written(saving, trainer.cfg, log)


def written(saving: Saving, cfg: TrainConfig, log: Callable[[str], None]) -> None:
    """Wait until a checkpoint is written. A failure is logged and training continues, except for the last one."""
    try:
        saving.end()
    except OSError as error:
        if saving.step == cfg.steps:
            raise OSError(
                f"the last checkpoint was not written ({error}); free some space, then use --resume auto"
            ) from error
        log(f"step {saving.step}: checkpoint not written ({error}); earlier ones are kept, training continues")


def stages(cfg: TrainConfig) -> int:
    """Maximum number of times that :func:`finish` calls ``begin``."""
    gate = min(ROUNDS, cfg.gate.steps) + 3 if cfg.kind == "looped" and cfg.gate.steps else 0
    return gate + (1 if cfg.task.name == Text.name else n_steps(cfg.evaluation.difficulties, [0]))


def finish(model: OpenMythos, task: Task, cfg: TrainConfig, run: Path, begin: Callable[[str], None]) -> None:
    """With the averaged weights: train the halting gate, save the model and its tokenizer, evaluate."""
    model = baselines.stretched(model, cfg.stretch)
    if cfg.kind == "looped" and cfg.gate.steps > 0:
        begin("halting gate")
        generator = torch.Generator().manual_seed(1000 * cfg.seed + GATE_SEED)
        train_gate(model, task, cfg.gate, cfg.task.min_difficulty, cfg.hardest_for_gate, generator, begin)
    directory = runs.save_model(model, cfg, run)
    save_tokenizer(task, directory)
    measure(model, task, cfg, run, begin)


def averaged(checkpoint: Path) -> tuple[OpenMythos, dict[str, Any], TrainConfig]:
    """The model that a run would have saved had it ended at ``checkpoint``, except that no gate is trained.

    Returns:
        The model, on the meta device; its averaged weights by name, as tensors or
        :class:`~open_mythos.training.checkpoints.Stored`, which are read when used; and the config of the run.

    Raises:
        CheckpointError: for a damaged checkpoint.
    """
    state = checkpoints.load(checkpoint, mapped=True)["trainer"]
    cfg = TrainConfig.from_dict(state["config"])
    model = baselines.counted(cfg)
    model.cfg.rope_factor = model.cfg.rope_factor if cfg.stretch == 1 else cfg.stretch  # as `finish` sets it
    old = state["processes"][0]["carried"] if "processes" in state else state  # of earlier versions
    found = state["ema"]["average"] | old["buffers"]
    if (lora := model.recurrent.lora) is not None and (table := found.get("recurrent.lora.scale.weight")) is not None:
        lora.grow(table.shape[0])  # the model that training started from may have had more loops
    for name, like in stored(model).items():
        is_there = name in found and found[name].shape == like.shape
        must(is_there, f"{checkpoint} does not match the model of its config: see its {name}; use another checkpoint")
    return model, {name: found[name] for name in stored(model)}, cfg


def save_beside(cfg: TrainConfig, directory: Path) -> None:
    """Write the files that belong beside the model of a run: its training config and its tokenizer."""
    copy_tokenizer(cfg.start, directory)
    save_tokenizer(tasks.load(cfg.task.name, **cfg.task.options), directory)
    cfg.save(directory / runs.TRAINING_FILE)


def save_tokenizer(task: Task, directory: Path) -> None:
    """Write the tokenizer of a task of text or of words into the model's directory; nothing for other tasks."""
    if isinstance(task, Text):
        task.save_tokenizer(directory)
    elif isinstance(task, InWords):
        spelled = task.spelling
        (WordLevel(VOCABULARY, ends=isinstance(task, Words)) if spelled is None else spelled.tokenizer).save(directory)


def measure(model: OpenMythos, task: Task, cfg: TrainConfig, run: Path, begin: Callable[[str], None]) -> None:
    """Evaluate with ``cfg.evaluation``, a baseline at its one depth, and write RUN/evaluation.json."""
    settings = cfg.evaluation
    if not isinstance(task, Text):
        evaluate(model, task.held_out(), settings.difficulties, cfg.depths, settings.examples, progress=begin).save(run)
        return
    begin("held-out text")
    length = settings.difficulties[0]
    held_out, loops = task.held_out(), cfg.loops.trained if cfg.kind == "looped" else cfg.depths[0]
    bits = bits_per_byte(model, held_out, cfg.depths, length, settings.examples)
    kinds = {name: one for name, (one, _) in bits_by_kind(model, held_out, loops, length, settings.examples).items()}
    files.write_json(run / runs.EVALUATION, {"bits_per_byte": bits, "bits_by_kind": kinds})


def load_kinds(run: Path) -> dict[str, float]:
    """Bits per byte of each kind of token at the depth of training, as :func:`measure` wrote them; {} if it did not."""
    data: dict[str, Any] = files.read_json(run / runs.EVALUATION, {"bits_by_kind?": {"*": float}})
    return data.get("bits_by_kind", {})


def load_evaluation(run: Path) -> Evaluation | dict[int, float]:
    """Read the file of :func:`measure`: an evaluation, or bits per byte by loops; ValueError naming any other file."""
    path = run / runs.EVALUATION
    data = files.read_json(path, {"bits_per_byte?": {"*": float}})
    if "bits_per_byte" not in data:
        return Evaluation.from_dict(data, str(path))
    bits = {int(n): value for n, value in data["bits_per_byte"].items() if n.isdecimal()}
    must(0 < len(bits) == len(data["bits_per_byte"]), f"{path}: the keys of bits_per_byte should be numbers of loops")
    return bits
