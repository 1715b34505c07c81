"""Evaluation on this library's tasks for ``mythos eval``, and tables of results, also for ``mythos train``."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.text import Text as Cell

from open_mythos import files, plots, tasks
from open_mythos.cli.console import console, note, picture, progress, si, table
from open_mythos.config import MythosConfig
from open_mythos.evaluation.grid import DepthGrid, combine
from open_mythos.evaluation.metrics import OVERTHINKING_FACTOR
from open_mythos.evaluation.summary import FILE, Evaluation, evaluate, n_steps
from open_mythos.evaluation.text import text_scores
from open_mythos.evaluation.token_kinds import bits_by_kind
from open_mythos.model import OpenMythos
from open_mythos.models import TRAINING_FILE, model_dir
from open_mythos.nn.exits import parse, spell
from open_mythos.tasks import tokenizer
from open_mythos.tasks.text import Text
from open_mythos.training.config import TaskConfig, TrainConfig
from open_mythos.training.overrides import override
from open_mythos.training.recipes import recipe
from open_mythos.training.runs import held_out_options, training_config

SHALLOW, DEEP = 8, 32  # loop counts whose relative difference in bits is shown
IDLE, FEW = 0.02, 4  # a gate that saves less than this share of at least so many loops is said to stop hardly anything
HARM = 0.005  # loss of accuracy, or relative increase of bits, above which an exit is said to stop too early


def settings(
    checkpoint: str, model: MythosConfig, task: str | None, options: list[str], difficulties: str | None,
    loops: str | None, examples: int | None,
) -> TrainConfig:  # fmt: skip
    """The checkpoint's training config, with task and evaluation overridden.

    For a text model without one: the config of recipe ``heal``, which would train it further."""
    directory = model_dir(checkpoint)
    has_config, is_text = (directory / TRAINING_FILE).is_file(), (directory / tokenizer.FILE).is_file()
    if task is None and is_text and not has_config:
        cfg = dataclasses.replace(recipe("heal"), model=model)
    else:
        cfg = training_config(checkpoint) if task is None or has_config else TrainConfig(model=model)
    if task is not None and (not has_config or task != cfg.task.name):
        cfg = dataclasses.replace(cfg, task=TaskConfig(name=task))
    requested = {"difficulties": difficulties, "loops": loops, "examples": examples}
    changes = [f"evaluation.{name}={value}" for name, value in requested.items() if value is not None]
    if cfg.kind != "looped" and loops is None:
        changes.append(f"evaluation.loops={cfg.depths[0]}")  # a baseline has one depth
    changes += [f"task.options.{key}={value}" for key, value in held_out_options(checkpoint, cfg).items()]
    return override(cfg, [*changes, *(f"task.options.{option}" for option in options)])


def eval_problems(
    model: OpenMythos, task: tasks.Task, cfg: TrainConfig, seeds: list[int], exit: str | None, out: Path
) -> Path:
    """Evaluate, write ``evaluation.json`` and, with matplotlib, a plot, and show tables."""
    settings, rule = cfg.evaluation, None if exit is None else parse(exit)
    with progress(n_steps(settings.difficulties, seeds, rule)) as begin:
        result = evaluate(model, task, settings.difficulties, settings.loops, settings.examples, seeds, rule, begin)
    path, grid, mean = result.save(out), result.grids[0], combine(result.grids)["accuracy"].mean
    axes = grid.difficulties, grid.loops, out / "grid.png", grid.unit, grid.chance
    trained = (cfg.task.max_difficulty, model.cfg.max_loop_iters) if cfg.task.name == task.name else None
    picture(lambda: plots.accuracy_grid(mean, *axes, trained, result.exit_in_words()))
    show_grid(result, cfg.task.max_difficulty if trained else 0)
    show_metrics(result)
    show_halting(result)
    return path


def show_metrics(evaluation: Evaluation) -> None:
    grid = evaluation.grids[0]
    title = "depth metrics, every position running all loops"
    rows = table(title, grid.unit, "best", "95%", "loops", "exact", "drop", "converged", "zeros", "noise")
    for metrics in evaluation.metrics["difficulties"]:
        low, high, exact = (share(metrics[name]) for name in ("low", "high", "exact"))
        converged, starts = metrics["settle_rate"], metrics["from_start"]
        rows.add_row(
            str(metrics["difficulty"]), share(metrics["best"]), f"{low}-{high}", str(metrics["best_loops"]), exact,
            share(metrics["damage"]), "-" if converged is None else share(converged),
            *(share(starts[start]["differing"]) for start in ("zeros", "noise")),
        )  # fmt: skip
    console.print(rows)
    trained = evaluation.metrics["trained_loops"]
    console.print(
        f"best: the highest accuracy; loops: the fewest that come within .001 of it. drop: best minus accuracy at "
        f"{OVERTHINKING_FACTOR} times the {trained} trained loops, or at the most loops here. converged: share of "
        f"positions whose state changes by less than 1% in loop {grid.loops[-1]}. zeros, noise: share of answers that "
        f"differ there if the state starts from zeros or noise.",
        style="dim",
    )  # fmt: skip


def eval_text(model: OpenMythos, task: Text, cfg: TrainConfig, exit: str | None, out: Path) -> Path:
    """Measure bits per byte at each length and loop count, write ``evaluation.json``, and show tables."""
    settings, rule = cfg.evaluation, None if exit is None else parse(exit)
    scores = {}  # by length: bits and mean loops of a position, first without the exit, then with it if there is one
    with progress(len(settings.difficulties)) as begin:
        for length in settings.difficulties:
            begin(f"{length} {task.unit}")
            asked = settings.loops, length, settings.examples
            scores[length] = [text_scores(model, task, *asked, one) for one in ((None, rule) if rule else (None,))]
    full, bits = ({length: found[i][0] for length, found in scores.items()} for i in (0, -1))
    # "bits_per_byte" is that of the first length, as in the evaluation.json that training writes
    data = {"bits_per_byte": next(iter(bits.values())), "by_length": bits, "windows": settings.examples}
    data |= {"task": task.name, "options": task.to_dict(), "exit": exit, "all_loops": full}
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / FILE, data)
    show_text(bits, "no early exit" if rule is None else f"exit {spell(rule)}")
    n, length = max(settings.loops), settings.difficulties[0]
    kinds = bits_by_kind(model, task, n, length, settings.examples)
    title = f"bits per byte by kind of token, {n} loops, {length} tokens, no early exit"
    rows = ((kind, f"{one:.4f}", f"{part:.1%}") for kind, (one, part) in kinds.items())
    console.print(table(title, "kind", "bits", "of the bytes", rows=rows))
    if rule is not None:
        n, costs = max(settings.loops), []
        for length, ((most, _), (left, used)) in scores.items():
            costs.append((length, f"{most[n]:.4f}", f"{left[n]:.4f}", left[n] / most[n] - 1, used[n]))
        show_cost(spell(rule), n, task.unit, costs)
    return out / FILE


def show_cost(exit: str, loops: int, unit: str, costs: list[tuple[int, str, str, float, float]]) -> None:
    """Show, for each difficulty: the score with all loops and with the exit, what it loses, and the mean loops run."""
    title = f"cost of the exit {exit}, against all {loops} loops on the same problems"
    rows = table(title, unit, "all loops", "with the exit", "lost", "loops run")
    for difficulty, most, left, lost, used in costs:
        rows.add_row(str(difficulty), most, left, Cell(f"{lost:.2%}", "red" if lost > HARM else ""), f"{used:.1f}")
    console.print(rows)
    if max(cost[3] for cost in costs) > HARM:
        note("This exit stops positions too early: use a stricter threshold, more patience, or a trained gate.")


def show_grid(evaluation: Evaluation, trained: int) -> None:
    """Show accuracies, a column per difficulty, those up to ``trained`` marked, the best bold; then the same for each
    kind of problem in the task, and what an exit costs."""
    grid = evaluation.grids[0]
    show_accuracy(evaluation.grids, trained)
    for kind in evaluation.kinds:
        show_accuracy([kind], 0)
    if grid.exit is not None:
        costs = [
            (cost["difficulty"], share(cost["all_loops"]), share(cost["accuracy"]), cost["lost"], cost["loops_used"])
            for cost in evaluation.metrics["exit"]
        ]
        show_cost(grid.exit, grid.loops[-1], grid.unit, costs)


def show_accuracy(grids: list[DepthGrid], trained: int) -> None:
    grid, mean = grids[0], combine(grids)["accuracy"].mean
    rule = "no early exit" if grid.exit is None else f"exit {grid.exit}"
    n_problems = grid.examples * len(grids)
    names = [f"{n} {grid.unit}" + (" (trained)" if n <= trained else "") for n in grid.difficulties]
    title = f"{grid.task}: accuracy by loops, {rule}, {n_problems} problems each, guessing {share(grid.chance)}"
    rows, best = table(title, "loops", *names), [share(accuracy) for accuracy in mean.amax(1).tolist()]
    for count, column in zip(grid.loops, mean.T.tolist(), strict=True):
        cells = (Cell(share(x), "bold" if share(x) == top else "") for x, top in zip(column, best, strict=True))
        rows.add_row(str(count), *cells)
    console.print(rows)


def show_halting(evaluation: Evaluation) -> None:
    """Show the savings of the exit, or else of the gate, and the gate's accuracy at matched FLOPs, if there is one."""
    halting, matched = evaluation.metrics["halting"], evaluation.metrics["compute_matched"]
    if halting is None:
        return
    ways = {"fixed depth": "fixed", f"exit {halting.get('exit', 'gate')}": "halting"}
    rows = [(way, share(halting[f"accuracy_{k}"]), f"{halting[f'loops_{k}']:.1f}") for way, k in ways.items()]
    lost = halting["accuracy_fixed"] - halting["accuracy_halting"]
    rows.append(("", f"{lost:.2%} lost", f"{halting['saved']:.0%} saved"))
    console.print(table("difficulties mixed in one batch", "", "accuracy", "loops", rows=rows))
    if matched is None:  # an exit other than the gate
        return
    if halting["saved"] < IDLE and halting["loops_fixed"] >= FEW:
        idle = "The gate hardly stops any position: it is untrained, or stopping would cost accuracy. States that keep"
        console.print(f"{idle} changing (converged, above) can be trained to settle: loss.fixed_point=1.", style="dim")
    title = f"gate at matched FLOPs, {matched['difficulty']} {evaluation.grids[0].unit}"
    points = table(title, "act_threshold", "loops", "a token", "with gate", "fixed depth")
    for threshold, curve in matched["halting"].items():
        point: dict[str, Any] = curve[-1]
        accuracy = share(point["accuracy"]), share(point["fixed_accuracy"])
        points.add_row(threshold, f"{point['loops']:.1f}", si(point["flops"], "FLOP"), *accuracy)
    console.print(points)


def show_text(bits: dict[int, dict[int, float]], rule: str = "no early exit") -> None:
    """Show bits per byte, a column per length; the minimum is bold."""
    rows = table(f"bits per byte of held-out text, {rule}", "loops", *(f"{length} tokens" for length in bits))
    curves = list(bits.values())
    for n in curves[0]:
        rows.add_row(str(n), *(Cell(f"{c[n]:.4f}", "bold" if c[n] == min(c.values()) else "") for c in curves))
    if {SHALLOW, DEEP} <= curves[0].keys():
        rows.add_section()
        changes = (curve[DEEP] / curve[SHALLOW] - 1 for curve in curves)
        rows.add_row(f"from {SHALLOW} to {DEEP}", *(f"{change:+.2%}" for change in changes))
    console.print(rows)


def share(x: float) -> str:
    """A fraction in four characters: ``.731``, ``1.00``."""
    return f"{x:.3f}".removeprefix("0")[:4]
