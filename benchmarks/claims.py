"""Measure every claim of the tutorials over several seeds, and fill in docs/tutorials.md.

    python benchmarks/claims.py [--seeds 0 1 2] [--jobs 2] [--out benchmarks/results/claims.json]

Runs examples/parity.py and examples/chain_sum.py once per seed, each in a process of its own with one thread, and
writes the table of docs/tutorials.md; the last line printed is JSON. Takes about five minutes for three seeds on two
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pages import spread, table, write
from rich.console import Console
from rich.progress import track
from rich.table import Table

from open_mythos import MythosConfig, OpenMythos

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tutorials.md"


def run_example(name: str, seed: int, out: Path) -> dict[str, Any]:
    """The JSON line that one example prints, run with one thread."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--seed", str(seed), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def parity_claims(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The figures that tutorial B makes claims about, one for each run."""
    return {
        "parity, 1 loop": [run["accuracy"]["1"] for run in runs],
        "parity, 3 loops (trained)": [run["accuracy"]["3"] for run in runs],
        "parity, 16 loops": [run["accuracy"]["16"] for run in runs],
        "parity, 16 loops, halting off": [run["accuracy_halting_off"]["16"] for run in runs],
        "least expert share": [min(run["expert_share"]) for run in runs],
        "loops used of 16": [run["mean_loops"] for run in runs],
        "loops against position (Spearman)": [run["loops_vs_position"] for run in runs],
    }


def chain_sum_claims(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The figures that tutorial A makes claims about, one for each run."""
    near, far = "2 to 5 digits", "6 to 8 digits"
    return {
        "chain sum, 1 loop": [run["accuracy"][near]["1"] for run in runs],
        "chain sum, 4 loops (trained)": [run["accuracy"][near]["4"] for run in runs],
        "chain sum, 8 loops": [run["accuracy"][near]["8"] for run in runs],
        "chain sum, 6 to 8 digits, 4 loops": [run["accuracy"][far]["4"] for run in runs],
    }


def tutorial_a_config(**changes: Any) -> MythosConfig:
    """The config for comparing caches and for :func:`abused_decay`: dim 128, 2 kv heads of 32, latent 32 + 16."""
    sizes = dict(
        vocab_size=64, dim=128, n_heads=4, n_kv_heads=2, max_seq_len=64, max_loop_iters=8,
        prelude_layers=1, coda_layers=1, n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=64,
        lora_rank=8, attn_type="mla", kv_lora_rank=32, q_lora_rank=32,
        qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    return MythosConfig(**(sizes | changes))


def cache_ratio() -> float:
    """Bytes of a GQA cache divided by those of an MLA cache, both measured with 64 tokens and 4 loops."""
    measured = {}
    for kind in ("gqa", "mla"):
        cache: dict[str, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            OpenMythos(tutorial_a_config(attn_type=kind)).eval()(torch.ones(1, 64, dtype=torch.int64), 4, cache)
        measured[kind] = sum(t.numel() * t.element_size() for slot in cache.values() for t in slot.values())
    return measured["gqa"] / measured["mla"]


def abused_decay(seed: int) -> tuple[float, float, bool]:
    """Smallest and largest A, and whether logits are finite, after 30 Adam steps at lr 1.0 on mean-square logits."""
    torch.manual_seed(seed)
    model = OpenMythos(tutorial_a_config())
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    ids = torch.randint(0, 64, (4, 16))
    for _ in range(30):
        optimizer.zero_grad()
        model(ids).pow(2).mean().backward()
        optimizer.step()
    decay = model.recurrent.injection.get_A()
    with torch.no_grad():
        return decay.min().item(), decay.max().item(), bool(model(ids).isfinite().all())


# Rows of the page: (claim, what was measured with the reference implementation, goal).
SHOWN = {
    "parity, 3 loops (trained)": (
        "parity of 24 bits, trained at 3 loops: accuracy at 3 loops",
        ".555 (chance .5)",
        "≥ .90",
    ),
    "parity, 16 loops": ("… at 16 loops, with early exit", ".555", "≥ .95, above 3 loops"),
    "parity, 16 loops, halting off": ("… at 16 loops, without early exit", ".555", "at most .005 above the row before"),
    "parity, 1 loop": ("… at 1 loop", ".531", "≥ .10 below 3 loops"),
    "least expert share": ("share of tokens of the least used of 4 experts", ".00", "≥ .10"),
    "loops used of 16": ("loops run of 16 with early exit, mean over positions", "16", "≤ 10"),
    "loops against position (Spearman)": ("rank correlation of loops run with position", "none", "≥ .5"),
    "chain sum, 4 loops (trained)": (
        "sum of 2–5 digits modulo 7, trained at 4 loops: accuracy at 4 loops",
        ".14 (chance .143)",
        "≥ .50",
    ),
    "chain sum, 1 loop": ("… at 1 loop", ".14", "≥ .03 below 4 loops"),
    "chain sum, 6 to 8 digits, 4 loops": ("… on 6–8 digits, 4 loops", ".14", "none set"),
    "greatest A after abuse": (
        "largest entry of A after 30 Adam steps at learning rate 1.0",
        "A reaches 0",
        "inside (0, 1)",
    ),
    "least A after abuse": ("smallest entry of A after the same", "0", "inside (0, 1)"),
    "GQA cache over MLA cache": ("size of a GQA cache over that of an MLA cache", "1.33", "2.67"),
}


def markdown(claims: dict[str, list[float]]) -> str:
    """The table of the page: mean over seeds, and the range."""
    columns = ("claim", "open-mythos 0.5.0", "goal", "here: mean (min – max)")
    return "\n".join(table(columns, ([*said, spread(claims[name])] for name, said in SHOWN.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "claims.json")
    args = parser.parse_args()
    console = Console()
    work = [(name, seed) for seed in args.seeds for name in ("chain_sum", "parity")]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(track(
            pool.map(lambda job: run_example(*job, ROOT / "runs" / "claims" / f"{job[0]}-{job[1]}"), work),
            total=len(work), description="training", console=Console(stderr=True), transient=True,
        ))  # fmt: skip
    claims = parity_claims([run for (name, _), run in zip(work, runs, strict=True) if name == "parity"])
    claims |= chain_sum_claims([run for (name, _), run in zip(work, runs, strict=True) if name == "chain_sum"])
    claims["GQA cache over MLA cache"] = [cache_ratio()]
    abused = [abused_decay(seed) for seed in args.seeds]
    claims["least A after abuse"] = [low for low, _, _ in abused]
    claims["greatest A after abuse"] = [high for _, high, _ in abused]
    claims["finite logits after abuse"] = [float(finite) for _, _, finite in abused]

    shown = Table("claim", "mean", "min", "max", title=f"seeds {args.seeds}", title_justify="left")
    for name, values in claims.items():
        shown.add_row(name, *(f"{value:.4f}" for value in (mean(values), min(values), max(values))))
    console.print(shown)
    conditions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }
    result = {"seeds": args.seeds, "conditions": conditions, "claims": claims}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    write(PAGE, markdown(claims))
    console.print(f"Written to {args.out} and {PAGE}; the models and their pictures are in {ROOT / 'runs' / 'claims'}.")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
