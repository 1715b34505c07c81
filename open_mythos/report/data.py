"""Collects the data of a report, from the run's files or computed where they lack it, and renders it as a page."""

import dataclasses
import html
import json
import platform
import shlex
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch

from open_mythos import __version__, tasks
from open_mythos.checkpoint import FIGURES, SHIPPED
from open_mythos.evaluation import DepthGrid, depth_grid
from open_mythos.evaluation.summary import Evaluation
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.fields import must
from open_mythos.files import read_json, real
from open_mythos.model import OpenMythos
from open_mythos.report.example import MAX_CELLS, trace_example
from open_mythos.tasks.text import Text
from open_mythos.training import runs
from open_mythos.training.compare import RESULTS
from open_mythos.training.compare import load as load_comparison
from open_mythos.training.config import UNTIED, EvalConfig, TrainConfig
from open_mythos.training.distributed import find_device
from open_mythos.training.fit import load_evaluation
from open_mythos.training.loggers import read_metrics
from open_mythos.training.overrides import differences, dotted
from open_mythos.training.recipes import RECIPES, recipe

MAX_CURVE_POINTS = 600  # longer training curves are subsampled
MAX_EXAMPLE_TOKENS = 128  # maximum length of the default example, which should fit one screen
CURVES = (  # key in metrics.jsonl, title, log axis?, axis range
    ("loss", "Loss", True, None),
    ("accuracy", "Accuracy on training problems", False, [0, 1]),
    ("loops", "Loops, mean over the batch", False, None),
    ("lr", "Learning rate", False, None),
    ("grad_norm", "Norm of the gradient, before clipping", True, None),
    ("spectral_radius", "Spectral radius of the injection", False, None),
)
_TEXT_SHAPE = {"options": dict, "exit": (str, type(None)), "by_length": {"*": dict}, "windows": int}  # of mythos eval
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def gather(
    run: str | Path, difficulty: int | None = None, n_loops: int | None = None, seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Collect the input of :func:`render` as plain values; deterministic for a run.

    Args:
        run: a run, its model, or the name of a shipped model; see :func:`open_mythos.models.model_dir`.
        difficulty: of the example; default: the smallest evaluated one above those of training, if it fits a screen.
        n_loops: maximum loops of the example; default: the maximum evaluated, or as many as fit the page.
        seed: of the example.
        progress: called at the start of each of three stages.

    Raises:
        ValueError: if the run has no model or training config, or for an example that does not exist.
    """
    begin = progress or (lambda stage: None)
    begin("loading")
    run = runs.home_dir(run) if Path(run).exists() else run
    cfg, model = runs.training_config(run), runs.load_model(run).to(find_device("auto"))
    task = tasks.load(cfg.task.name, **cfg.task.options | runs.held_out_options(run, cfg))
    begin("evaluating")
    scores, settings = last_evaluation(Path(run), cfg, model, task)
    begin("tracing an example")
    if difficulty is None:
        harder = (d for d in sorted(cfg.evaluation.difficulties) if d > cfg.task.max_difficulty)
        difficulty = next((d for d in harder if task.length(d) <= MAX_EXAMPLE_TOKENS), cfg.task.max_difficulty)
    task.check(difficulty)
    n_loops = max(1, min(max(cfg.depths), MAX_CELLS // task.length(difficulty))) if n_loops is None else n_loops
    must(
        cfg.kind not in UNTIED or n_loops <= model.cfg.max_loop_iters,
        f"{n_loops} loops, but an unrolled model has {model.cfg.max_loop_iters} blocks and no more; leave --loops out",
    )
    example, experts = trace_example(model, task, difficulty, n_loops, seed)
    chosen = f"{model.cfg.n_experts_per_tok} of {model.cfg.n_experts} experts"
    lead = f"Each loop sends each token to {chosen}. Share of these choices, over {experts['problems']} problems."
    if model.cfg.n_experts == 1:
        lead = "The recurrent block has one expert, which takes every token in every loop."
    defaults = {key: getattr(part, name) for key, (part, name, _) in dotted(TrainConfig()).items()}
    return {
        "title": cfg.recipe if cfg.recipe == cfg.task.name else f"{cfg.recipe}: {cfg.task.name}",
        "subtitle": _subtitle(cfg, task.unit),
        "facts": [("parameters", f"{sum(p.numel() for p in model.parameters()):,}"), *_facts(scores)],
        "grid": None,
        "bits": None,
        **_curves(scores, settings, cfg),
        "example": example | {"lead": _example_lead(example, task.unit)},
        "experts": experts | {"lead": lead} if cfg.kind == "looped" and model.cfg.n_experts > 0 else None,
        "baselines": _baselines(Path(run)),
        "training": _training(Path(run) / runs.METRICS),
        "settings": [
            (key, _text(getattr(part, name)), _text(defaults[key])) for key, (part, name, _) in dotted(cfg).items()
        ],
        "versions": dict(open_mythos=__version__, torch=str(torch.__version__), Python=platform.python_version()),
        "commands": _commands(cfg),
    }


def render(data: dict[str, Any]) -> str:
    """Render the data from :func:`gather` as HTML, with inline style, script and data.

    Injection-safe: the title is escaped, the rest is JSON without angle brackets, inserted as text nodes.
    """
    names = ("page.html", "page.css", "charts.js", "page.js")
    page, style, charts, script = (files("open_mythos.report").joinpath(name).read_text("utf-8") for name in names)
    return Template(page).substitute(
        title=html.escape(data["title"]),
        style=style.strip(),
        script=f"{charts}\n{script}".strip(),
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES),
    )


def last_evaluation(
    run: Path, cfg: TrainConfig, model: OpenMythos, task: tasks.Task
) -> tuple[Evaluation | dict[int, float], EvalConfig]:
    """The latest evaluation, by training or ``mythos eval`` (for text: bits per byte by loops), with its settings; for
    a shipped model that of its card; computed now if there is none."""
    settings, loops = cfg.evaluation, cfg.depths
    directories = [path for path in {run, runs.evaluation_dir(run)} if (path / runs.EVALUATION).is_file()]
    for directory in sorted(directories, key=lambda path: (path / runs.EVALUATION).stat().st_mtime, reverse=True):
        evaluation = load_evaluation(directory)
        if directory == run:
            return evaluation, settings
        if isinstance(evaluation, Evaluation):
            if (evaluation.grids[0].task, evaluation.grids[0].options) == (task.name, task.to_dict()):
                return evaluation, settings
            continue
        data = read_json(directory / runs.EVALUATION, _TEXT_SHAPE)
        one, other = (options | {"tokenizer": ""} for options in (data["options"], task.to_dict()))
        if one == other and data["exit"] is None:  # the same text, by any tokenizer path
            lengths = [int(length) for length in data["by_length"]]
            return evaluation, dataclasses.replace(settings, difficulties=lengths, examples=data["windows"])
    if not run.exists():
        card = read_json(SHIPPED / run / FIGURES)
        if isinstance(task, Text):
            bits = {int(n): value for n, value in card["bits_per_byte"].items()}
            return bits, dataclasses.replace(settings, difficulties=[card["length"]], examples=card["windows"])
        return Evaluation([DepthGrid.from_dict(card)], {}), settings
    if isinstance(task, Text):
        return bits_per_byte(model, task, loops, settings.difficulties[0], settings.examples), settings
    grid = depth_grid(model, task, settings.difficulties, loops, settings.examples, halting=False)
    return Evaluation([grid], {}), settings


def _curves(scores: Evaluation | dict[int, float], settings: EvalConfig, cfg: TrainConfig) -> dict[str, Any]:
    if not isinstance(scores, Evaluation):
        windows = f"{settings.examples} windows of {settings.difficulties[0]} tokens of held-out text"
        lead = f"{windows}, every position running all loops."
        values = list(scores.values())
        return {"bits": {"lead": lead, "loops": list(scores), "values": values, "trained_loops": cfg.loops.maximum}}
    grid = scores.grids[0]
    lead = (
        f"{grid.examples} new problems of each difficulty; {scores.exit_in_words()}. "
        f"Guessing gets {grid.chance:.1%} of the tokens right."
    )
    trained = {"trained_difficulty": cfg.task.max_difficulty, "trained_loops": cfg.loops.maximum}
    return {"grid": grid.to_dict() | {"lead": lead} | trained}


def _facts(scores: Evaluation | dict[int, float]) -> list[tuple[str, str]]:
    if not isinstance(scores, Evaluation):
        best = min(scores, key=scores.__getitem__)
        return [(f"bits per byte, {_plural(best, 'loop')}", f"{scores[best]:.4f}")]
    grid = scores.grids[0]
    exit = "" if grid.exit is None else f", exit {grid.exit}"
    accuracy, hardest = grid.accuracy[-1], f"accuracy{exit}, {grid.difficulties[-1]} {grid.unit}"
    facts = [
        (f"{hardest}, {_plural(grid.loops[i], 'loop')}", f"{float(accuracy[i]):.2%}")
        for i in dict.fromkeys((int(accuracy.argmax()), 0))
    ]
    if halting := scores.metrics.get("halting"):
        lost = halting["accuracy_fixed"] - halting["accuracy_halting"]
        who = f"loops that the exit {halting.get('exit', 'gate')} saves; accuracy that it loses"
        facts.append((who, f"{halting['saved']:.0%}; {max(lost, 0):.3f}"))
    return facts


def _training(path: Path) -> dict[str, Any] | None:
    """Subsampled curves of metrics.jsonl; None without that file."""
    if not path.is_file():
        return None
    lines = read_metrics(path)
    stride = -(-len(lines) // MAX_CURVE_POINTS) or 1
    lines = [line for i, line in enumerate(lines) if i % stride == 0 or i == len(lines) - 1]
    curves = [
        {"title": title, "values": [line.get(key) for line in lines], "log": log, "range": limits}
        for key, title, log, limits in CURVES
        if any(line.get(key) is not None for line in lines)
    ]
    skipped = lines[-1].get("skipped", 0) if lines else 0
    lead = f"As logged, of the raw weights rather than their moving average. Steps skipped: {skipped}."
    lead += f" One line in {stride} is shown." if stride > 1 else ""
    return {"lead": lead, "steps": [line["step"] for line in lines], "curves": curves}


def _baselines(run: Path) -> dict[str, Any] | None:
    """The results of ``mythos compare``, in the run's directory or its parent."""
    if not run.exists():  # a shipped model
        return None
    run = real(run)
    path = next((path / RESULTS for path in (run, run.parent) if (path / RESULTS).is_file()), None)
    if path is None:
        return None
    try:
        results = load_comparison(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, or make it again with mythos compare") from error
    return results | {
        "lead": "Trained with the same data and steps: single runs its block once; wide is one pass with the "
        "operations of all loops; unrolled has as many blocks as the looped model has loops, with untied weights; "
        "plain is a plain pre-norm transformer as deep."
    }


def _subtitle(cfg: TrainConfig, unit: str) -> str:
    kind = {
        "looped": f"one block, looped up to {cfg.loops.maximum} times in training",
        "single": "baseline: the same block, run once",
        "wide": f"baseline: one pass, as wide as takes the operations of {cfg.loops.trained} loops",
        "unrolled": f"baseline: {cfg.loops.trained} blocks with untied weights",
        "plain": f"baseline: a plain pre-norm transformer with {cfg.loops.trained} blocks of its own",
    }[cfg.kind]
    low, high = cfg.task.min_difficulty, cfg.task.max_difficulty
    trained = f"{low} to {high}" if low < high else high
    return f"{kind}; {trained} {unit}, {cfg.steps:,} steps of {cfg.batch_size} sequences, seed {cfg.seed}"


def _example_lead(example: dict[str, Any], unit: str) -> str:
    n_run, maximum = len(example["predictions"]), example["allowed"]
    gate = "the halting gate on" if example["halting"] else "every position running all of them"
    halted = f" After loop {n_run} every position had halted." if n_run < maximum else ""
    return (
        f"A new problem of {example['difficulty']} {unit} (seed {example['seed']}), at most "
        f"{_plural(maximum, 'loop')}, {gate}.{halted} Step with the slider or the arrow keys. Each square "
        f"is a position of the input; the map shows all loops at once, the first on top."
    )


def _commands(cfg: TrainConfig) -> list[str]:
    if cfg.recipe not in RECIPES:
        return ["# from Python, with config.json of the run:", "# open_mythos.training.TrainConfig.load(...)"]
    changed = differences(recipe(cfg.recipe), cfg)
    assignments = [shlex.quote(f"{key}={_text(new)}") for key, (_, new) in changed.items()]
    return [" ".join(["mythos", "train", cfg.recipe, *assignments])]


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _text(value: Any) -> str:
    """A value as an override on the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
