"""What a page says of a run: read from its files, and measured where they do not have it."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from open_mythos import __version__, tasks
from open_mythos.evaluation.summary import Evaluation
from open_mythos.fields import must
from open_mythos.model import OpenMythos
from open_mythos.report.example import MOST_CELLS, follow
from open_mythos.report.measured import last_evaluation
from open_mythos.training import runs
from open_mythos.training.checks import find_device
from open_mythos.training.compare import RESULTS
from open_mythos.training.config import EvalConfig, TrainConfig
from open_mythos.training.loggers import read_metrics
from open_mythos.training.overrides import differences, dotted
from open_mythos.training.recipes import RECIPES, recipe

MOST_POINTS = 600
"""Of a training curve; a longer one is thinned."""
MOST_TOKENS = 128
"""Of the example, unless a difficulty is asked for: what one screen holds."""
CURVES = (  # key in metrics.jsonl, title, whether the axis is logarithmic, range of the axis
    ("loss", "Loss", True, None),
    ("accuracy", "Accuracy on training problems", False, [0, 1]),
    ("loops", "Loops, mean over the batch", False, None),
    ("lr", "Learning rate", False, None),
    ("grad_norm", "Norm of the gradient, before clipping", True, None),
    ("spectral_radius", "Spectral radius of the injection", False, None),
)


def gather(
    run: str | Path,
    difficulty: int | None = None,
    n_loops: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """All that :func:`~open_mythos.report.page.render` needs, as plain values; the same for the same run.

    Args:
        run: a run, its model, or the name of a shipped model; see :func:`open_mythos.models.model_dir`.
        difficulty: of the example; the least measured that is harder than training, if it fits a screen.
        n_loops: allowed for the example; the most measured, or as many as fit the page.
        seed: of the example.
        progress: called as each of three pieces of work begins.

    Raises:
        ValueError: if the run has no model, nothing says how it was trained, or the example does not exist.
    """
    begin = progress or (lambda what: None)
    begin("reading")
    run = runs.home_dir(runs.model_dir(run)) if Path(run).exists() else run
    cfg, model = runs.training_config(run), runs.load_model(run).to(find_device("auto"))
    unseen = runs.held_out_options(run, cfg)
    task = tasks.load(cfg.task.name, **cfg.task.options | unseen)
    begin("measuring")
    found, asked = last_evaluation(Path(run), cfg, model, task)
    begin("following an example")
    difficulty = _difficulty(cfg, task) if difficulty is None else difficulty
    task.check(difficulty)
    n_loops = max(1, min(max(cfg.depths), MOST_CELLS // task.length(difficulty))) if n_loops is None else n_loops
    must(
        cfg.kind != "unrolled" or n_loops <= model.cfg.max_loop_iters,
        f"{n_loops} loops, but an unrolled model has {model.cfg.max_loop_iters} blocks and no more; leave --loops out",
    )
    example, experts = follow(model, task, difficulty, n_loops, seed)
    has_experts = cfg.kind == "looped" and model.cfg.n_experts > 0
    return {
        "title": cfg.recipe if cfg.recipe == cfg.task.name else f"{cfg.recipe}: {cfg.task.name}",
        "subtitle": _subtitle(cfg, task.unit),
        "facts": [("parameters", f"{sum(p.numel() for p in model.parameters()):,}"), *_facts(found)],
        "grid": _grid(found, cfg) if isinstance(found, Evaluation) else None,
        "bits": None if isinstance(found, Evaluation) else _bits(found, asked, cfg),
        "example": example | {"lead": _example_lead(example, task.unit)},
        "experts": experts | {"lead": _experts_lead(model, experts)} if has_experts else None,
        "baselines": _compared(Path(run)),
        "training": _training(Path(run) / runs.METRICS),
        "settings": _settings(cfg),
        "versions": {
            "open_mythos": __version__,
            "torch": str(torch.__version__),
            "Python": platform.python_version(),
        },
        "commands": _commands(cfg),
    }


# -- what was measured


def _grid(found: Evaluation, cfg: TrainConfig) -> dict[str, Any]:
    grid = found.grids[0]
    return grid.to_dict() | {
        "lead": f"{grid.examples} new problems of each difficulty, halting {'on' if grid.halting else 'off'}. "
        f"Guessing gets {grid.chance:.1%} of the tokens right.",
        "trained_difficulty": cfg.task.max_difficulty,
        "trained_loops": cfg.loops.maximum,
    }


def _bits(found: dict[int, float], asked: EvalConfig, cfg: TrainConfig) -> dict[str, Any]:
    return {
        "lead": f"{asked.examples} windows of {asked.difficulties[0]} tokens of held-out text.",
        "loops": list(found),
        "values": list(found.values()),
        "trained_loops": cfg.loops.maximum,
    }


def _facts(found: Evaluation | dict[int, float]) -> list[tuple[str, str]]:
    if not isinstance(found, Evaluation):
        best = min(found, key=lambda n: found[n])
        return [(f"bits per byte, {_plural(best, 'loop')}", f"{found[best]:.4f}")]
    grid = found.grids[0]
    accuracy = grid.accuracy[-1]
    facts = [
        (
            f"accuracy, {grid.difficulties[-1]} {grid.unit}, {_plural(grid.loops[i], 'loop')}",
            f"{float(accuracy[i]):.2%}",
        )
        for i in dict.fromkeys((int(accuracy.argmax()), 0))
    ]
    if halting := found.metrics.get("halting"):
        facts.append(("loops that halting saves", f"{halting['saved']:.0%}"))
    return facts


def _difficulty(cfg: TrainConfig, task: tasks.Task) -> int:
    harder = (d for d in sorted(cfg.evaluation.difficulties) if d > cfg.task.max_difficulty)
    return next((d for d in harder if task.length(d) <= MOST_TOKENS), cfg.task.max_difficulty)


def _training(path: Path) -> dict[str, Any] | None:
    """Steps and curves of metrics.jsonl, thinned; None for a model that came without one."""
    if not path.is_file():
        return None
    lines = read_metrics(path)
    stride = -(-len(lines) // MOST_POINTS) or 1
    lines = [line for i, line in enumerate(lines) if i % stride == 0 or i == len(lines) - 1]
    curves = [
        {"title": title, "values": [line.get(key) for line in lines], "log": log, "range": limits}
        for key, title, log, limits in CURVES
        if any(line.get(key) is not None for line in lines)
    ]
    skipped = lines[-1]["skipped"] if lines else 0
    lead = f"As logged, of the weights in training rather than of their average. Steps skipped: {skipped}."
    return {"lead": lead, "steps": [line["step"] for line in lines], "curves": curves}


def _compared(run: Path) -> dict[str, Any] | None:
    """What ``mythos compare`` wrote into the run's directory, or into the one that holds its runs."""
    path = next((place / RESULTS for place in (run, run.parent) if (place / RESULTS).is_file()), None)
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it, or make it again with mythos compare") from error
    lead = (
        "Trained with the same data and steps: a model that runs its block once, and one with as many blocks as the "
        "looped model has loops, each with weights of its own."
    )
    return {**found, "lead": lead}


# -- words


def _subtitle(cfg: TrainConfig, unit: str) -> str:
    depth = cfg.loops.maximum
    kind = {
        "looped": f"one block, looped up to {depth} times in training",
        "single": "baseline: the same block, run once",
        "unrolled": f"baseline: {depth} blocks with weights of their own",
    }[cfg.kind]
    low, high = cfg.task.min_difficulty, cfg.task.max_difficulty
    trained = f"{low} to {high}" if low < high else high
    return f"{kind}; {trained} {unit}, {cfg.steps:,} steps of {cfg.batch_size} sequences, seed {cfg.seed}"


def _example_lead(example: dict[str, Any], unit: str) -> str:
    end = len(example["predictions"])
    halted = f" After loop {end} every position had halted." if end < example["allowed"] else ""
    return (
        f"A new problem of {example['difficulty']} {unit} (seed {example['seed']}), allowed "
        f"{_plural(example['allowed'], 'loop')}.{halted} Step with the slider or the arrow keys. Each square "
        f"is a position of the input; the map shows all loops at once, the first on top."
    )


def _experts_lead(model: OpenMythos, experts: dict[str, Any]) -> str:
    if model.cfg.n_experts == 1:
        return "The recurrent block has one expert, which takes every token in every loop."
    chosen = f"{model.cfg.n_experts_per_tok} of {model.cfg.n_experts} experts"
    return f"Each loop sends each token to {chosen}. Share of these choices, over {experts['problems']} problems."


def _settings(cfg: TrainConfig) -> list[tuple[str, str, str]]:
    """Dotted key, value and default of every setting."""
    usual = {key: getattr(part, name) for key, (part, name, _) in dotted(TrainConfig()).items()}
    return [(key, _text(getattr(part, name)), _text(usual[key])) for key, (part, name, _) in dotted(cfg).items()]


def _commands(cfg: TrainConfig) -> list[str]:
    """What to type to make the run again."""
    if cfg.recipe not in RECIPES:
        return ["# from Python, with config.json of the run:", "# open_mythos.training.TrainConfig.load(...)"]
    changed = differences(recipe(cfg.recipe), cfg)
    assignments = [shlex.quote(f"{key}={_text(new)}") for key, (_, new) in changed.items()]
    return [" ".join(["mythos", "train", cfg.recipe, *assignments])]


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
