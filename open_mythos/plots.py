"""PNG plots by loop, from lists, NumPy arrays or CPU tensors. Needs the ``plots`` extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from open_mythos import files
from open_mythos.install import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

# Okabe and Ito's colour-blind-safe palette (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY, LIGHT_GREY = "#767676", "#F2F2F2"
WIDTH, HEIGHT, MAX_WIDTH = 6.4, 4.0, 16.0  # inches
LEGEND = 1.6  # inches, right of the axes
STYLE: Any = {
    "font.size": 10, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titlepad": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.color": "#E4E4E4",
    "lines.linewidth": 1.8, "lines.markersize": 5, "legend.frameon": False, "image.cmap": "cividis",
    "savefig.dpi": 150, "savefig.facecolor": "white",
}  # fmt: skip


def require_matplotlib() -> None:
    """Raise ImportError, naming the extra, if matplotlib is not installed; called before long work for a plot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing("plots need matplotlib", "plots") from error


def accuracy_by_loops(
    curves: Mapping[str, Mapping[int, float]],
    path: str | Path,
    chance: float | None = None,
    trained_loops: int | None = None,
    title: str = "Accuracy by number of loops",
) -> None:
    """Accuracy against the number of loops, one line per label.

    Args:
        curves: for each label, accuracy in [0, 1] at each loop count.
        path: PNG to write.
        chance: accuracy of guessing, drawn as a dotted line.
        trained_loops: maximum in training; deeper ones are shaded.
        title: which model it is, and which exit was on.
    """
    with _axes(path, WIDTH + LEGEND) as (figure, axes):
        for i, (label, curve) in enumerate(curves.items()):
            loops = sorted(curve)
            axes.plot(loops, [curve[n] for n in loops], label=label, clip_on=False, zorder=3, **_line_style(i))
        counts = sorted({n for curve in curves.values() for n in curve})
        _log2_ticks(axes, counts)
        axes.set(ylim=(0, 1), ylabel="accuracy (share of answers right)", xlabel="loops of the recurrent block")
        axes.set_title(title)
        if chance is not None:
            axes.axhline(chance, color=GREY, linestyle=":", linewidth=1.4, label="guessing")
        if trained_loops is not None and counts[-1] > trained_loops:
            axes.axvspan(trained_loops, counts[-1], color=LIGHT_GREY, zorder=0, label="deeper than trained")
        figure.legend(loc="outside right upper")


def scores_by_loops(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float | None]]]], path: str | Path
) -> None:
    """Scores against the number of loops: one panel per metric, one line per task.

    A panel's y axis runs from 0 to 1 if all its scores do. Otherwise it spans at least a tenth of the largest score:
    with a shorter one, noise would look like a gain.

    Args:
        panels: for each metric and task, at each loop count, the score and its standard error or None.
        path: PNG to write.
    """
    tasks = list(dict.fromkeys(task for curves in panels.values() for task in curves))
    with _figure(path, WIDTH + LEGEND, height=max(HEIGHT, 2.2 * len(panels))) as figure:
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (metric, curves) in zip(rows, panels.items(), strict=True):
            for task, curve in curves.items():
                loops, i = sorted(curve), tasks.index(task)
                scores, errors = zip(*((curve[n][0], curve[n][1] or 0) for n in loops), strict=True)
                axes.errorbar(loops, scores, errors, label=task, capsize=2, elinewidth=0.8, **_line_style(i))
            _log2_ticks(axes, sorted({n for curve in curves.values() for n in curve}))
            values, (low, high) = [score for curve in curves.values() for score, _ in curve.values()], axes.get_ylim()
            pad = max(0.0, max(map(abs, values)) / 10 - (high - low)) / 2
            axes.set_ylim((0, 1) if min(values) >= 0 and max(values) <= 1 else (low - pad, high + pad))
            axes.set_ylabel(metric)
        rows[0].set_title("Scores by number of loops (bars: standard error)")
        rows[-1].set_xlabel("loops of the recurrent block")
        lines = {label: line for axes in rows for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(lines.values(), lines.keys(), loc="outside right upper")


def accuracy_grid(
    accuracy: ArrayLike, difficulties: Sequence[int], loops: Sequence[int], path: str | Path, unit: str = "difficulty",
    chance: float = 0.0, trained: tuple[int, int] | None = None, exit: str = "",
) -> None:  # fmt: skip
    """Accuracy over difficulty and loops, as a heat map with the numbers in it.

    Args:
        accuracy: (D, L) in [0, 1].
        difficulties: D of them, the first on top.
        loops: L of them.
        path: PNG to write.
        unit: what difficulty counts.
        chance: accuracy of guessing, the low end of the colours.
        trained: maximum difficulty and loops in training; the cells within both are outlined.
        exit: a line that says which exit was on, and what it cost.
    """
    values = np.asarray(accuracy, dtype=float)
    n_rows, n_columns = values.shape
    width = max(WIDTH, 2.4 + 0.52 * n_columns)
    with _axes(path, width, height=max(HEIGHT / 2, 1.4 + 0.4 * n_rows)) as (figure, axes):
        _heat_map(figure, axes, values, "accuracy" + (", from guessing up" if chance else ""), high=1.0, low=chance)
        for row, column in np.ndindex(n_rows, n_columns):
            dark = values[row, column] < (1 + chance) / 2
            text = f"{values[row, column]:.3f}".removeprefix("0")
            axes.text(column, row + 1, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        hardest, deepest = trained or (0, 0)
        bottom, right = 0.5 + sum(n <= hardest for n in difficulties), sum(n <= deepest for n in loops) - 0.5
        if bottom > 0.5 and right > -0.5:
            across, down = [-0.5, right, right, -0.5, -0.5], [0.5, 0.5, bottom, bottom, 0.5]
            axes.plot(across, down, color=COLOURS[1], linewidth=2.5, clip_on=False)
        axes.set_xticks(range(n_columns), [str(n) for n in loops])
        axes.set_yticks(range(1, n_rows + 1), [str(n) for n in difficulties])
        axes.tick_params(length=0)
        title = "Accuracy by difficulty and loops" + (" (outlined: as in training)" if trained is not None else "")
        title += f"\n{exit}" if exit else ""
        axes.set(xlabel="loops of the recurrent block", ylabel=unit, title=title)


def halting_map(
    loops: ArrayLike, path: str | Path, tokens: Sequence[object] | None = None, used: ArrayLike | None = None
) -> None:
    """Loops used, or halting probability, by position.

    Args:
        loops: (T,) loops used by each position, drawn as bars; or (loops, T) halting probability after each loop,
            drawn as a heat map.
        path: PNG to write.
        tokens: label of each of the T positions.
        used: (T,) loops that each position ran before it halted. The heat map then shows the sum of the probabilities
            so far, by which the gate decides, and hatches the cells after these loops.
    """
    values = np.asarray(loops, dtype=float)
    length = values.shape[-1]
    with _axes(path, _width_for(length)) as (figure, axes):
        if values.ndim == 1:
            axes.bar(range(length), values, width=0.8, color=COLOURS[0])
            axes.set(ylabel="loops used", title="Loops used by each position", xlim=(-0.6, length - 0.4))
            axes.grid(False, axis="x")
            _whole_ticks(axes.yaxis)
        else:
            title, label = "Halting probability by position and loop", "halting probability of the gate"
            if used is not None:
                after = np.arange(1, len(values) + 1)[:, None] > np.asarray(used)
                values = np.where(after, np.nan, values.cumsum(0).clip(max=1))
                title, label = "Towards halting, by position and loop (hatched: has halted)", f"{label}, summed so far"
                axes.patch.set(hatch="/////", edgecolor="#C4C4C4")
            _heat_map(figure, axes, values, label, high=1.0)
            axes.set(ylabel="loop", title=title)
        axes.set_xlabel("position (tokens)" if tokens is None else "input token")
        if tokens is None:
            _whole_ticks(axes.xaxis)
        else:
            labels = [str(token) for token in tokens]
            longest = max(map(len, labels))
            axes.set_xticks(range(length), labels, fontsize=8, parse_math=False)
            axes.tick_params(axis="x", rotation=90 if length * longest > 60 and longest > 2 else 0, length=0)


def expert_load(load: ArrayLike, path: str | Path) -> None:
    """Share of token choices of each expert at each loop.

    Args:
        load: (loops, n_experts) counts; a row of zeros is left blank.
        path: PNG to write.
    """
    counts = np.asarray(load, dtype=float)
    total = counts.sum(axis=1, keepdims=True)
    share = 100 * np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    with _axes(path, _width_for(counts.shape[1])) as (figure, axes):
        _heat_map(figure, axes, share, "share of token choices (%)")
        axes.set(xlabel="expert", ylabel="loop", title=f"Expert load by loop (even: {100 / counts.shape[1]:.3g}% each)")
        _whole_ticks(axes.xaxis)


def state_change(delta: ArrayLike, path: str | Path) -> None:
    """Relative change of the state at each loop: mean and range over the positions that moved, and how many those were.

    Args:
        delta: (loops, ...) ``|h_t - h_{t-1}| / |h_t|``; 0 where a position has halted, or is padding.
        path: PNG to write.
    """
    require_matplotlib()
    from matplotlib.ticker import LogLocator, NullLocator

    values = np.asarray(delta, dtype=float)
    ran = [row[row > 0] for row in values.reshape(len(values), -1)]
    rows = [(loop, row.mean(), row.min(), row.max()) for loop, row in enumerate(ran, 1) if row.size]
    with _figure(path, WIDTH + LEGEND, 1.3 * HEIGHT) as figure:
        axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        if rows:
            loops, mean, low, high = map(np.array, zip(*rows, strict=True))
            axes.fill_between(loops, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="min to max")
            axes.plot(loops, mean, color=COLOURS[0], marker="o", label="mean of those that move")
            axes.set(yscale="log", ylim=(low.min() / 1.5, high.max() * 1.5))
            # below three decades, ticks at 2 and 5 of each decade as well
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high.max() < 1000 * low.min() else (1,)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            figure.legend(loc="outside right upper")
        axes.set(ylabel="relative change of the state, |Δh| / |h|")
        axes.set_title("State change by loop, of the positions that move")
        below.bar(range(1, len(ran) + 1), [row.size for row in ran], color=COLOURS[0])
        limits: Any = dict(xlim=(0.4, len(ran) + 0.6), ylim=(0, max(1, max(row.size for row in ran))))
        below.set(xlabel="loop", ylabel="positions", **limits)
        below.grid(False, axis="x")
        _whole_ticks(below.xaxis)
        _whole_ticks(below.yaxis, 4)


def _line_style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


@contextmanager
def _axes(path: str | Path, width: float, height: float = HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    with _figure(path, width, height) as figure:
        yield figure, figure.add_subplot()


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in :data:`STYLE`, written to ``path`` at the end."""
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": "OpenMythos"})


def _heat_map(
    figure: Figure, axes: Axes, values: NDArray[np.float64], label: str, high: float | None = None, low: float = 0.0
) -> None:
    """(rows, columns) values as a heat map with a colour bar; row 1 is on top."""
    n_rows, n_columns = values.shape
    columns, rows = np.arange(n_columns + 1) - 0.5, np.arange(n_rows + 1) + 0.5
    cells = axes.pcolormesh(columns, rows, values, vmin=low, vmax=high, edgecolors="white", linewidth=0.4)
    figure.colorbar(cells, ax=axes, label=label, pad=0.02)
    axes.invert_yaxis()
    axes.set_facecolor(LIGHT_GREY)
    axes.grid(False)
    _whole_ticks(axes.yaxis)


def _log2_ticks(axes: Axes, counts: Sequence[int]) -> None:
    """A base-2 axis with ticks at the powers of two and both ends of ``counts``."""
    axes.set_xscale("log", base=2)
    ticks = [n for n in counts if n & (n - 1) == 0 or n in (counts[0], counts[-1])]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xticks([], minor=True)


def _whole_ticks(axis: Any, most: Any = "auto") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def _width_for(n_columns: int) -> float:
    return min(MAX_WIDTH, max(WIDTH, 1.8 + 0.16 * n_columns))
