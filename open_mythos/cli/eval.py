"""``mythos eval``: accuracy of a checkpoint over difficulty and loops, with metrics of depth."""

from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import mythos, note, whole_numbers
from open_mythos.fields import must


def eval(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    task: Annotated[str | None, typer.Option(help="Task; default: the one it was trained on.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the task, as key=value; may be repeated.")] = None,
    difficulties: Annotated[str | None, typer.Option(help="Difficulties, as in 24,96.")] = None,
    loops: Annotated[str | None, typer.Option(help="Numbers of loops, as in 1,2,4,8.")] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Problems per difficulty, or documents per harness task.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds for the problems, as in 0,1,2; default: 0.")] = None,
    exit: Annotated[
        str | None, typer.Option(help="Early-exit rule for each position, such as gate; the tables show what it costs.")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Run tasks of the lm-evaluation-harness instead, as in hellaswag,arc_easy.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of your own harness tasks.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Output directory for table and plot.")] = None,
) -> None:
    """Measure accuracy over difficulty and loops, with depth metrics."""
    if harness is not None:
        from open_mythos.cli.harness import eval_harness

        only_ours = {
            "--task": task,
            "--option": option,
            "--difficulties": difficulties,
            "--exit": exit,
            "--seeds": seeds,
        }
        eval_harness(checkpoint, harness, loops, examples, include_path, only_ours, device, out)
        return
    must(include_path is None, "--include-path is where --harness finds tasks; give the tasks to run with --harness")
    from open_mythos import tasks
    from open_mythos.cli.own_tasks import eval_problems, eval_text, settings
    from open_mythos.cli.owned import may_replace
    from open_mythos.models import load_model, model_dir
    from open_mythos.tasks.text import Text
    from open_mythos.training.distributed import find_device
    from open_mythos.training.runs import EVALUATION, METRICS, evaluation_dir

    model = load_model(checkpoint).to(find_device(device))
    cfg = settings(checkpoint, model.cfg, task, option or [], difficulties, loops, examples)
    loaded = tasks.load(cfg.task.name, **cfg.task.options)
    out = out or evaluation_dir(checkpoint)
    may_replace(out / EVALUATION, out / "grid.png")
    if isinstance(loaded, Text):
        must(seeds is None, f"--seeds {seeds}: text is measured on evenly spaced windows; leave --seeds out")
        path = eval_text(model, loaded, cfg, exit, out)
        (out / "grid.png").unlink(missing_ok=True)  # of an earlier evaluation on problems
    else:
        path = eval_problems(model, loaded, cfg, whole_numbers("--seeds", seeds or "0", "0,1,2"), exit, out)
    plot, run = out / "grid.png", model_dir(checkpoint).parent
    then = f"look inside with {mythos('diagnose', checkpoint)}."
    if (run / METRICS).is_file():
        then = f"write an HTML page with {mythos('report', run)}."
    note(f"Results: {path}" + (f"   plot: {plot}" if plot.is_file() else ""), f"Next: {then}")
