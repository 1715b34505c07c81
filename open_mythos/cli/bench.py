"""``mythos bench``: how fast a model runs on this machine, and what share of its peak rates that is."""

import dataclasses
import json
import math
from datetime import date
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_mythos.cli.console import console, progress, si, table
from open_mythos.fields import must

if TYPE_CHECKING:
    from open_mythos.diagnostics.speed import Speed

_SIZES = {"train": (8, 256), "prefill": (1, 1024), "decode": (1, 512)}  # default rows, and tokens of a row


Work = StrEnum("Work", ["train", "prefill", "decode"])
Dtype = StrEnum("Dtype", ["fp32", "bf16"])
Attention = StrEnum("Attention", ["gqa", "mla"])


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="A variant such as 100m, a run, a model's directory, or the name of a shipped model."),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(min=64, help="Width if no MODEL is given; a multiple of 64.  [512]")
    ] = None,
    attn: Annotated[Attention | None, typer.Option(help="Attention if no MODEL is given.  [gqa]")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Routed experts if no MODEL is given.  [8]")] = None,
    loops: Annotated[int | None, typer.Option(min=1, help="Number of loops; default: the model's, or 4.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="bf16: training with autocast, the rest with bf16 weights.")
    ] = Dtype.fp32,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size; default: 8 for training, else 1.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per row; default: 256 in training, 1024 in prefill, 512 before decoding."),
    ] = None,
    only: Annotated[list[Work] | None, typer.Option(help="What to time; may be repeated.  [all three]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=86_400, help="Time for each measurement, of at least three repetitions.")
    ] = 6.0,
    price: Annotated[
        float | None,
        typer.Option(
            metavar="PER_HOUR",
            help="Hourly price of this machine, in any currency: also show what a million tokens cost, at 1, 2, 4, … "
            "loops or at --loops, next to a dense model if one of the same quality was measured (800k).",
        ),
    ] = None,
) -> None:
    """Measure how fast a model trains, prefills and decodes on this machine, next to the machine's peak rates."""
    usable = price is None or (math.isfinite(price) and price > 0)
    must(usable, f"--price {price}: give the hourly price of this machine, above 0, as in --price 2.50")
    import torch

    from open_mythos.cli.timed import build, prices, time_works
    from open_mythos.diagnostics import parameters
    from open_mythos.diagnostics.machine import describe, matmul_rate, read_rate
    from open_mythos.model import OpenMythos
    from open_mythos.ops.dispatch import use_tf32
    from open_mythos.variants import dense_beside

    if threads is not None:
        torch.set_num_threads(threads)
    here = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    must(device in (None, *here), f"--device {device!r} is not available here; use {' or '.join(here)}")
    at = torch.device(device or here[0])
    use_tf32(at)
    number = torch.float32 if dtype is Dtype.fp32 else torch.bfloat16
    timed = build(model, dim, attn, experts, loops).to(at)
    cfg, n_loops = timed.cfg, timed.cfg.max_loop_iters
    every = price is not None and loops is None
    depths = [*(2**i for i in range((n_loops - 1).bit_length()) if every), n_loops]
    dense = None if price is None else dense_beside(cfg)
    sizes = {work: (batch or _SIZES[work][0], tokens or _SIZES[work][1]) for work in Work if work in (only or Work)}
    with progress(n_steps=2 + len(sizes) * (len(depths) + (dense is not None))) as begin:
        begin("matrix products")
        peak = matmul_rate(number, at, min(seconds, 2.0))
        begin("memory")
        reading = read_rate(at, min(seconds, 1.0))
        found = [time_works(timed, n, sizes, number, seconds, begin) for n in depths]
        other = [] if dense is None else time_works(OpenMythos(dense).to(at), 1, sizes, number, seconds, begin)
    name = model or f"dim {cfg.dim}, {cfg.attn_type.upper()}, {cfg.n_experts} experts"
    conditions = describe(at) | {"dtype": str(dtype), "date": date.today().isoformat()}
    works = show(f"{name}: {n_loops} loops, {dtype}", found[-1], peak, reading, conditions)
    count = dataclasses.asdict(parameters(cfg))
    peaks = {"matmul_flops_per_second": peak, "read_bytes_per_second": reading}
    line = {"model": name, "config": json.loads(cfg.to_json()), "parameters": count, "works": works, "peaks": peaks,
            "conditions": conditions}  # fmt: skip
    if price is not None:
        line["prices"] = {"per_hour": price, "rows": prices(price, found, other)}
        show_prices(**line["prices"])
    print(json.dumps(line))


def show_prices(per_hour: float, rows: list[dict[str, Any]]) -> None:
    """Print what a million tokens cost: a row for each number of loops, and one for the dense model, if any."""
    has_dense, works = rows[-1]["model"] == "dense", list(rows[0]["per_million_tokens"])
    quality = ["bits per byte"] if has_dense else []
    shown = table(f"price of a million tokens, at {per_hour:g} an hour", "", *works, *quality)
    for row in rows:
        name = "dense, 6 layers" if row["model"] == "dense" else f"{row['n_loops']} loop{'s' * (row['n_loops'] > 1)}"
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}"
        shown.add_row(name, *(f"{money:.3g}" for money in row["per_million_tokens"].values()), *[bits for _ in quality])
    console.print(shown)
    beside = "No dense model of the same quality was measured for this one; for mythos bench 800k there is one."
    if has_dense:
        beside = "Bits per byte: held-out text, mean of three seeds, by benchmarks/dense.py (a byte is a token)."
    console.print(
        f"Batch size and tokens as in the table above; a larger --batch makes tokens cheaper. {beside}",
        style="dim",
    )  # fmt: skip


def show(
    title: str, found: list["Speed"], peak: float, reading: float, conditions: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Print a table of speeds; return, for each work, its rates and the measurements that they are computed from."""
    shown, works = table(title, "", "tokens", "tokens/s", "FLOP/s", "of peak", "B/s", "of peak"), {}
    for one in found:
        flops_share, read = one.flops_per_second / peak, one.bytes_per_second
        bytes_share = None if read is None else read / reading
        shown.add_row(
            one.work, f"{one.batch} x {one.tokens}", f"{one.tokens_per_second:,.0f}", si(one.flops_per_second),
            f"{flops_share:.0%}", *(("", "") if read is None else (si(read), f"{bytes_share:.0%}")),
        )  # fmt: skip
        rates = {"tokens_per_second": one.tokens_per_second, "flops_share": flops_share, "bytes_share": bytes_share}
        works[one.work] = dataclasses.asdict(one) | rates
    console.print(shown)
    console.print(
        f"measured peaks: matrix products in {conditions['dtype']} {si(peak, 'FLOP/s')}, memory reads "
        f"{si(reading, 'B/s')}. {conditions['name']}, {conditions['instructions']}, {conditions['threads']} threads, "
        f"torch {conditions['torch']}.\n"
        "B/s: weights, counted at each use, and key/value cache; above 100% if the loop's weights stay in the "
        "processor's cache.",
        style="dim",
    )  # fmt: skip
    return works
