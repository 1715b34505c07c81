"""``mythos demo``: running parity, and accuracy that rises with the number of loops: trained now, or shipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from open_mythos import plots
from open_mythos.cli.console import clear_errors, console, progress, table
from open_mythos.config import MythosConfig
from open_mythos.evaluation import accuracy_by_loops
from open_mythos.model import OpenMythos
from open_mythos.tasks.parity import Parity

TASK = Parity()
TRAINED_LENGTH, MOST_TRAINED_LOOPS, BATCH = 24, 8, 64
LENGTHS = (24, 48, 96)
LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PRETRAINED = "parity-tiny"
FAR_LENGTHS, FAR_LOOPS = (24, 96, 384), (1, 2, 4, 8, 16, 32, 64, 128, 256)  # for the model that trained for longer
CONFIG = MythosConfig(
    vocab_size=TASK.vocab_size, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=128, max_loop_iters=16,
    prelude_layers=1, coda_layers=1, attn_type="gqa",
    n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=32, lora_rank=0,
)  # fmt: skip


def demo(
    out: Annotated[Path, typer.Option(help="Directory for picture, table and checkpoint.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 800,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    pretrained: Annotated[bool, typer.Option("--pretrained", help=f"Train nothing; use {PRETRAINED}.")] = False,
) -> None:
    """Train a small model and watch depth pay."""
    with clear_errors():
        plots.require_matplotlib()
        torch.manual_seed(seed)
        model = OpenMythos.from_pretrained(PRETRAINED) if pretrained else OpenMythos(CONFIG)
        lengths, loops = (FAR_LENGTHS, FAR_LOOPS) if pretrained else (LENGTHS, LOOPS)
        trained_loops = model.cfg.max_loop_iters if pretrained else MOST_TRAINED_LOOPS
        n_parameters = sum(p.numel() for p in model.parameters())
        console.print(
            f"Running parity: say at every bit whether the ones so far are even or odd. A model of {n_parameters:,} "
            f"parameters {'was trained' if pretrained else 'trains'} on up to {TRAINED_LENGTH} bits with 1 to "
            f"{trained_loops} loops.",
            highlight=False,
        )
        if not pretrained:
            train(model, steps)
        curves = measure(model, lengths, loops)
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        example = TASK.batch(1, TRAINED_LENGTH).ids
        (out / "example.json").write_text(json.dumps({"tokens": example[0].tolist()}) + "\n")
        (out / "table.json").write_text(json.dumps(curves, indent=2) + "\n")
        plots.accuracy_by_loops(curves, out / "depth.png", chance=0.5, trained_loops=trained_loops)
    show(curves)
    console.print(
        f"Picture: {out / 'depth.png'}   table: {out / 'table.json'}   checkpoint: {out}\n"
        f"Next: look inside it with [bold]mythos diagnose {out} --plots {out}[/bold].",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def train(model: OpenMythos, steps: int) -> None:
    """Fresh sequences at every step, the number of loops drawn anew each time; learning rate decays over the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 4 * (1 - step / steps)))
    model.train()
    with progress(steps) as begin:
        for _ in range(steps):
            x, y, _ = TASK.batch(BATCH, TRAINED_LENGTH)
            n_loops = int(torch.randint(1, MOST_TRAINED_LOOPS + 1, ()))
            logits = model(x, n_loops=n_loops)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            right = (logits.argmax(-1) == y).float().mean()
            begin(f"loss {loss:.3f}  accuracy {right:.3f}  loops {n_loops}")


def measure(model: OpenMythos, lengths: Sequence[int], loops: Sequence[int]) -> dict[str, dict[int, float]]:
    """Accuracy by loops on new sequences of every length."""
    curves = {}
    with progress(len(lengths)) as begin:
        for length in lengths:
            begin(f"measuring {length} bits")
            problems = TASK.batch(256 if length <= 100 else 64, length)
            name = f"{length} bits" + (" (trained)" if length == TRAINED_LENGTH else "")
            curves[name] = accuracy_by_loops(model, problems.ids, problems.targets, loops)
    return curves


def show(curves: dict[str, dict[int, float]]) -> None:
    shown = table("accuracy by loops, same weights", "loops", *curves)
    for n in next(iter(curves.values())):
        shown.add_row(str(n), *(f"{curve[n]:.3f}" for curve in curves.values()))
    console.print(shown)
