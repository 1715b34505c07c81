"""Tokens per second with early exit compared with a fixed number of loops, and the accuracy that early exit costs.

    python benchmarks/adaptive.py [--only parity p_hop] [--out benchmarks/results/adaptive.json]

The ways of decoding are described in ``adaptive_ways.py``. Batch 1 is eight problems of one size, one after the other;
batch 8 is the same eight at once. "Mixed" is eight problems of several sizes, like requests of unrelated users. In a
plain batch these are padded on the right; padding is not counted as tokens, and compiled code does not support it.

The exit of each case is chosen on problems (or windows of text) other than those reported: the one that runs the fewest
loops among those that lose no more than half of the accuracy allowed (LOST), or four fifths of it for text, which is
measured more finely. In each round, every way is timed once, in turn. The ratio reported is the median over rounds;
compiled ways are compared with compiled code at the fixed number of loops. Takes half an hour on one core;
``--retime`` repeats only the timing, a third of that.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import adaptive_ways
import torch
import torch.nn.functional as F

from open_mythos import OpenMythos, tasks
from open_mythos.diagnostics.machine import describe
from open_mythos.evaluation.depth import chunks, measuring, readings
from open_mythos.nn import exits
from open_mythos.nn.exits import Exit
from open_mythos.tasks import UNSCORED, Batch
from open_mythos.tasks.text import Text

ROOT = Path(__file__).parent
WAYS = "plain", "depth-batched", "compiled"
SPEEDUP, LOST = 1.8, 0.005  # required: speedup, and at most this accuracy lost (of text, share of its bits per byte)
ROWS = 8
GATE_COST = 1.1  # of a loop followed by the gate, relative to a loop after which only the change is measured
TOKENS = 16384  # in the problems on which an exit is chosen, and in those reported
GATES = ("gate:.99", "gate:.9", "gate:.5", "gate:.2", "gate:.1", "gate:.05", "gate:.03", "gate:.02")
RESTS = [
    f"change:{threshold:g}:{patience}"
    for threshold in (0.4, 0.3, 0.25, 0.2, 0.17, 0.15, 0.12, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005)
    for patience in (1, 2)
]


@dataclass(frozen=True)
class Case:
    """A model, the size of its problems, the fixed number of loops that its card shows for it, and sizes to mix."""

    model: str
    task: str
    difficulty: int
    loops: int
    sizes: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def problems(self, n: int, seed: int, mixed: bool = False) -> Batch:
        """``n`` problems; seed 0 is for choosing an exit, other seeds for reporting. For text, every second window."""
        if self.task == "text":
            windows: Batch = tasks.load("text", split="held_out").windows(self.difficulty, 2 * n)  # type: ignore[attr-defined]
            return Batch(windows.ids[bool(seed) :: 2], windows.targets[bool(seed) :: 2])
        sizes = [self.sizes[i % len(self.sizes)] for i in range(n)] if mixed else [self.difficulty] * n
        return self.made().mixed(sizes, torch.Generator().manual_seed(1000 + seed))

    def made(self) -> tasks.Task:
        return tasks.load(self.task, **dict(self.options))


CASES = {
    "parity": Case("parity-tiny", "parity", 96, 64, (24, 48, 96)),
    "prefix_sums": Case("prefix-sums-tiny", "prefix_sums", 128, 64, (32, 64, 128)),
    "chain_sum": Case("chain-sum-tiny", "chain_sum", 16, 32, (5, 8, 16)),
    "p_hop": Case("p-hop-tiny", "p_hop", 12, 32, (6, 9, 12), (("symbols", 14), ("questions", 7))),
    "permutations": Case("permutations-tiny", "permutations", 24, 32, (6, 12, 24), (("generators", "transpositions"),)),
    "addition": Case("addition-tiny", "addition", 20, 32, (5, 10, 20)),
    "text, 8 loops": Case("text-tiny", "text", 128, 8),
    "text, 32 loops": Case("text-tiny", "text", 128, 32),
}


# -- accuracy, and the choice of an exit


def quality(model: OpenMythos, case: Case, batch: Batch, exit: Exit | None) -> tuple[float, float]:
    """Accuracy, or bits per byte, and the mean loops that a position ran: ``case.loops``, or fewer with an exit."""
    task, right, nats, ran, n = case.made(), 0.0, 0.0, 0.0, 0
    with measuring(model, halting=False) as model:
        for part in chunks(batch, torch.device("cpu")):
            (reading,) = readings(model, part.ids, [case.loops], part.valid, exit=exit)
            ran += float(reading.used.sum())
            n += part.ids.numel() if part.valid is None else int(part.valid.sum())
            right += float(task.score(reading.logits.argmax(-1), part.targets).tokens.sum())
            logits, targets = reading.logits.flatten(0, 1), part.targets.flatten()
            nats += float(F.cross_entropy(logits, targets, ignore_index=UNSCORED, reduction="sum"))
    if isinstance(task, Text):
        return nats / math.log(2) / int(task.bytes_of(batch.targets).sum()), ran / n
    return right / len(batch.ids), ran / n


def lost(case: Case, fixed: float, adaptive: float) -> float:
    """Accuracy lost; for text, the relative increase of bits per byte."""
    return adaptive / fixed - 1 if case.task == "text" else fixed - adaptive


def choose(model: OpenMythos, case: Case, examples: int) -> str:
    """The cheapest exit that loses no more than half of ``LOST`` (text: four fifths) on its own set of problems."""
    batch, best, least = case.problems(examples, 0), "gate:1", math.inf
    fixed, _ = quality(model, case, batch, None)
    for name in (*(GATES if model.cfg.halting else ()), *RESTS):
        found, loops = quality(model, case, batch, exits.parse(name))
        cost = loops * (GATE_COST if name in GATES else 1)
        if cost < least and lost(case, fixed, found) <= LOST * (0.8 if case.task == "text" else 0.5):
            best, least = name, cost
    return best


def assess(model: OpenMythos, case: Case) -> dict[str, Any]:
    """The chosen exit, and the accuracy that it costs."""
    tokens = TOKENS * (4 if case.task == "text" else 1)  # whose criterion is ten times as fine
    examples = max(64, tokens // case.problems(1, 0).ids.shape[1])
    chosen = choose(model, case, examples)
    fixed, _ = quality(model, case, batch := case.problems(examples, 1), None)
    adaptive, loops = quality(model, case, batch, exits.parse(chosen))
    return asdict(case) | {
        "examples": examples, "exit": chosen, "fixed": fixed, "adaptive": adaptive,
        "lost": lost(case, fixed, adaptive), "mean_loops": loops,
    }  # fmt: skip


def races(model: OpenMythos, case: Case, exit: Exit, rounds: int) -> dict[str, Any]:
    """The speedup of every way of decoding."""
    batches = dict.fromkeys(("batch 1", f"batch {ROWS}"), case.problems(ROWS, 2))
    if case.sizes:
        batches["mixed"] = case.problems(ROWS, 2, mixed=True)
    with measuring(model, halting=False) as still:
        return {
            name: adaptive_ways.race(still, case.loops, batch, exit, rounds, one_by_one=name == "batch 1")
            for name, batch in batches.items()
        }


def markdown(results: dict[str, Any]) -> str:
    """One line for each case, with the speedups, in bold where speed and accuracy are as required."""
    columns = [("batch 1", "plain"), ("batch 1", "compiled"), *((f"batch {ROWS}", way) for way in WAYS)]
    columns += [("mixed", "plain"), ("mixed", "depth-batched")]
    lines = [
        "| case | fixed loops | exit | loops run | accuracy (text: bits/byte), fixed | lost | "
        + " | ".join(", ".join(column) for column in columns)
        + " |",
        "|---" * (6 + len(columns)) + "|",
    ]
    for name, found in results.items():
        cells = [
            f"{name}, {found['difficulty']}", found["loops"], f"`{found['exit']}`", f"{found['mean_loops']:.1f}",
            f"{found['fixed']:.4f}", f"{found['lost']:.4f}",
        ]  # fmt: skip
        for batch, way in columns:
            speedup = found[batch]["speedup"].get(way) if batch in found else None
            cell = "–" if speedup is None else f"{speedup:.2f}x"
            cells.append(f"**{cell}**" if speedup and speedup >= SPEEDUP and found["lost"] <= LOST else cell)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--text", default="text-tiny", help="the text model: a name or a directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--retime", action="store_true", help="keep exits and accuracies in --out, time them again")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "adaptive.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text())["results"] if args.out.is_file() else {}
    for name in args.only:
        case = CASES[name]
        model = OpenMythos.from_pretrained(args.text if case.task == "text" else case.model).float().eval()
        kept = results[name] if args.retime else assess(model, case)
        results[name] = kept | races(model, case, exits.parse(kept["exit"]), args.rounds)
        results = {known: results[known] for known in CASES if known in results}
        conditions = describe(torch.device("cpu")) | {"rounds": args.rounds, "dtype": "float32"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    print(markdown(results))
    print(f"\nResults: {args.out}")


if __name__ == "__main__":
    main()
