"""``mythos compare``: a recipe's looped model beside two that do not loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from open_mythos.cli.console import clear_errors, console, fail, si, table, whole_numbers

if TYPE_CHECKING:
    from open_mythos.training.compare import Comparison


def compare(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; mythos train --list shows them.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as steps=500 optim.lr=3e-4.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of weights and data, as in 0,1,2.")] = "0,1,2",
    out: Annotated[Path | None, typer.Option(help="Directory of the runs; runs/compare-RECIPE if left out.")] = None,
) -> None:
    """Train a model and two that do not loop, and see who wins.

    One baseline runs the same block once; the other has as many blocks as the model has loops, each with weights of
    its own. All see the same problems for as many steps. Runs in --out that have ended are not run again.
    """
    from open_mythos import plots
    from open_mythos.cli.watch import watching
    from open_mythos.training.compare import RESULTS
    from open_mythos.training.compare import compare as run_all
    from open_mythos.training.recipes import configured
    from open_mythos.training.trainer import TrainingError

    out = out or Path("runs") / f"compare-{recipe}"
    with clear_errors():
        plots.require_matplotlib()
        cfg = configured(recipe, overrides or [])
        try:
            found = run_all(cfg, out, whole_numbers("--seeds", seeds, "0,1,2"), watching)
        except TrainingError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("stopped; the same command goes on from here")
        pictures = draw(found, out)
    show(found)
    where = f"   pictures: {', '.join(map(str, pictures))}" if pictures else ""
    console.print(
        f"Everything: {out / RESULTS}{where}\n"
        f"Next: a page with all of it, [bold]mythos report {escape(str(out / f'looped-seed{found.seeds[0]}'))}[/bold].",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def draw(found: Comparison, out: Path) -> list[Path]:
    """A picture for each difficulty, baselines as points at their depth. Bits per byte are for the report to draw."""
    from open_mythos import plots

    if found.measure != "accuracy":
        return []
    pictures = []
    for difficulty in found.difficulties:
        pictures.append(out / f"compare-{difficulty}.png")
        curves = {f"{kind}, {difficulty} {found.unit}": curve for kind, curve in found.curves(difficulty).items()}
        plots.accuracy_by_loops(curves, pictures[-1], trained_loops=found.trained_loops)
    return pictures


def show(found: Comparison) -> None:
    shown = table(
        f"{found.recipe}: {found.measure}, mean over {len(found.seeds)} seeds (worst)",
        "model", "parameters", "FLOPs to train", "FLOPs a token", *(f"{n} {found.unit}" for n in found.difficulties),
    )  # fmt: skip
    for entry in found.entries():
        values = zip(entry.mean, entry.worst, strict=True)
        shown.add_row(
            entry.name, si(entry.parameters), si(entry.training_flops), si(entry.flops_per_token[-1]),
            *(f"{found.show(mean)} ({found.show(worst)})" for mean, worst in values),
        )  # fmt: skip
    console.print(shown)
    console.print(f"FLOPs a token: at {found.difficulties[-1]} {found.unit}.", style="dim", highlight=False)
    for line in found.verdicts():
        console.print(line, highlight=False)
