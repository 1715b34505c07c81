"""What loops, experts, attention and context cost, measured on this CPU; fills in the tables of docs/costs.md.

    python benchmarks/costs.py [--threads N] [--seconds S] [--out benchmarks/results/costs.json]

The models are those of `mythos bench --dim 256`. Memory is measured as in speed.py, each figure in a new process.
Takes three minutes. Other work on the machine distorts the results, the times of decoding most of all.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from pages import table, write
from rich.console import Console
from rich.progress import track
from speed import Worker
from speed_cases import Task

from open_mythos import OpenMythos
from open_mythos.cli.timed import shaped
from open_mythos.diagnostics import cache_bytes_per_token, flops_per_token, parameters
from open_mythos.diagnostics.machine import describe, matmul_rate, read_rate
from open_mythos.diagnostics.speed import decode_speed, prefill_speed, train_speed
from open_mythos.training.allocator import keep_freed_memory

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "costs.md"
DIM, FP32 = 256, 4
BASE: dict[str, Any] = dict(attn="gqa", experts=8, loops=4)
TRAINED, READ = (4, 128), 512  # rows and tokens of a training step; tokens of a prompt, also before decoding
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "loops": [BASE | {"loops": n} for n in (1, 2, 4, 8, 16, 32)],
    "experts": [BASE | {"experts": n} for n in (1, 8, 64, 256)],
    "context": [BASE | {"attn": attn, "context": n} for attn in ("gqa", "mla") for n in (64, 512, 4096)],
}
MEMORY = (4, 16, 32)  # loops


def measure(sweep: str, line: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One line of a table: its settings, its costs by formula, and its measured speeds."""
    loops, context = line["loops"], line.get("context", READ)
    torch.manual_seed(0)
    model = OpenMythos(cfg := shaped(DIM, line["attn"], line["experts"], loops))
    cfg.halting, cfg.max_seq_len = False, 2 * max(context, READ)
    found = line | {
        "parameters": parameters(cfg).total, "active": parameters(cfg).active,
        "flops": flops_per_token(cfg, loops, context), "cache": cache_bytes_per_token(cfg, loops, FP32) * context,
        "decode": 1 / decode_speed(model, 1, context, loops, seconds).tokens_per_second,
        "prefill": prefill_speed(model, 1, context, loops, seconds).tokens_per_second,
    }  # fmt: skip
    if sweep != "context":
        keep_freed_memory()  # as the Trainer does
        found["train"] = train_speed(model, *TRAINED, loops, seconds=seconds).tokens_per_second
    return found


def memory(loops: int, recompute: bool, threads: int) -> float:
    """Megabytes by which a training step increases the memory of a process."""
    cfg = shaped(DIM, BASE["attn"], BASE["experts"], loops)
    model = {name: value for name, value in json.loads(cfg.to_json()).items() if name != "halting"}
    task = Task("ours", "memory", model, loops, *TRAINED, recompute=recompute)
    worker = Worker(Path(sys.executable), task, {}, threads)
    worker.start()
    worker.repeat()
    worker.stop()
    return worker.found[0]["growth MB"]


def markdown(results: dict[str, Any]) -> str:
    """The tables of the page."""
    at = results["conditions"]
    lines = [
        f"{at['name']}, {at['threads']} of {at['cores']} cores, torch {at['torch']}, float32, {at['date']}: matrix "
        f"products {results['peaks']['matmul'] / 1e9:.0f} GFLOP/s, reading {results['peaks']['read'] / 1e9:.0f} GB/s. "
        f"Width {DIM}, one prelude and one coda block, 8 routed experts, 2 per token, GQA and 4 loops, unless "
        f"the table says otherwise. Training: steps of {TRAINED[0]} x {TRAINED[1]} tokens. Decoding: one row, "
        f"after {READ} tokens. Prompts: {READ} tokens.",
    ]
    for title, columns, rows in (loops_table(results), experts_table(results), context_table(results)):
        lines += ["", f"**{title}**", "", *table(columns, rows, numbers=True)]
    return "\n".join(lines)


Content = tuple[str, list[str], Iterator[list[str]]]


def loops_table(results: dict[str, Any]) -> Content:
    kept, recomputed = results["memory"]["kept"], results["memory"]["recomputed"]
    columns = ["loops", "MFLOP to decode a token", "decoding, ms per token", "prompts, tokens/s", "training, tokens/s",
               "cache, kB per token", "memory of a training step, MB", "with recomputed loops, MB"]  # fmt: skip
    rows = (
        [
            str(line["loops"]), f"{line['flops'] / 1e6:.1f}", f"{1000 * line['decode']:.1f}", f"{line['prefill']:,.0f}",
            f"{line['train']:,.0f}", f"{line['cache'] / READ / 1000:.1f}",
            *(f"{by[n]:,.0f}" if (n := str(line["loops"])) in by else "" for by in (kept, recomputed)),
        ]
        for line in results["loops"]
    )  # fmt: skip
    return "Loops", columns, rows


def experts_table(results: dict[str, Any]) -> Content:
    columns = ["routed experts", "parameters, M", "active, M", "MFLOP to decode a token", "decoding, ms per token",
               "prompts, tokens/s", "training, tokens/s"]  # fmt: skip
    rows = (
        [
            str(line["experts"]), f"{line['parameters'] / 1e6:.1f}", f"{line['active'] / 1e6:.1f}",
            f"{line['flops'] / 1e6:.1f}", f"{1000 * line['decode']:.1f}", f"{line['prefill']:,.0f}",
            f"{line['train']:,.0f}",
        ]
        for line in results["experts"]
    )  # fmt: skip
    return "Experts", columns, rows


def context_table(results: dict[str, Any]) -> Content:
    columns = ["attention, context", "cache, MB", "MFLOP to decode a token", "decoding, ms per token",
               "prompt of that length, tokens/s"]  # fmt: skip
    rows = (
        [
            f"{line['attn'].upper()}, {line['context']:,}", f"{line['cache'] / 1e6:.2f}", f"{line['flops'] / 1e6:.1f}",
            f"{1000 * line['decode']:.1f}", f"{line['prefill']:,.0f}",
        ]
        for line in results["context"]
    )  # fmt: skip
    return "Attention and context", columns, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per figure; at least three repetitions")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "costs.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu = torch.device("cpu")
    results: dict[str, Any] = {
        "conditions": describe(cpu) | {"date": date.today().isoformat()},
        "peaks": {"matmul": matmul_rate(torch.float32, cpu), "read": read_rate(cpu)},
    }
    lines = [(sweep, line) for sweep, asked in SWEEPS.items() for line in asked]
    for sweep, line in track(lines, "measuring", console=Console(stderr=True), transient=True):
        results.setdefault(sweep, []).append(measure(sweep, line, args.seconds))
    results["memory"] = {
        name: {str(n): memory(n, recompute, args.threads) for n in MEMORY}
        for name, recompute in (("kept", False), ("recomputed", True))
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    write(PAGE, markdown(results))
    print(f"{markdown(results)}\n\nResults: {args.out}; page: {PAGE}")


if __name__ == "__main__":
    main()
