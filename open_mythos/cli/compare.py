"""``mythos compare``: a recipe's looped model against four baselines without loops."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from open_mythos.cli.console import console, mythos, note, numbers, si, table, typed, whole_numbers

if TYPE_CHECKING:
    from open_mythos.training.compare import Comparison


def compare(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; mythos train --list shows them.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings such as steps=500 optim.lr=3e-4.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds for weights and data, comma-separated.")] = "0,1,2",
    rates: Annotated[
        str | None,
        typer.Option(
            help="Learning rates, as in 3e-4,1e-3,3e-3: each kind of model tries all of them on the first seed and "
            "uses its best for the other seeds, so each further rate costs one run per kind. Default: the recipe's."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the planned runs and exit.")] = False,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Directory of the runs; default: runs/compare-RECIPE.")
    ] = None,
) -> None:
    """Compare a looped model with four baselines that do not loop.

    single: the same block, run once. wide: one pass, so wide that it takes as many operations as all loops. unrolled:
    as many blocks as loops, with untied weights. plain: the same as a plain pre-norm transformer. All train on the same
    problems for the same number of steps. Finished runs in --out are reused.
    """
    from open_mythos import plots
    from open_mythos.cli.owned import may_replace
    from open_mythos.cli.watch import log, watching
    from open_mythos.training.compare import RESULTS
    from open_mythos.training.compare import compare as run_all
    from open_mythos.training.owner import owned
    from open_mythos.training.plan import Plan
    from open_mythos.training.recipes import configured

    out = out or Path("runs") / f"compare-{recipe}"
    plots.require_matplotlib()
    cfg = configured(recipe, overrides or [])
    may_replace(out / RESULTS, *(out / f"compare-{n}.png" for n in cfg.evaluation.difficulties))
    again = ["compare", recipe, *(overrides or []), "--seeds", seeds, "--out", str(out)]
    again += ["--rates", rates] if rates else []
    tried = () if rates is None else numbers("--rates", rates, "3e-4,1e-3,3e-3")
    plan, paths = Plan(cfg, out, whole_numbers("--seeds", seeds, "0,1,2"), tried), []
    log(plan.describe())
    if dry_run:
        note(f"Nothing was written. Next: {mythos(*again)}.")
        return
    with owned(out, log):
        results = run_all(cfg, out, plan.seeds, partial(watching, again=typed(*again)), plan.rates)
        for difficulty in results.difficulties if results.measure == "accuracy" else ():  # bits: only in the report
            paths.append(out / f"compare-{difficulty}.png")
            title = f"{results.recipe}: accuracy on {difficulty} {results.unit}, mean over seeds, no early exit"
            plots.accuracy_by_loops(results.curves(difficulty), paths[-1], None, results.trained_loops, title)
    show(results)
    plotted = f"   plots: {', '.join(map(str, paths))}" if paths else ""
    note(
        f"Results: {out / RESULTS}{plotted}",
        f"Next: write an HTML page with {mythos('report', out / f'looped-seed{results.seeds[0]}')}.",
    )


def show(results: "Comparison") -> None:
    tuned = max(len(contender.tried) for contender in results.contenders)
    rows = table(
        f"{results.recipe}: {results.measure}, mean over {len(results.seeds)} seeds (worst)", "model", "parameters",
        "FLOPs to train", "FLOPs per token", "lr", *(f"{n} {results.unit}" for n in results.difficulties),
    )  # fmt: skip
    for entry in results.entries():
        values = zip(entry.mean, entry.worst, strict=True)
        rows.add_row(
            entry.name, si(entry.parameters), si(entry.training_flops), si(entry.flops_per_token[-1]),
            f"{entry.lr:g}",
            *(f"{results.show(mean)} ({results.show(worst)})" for mean, worst in values),
        )  # fmt: skip
    console.print(rows)
    rates = (
        f"the best of {tuned} on seed {results.seeds[0]}" if tuned > 1 else "the recipe's for all; tune it with --rates"
    )
    console.print(f"FLOPs per token: at {results.difficulties[-1]} {results.unit}. lr: {rates}.", style="dim")
    if results.contenders[0].by_token:
        title = f"bits per byte by kind of token, {results.trained_loops} loops for the looped model"
        kinds = list(results.contenders[0].by_token)
        bits = ([one.kind, *(f"{one.by_token[kind]:.4f}" for kind in kinds)] for one in results.contenders)
        console.print(table(title, "model", *kinds, rows=bits))
    for line in (*results.worth(), *results.verdicts()):
        console.print(line)
