"""Tutorial A: sums of 2 to 5 digits mod 7, read at the "=", trained with 4 loops on 3000 fixed examples.

    python examples/chain_sum.py [--seed 0] [--out runs/chain_sum]

Prints one line of JSON, and draws the accuracy by loops on sums as long as in training and on longer ones. Takes about
a minute on one core.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from open_mythos import MythosConfig, OpenMythos
from open_mythos.plots import accuracy_by_loops

CONFIG = MythosConfig(
    vocab_size=64, dim=128, n_heads=4, max_seq_len=32, max_loop_iters=8, prelude_layers=1, coda_layers=1,
    n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=64, lora_rank=8, attn_type="mla",
    kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
)  # fmt: skip
PAD, START, EQ, DIGIT = 0, 1, 2, 10
LOOPS = (1, 2, 4, 6, 8)


def examples(n: int, min_digits: int, max_digits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """START, digits, EQ, padding to 32 tokens (n, 32); the target at EQ (n,); the position of EQ (n,)."""
    x = torch.full((n, 32), PAD)
    lengths = torch.randint(min_digits, max_digits + 1, (n,))
    answer = torch.empty(n, dtype=torch.int64)
    for row, length in enumerate(lengths.tolist()):
        digits = torch.randint(0, 7, (length,))
        x[row, : length + 2] = torch.cat([torch.tensor([START]), DIGIT + digits, torch.tensor([EQ])])
        answer[row] = DIGIT + digits.sum() % 7
    return x, answer, lengths + 1


def logits_at(model: OpenMythos, x: torch.Tensor, position: torch.Tensor, n_loops: int) -> torch.Tensor:
    return model(x, n_loops=n_loops)[torch.arange(len(x)), position]


def train(model: OpenMythos, epochs: int = 6) -> None:
    x, y, position = examples(3000, 2, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in track(range(epochs), "training", console=Console(stderr=True)):
        for rows in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(logits_at(model, x[rows], position[rows], 4), y[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: OpenMythos, min_digits: int, max_digits: int) -> dict[int, float]:
    model.eval()
    x, y, position = examples(400, min_digits, max_digits)
    return {n: (logits_at(model, x, position, n).argmax(-1) == y).float().mean().item() for n in LOOPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chain_sum"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    model = OpenMythos(CONFIG)
    train(model)
    scores = {"2 to 5 digits": accuracy(model, 2, 5), "6 to 8 digits": accuracy(model, 6, 8)}
    accuracy_by_loops(scores, args.out / "chain_sum.png", chance=1 / 7, trained_loops=4)
    model.save_pretrained(args.out)
    print(json.dumps({"seed": args.seed, "accuracy": scores, "picture": str(args.out / "chain_sum.png")}))


if __name__ == "__main__":
    main()
