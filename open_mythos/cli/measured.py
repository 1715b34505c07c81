"""Tables of what was measured of a model, as every command shows them."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from open_mythos.cli.console import console, si, table
from open_mythos.evaluation.grid import combine
from open_mythos.evaluation.summary import Evaluation
from open_mythos.nn.exits import Exit

SHALLOW, DEEP = 8, 32
"""Loops between which a text model is asked to stay as good as it was."""


def show_grid(found: Evaluation, trained: int, exit: Exit | None = None) -> None:
    """A column for each difficulty, those up to ``trained`` marked; the best accuracies bold."""
    grid, mean = found.grids[0], combine(found.grids)["accuracy"].mean
    state = "none stops early" if exit is None else f"exit {exit}"
    n_problems = grid.examples * len(found.grids)
    names = [f"{n} {grid.unit}" + (" (trained)" if n <= trained else "") for n in grid.difficulties]
    title = f"{grid.task}: accuracy by loops, {state}, {n_problems} problems each, guessing {share(grid.chance)}"
    shown, best = table(title, "loops", *names), [share(accuracy) for accuracy in mean.amax(1).tolist()]
    for count, column in zip(grid.loops, mean.T.tolist(), strict=True):
        cells = (Text(share(x), "bold" if share(x) == most else "") for x, most in zip(column, best, strict=True))
        shown.add_row(str(count), *cells)
    console.print(shown)
    if exit is not None:
        used = zip(grid.difficulties, grid.loops_used[:, -1].tolist(), strict=True)
        ran = ", ".join(f"{n:.1f} with {difficulty} {grid.unit}" for difficulty, n in used)
        console.print(f"loops that a position ran, of {grid.loops[-1]}: {ran}", style="dim", highlight=False)


def show_halting(found: Evaluation) -> None:
    """What halting saves, and accuracy at equal operations; nothing for a model that does not halt."""
    halting, matched = found.metrics["halting"], found.metrics["compute_matched"]
    if halting is None:
        return
    shown = table("difficulties mixed in one batch", "", "accuracy", "loops")
    shown.add_row("fixed count", share(halting["accuracy_fixed"]), f"{halting['loops_fixed']:.1f}")
    shown.add_row("halting", share(halting["accuracy_halting"]), f"{halting['loops_halting']:.1f}")
    shown.add_row("saved", "", f"{halting['saved']:.0%}")
    console.print(shown)
    title = f"at equal operations, {matched['difficulty']} {found.grids[0].unit}"
    shown = table(title, "act_threshold", "loops", "a token", "halting", "fixed count")
    for threshold, curve in matched["halting"].items():
        point: dict[str, Any] = curve[-1]
        cost = si(point["flops"], "FLOP")
        shown.add_row(
            threshold, f"{point['loops']:.1f}", cost, share(point["accuracy"]), share(point["fixed_accuracy"])
        )
    console.print(shown)


def show_text(found: dict[int, dict[int, float]]) -> None:
    """A column for each length; the least bits bold."""
    shown = table("bits per byte of held-out text", "loops", *(f"{length} tokens" for length in found))
    curves = list(found.values())
    for n in curves[0]:
        cells = ((curve[n], "bold" if curve[n] == min(curve.values()) else "") for curve in curves)
        shown.add_row(str(n), *(Text(f"{bits:.4f}", style) for bits, style in cells))
    if {SHALLOW, DEEP} <= curves[0].keys():
        shown.add_section()
        changes = (curve[DEEP] / curve[SHALLOW] - 1 for curve in curves)
        shown.add_row(f"from {SHALLOW} to {DEEP}", *(f"{change:+.2%}" for change in changes))
    console.print(shown)


def share(x: float) -> str:
    """A share in four characters: ``.731``, ``1.00``."""
    return f"{x:.3f}".removeprefix("0")[:4]
