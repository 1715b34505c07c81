"""``mythos eval``: a checkpoint's accuracy over difficulty and loops, and what more depth does to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import clear_errors, console, whole_numbers


def eval(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    task: Annotated[str | None, typer.Option(help="Task; the one it was trained on if left out.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Of the task, as key=value; may be repeated.")] = None,
    difficulties: Annotated[str | None, typer.Option(help="As in 24,96.")] = None,
    loops: Annotated[str | None, typer.Option(help="As in 1,2,4,8.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Problems of a difficulty; documents of a task.")] = None,
    seeds: Annotated[str, typer.Option(help="Of the problems, as in 0,1,2.")] = "0",
    exit: Annotated[
        str | None,
        typer.Option(help="Let positions stop early: gate, change:0.03:2, acceleration, kl:5e-4, argmax:3."),
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of the lm-evaluation-harness in place of ours, as in hellaswag,arc_easy.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Where the harness finds tasks of your own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for table and picture.")] = None,
) -> None:
    """Accuracy over difficulty and loops, and what depth does."""
    with clear_errors():
        if harness is not None:
            from open_mythos.cli.harness import eval_harness

            only_ours = {"--task": task, "--option": option, "--difficulties": difficulties, "--exit": exit}
            eval_harness(checkpoint, harness, loops, examples, include_path, only_ours, out)
            return
        if include_path is not None:
            raise ValueError("--include-path is where --harness finds tasks; name one of them with --harness")
        from open_mythos import tasks
        from open_mythos.cli.own_tasks import eval_problems, eval_text, settings
        from open_mythos.models import load_model
        from open_mythos.nn.exits import parse
        from open_mythos.tasks.text import Text
        from open_mythos.training.runs import evaluation_dir

        model = load_model(checkpoint)
        cfg = settings(checkpoint, model.cfg, task, option or [], difficulties, loops, examples)
        made = tasks.load(cfg.task.name, **cfg.task.options)
        leave = None if exit is None else parse(exit)
        out = out or evaluation_dir(checkpoint)
        if isinstance(made, Text):
            path = eval_text(model, made, cfg, exit, out)
        else:
            path = eval_problems(model, made, cfg, whole_numbers("--seeds", seeds, "0,1,2"), leave, out)
    drawing = out / "grid.png"
    also = f"   picture: {drawing}" if drawing.is_file() else ""
    console.print(f"Everything: {path}{also}\n{next_step(checkpoint)}", highlight=False, soft_wrap=True)


def next_step(checkpoint: str) -> str:
    from open_mythos.models import model_dir
    from open_mythos.training.runs import METRICS

    directory = model_dir(checkpoint)
    if (directory.parent / METRICS).is_file():
        return f"Next: a page with all of it, [bold]mythos report {directory.parent}[/bold]."
    return f"Next: look inside, [bold]mythos diagnose {checkpoint}[/bold]."
