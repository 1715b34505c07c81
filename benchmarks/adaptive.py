"""Tokens per second with an adaptive exit against a fixed number of loops, and what it costs in accuracy.

    python benchmarks/adaptive.py [--only parity p_hop] [--out benchmarks/results/adaptive.json]

The ways of decoding are those of ``adaptive_ways.py``. Batch 1 is eight problems of one size, one after the other;
batch 8 the same at once. "Mixed" are eight problems of several sizes, as requests of strangers would be; in a plain
batch they are padded at their ends, which is not counted, and which compiled code does not take.

The exit is chosen for each case on other problems, or windows of text, than those reported: the fewest loops among
those that lose no more than half the bar, or four fifths for text, which is measured more finely. A round times every
way once, in turn; the ratio reported is the median over rounds, compiled ways against the compiled fixed count. Half an
hour on one core, of which ``--retime`` repeats only the timing, a third.
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
SPEEDUP, LOST = 1.8, 0.005  # the bar: times as fast, at no more accuracy (of text, share of its bits per byte) lost
ROWS = 8
GATE_COST = 1.1  # of a loop after which the gate is asked, against one after which only the change is measured
TOKENS = 16384  # of the problems on which an exit is chosen, and of those reported
GATES = ("gate:.99", "gate:.9", "gate:.5", "gate:.2", "gate:.1", "gate:.05", "gate:.03", "gate:.02")
RESTS = [
    f"change:{threshold:g}:{patience}"
    for threshold in (0.4, 0.3, 0.25, 0.2, 0.17, 0.15, 0.12, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005)
    for patience in (1, 2)
]


@dataclass(frozen=True)
class Case:
    """A model, the size of its problems, the fixed loops that its card recommends there, and sizes to mix."""

    model: str
    task: str
    difficulty: int
    loops: int
    sizes: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def problems(self, n: int, seed: int, mixed: bool = False) -> Batch:
        """``n`` problems; seed 0 is for choosing an exit, others for what is reported. Of text, every other window."""
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
    """Accuracy, or bits per byte, and the loops that a position ran, at ``case.loops`` or where the exit stops."""
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
    """Accuracy lost, or the share by which bits per byte have grown."""
    return adaptive / fixed - 1 if case.task == "text" else fixed - adaptive


def choose(model: OpenMythos, case: Case, examples: int) -> str:
    """The cheapest exit that loses no more than half the bar on problems of its own."""
    batch, best, least = case.problems(examples, 0), "gate:1", math.inf
    fixed, _ = quality(model, case, batch, None)
    for name in (*(GATES if model.cfg.halting else ()), *RESTS):
        found, loops = quality(model, case, batch, exits.parse(name))
        cost = loops * (GATE_COST if name in GATES else 1)
        if cost < least and lost(case, fixed, found) <= LOST * (0.8 if case.task == "text" else 0.5):
            best, least = name, cost
    return best


def assess(model: OpenMythos, case: Case) -> dict[str, Any]:
    """The exit that is chosen, and what it costs in accuracy."""
    tokens = TOKENS * (4 if case.task == "text" else 1)  # whose bar is ten times as fine
    examples = max(64, tokens // case.problems(1, 0).ids.shape[1])
    chosen = choose(model, case, examples)
    fixed, _ = quality(model, case, batch := case.problems(examples, 1), None)
    adaptive, loops = quality(model, case, batch, exits.parse(chosen))
    return asdict(case) | {
        "examples": examples, "exit": chosen, "fixed": fixed, "adaptive": adaptive,
        "lost": lost(case, fixed, adaptive), "mean_loops": loops,
    }  # fmt: skip


def races(model: OpenMythos, case: Case, exit: Exit, rounds: int) -> dict[str, Any]:
    """What every way of decoding gains."""
    batches = dict.fromkeys(("batch 1", f"batch {ROWS}"), case.problems(ROWS, 2))
    if case.sizes:
        batches["mixed"] = case.problems(ROWS, 2, mixed=True)
    with measuring(model, halting=False) as still:
        return {
            name: adaptive_ways.race(still, case.loops, batch, exit, rounds, one_by_one=name == "batch 1")
            for name, batch in batches.items()
        }


def markdown(results: dict[str, Any]) -> str:
    """One line for each case: how many times as fast, in bold where it meets the bar."""
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
    parser.add_argument("--retime", action="store_true", help="keep the exits and accuracies in --out")
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
