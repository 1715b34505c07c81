"""``mythos compare``: a recipe's looped model against two baselines that do not loop."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from open_mythos.cli.console import console, mythos, note, si, table, typed, whole_numbers

if TYPE_CHECKING:
    from open_mythos.training.compare import Comparison


def compare(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; mythos train --list shows them.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as steps=500 optim.lr=3e-4.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of weights and data, comma-separated.")] = "0,1,2",
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Of the runs; default: runs/compare-RECIPE.")
    ] = None,
) -> None:
    """Compare a looped model with two baselines that do not loop.

    One baseline runs the same block once; the other has as many blocks as the model has loops, with untied weights.
    All train on the same problems for the same number of steps. Finished runs in --out are reused.
    """
    from open_mythos import plots
    from open_mythos.cli.owned import may_replace
    from open_mythos.cli.watch import log, watching
    from open_mythos.training.compare import RESULTS
    from open_mythos.training.compare import compare as run_all
    from open_mythos.training.owner import owned
    from open_mythos.training.recipes import configured

    out = out or Path("runs") / f"compare-{recipe}"
    plots.require_matplotlib()
    cfg = configured(recipe, overrides or [])
    may_replace(out / RESULTS, *(out / f"compare-{n}.png" for n in cfg.evaluation.difficulties))
    again = typed("compare", recipe, *(overrides or []), "--seeds", seeds, "--out", out)
    wanted, paths = whole_numbers("--seeds", seeds, "0,1,2"), []
    with owned(out, log):
        results = run_all(cfg, out, wanted, partial(watching, again=again))
        for difficulty in results.difficulties if results.measure == "accuracy" else ():  # bits: only in the report
            paths.append(out / f"compare-{difficulty}.png")
            title = f"{results.recipe}: accuracy on {difficulty} {results.unit}, mean over seeds, no early exit"
            plots.accuracy_by_loops(results.curves(difficulty), paths[-1], None, results.trained_loops, title)
    show(results)
    plotted = f"   plots: {', '.join(map(str, paths))}" if paths else ""
    note(
        f"Results: {out / RESULTS}{plotted}",
        f"Next: an HTML page, {mythos('report', out / f'looped-seed{results.seeds[0]}')}.",
    )


def show(results: "Comparison") -> None:
    rows = table(
        f"{results.recipe}: {results.measure}, mean over {len(results.seeds)} seeds (worst)", "model", "parameters",
        "FLOPs to train", "FLOPs a token", *(f"{n} {results.unit}" for n in results.difficulties),
    )  # fmt: skip
    for entry in results.entries():
        values = zip(entry.mean, entry.worst, strict=True)
        rows.add_row(
            entry.name, si(entry.parameters), si(entry.training_flops), si(entry.flops_per_token[-1]),
            *(f"{results.show(mean)} ({results.show(worst)})" for mean, worst in values),
        )  # fmt: skip
    console.print(rows)
    console.print(f"FLOPs a token: at {results.difficulties[-1]} {results.unit}.", style="dim")
    for line in results.verdicts():
        console.print(line)
