"""Tutorial B: train running parity with 3 loops, then run 1 to 16 loops of the same weights.

    python examples/parity.py [--seed 0] [--out runs/parity]

Prints one line of JSON, and draws the accuracy by loops and the halting map of one sequence. Takes about a minute on
one CPU core.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from open_mythos import MythosConfig, OpenMythos
from open_mythos.diagnostics import trace
from open_mythos.evaluation import depth
from open_mythos.plots import accuracy_by_loops, halting_map

CONFIG = MythosConfig(
    vocab_size=64, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=28, max_loop_iters=16, prelude_layers=1,
    coda_layers=1, n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=32, lora_rank=4,
    attn_type="gqa", act_threshold=0.99,
)  # fmt: skip
LOOPS = range(1, 17)


def batch(n: int, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits as tokens 1 and 2, and the parity of every prefix in the same form; (n, length) each."""
    bits = torch.randint(0, 2, (n, length))
    return bits + 1, bits.cumsum(1) % 2 + 1


def train(model: OpenMythos, steps: int = 600) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()
    for _ in track(range(steps), "training", console=Console(stderr=True)):
        x, y = batch(64)
        loss = F.cross_entropy(model(x, n_loops=3).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def accuracy(model: OpenMythos, x: torch.Tensor, y: torch.Tensor, halting: bool) -> dict[int, float]:
    """Accuracy at each number of loops, all from a single run of the loops."""
    model.eval()
    model.cfg.halting = halting
    scores = depth.accuracy_by_loops(model, x, y, LOOPS)
    model.cfg.halting = True
    return scores


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation; ties get their mean rank."""
    ranks = [(v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) + 1) / 2 for v in (a.double(), b.double())]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    model = OpenMythos(CONFIG)
    train(model)
    x, y = batch(512)
    adaptive, full = accuracy(model, x, y, halting=True), accuracy(model, x, y, halting=False)
    traced = trace(model, x, n_loops=16)
    used = traced.loops_used.float()
    share = traced.expert_load.sum(0) / traced.expert_load.sum()
    generated = {n: model.generate(x[:1, :12], 12, n_loops=n, temperature=0)[0, 12:].tolist() for n in (1, 4, 12)}

    accuracy_by_loops(
        {"halting on": adaptive, "halting off": full}, args.out / "parity.png", chance=0.5, trained_loops=3
    )
    halting_map(trace(model, x[:1], n_loops=16).halting[:, 0], args.out / "parity_halting.png")
    model.save_pretrained(args.out)
    print(json.dumps({
        "seed": args.seed, "accuracy": adaptive, "accuracy_halting_off": full, "expert_share": share.tolist(),
        "mean_loops": used.mean().item(), "loops_vs_position": spearman(used.mean(0), torch.arange(24)),
        "generated": generated, "picture": str(args.out / "parity.png"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
