"""Put trained models into the package, each with a model card whose figures are measured on it.

    python benchmarks/ship.py [--seed 0] [--gates | --run DIR [--note TEXT]] [--only NAME ...]

--run names the run of the one model that --only names; --note is added to its card, under "How it was made". With
--gates, only the halting gates of the shipped models are trained again. Otherwise the runs of benchmarks/reasoners.py
are taken; the seed is chosen beforehand, not by its results. tests/test_pretrained.py measures every card again. The
text model is stored in bfloat16, and its stored weights are measured in float32.
"""

import argparse
import json
import platform
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from open_mythos import OpenMythos, tasks
from open_mythos.checkpoint import CONFIG_FILE, FIGURES, SHIPPED, WEIGHTS_FILE
from open_mythos.evaluation import DepthGrid, depth_grid
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.models import TRAINING_FILE, load_model, model_dir
from open_mythos.tasks.text import Text
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import GATE_SEED, RESUMABLE_CHANGES, save_tokenizer
from open_mythos.training.gate import train_gate
from open_mythos.training.overrides import differences
from open_mythos.training.recipes import recipe

RUNS = Path(__file__).parent.parent / "runs" / "reasoners"
NAMES = {
    "parity-tiny": "parity",
    "prefix-sums-tiny": "prefix_sums",
    "chain-sum-tiny": "chain_sum",
    "p-hop-tiny": "p_hop",
    "addition-tiny": "addition",
    "permutations-tiny": "permutations",
    "text-tiny": "text",
    "words-tiny": "words",
}
EXAMPLES = 32
CARD, KINDS = "README.md", "kinds.json"
MOST_BYTES = {"words-tiny": 6_000_000}  # of weights; 1 MB for the others


def ship(name: str, run: Path, note: str = "") -> Path:
    """Write ``open_mythos/pretrained/NAME`` from a run, or from itself with a new gate, and return its path."""
    cfg = TrainConfig.load(model_dir(run) / TRAINING_FILE)
    model, target = load_model(run), SHIPPED / name
    task = tasks.load(cfg.task.name, **cfg.task.options)
    if run == target:
        generator = torch.Generator().manual_seed(1000 * cfg.seed + GATE_SEED)
        train_gate(model, task, cfg.gate, cfg.task.min_difficulty, cfg.hardest_for_gate, generator, print)
    if isinstance(task, Text):
        model.to(torch.bfloat16)
    model.save_pretrained(target)
    if cfg.start and not (SHIPPED / cfg.start).is_dir():  # the path of a run on this machine
        cfg.start = f"runs/{Path(cfg.start).name}"
    cfg.save(target / TRAINING_FILE)
    save_tokenizer(task, target)
    assert (target / WEIGHTS_FILE).stat().st_size <= MOST_BYTES.get(name, 1_000_000)
    figures, text = (
        of_text(name, model, task, cfg) if isinstance(task, Text) else of_problems(name, model, task, cfg, note)
    )
    (target / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    (target / CARD).write_text(text)
    return target


def of_problems(
    name: str, model: OpenMythos, task: tasks.Task, cfg: TrainConfig, note: str
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """The accuracy by difficulty and loops, and the card that shows it."""
    loops = [n for n in cfg.evaluation.loops if n <= 256]
    task = task.held_out()
    grid = depth_grid(model, task, cfg.evaluation.difficulties, loops, EXAMPLES)
    most = depth_grid(model, task, grid.difficulties, loops[-1:], EXAMPLES, halting=False)
    lost = float((most.accuracy - grid.accuracy[:, -1:]).max())
    kinds = [
        depth_grid(model, part, levels, loops, EXAMPLES) for part, levels in task.by_kind(cfg.evaluation.difficulties)
    ]
    if kinds:
        (SHIPPED / name / KINDS).write_text(json.dumps([kind.to_dict() for kind in kinds], indent=1) + "\n")
        return grid.to_dict(), words_card(name, cfg, [grid, *kinds], lost, model, note)
    return grid.to_dict(), card(name, cfg, grid, lost, count(model))


def of_text(name: str, model: OpenMythos, task: Text, cfg: TrainConfig) -> tuple[dict[str, Any], str]:
    """The bits per byte by loops, and the card that shows them."""
    length, windows = cfg.evaluation.difficulties[0], cfg.evaluation.examples
    held_out = replace(task, split="held_out")
    bits = bits_per_byte(model.float(), held_out, cfg.evaluation.loops, length, windows)
    figures = {
        "bits_per_byte": {str(n): found for n, found in bits.items()},
        "length": length, "windows": windows, "python": platform.python_version(), "version": task.version,
    }  # fmt: skip
    return figures, text_card(name, cfg, figures, count(model))


def count(model: OpenMythos) -> int:
    return sum(p.numel() for p in model.parameters())


def text_card(name: str, cfg: TrainConfig, figures: dict[str, Any], n_parameters: int) -> str:
    """The model card of a text model, in Markdown."""
    rows = "\n".join(f"| {n} | {bits:.4f} |" for n, bits in figures["bits_per_byte"].items())
    seen = cfg.steps * cfg.batch_size * figures["length"]
    return f"""---
license: mit
library_name: open_mythos
tags: [recurrent-depth, {cfg.task.name}]
---

# {name}

A recurrent-depth transformer of {n_parameters:,} parameters that predicts the next byte of Python source code. It was
trained for a few minutes on the modules of the standard library, at {cfg.loops.mean:g} loops. It is meant for trying
out decoding, not for writing code: it has learned indentation, keywords and common names, and little more. Byte b is
token 1 + b.

```python
import torch
from open_mythos import OpenMythos, tasks

model, task = OpenMythos.from_pretrained("{name}").float(), tasks.load("{cfg.task.name}")
ids = torch.tensor([task.encode("import os\\n\\n\\ndef ")])
print(task.decode(model.generate(ids, 64, temperature=0)[0].tolist()))
```

Weights are stored and loaded in bfloat16; `.float()` converts them to float32, which is faster on a CPU.

## Bits per byte by loops

Measured in float32 on {figures["windows"]} windows of {figures["length"]} bytes from held-out modules of the standard
library of Python {figures["python"]}; with another version of Python, the figures differ slightly.

| loops | bits per byte |
|---|---|
{rows}

`mythos eval {name}` measures this again.

## How it was made

`mythos train {cfg.recipe} seed={cfg.seed}`: {cfg.steps} steps of {cfg.batch_size} windows of {figures["length"]} bytes;
all settings are in `training.json`. The seed was chosen before training. `docs/language.md` has the results of three
seeds of the recipe, next to models without a loop, and `benchmarks/results/decoding.json` measurements of decoding.

## Limits

It was trained on windows of {figures["length"]} bytes, {seen / 1e6:.0f} MB of text in all. It has no halting gate.
"""


def card(name: str, cfg: TrainConfig, grid: DepthGrid, lost: float, n_parameters: int) -> str:
    """The model card of a reasoner, in Markdown; ``lost`` is the accuracy that its gate loses against all loops."""
    trained = f"{cfg.task.min_difficulty} to {cfg.task.max_difficulty} {grid.unit}"
    heads = " | ".join(f"{n} {grid.unit}" for n in grid.difficulties)
    rows = rows_of(grid)
    made = f"mythos train {cfg.recipe} seed={cfg.seed}"
    options = "".join(f", {key}={json.dumps(value)}" for key, value in cfg.task.options.items())
    return f"""---
license: mit
library_name: open_mythos
tags: [recurrent-depth, {cfg.task.name}]
---

# {name}

A recurrent-depth transformer of {n_parameters:,} parameters that solves problems of the task `{cfg.task.name}`.
It was trained on problems of {trained}, with {cfg.loops.minimum} to {cfg.loops.maximum} loops.
Run for more loops, the same weights solve larger problems.

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

The share of answer tokens that are right, with the halting gate on, as a mean over {grid.examples} new problems of each
difficulty (seed {grid.seed}); in brackets, the mean number of loops that a position ran. Chance is {grid.chance:.3f}.
Compared with all {grid.loops[-1]} loops at every position, the gate loses at most {max(lost, 0):.4f} of accuracy.

| maximum loops | {heads} |
|---|{"---|" * len(grid.difficulties)}
{chr(10).join(rows)}

`mythos eval {name} --exit gate --examples {grid.examples}` measures this again.
`figures.json` has the unrounded figures.

## How it was made

`{made}`: {cfg.steps} steps of {cfg.batch_size} problems; all settings are in `training.json`. The seed was chosen
before training. `benchmarks/results/reasoners.json` has the results of three seeds and of both baselines without a
loop.

## Limits

It has learned this one task only, in the task's own tokens. Difficulties beyond those above were not measured.
"""


def words_card(
    name: str, cfg: TrainConfig, grids: list[DepthGrid], lost: float, model: OpenMythos, note: str
) -> str:  # fmt: skip
    """The model card of a model that answers questions in words, in Markdown.

    ``grids`` has the accuracy over all tasks first, then that of each task.
    """
    tables = "\n\n".join(
        f"### {grid.task.replace('_', ' ')}\n\n| maximum loops | "
        + " | ".join(f"{n} {grid.unit}" for n in grid.difficulties)
        + f" |\n|---|{'---|' * len(grid.difficulties)}\n"
        + "\n".join(rows_of(grid))
        + f"\n\nChance is {grid.chance:.3f}."
        for grid in grids
    )
    weights, first = SHIPPED / name / WEIGHTS_FILE, grids[0]
    made = f"`mythos train {' '.join([cfg.recipe, *overrides_of(cfg)])}`"
    return f"""---
license: mit
library_name: open_mythos
tags: [recurrent-depth, {", ".join(grid.task for grid in grids)}]
---

# {name}

A recurrent-depth transformer of {count(model):,} parameters ({weights.stat().st_size / 1e6:.1f} MB) that answers
questions about facts that it is told, in a vocabulary of {cfg.model.vocab_size} words. Run for more loops, the same
weights solve problems of more steps.

```
$ mythos chat {name}
> Ana has what Ben has. Ben keeps a key. What does Ana have?
> /trace          the answer after each loop
> /example 4      a problem of 4 steps that was never in training, the model's answer, and the right one
> /loops 2
> /again          the same problem, with fewer loops than it takes
```

## Accuracy by kind, difficulty and loops

The share of answers that are right, with the halting gate on, as a mean over {first.examples} new problems of each
difficulty (seed {first.seed}), whose sentences and pairs of names were never in training; in brackets, the mean number
of loops that a position ran. The first table is for all four kinds together. Compared with all {first.loops[-1]}
loops at every position, the gate loses at most {max(lost, 0):.4f} of accuracy. The model was trained on problems of
{cfg.task.min_difficulty} to {cfg.task.max_difficulty} {first.unit}, with up to {cfg.loops.maximum} loops.

{tables}

`mythos eval {name} --exit gate --examples {first.examples}` measures this again.
`figures.json` and `kinds.json` have the unrounded figures.

## How it was made

{made}: {cfg.steps} steps of {cfg.batch_size} problems of each kind;
all settings are in `training.json`.{note and " " + note}

## Limits

It has learned the sentences of its four tasks, with numbers from 0 to 6, and no other English: a sentence unlike those
may get a wrong answer with high probability. So may a question about somebody of whom nothing was said, since every
question in training has an answer, and a question of another kind than the facts so far were told for; use `/reset` in
between. Difficulties beyond those above were not measured.
"""


def overrides_of(cfg: TrainConfig) -> list[str]:
    """Settings that differ from the recipe's, ``seed`` always; with ``start``, those of the model are left out."""
    usual = recipe(cfg.recipe)
    if cfg.start:  # the model has a config of its own, except for the number of loops
        usual.model = replace(cfg.model, max_loop_iters=1)
    changed = {key: value for key, (_, value) in differences(usual, cfg).items() if key not in RESUMABLE_CHANGES}
    texts = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in changed.items()}
    return [shlex.quote(f"{key}={value}") for key, value in ({"seed": cfg.seed} | texts).items()]


def rows_of(grid: DepthGrid) -> list[str]:
    """A table row for each number of loops: the accuracies, each with the loops that a position ran."""
    return [
        f"| {n} | " + " | ".join(f"{accuracy:.4f} ({used:.1f})" for accuracy, used in zip(a, u, strict=True)) + " |"
        for n, a, u in zip(grid.loops, grid.accuracy.T.tolist(), grid.loops_used.T.tolist(), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gates", action="store_true", help="train the halting gates of the shipped models again")
    source.add_argument("--run", type=Path, help="the run of the one model that --only names")
    parser.add_argument("--note", default="", help="more about how the model was made, for its card")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    args = parser.parse_args()
    if args.run and len(args.only) != 1:
        parser.error("--run is the run of one model; name it with --only")
    for name in args.only:
        run = args.run or (SHIPPED / name if args.gates else RUNS / NAMES[name] / f"looped-{args.seed}")
        has_gate = run.is_dir() and TrainConfig.load(model_dir(run) / TRAINING_FILE).gate.steps > 0
        if has_gate if args.gates else (run / "evaluation.json").is_file():
            print(f"{name}: {ship(name, run, args.note)}")
    print(f"{CONFIG_FILE}, {WEIGHTS_FILE}, {TRAINING_FILE}, {FIGURES} and {CARD} of each model are in {SHIPPED}.")


if __name__ == "__main__":
    main()
