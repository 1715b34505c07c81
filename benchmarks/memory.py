"""Peak memory of a training step by loop count, with the loops' activations kept or recomputed.

    python benchmarks/memory.py [--out benchmarks/results/memory.json]

Each figure is the growth of the peak resident size of a new process over one step, with gradient through all loops.
Takes half a minute on one core.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from speed_worker import resident

LOOPS = (4, 8, 16, 32)
ROOT = Path(__file__).parent


def peak(n_loops: int, recompute: bool) -> float:
    """Megabytes by which one step of the text recipe's model increases the memory of this process."""
    from open_mythos.tasks import Batch
    from open_mythos.training.baselines import build
    from open_mythos.training.objective import Objective
    from open_mythos.training.recipes import recipe

    torch.set_num_threads(1)
    cfg = recipe("text")
    cfg.loops.schedule, cfg.loops.mean, cfg.loops.maximum, cfg.loops.gradient = "fixed", n_loops, n_loops, "all"
    cfg.checkpoint_loops = recompute
    torch.manual_seed(0)
    model, objective = build(cfg).train(), Objective(cfg)
    before = resident()
    ids = torch.randint(1, cfg.model.vocab_size, (cfg.batch_size, cfg.task.max_difficulty))
    plan = objective.plan(0, len(ids), ids.shape[1], torch.Generator().manual_seed(0))
    objective(model, Batch(ids, ids), plan, ids.numel()).loss.backward()
    return resident() - before


def measured(n_loops: int, recompute: bool) -> float:
    """:func:`peak`, in a process of its own."""
    command = [sys.executable, __file__, "--loops", str(n_loops), *(["--recompute"] if recompute else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "memory.json")
    parser.add_argument("--loops", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loops:
        print(peak(args.loops, args.recompute))
        return
    kept = {n: measured(n, False) for n in LOOPS}
    recomputed = {n: measured(n, True) for n in LOOPS}
    ratio = recomputed[32] / recomputed[4]
    print(f"{'loops':>6} {'kept':>9} {'recomputed':>11}  (MB of one training step)")
    for n in LOOPS:
        print(f"{n:>6} {kept[n]:>9.0f} {recomputed[n]:>11.0f}")
    print(f"32 loops over 4, recomputed: {ratio:.2f} (kept: {kept[32] / kept[4]:.2f})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    conditions = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu", "recipe": "text"}
    found = {"kept": kept, "recomputed": recomputed, "ratio_32_to_4": ratio, "conditions": conditions}
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"Results: {args.out}")


if __name__ == "__main__":
    main()
