"""``mythos report``: an HTML report of a run."""

from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import mythos, note, progress, si
from open_mythos.fields import MAX_SEED, must


def report(
    run: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="File to write; default: RUN/report.html.")] = None,
    difficulty: Annotated[int | None, typer.Option(min=1, help="Difficulty of the example.")] = None,
    loops: Annotated[int | None, typer.Option(min=1, help="Maximum loops of the example.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the example.")] = 0,
) -> None:
    """Write an HTML report of a run: curves, and every loop of an example."""
    from open_mythos import files
    from open_mythos.cli.owned import may_replace
    from open_mythos.models import home_dir
    from open_mythos.report import gather, render

    path = out or (home_dir(run) if Path(run).is_dir() else Path("runs") / run) / "report.html"
    must(path.suffix in (".html", ".htm"), f"--out {path} should end in .html, as it is an HTML page")
    may_replace(path)
    with progress(n_steps=3) as begin:
        page = render(data := gather(run, difficulty, loops, seed, begin))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, page)
    then = f"another example with {mythos('report', run, '--seed', seed + 1)}"
    if data["grid"]:
        then += f", a harder one with {mythos('report', run, '--difficulty', data['grid']['difficulties'][-1])}"
    note(
        f"Page: {path} ({si(len(page.encode()), 'B')}, one file; open it in any browser)",
        f"Next: {then}.",
    )
