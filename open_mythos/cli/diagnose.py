"""``mythos diagnose``: one traced forward pass through a checkpoint, as tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from open_mythos.cli.console import clear_errors, console, progress, si, table
from open_mythos.config import MythosConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from open_mythos.diagnostics import Trace
    from open_mythos.model import OpenMythos

POSITIONS_PER_LINE = 16
BLOCKS, MOST_BLOCKS = " ▁▂▃▄▅▆▇█", 32


def diagnose(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    loops: Annotated[int | None, typer.Option(min=1, help="Loops to run; the model's default if left out.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for pictures (needs matplotlib).")] = None,
    prompt: Annotated[str | None, typer.Option(help='Token ids, as in "1 2 1 1".')] = None,
) -> None:
    """Look inside a checkpoint, loop by loop."""
    from open_mythos.cli.tokens import choose_tokens
    from open_mythos.diagnostics import trace
    from open_mythos.models import load_model, model_dir

    with clear_errors(), progress(n_steps=3 if plots is None else 4) as begin:
        begin("loading")
        model = load_model(checkpoint)
        source, ids = choose_tokens(model.cfg, model_dir(checkpoint), prompt)
        begin("tracing")
        found = trace(model, ids, loops)
        begin("measuring")
        measured = measure(model, ids, len(found.delta))
        if plots is not None:
            begin("drawing")
            draw_all(found, ids, plots)
    console.print(f"{checkpoint}: {len(found.delta)} loops over {ids.shape[1]} tokens ({source})", highlight=False)
    show_measures(measured, ids.shape[1])
    show_loops(found)
    show_halting(found.loops_used[0].tolist())
    if model.cfg.n_experts:
        show_experts(found.expert_load)
    show_next(checkpoint, plots, model.cfg)


# -- what to measure besides the trace


@dataclass
class Measures:
    """Numbers of the whole run: see :mod:`open_mythos.diagnostics`."""

    radius: float
    gain: float
    cache_bytes: int


def measure(model: OpenMythos, ids: Tensor, n_loops: int) -> Measures:
    import torch

    from open_mythos.cache import KVCache
    from open_mythos.diagnostics import cache_bytes, loop_gain, spectral_radius

    cache = KVCache()
    with torch.no_grad():
        model(ids, n_loops, kv_cache=cache)
        return Measures(spectral_radius(model), loop_gain(model, ids, n_loops), cache_bytes(cache))


def draw_all(found: Trace, ids: Tensor, directory: Path) -> None:
    from open_mythos import plots as draw

    tokens = ids[0].tolist()
    draw.state_change(found.delta, directory / "state_change.png")
    draw.halting_map(found.loops_used[0], directory / "loops_used.png", tokens)
    draw.halting_map(found.halting[:, 0].float(), directory / "halting.png", tokens)
    if found.expert_load.shape[1]:
        draw.expert_load(found.expert_load, directory / "expert_load.png")


# -- what to print


def show_measures(measured: Measures, n_tokens: int) -> None:
    shown = table("the loop as a whole", "measure", "value", "reading")
    shown.columns[2].justify = "left"
    settles = "settles on a state" if measured.gain < 1 else "keeps moving"
    shown.add_row("spectral radius of A", f"{measured.radius:.4f}", "always below 1: the linear part is stable")
    shown.add_row("gain of one more loop", f"{measured.gain:.4f}", f"the state {settles}")
    per_token = si(measured.cache_bytes / n_tokens, "B")
    shown.add_row("cache", si(measured.cache_bytes, "B"), f"measured; {per_token} per token")
    console.print(shown)


def show_loops(found: Trace) -> None:
    shown = table("state change |Δh| / |h| and halting", "loop", "running", "mean", "max", "gate, mean")
    for loop, (delta, gate) in enumerate(zip(found.delta, found.halting, strict=True), start=1):
        ran = found.loops_used >= loop
        changes = (f"{delta[ran].mean():.4f}", f"{delta.max():.4f}") if ran.any() else ("-", "-")
        shown.add_row(str(loop), str(int(ran.sum())), *changes, f"{gate.float().mean():.4f}")
    console.print(shown)


def show_halting(loops_used: list[int]) -> None:
    shown = table("loops used by each position", "positions", "loops")
    width = len(str(max(loops_used)))
    for start in range(0, len(loops_used), POSITIONS_PER_LINE):
        line = loops_used[start : start + POSITIONS_PER_LINE]
        shown.add_row(f"{start}-{start + len(line) - 1}", " ".join(f"{used:{width}}" for used in line))
    shown.columns[1].justify = "left"
    console.print(shown)


def show_experts(load: Tensor) -> None:
    n_experts = load.shape[1]
    shown = table(
        f"load of {n_experts} experts (even: {1 / n_experts:.1%})", "loop", "busiest", "idlest", "unused", "load"
    )
    for loop, counts in enumerate(load, start=1):
        share = counts / counts.sum().clamp(min=1)
        unused = str(int((counts == 0).sum()))
        shown.add_row(str(loop), f"{share.max():.1%}", f"{share.min():.1%}", unused, bars(counts.numpy()))
    shown.columns[-1].justify = "left"
    console.print(shown)


def bars(counts: np.ndarray) -> str:
    """Counts as blocks of eight heights; neighbours share one where there are too many for a line."""
    import numpy as np

    means = [part.mean() for part in np.array_split(counts, min(len(counts), MOST_BLOCKS))]
    return "".join(BLOCKS[round(8 * mean / max(*means, 1))] for mean in means)


def show_next(checkpoint: str, plots: Path | None, cfg: MythosConfig) -> None:
    if plots is not None:
        console.print(f"Pictures are in {plots}.", highlight=False)
    deeper = f"mythos diagnose {checkpoint} --loops {2 * cfg.max_loop_iters}"
    pictures = "" if plots is not None else ", or add [bold]--plots DIRECTORY[/bold] for pictures"
    console.print(f"Next: think longer with [bold]{deeper}[/bold]{pictures}.", highlight=False, soft_wrap=True)
