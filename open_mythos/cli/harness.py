"""``mythos eval --harness``: scores of the lm-evaluation-harness's tasks by loops."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.text import Text

from open_mythos import files, plots
from open_mythos.cli.console import announce, console, mythos, note, picture, table, whole_numbers
from open_mythos.cli.owned import may_replace
from open_mythos.cli.watch import log
from open_mythos.fields import must
from open_mythos.install import find_hub
from open_mythos.integrations.harness import Curve, scores
from open_mythos.models import model_dir
from open_mythos.training.distributed import find_device
from open_mythos.training.runs import evaluation_dir

FILE = "harness.json"


def eval_harness(
    checkpoint: str, names: str, loops: str | None, examples: int | None, include: Path | None,
    only_ours: dict[str, Any], device: str, out: Path | None,
) -> None:  # fmt: skip
    """Run the tasks ``names``, show a table, and write it and a picture to ``out``."""
    given = [option for option, value in only_ours.items() if value]
    must(
        not given,
        f"{', '.join(given)} cannot be used with --harness, whose tasks bring their own settings; leave it out",
    )
    counts = whole_numbers("--loops", "1,2,4,8" if loops is None else loops, "1,2,4,8")
    out = out or evaluation_dir(checkpoint)
    path, drawing = out / FILE, out / "harness.png"
    may_replace(path, drawing)
    find_hub()
    at = find_device(device)
    curves = list[Curve]()
    try:
        for curves in scores(model_dir(checkpoint), names.split(","), counts, include, examples, 8, announce, at):
            out.mkdir(parents=True, exist_ok=True)
            files.write_json(path, [dataclasses.asdict(curve) for curve in curves])
    except BaseException:
        if curves:
            done = ", ".join(map(str, curves[0].loops))
            log(f"stopped; the scores of {done} loops are in {path}")
        raise
    show(curves)
    panels: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = {}  # metric, task, loops: value, error
    for curve in curves:
        points = zip(curve.loops, zip(curve.values, curve.errors, strict=True), strict=True)
        panels.setdefault(curve.metric, {})[curve.task] = dict(points)
    also = f"   plot: {drawing}" if picture(lambda: plots.scores_by_loops(panels, drawing)) else ""
    found_in = () if include is None else ("--include-path", include)
    more = mythos("eval", checkpoint, "--harness", names, *found_in, "--loops", 2 * max(counts))
    note(f"Results: {path}{also}", f"Next: run more loops with {more}.")


def show(curves: list[Curve]) -> None:
    """A row for each metric of each task, a column for each loop count; the best score bold."""
    counts = curves[0].loops
    shown = table("score by loops (± standard error)", "task", "metric", "of", *(str(count) for count in counts))
    for column in shown.columns:
        column.overflow = "fold"  # a truncated score would read as another
    shown.columns[1].no_wrap = True
    for curve in curves:
        best = None if curve.higher_is_better is None else (max if curve.higher_is_better else min)(curve.values)
        cells = []
        for value, error in zip(curve.values, curve.errors, strict=True):
            number = f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"
            cells.append(Text(number + ("" if error is None else f" ±{error:.4f}"), "bold" if value == best else ""))
        arrow = {True: " ↑", False: " ↓", None: ""}[curve.higher_is_better]
        shown.add_row(curve.task, curve.metric + arrow, str(curve.n), *cells)
    console.print(shown)
