"""``mythos demo``: accuracy on running parity by number of loops, of a model that is trained now or shipped."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import console, mythos, note, table, typed
from open_mythos.fields import MAX_SEED, must

PRETRAINED, STEPS = "parity-tiny", 800


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Output directory; default: runs/demo, or runs/demo-pretrained with --pretrained."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help=f"Training steps; default: {STEPS}.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed for weights and data.")] = 0,
    pretrained: Annotated[bool, typer.Option("--pretrained", help=f"Use {PRETRAINED} instead of training.")] = False,
) -> None:
    """Train a small model and show its accuracy by loops."""
    import torch

    from open_mythos import files, plots, tasks
    from open_mythos.cli.diagnose import EXAMPLE_FILE
    from open_mythos.cli.owned import may_replace, may_replace_run
    from open_mythos.cli.watch import log, watching
    from open_mythos.diagnostics import parameters
    from open_mythos.evaluation import depth_grid
    from open_mythos.evaluation.summary import Evaluation
    from open_mythos.models import load_model
    from open_mythos.training import runs
    from open_mythos.training.config import EvalConfig
    from open_mythos.training.fit import fit
    from open_mythos.training.owner import owned
    from open_mythos.training.recipes import configured
    from open_mythos.training.stopping import Stop

    must(not pretrained or steps is None, f"--steps {steps}: {PRETRAINED} is already trained; leave it out")
    steps = steps or STEPS
    out = out or Path("runs") / ("demo-pretrained" if pretrained else "demo")
    plots.require_matplotlib()
    may_replace_run(out)
    may_replace(out / "table.json", out / "depth.png", out / runs.MODEL / EXAMPLE_FILE)
    cfg = runs.training_config(PRETRAINED) if pretrained else configured("demo", [f"steps={steps}", f"seed={seed}"])
    task, trained_length = tasks.load(cfg.task.name), cfg.task.max_difficulty
    console.print(
        f"Running parity: at every bit, is the number of ones so far even or odd? A model of "
        f"{parameters(cfg.model).total:,} parameters {'was trained' if pretrained else 'trains'} on up to "
        f"{trained_length} bits with 1 to {cfg.loops.maximum} loops.",
    )
    is_run = (out / runs.RUN_CONFIG).exists()
    again = typed("demo", "--out", out, "--steps", steps, "--seed", seed)
    with Stop(), watching(cfg, again) as watch, owned(out, log) if pretrained else nullcontext():
        if pretrained:
            must(not is_run, f"{out} already holds a run; choose another --out")
            model, cfg.evaluation = load_model(PRETRAINED), EvalConfig([24, 96, 384], cfg.evaluation.loops, 32)
            runs.save_model(model, cfg, out)
            wanted = cfg.evaluation.difficulties, cfg.evaluation.loops, cfg.evaluation.examples
            Evaluation([depth_grid(model, task, *wanted, progress=watch.begin)], {}).save(out)
        else:
            fit(cfg, out, "auto" if is_run else "never", watch)
    grid = Evaluation.load(out).grids[0]
    curves = {f"{n} bits" + " (trained)" * (n == trained_length): grid.curve(n) for n in grid.difficulties}
    example = task.batch(1, trained_length, torch.Generator().manual_seed(seed)).ids
    title = f"{PRETRAINED if pretrained else 'mythos demo'}: accuracy by loops, no early exit"
    with owned(out, log):
        files.write_json(out / runs.MODEL / EXAMPLE_FILE, {"tokens": example[0].tolist()})
        files.write_json(out / "table.json", curves, indent=2)
        plots.accuracy_by_loops(curves, out / "depth.png", task.chance, cfg.loops.maximum, title)
    rows = ([str(n), *(f"{curve[n]:.3f}" for curve in curves.values())] for n in grid.loops)
    console.print(table("accuracy by loops, same weights, no early exit", "loops", *curves, rows=rows))
    note(
        f"Plot: {out / 'depth.png'}   table: {out / 'table.json'}   run: {out}",
        f"Next: look inside it with {mythos('diagnose', out, '--plots', out)}, "
        f"or write an HTML report with {mythos('report', out)}.",
    )
