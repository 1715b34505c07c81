"""Write the table of docs/scale.md: each line is the result of one ``mythos plan``, which needs no GPUs."""

import argparse
from pathlib import Path
from typing import Any

from pages import table, write

from open_mythos.cli.plan import as_data, find_job
from open_mythos.diagnostics import parameters
from open_mythos.planning.job import Job
from open_mythos.planning.search import search, would_fit
from open_mythos.training.overrides import override

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
PLANNED = [  # variant, number of GPUs, GB of each GPU, settings
    ("nano", 1, 24, "device=rtx4090"),
    ("800k", 1, 24, "device=rtx4090"),
    ("micro", 1, 24, "device=rtx4090"),
    ("100m", 1, 24, "device=rtx4090"),
    ("1b", 1, 80, "device=h100"),
    ("1b", 8, 80, "device=h100"),
    ("3b", 8, 80, "device=h100"),
    ("10b", 64, 80, "device=h100"),
    ("50b", 256, 141, "device=h200"),
    ("100b", 512, 141, "device=h200"),
    ("500b", 4096, 180, "device=b200"),
    ("1t", 2048, 180, "device=b200"),
]
COLUMNS = [
    "`mythos plan`", "replicate x shard x tensor, expert", "micro-batches x rows, activations of loops", "GB per GPU",
    "GB per GPU with FSDP alone", "step, s", "tokens/s", "bound by",
]  # fmt: skip


def line(variant: str, gpus: int, memory: int, settings: str) -> list[str]:
    """A line of the table: the plan, or if none fits, what would have to change."""
    cfg, own = find_job(variant)
    job = Job(cfg, gpus, override(own, settings.split()), 1e9 * memory, n_parameters=parameters(cfg).total)
    found, said = search(job), f"`{variant} {settings} --gpus {gpus} --memory {memory}`"
    if found.best is None:
        least = found.least.memory.total / 1e9
        alone = "" if found.sharded is None else f"{found.sharded.memory.total / 1e9:,.0f}"
        return [said, f"does not fit; use `{would_fit(job)}`", "", f"{least:,.0f}", alone, "", "", ""]
    data: dict[str, Any] = as_data(variant, found.best, found, None)
    layout = data["layout"]
    return [
        said,
        f"{layout['replicate']} x {layout['shard']} x {layout['tensor']}, {layout['expert']}",
        f"{layout['accumulate']} x {layout['rows']}, {'recomputed' if layout['recompute'] else 'kept'}",
        f"{data['memory']['total'] / 1e9:.1f}",
        f"{(data['fsdp_alone'] or 0) / 1e9:,.1f}",
        f"{data['seconds']['step']:.3g}",
        f"{data['tokens_per_second']:,.0f}",
        data["bound"],
    ]


def markdown() -> str:
    return "\n".join(table(COLUMNS, [line(*one) for one in PLANNED]))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    write(PAGE, markdown())
