"""Tables of evaluation results, shared by the commands."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from open_mythos.cli.console import console, si, table
from open_mythos.evaluation.grid import combine
from open_mythos.evaluation.summary import Evaluation
from open_mythos.nn.exits import Exit

SHALLOW, DEEP = 8, 32
"""Loop counts whose relative difference in bits is shown."""


def show_grid(evaluation: Evaluation, trained: int, exit: Exit | None = None) -> None:
    """A column per difficulty, those up to ``trained`` marked; the best accuracies bold."""
    grid, mean = evaluation.grids[0], combine(evaluation.grids)["accuracy"].mean
    rule = "no early exit" if exit is None else f"exit {exit}"
    n_problems = grid.examples * len(evaluation.grids)
    names = [f"{n} {grid.unit}" + (" (trained)" if n <= trained else "") for n in grid.difficulties]
    title = f"{grid.task}: accuracy by loops, {rule}, {n_problems} problems each, guessing {share(grid.chance)}"
    rows, best = table(title, "loops", *names), [share(accuracy) for accuracy in mean.amax(1).tolist()]
    for count, column in zip(grid.loops, mean.T.tolist(), strict=True):
        cells = (Text(share(x), "bold" if share(x) == top else "") for x, top in zip(column, best, strict=True))
        rows.add_row(str(count), *cells)
    console.print(rows)
    if exit is not None:
        used = zip(grid.difficulties, grid.loops_used[:, -1].tolist(), strict=True)
        means = ", ".join(f"{n:.1f} with {difficulty} {grid.unit}" for difficulty, n in used)
        console.print(f"mean loops of a position, of {grid.loops[-1]}: {means}", style="dim", highlight=False)


def show_halting(evaluation: Evaluation) -> None:
    """Savings of halting, and accuracy at matched FLOPs; nothing for a model without halting."""
    halting, matched = evaluation.metrics["halting"], evaluation.metrics["compute_matched"]
    if halting is None:
        return
    rows = table("difficulties mixed in one batch", "", "accuracy", "loops")
    rows.add_row("fixed depth", share(halting["accuracy_fixed"]), f"{halting['loops_fixed']:.1f}")
    rows.add_row("halting", share(halting["accuracy_halting"]), f"{halting['loops_halting']:.1f}")
    rows.add_row("saved", "", f"{halting['saved']:.0%}")
    console.print(rows)
    title = f"at matched FLOPs, {matched['difficulty']} {evaluation.grids[0].unit}"
    rows = table(title, "act_threshold", "loops", "a token", "halting", "fixed depth")
    for threshold, curve in matched["halting"].items():
        point: dict[str, Any] = curve[-1]
        accuracy = share(point["accuracy"]), share(point["fixed_accuracy"])
        rows.add_row(threshold, f"{point['loops']:.1f}", si(point["flops"], "FLOP"), *accuracy)
    console.print(rows)


def show_text(bits: dict[int, dict[int, float]]) -> None:
    """A column per length; the minimum bits bold."""
    rows = table("bits per byte of held-out text", "loops", *(f"{length} tokens" for length in bits))
    curves = list(bits.values())
    for n in curves[0]:
        rows.add_row(str(n), *(Text(f"{c[n]:.4f}", "bold" if c[n] == min(c.values()) else "") for c in curves))
    if {SHALLOW, DEEP} <= curves[0].keys():
        rows.add_section()
        changes = (curve[DEEP] / curve[SHALLOW] - 1 for curve in curves)
        rows.add_row(f"from {SHALLOW} to {DEEP}", *(f"{change:+.2%}" for change in changes))
    console.print(rows)


def share(x: float) -> str:
    """A fraction in four characters: ``.731``, ``1.00``."""
    return f"{x:.3f}".removeprefix("0")[:4]
