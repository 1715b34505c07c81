"""Training and evaluation of ``mythos demo``: running parity, at more bits and loops than in training."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from open_mythos.cli.console import progress
from open_mythos.config import MythosConfig
from open_mythos.evaluation import accuracy_by_loops
from open_mythos.evaluation.depth import measuring
from open_mythos.model import OpenMythos
from open_mythos.tasks.parity import Parity

TASK = Parity()
TRAINED_LENGTH, MAX_TRAINED_LOOPS, BATCH = 24, 8, 64
TRAINED = (24, 48, 96), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # lengths and loops of the evaluation
PRETRAINED = (24, 96, 384), (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONFIG = MythosConfig(
    vocab_size=TASK.vocab_size, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=128, max_loop_iters=16,
    prelude_layers=1, coda_layers=1, attn_type="gqa",
    n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=32, lora_rank=0,
)  # fmt: skip


def train(model: OpenMythos, steps: int) -> None:
    """Train on new sequences at random depths; the learning rate decays over the last quarter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 4 * (1 - step / steps)))
    model.train()
    with progress(steps) as begin:
        for _ in range(steps):
            x, y, _ = TASK.batch(BATCH, TRAINED_LENGTH)
            n_loops = int(torch.randint(1, MAX_TRAINED_LOOPS + 1, ()))
            logits = model(x, n_loops=n_loops)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            accuracy = (logits.argmax(-1) == y).float().mean()
            begin(f"loss {loss:.3f}  accuracy {accuracy:.3f}  loops {n_loops}")


def measure(model: OpenMythos, lengths: Sequence[int], loops: Sequence[int]) -> dict[str, dict[int, float]]:
    """Accuracy by loops on new sequences of every length, every position running all of them."""
    curves = {}
    with progress(len(lengths)) as begin, measuring(model, halting=False):
        for length in lengths:
            begin(f"evaluating {length} bits")
            problems = TASK.batch(min(256, 6144 // length), length)
            name = f"{length} bits" + (" (trained)" if length == TRAINED_LENGTH else "")
            curves[name] = accuracy_by_loops(model, problems.ids, problems.targets, loops)
    return curves
