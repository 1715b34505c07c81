"""Put trained reasoners into the package, each with a model card of figures that it was just measured to have.

    python benchmarks/ship.py [--seed 0]

Takes the runs of benchmarks/reasoners.py; the seed is chosen beforehand, not by its figures. tests/test_pretrained.py
measures every card again.
"""

import argparse
import json
from pathlib import Path

from open_mythos import tasks
from open_mythos.checkpoint import CONFIG_FILE, SHIPPED, WEIGHTS_FILE
from open_mythos.evaluation import DepthGrid, depth_grid
from open_mythos.training.config import TrainConfig
from open_mythos.training.runs import TRAINING_FILE, load_model, model_dir

RUNS = Path(__file__).parent.parent / "runs" / "reasoners"
NAMES = {
    "parity-tiny": "parity",
    "prefix-sums-tiny": "prefix_sums",
    "chain-sum-tiny": "chain_sum",
    "p-hop-tiny": "p_hop",
    "addition-tiny": "addition",
    "permutations-tiny": "permutations",
}
EXAMPLES = 32
CARD, FIGURES = "README.md", "figures.json"
MOST_BYTES = 1_000_000


def ship(name: str, run: Path) -> Path:
    """Write ``open_mythos/pretrained/NAME`` from a run and return its path."""
    cfg = TrainConfig.load(model_dir(run) / TRAINING_FILE)
    model, asked = load_model(run), cfg.evaluation
    target = SHIPPED / name
    model.save_pretrained(target)
    cfg.save(target / TRAINING_FILE)
    assert (target / WEIGHTS_FILE).stat().st_size <= MOST_BYTES
    task = tasks.load(cfg.task.name, **cfg.task.options)
    loops = [n for n in asked.loops if n <= 256]
    grid = depth_grid(model, task, asked.difficulties, loops, EXAMPLES)
    (target / FIGURES).write_text(json.dumps(grid.to_dict(), indent=1) + "\n")
    (target / CARD).write_text(card(name, cfg, grid, sum(p.numel() for p in model.parameters())))
    return target


def card(name: str, cfg: TrainConfig, grid: DepthGrid, n_parameters: int) -> str:
    """A model card in Markdown."""
    trained = f"{cfg.task.min_difficulty} to {cfg.task.max_difficulty} {grid.unit}"
    heads = " | ".join(f"{n} {grid.unit}" for n in grid.difficulties)
    rows = [
        f"| {n} | " + " | ".join(f"{accuracy:.4f} ({used:.1f})" for accuracy, used in zip(a, u, strict=True)) + " |"
        for n, a, u in zip(grid.loops, grid.accuracy.T.tolist(), grid.loops_used.T.tolist(), strict=True)
    ]
    made = f"mythos train {cfg.recipe} seed={cfg.seed}"
    options = "".join(f", {key}={json.dumps(value)}" for key, value in cfg.task.options.items())
    return f"""---
license: mit
library_name: open_mythos
tags: [recurrent-depth, {cfg.task.name}]
---

# {name}

A recurrent-depth transformer of {n_parameters:,} parameters that solves `{cfg.task.name}`. Trained on {trained} at
{cfg.loops.minimum} to {cfg.loops.maximum} loops; the same weights, run for more, solve longer problems.

```python
import torch
from open_mythos import OpenMythos, tasks

model = OpenMythos.from_pretrained("{name}")
task = tasks.load("{cfg.task.name}"{options})
ids, answers, _ = task.batch(1, {grid.difficulties[-1]})
with torch.inference_mode():
    print(task.render(model(ids, n_loops={grid.loops[-1]}).argmax(-1)[0].tolist()))
```

## Accuracy by difficulty and loops

Share of scored tokens that are right, mean over {grid.examples} new problems of each difficulty (seed {grid.seed}),
with the halting gate on; in brackets the loops that a position ran, on average. Guessing gets {grid.chance:.3f}.

| loops, at most | {heads} |
|---|{"---|" * len(grid.difficulties)}
{chr(10).join(rows)}

Measure it again with `mythos eval {name}`; the figures above, in full, are in `figures.json`.

## How it was made

`{made}`: {cfg.steps} steps of {cfg.batch_size} problems; all settings are in `training.json`. The seed was chosen
before training; `benchmarks/results/reasoners.json` has three seeds and both baselines.

## Limits

It knows this one task, in this task's own tokens. Beyond the difficulties above nothing was measured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, source in NAMES.items():
        run = RUNS / source / f"looped-{args.seed}"
        if (run / "evaluation.json").is_file():
            print(f"{name}: {ship(name, run)}")
    print(f"{CONFIG_FILE}, {WEIGHTS_FILE}, {TRAINING_FILE}, {FIGURES} and {CARD} of each are in {SHIPPED}.")


if __name__ == "__main__":
    main()
