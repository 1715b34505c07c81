"""Sequence to sequence: an encoder reads words, a decoder writes them in reverse.

    python examples/reverse.py [--seed 0] [--steps 400] [--out runs/reverse]

Trains both from scratch and saves them. Prints a few words, and one line of JSON with the share of words that are
entirely right, by loops of the decoder. Takes half a minute on one CPU core.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from open_mythos import MythosConfig, OpenMythos, Seq2Seq

PAD, END, FIRST, IGNORED = 0, 1, 2, -100  # letters are 2 to 27
LONGEST = 8
SHAPE = dict(
    vocab_size=28, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=2 * LONGEST + 1, max_loop_iters=4, prelude_layers=1,
    coda_layers=1, n_experts=0, attn_type="gqa", halting=False, warm_start=False,
)  # fmt: skip


def make() -> Seq2Seq:
    return Seq2Seq(OpenMythos(MythosConfig(**SHAPE, causal=False)), OpenMythos(MythosConfig(**SHAPE)))


def batch(n: int, longest: int = LONGEST) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words (n, longest), padded on the left; their masks; and targets (n, longest + 1): reversed word, END, -100s."""
    lengths = torch.randint(2, longest + 1, (n, 1))
    letters = torch.randint(FIRST, 28, (n, longest))
    mask, at = torch.arange(longest) >= longest - lengths, torch.arange(longest + 1)
    target = torch.cat([letters.flip(1), torch.full((n, 1), END)], 1)
    target = target.masked_fill(at == lengths, END).masked_fill(at > lengths, IGNORED)
    return letters.masked_fill(~mask, PAD), mask, target


def train(model: Seq2Seq, steps: int, longest: int = LONGEST) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    model.train()
    for _ in track(range(steps), "training", console=Console(stderr=True)):
        source, mask, target = batch(32, longest)
        n_loops = int(torch.randint(1, 5, ()))
        loss = model.loss(source, target, n_loops=n_loops, encoder_loops=2, source_mask=mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def write(model: Seq2Seq, source: torch.Tensor, mask: torch.Tensor, n_loops: int) -> torch.Tensor:
    """The decoder's greedy output, (n, longest + 1), with END from the end of a word on."""
    length = source.shape[1] + 1
    return model.generate(source, length, n_loops, 2, mask, temperature=0, eos_token_id=END)


def share_right(written: torch.Tensor, target: torch.Tensor) -> float:
    """The share of words that are right in every letter and in their end."""
    return (written == target.where(target != IGNORED, END)).all(1).float().mean().item()


def word(tokens: torch.Tensor) -> str:
    return "".join(chr(ord("a") + token - FIRST) for token in tokens.tolist() if token >= FIRST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/reverse"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    model = make()
    train(model, args.steps)
    model.save_pretrained(args.out)
    model = Seq2Seq.from_pretrained(args.out)

    source, mask, target = batch(512)
    written = {n: write(model, source, mask, n) for n in (1, 2, 4, 8)}
    for i in range(3):
        print(f"{word(source[i]):>{LONGEST}} -> {word(written[4][i])}")
    right = {n: share_right(found, target) for n, found in written.items()}
    print(json.dumps({"seed": args.seed, "words_right": right, "model": str(args.out)}))


if __name__ == "__main__":
    main()
