"""``mythos demo``: accuracy on running parity by number of loops, of a model trained now or shipped."""

import json
from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import clear_errors, console, note, table

PRETRAINED, STEPS = "parity-tiny", 500


def demo(
    out: Annotated[Path, typer.Option(help="Directory for plot, table and checkpoint.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    pretrained: Annotated[bool, typer.Option("--pretrained", help=f"Use {PRETRAINED} instead of training.")] = False,
) -> None:
    """Train a small model and show its accuracy by loops."""
    import torch

    from open_mythos import plots
    from open_mythos.cli import parity
    from open_mythos.model import OpenMythos

    with clear_errors():
        plots.require_matplotlib()
        torch.manual_seed(seed)
        model = OpenMythos.from_pretrained(PRETRAINED) if pretrained else OpenMythos(parity.CONFIG)
        lengths, loops = parity.PRETRAINED if pretrained else parity.TRAINED
        trained_loops = model.cfg.max_loop_iters if pretrained else parity.MAX_TRAINED_LOOPS
        n_parameters = sum(p.numel() for p in model.parameters())
        console.print(
            f"Running parity: at every bit, is the number of ones so far even or odd? A model of {n_parameters:,} "
            f"parameters {'was trained' if pretrained else 'trains'} on up to {parity.TRAINED_LENGTH} bits with 1 to "
            f"{trained_loops} loops.",
            highlight=False,
        )
        if not pretrained:
            parity.train(model, steps)
        curves = parity.measure(model, lengths, loops)
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        example = parity.TASK.batch(1, parity.TRAINED_LENGTH).ids
        (out / "example.json").write_text(json.dumps({"tokens": example[0].tolist()}) + "\n")
        (out / "table.json").write_text(json.dumps(curves, indent=2) + "\n")
        title = f"{PRETRAINED if pretrained else 'mythos demo'}: accuracy by loops, no early exit"
        plots.accuracy_by_loops(curves, out / "depth.png", 0.5, trained_loops, title)
    rows = ([str(n), *(f"{curve[n]:.3f}" for curve in curves.values())] for n in loops)
    console.print(table("accuracy by loops, same weights, no early exit", "loops", *curves, rows=rows))
    note(
        f"Plot: {out / 'depth.png'}   table: {out / 'table.json'}   checkpoint: {out}",
        f"Next: look inside it with [bold]mythos diagnose {out} --plots {out}[/bold].",
    )
