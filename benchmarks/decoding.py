"""Decoding options that use recurrence, on the shipped models: memory of the cache, drafts, warm starts; int8 weights.

    python benchmarks/decoding.py [--only budget speculation warm int8] [--out benchmarks/results/decoding.json]

Uses one thread. Takes eight minutes, and five more the first time, to train the model that warm starts need
(runs/decoding). Bits per byte are measured on held-out text, fed through the cache of text-tiny; accuracy on problems
that are fed token by token (for int8, in one pass). The figures of parts not in --only are kept.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos import KVCache, MythosConfig, OpenMythos, tasks
from open_mythos.diagnostics.machine import describe
from open_mythos.evaluation.depth import measuring
from open_mythos.generation.engine import Depth
from open_mythos.generation.engines import make_engine
from open_mythos.generation.fused import why_not_fused
from open_mythos.generation.sampling import Sampling
from open_mythos.generation.speculative import Draft, drafted
from open_mythos.nn.exits import Exit, StateChange
from open_mythos.quantization import quantize_int8, weight_bytes
from open_mythos.tasks.base import UNSCORED
from open_mythos.training.runs import training_config

ROOT = Path(__file__).parent.parent
NOISE_RUN = ROOT / "runs" / "decoding" / "text-noise"
SLOTS = (1, 2, 4, None)
TEXT_LOOPS, WINDOW, WINDOWS = 8, 128, 64
PROBLEMS = {"chain-sum-tiny": (16, 32), "p-hop-tiny": (12, 32)}  # difficulty, loops
PROMPT, NEW, PROMPTS, BATCH = 64, 96, 6, 3
DRAFTS = {8: ((1, 4), (2, 4)), 16: ((2, 4),), 32: ((2, 8),)}  # n_loops: (draft_loops, draft_tokens)
THRESHOLDS = (0.3, 0.1, 0.03, 0.01)
MOST_LOOPS = 32
REASONERS = {"parity-tiny": (96, 64), "chain-sum-tiny": (16, 32)}  # difficulty, loops
BY_MODULES = "bfloat16, by modules"
FORMATS: dict[str, Callable[[OpenMythos], OpenMythos]] = {
    "float32": OpenMythos.float,
    "bfloat16": OpenMythos.bfloat16,
    BY_MODULES: lambda model: watched(model.bfloat16()),  # int8 decodes by modules: to tell their effects apart
    "int8, float32 products": lambda model: quantize_int8(model.float()),
    "int8, bfloat16 products": lambda model: quantize_int8(model.bfloat16()),
}
KINDS = [name for name in FORMATS if name != BY_MODULES]  # formats that may differ in quality
LARGE = MythosConfig(
    vocab_size=256, dim=1024, n_heads=16, n_kv_heads=4, max_seq_len=512, prelude_layers=1, coda_layers=1, n_experts=8,
    n_experts_per_tok=2, n_shared_experts=1, expert_dim=2048, attn_type="gqa", halting=False,
)  # fmt: skip
LARGE_LOOPS, ROUNDS, PROBLEMS_EACH = 4, 5, 256


@cache
def text() -> tasks.Task:
    return tasks.load("text", split="held_out")


@cache
def text_model() -> OpenMythos:
    return OpenMythos.from_pretrained("text-tiny").float()


def fed(model: OpenMythos, ids: Tensor, n_loops: int, kv_cache: KVCache, chunk: int) -> Tensor:
    """Logits of (B, T) tokens that are fed through the cache, ``chunk`` at a time."""
    return torch.cat([model(part, n_loops, kv_cache) for part in ids.split(chunk, 1)], 1)


def bits(logits: Tensor, targets: Tensor) -> float:
    """Bits per byte, as a token of text-tiny is a byte."""
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())) / math.log(2)


# -- slots for the loops


def budget() -> dict[str, Any]:
    """Cache bytes per token, and quality, by the number of cache slots that loops share."""
    batch, rows = text().windows(WINDOW, WINDOWS), []
    with measuring(text_model()):
        for chunk in (1, 16):
            for slots in SLOTS:
                held = KVCache(slots)
                found = bits(fed(text_model(), batch.ids, TEXT_LOOPS, held, chunk), batch.targets)
                rows.append({
                    "model": "text-tiny", "loops": TEXT_LOOPS, "chunk": chunk, "slots": slots,
                    "bytes_per_token": held.nbytes / batch.ids.numel(), "bits_per_byte": found,
                })  # fmt: skip
    for name, (difficulty, loops) in PROBLEMS.items():
        model, trained = OpenMythos.from_pretrained(name), training_config(name).task
        task = tasks.load(trained.name, **trained.options)
        problems = task.batch(128, difficulty, torch.Generator().manual_seed(0))
        assert problems.valid is None
        scored = problems.targets != UNSCORED
        with measuring(model, halting=False) as still:
            for slots in SLOTS:
                held = KVCache(slots)
                answers = fed(still, problems.ids, loops, held, 1).argmax(-1)
                rows.append({
                    "model": name, "loops": loops, "chunk": 1, "slots": slots,
                    "bytes_per_token": held.nbytes / problems.ids.numel(),
                    "accuracy": float((answers == problems.targets)[scored].float().mean()),
                })  # fmt: skip
    return {"rows": rows, "windows": WINDOWS, "window": WINDOW, "problems": 128}


# -- drafting ahead


def speculation() -> dict[str, Any]:
    """Tokens per second with and without drafts, on each prompt in turn."""
    prompts, rows = text().windows(PROMPT, PROMPTS).ids, []
    continued(prompts, 2, 0.0, Draft(1), seed=0)  # work done once is not timed
    settings = [
        (rows_at_once, temperature, n_loops, drafts)
        for rows_at_once, loops in ((1, tuple(DRAFTS)), (BATCH, (8,)))
        for temperature in (0.0, 1.0)
        for n_loops, drafts in DRAFTS.items()
        if n_loops in loops
    ]
    for rows_at_once, temperature, n_loops, drafts in settings:
        tries: list[Draft | None] = [None, *(Draft(*draft) for draft in drafts)]
        seconds, sizes, same = dict.fromkeys(tries, 0.0), {draft: [] for draft in tries}, dict.fromkeys(tries, True)
        for i, prompt in enumerate(prompts.split(rows_at_once)):
            plain = None
            for draft in tries:
                started = time.perf_counter()
                made = continued(prompt, n_loops, temperature, draft, seed=i)
                seconds[draft] += time.perf_counter() - started
                new = torch.cat(made, 1)
                plain = new if draft is None else plain
                same[draft] &= torch.equal(new, plain)
                sizes[draft] += [block.shape[1] for block in made[1:]]
        n_new = NEW * len(prompts)
        for draft in tries[1:]:
            rows.append({
                "rows": rows_at_once, "temperature": temperature, "loops": n_loops, "draft_loops": draft.loops,
                "draft_tokens": draft.tokens, "plain_per_second": n_new / seconds[None],
                "drafted_per_second": n_new / seconds[draft], "speedup": seconds[None] / seconds[draft],
                "per_round": sum(sizes[draft]) / len(sizes[draft]),
                "kept": acceptance(sizes[draft], draft), "same_tokens": same[draft] if temperature == 0 else None,
            })  # fmt: skip
    return {"rows": rows, "prompt": PROMPT, "new": NEW, "prompts": PROMPTS}


def continued(prompt: Tensor, n_loops: int, temperature: float, draft: Draft | None, seed: int) -> list[Tensor]:
    """``NEW`` tokens, in blocks of (B, n)."""
    generator = torch.Generator().manual_seed(seed)
    if draft is None:
        new = text_model().stream(prompt, NEW, n_loops, temperature, generator=generator, engine="fused")
        return [column.unsqueeze(1) for column in new]
    engine = make_engine("fused", text_model(), Depth(n_loops), prompt.shape[1] + NEW, drafts=True)
    logits = engine.extend(prompt)
    return list(drafted(text_model(), engine, logits, draft, Sampling(temperature), (), generator, NEW))


def acceptance(sizes: list[int], draft: Draft) -> float:
    """Share of drafted tokens that were accepted, out of those that were verified."""
    kept = sum(size - 1 for size in sizes)
    return kept / (kept + sum(size <= draft.tokens for size in sizes))


# -- warm starts


class Counting(Exit):
    """Wraps an exit, and counts the loops that are run with it."""

    def __init__(self, exit: Exit) -> None:
        self.exit, self.ran = exit, 0

    def init(self, h: Tensor) -> tuple[Tensor, ...]:
        return self.exit.init(h)

    def check(self, carried: tuple[Tensor, ...], state: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.ran += int(state.ran.sum())
        return self.exit.check(carried, state)


def warm() -> dict[str, Any]:
    """Loops and bits per byte when a token stops once its state hardly changes, by the initial state."""
    rows: list[dict[str, Any]] = []
    for name, model, starts in (
        ("trained from noise", noise_model(), ("zeros", "noise", "predecessor")),
        ("text-tiny, trained from its input", text_model(), ("input", "predecessor")),
    ):
        for start in starts:
            for threshold in THRESHOLDS:
                rows.append(
                    {"model": name, "start": start, "threshold": threshold, **one_by_one(model, start, threshold)}
                )
    return {"rows": rows, "windows": WINDOWS, "window": WINDOW, "most_loops": MOST_LOOPS}


def one_by_one(model: OpenMythos, start: str, threshold: float) -> dict[str, float]:
    """Bits per byte, and mean loops per token, of text that is fed one token at a time."""
    batch, held, exit = text().windows(WINDOW, WINDOWS), KVCache(), Counting(StateChange(threshold))
    generator = torch.Generator().manual_seed(0)
    found, first = [], None
    with measuring(model):
        for token in batch.ids.split(1, 1):
            h, ctx = model.states(token, MOST_LOOPS, held, exit=exit, first=first)
            found.append(model.head(model.decode(h, ctx)))
            first = {"predecessor": h, "noise": torch.randn(h.shape, generator=generator)}.get(start)
    return {"bits_per_byte": bits(torch.cat(found, 1), batch.targets), "loops": exit.ran / batch.ids.numel()}


def noise_model() -> OpenMythos:
    """The text recipe's model, trained with random initial states; it is trained now unless that has been done."""
    if not (NOISE_RUN / "evaluation.json").is_file():
        command = [sys.executable, "-m", "open_mythos", "train", "text", "model.state_init=noise"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--out", str(NOISE_RUN), "--resume", "auto"], check=True, env=env)
    return OpenMythos.from_pretrained(NOISE_RUN / "model")


# -- int8 weights


def watched(model: OpenMythos) -> OpenMythos:
    """The model with a hook, which makes it decode by its modules."""
    model.recurrent.block.register_forward_hook(lambda *_: None)
    return model


def int8() -> dict[str, Any]:
    """Quality of shipped models by weight format, and speed of text-tiny and of a large model with random weights."""
    torch.manual_seed(0)
    batch, large = text().windows(WINDOW, WINDOWS), OpenMythos(LARGE).eval()
    texts = {name: change(deepcopy(text_model())) for name, change in FORMATS.items()}
    quality = []
    for name in KINDS:
        with measuring(texts[name]):
            found = bits(texts[name](batch.ids, TEXT_LOOPS).float(), batch.targets)
        quality.append({"model": "text-tiny", "loops": TEXT_LOOPS, "format": name, "bits_per_byte": found})
    for shipped in REASONERS:
        quality += [{"model": shipped, "format": name, **solved(shipped, FORMATS[name])} for name in KINDS]
    speed = [{"model": "text-tiny", "loops": TEXT_LOOPS, **row} for row in speeds(texts, TEXT_LOOPS)]
    larges = {name: change(deepcopy(large)) for name, change in FORMATS.items()}
    speed += [{"model": f"random, dim {LARGE.dim}", "loops": LARGE_LOOPS, **row} for row in speeds(larges, LARGE_LOOPS)]
    return {
        "quality": quality, "speed": speed, "problems": PROBLEMS_EACH, "windows": WINDOWS, "window": WINDOW,
        "prompt": PROMPT, "new": NEW, "rounds": ROUNDS,
    }  # fmt: skip


def solved(name: str, change: Callable[[OpenMythos], OpenMythos]) -> dict[str, Any]:
    """Loops, difficulty and accuracy of a shipped reasoner."""
    (difficulty, loops), trained = REASONERS[name], training_config(name).task
    model = change(OpenMythos.from_pretrained(name))
    problems = tasks.load(trained.name, **trained.options).batch(
        PROBLEMS_EACH, difficulty, torch.Generator().manual_seed(0)
    )
    with measuring(model, halting=False) as still:
        right = (still(problems.ids, loops, attention_mask=problems.valid).argmax(-1) == problems.targets).float()
    return {"loops": loops, "difficulty": difficulty, "accuracy": float(right[problems.targets != UNSCORED].mean())}


def speeds(models: dict[str, OpenMythos], n_loops: int) -> list[dict[str, Any]]:
    """Prompt tokens and new tokens per second for one row, as medians; the models take turns."""
    prompt = text().windows(PROMPT, 1).ids
    prompts, steps = {name: [] for name in models}, {name: [] for name in models}
    plain = {name for name, model in models.items() if why_not_fused(model) is None}
    engines = {name: "fused" if name in plain else "modules" for name in models}  # PyTorch operators, not C code
    for turn in range(ROUNDS + 1):  # the first turn is not counted
        for name, model in models.items():
            started = time.perf_counter()
            stream = model.stream(prompt, NEW, n_loops, temperature=0, engine=engines[name])
            next(stream)
            first = time.perf_counter()
            done = sum(1 for _ in stream)
            if turn:
                prompts[name].append(PROMPT / (first - started))
                steps[name].append(done / (time.perf_counter() - first))
    return [
        {
            "format": name, "bytes": weight_bytes(model), "prompt_per_second": median(prompts[name]),
            "tokens_per_second": median(steps[name]),
            "for_bfloat16": median(mine / its for mine, its in zip(steps[name], steps["bfloat16"], strict=True)),
        }
        for name, model in models.items()
    ]  # fmt: skip


# -- tables


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    heads = list(heads)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def markdown(results: dict[str, Any]) -> str:
    lines: list[str] = []
    if "budget" in results:
        lines += table(
            ("model", "loops", "tokens per call", "slots", "bytes per token", "quality"),
            (
                (r["model"], r["loops"], r["chunk"], r["slots"] or "one per loop", f"{r['bytes_per_token']:.0f}",
                 f"{r['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in r else f"{r['accuracy']:.4f} right")
                for r in results["budget"]["rows"]
            ),
        )  # fmt: skip
    if "speculation" in results:
        lines += table(
            ("rows", "temperature", "loops", "draft loops", "draft tokens", "share kept", "tokens per round",
             "tokens/s without drafts", "with drafts", "speedup"),
            (
                (r["rows"], f"{r['temperature']:g}", r["loops"], r["draft_loops"], r["draft_tokens"],
                 f"{r['kept']:.2f}", f"{r['per_round']:.2f}", f"{r['plain_per_second']:.0f}",
                 f"{r['drafted_per_second']:.0f}", f"{r['speedup']:.2f}x")
                for r in results["speculation"]["rows"]
            ),
        )  # fmt: skip
    if "warm" in results:
        lines += table(
            ("model", "start", *(f"stop below {t:g}: bits per byte (loops)" for t in THRESHOLDS)),
            (
                (name, start, *(
                    f"{r['bits_per_byte']:.4f} ({r['loops']:.2f})"
                    for r in results["warm"]["rows"] if (r["model"], r["start"]) == (name, start)
                ))
                for name, start in dict.fromkeys((r["model"], r["start"]) for r in results["warm"]["rows"])
            ),
        )  # fmt: skip
    if "int8" in results:
        lines += table(
            ("model", "loops", "weights", "quality"),
            (
                (r["model"], r["loops"], r["format"],
                 f"{r['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in r else f"{r['accuracy']:.4f} right")
                for r in results["int8"]["quality"]
            ),
        )  # fmt: skip
        lines += table(
            ("model", "loops", "weights", "MB", "prompt tokens/s", "tokens/s", "over bfloat16's"),
            (
                (r["model"], r["loops"], r["format"], f"{r['bytes'] / 1e6:.2f}", f"{r['prompt_per_second']:.0f}",
                 f"{r['tokens_per_second']:.1f}", f"{r['for_bfloat16']:.2f}x")
                for r in results["int8"]["speed"]
            ),
        )  # fmt: skip
    return "\n".join(lines)


PARTS = {"budget": budget, "speculation": speculation, "warm": warm, "int8": int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decoding.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text())["results"] if args.out.is_file() else {}
    results |= {part: PARTS[part]() for part in args.only}
    results = {part: results[part] for part in PARTS if part in results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    conditions = describe(torch.device("cpu"))
    args.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    print(markdown(results))
    print(f"Results: {args.out}")


if __name__ == "__main__":
    main()
