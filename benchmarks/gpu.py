"""What the library reaches on a GPU, in ten minutes at most, unattended.

    python benchmarks/gpu.py [--minutes 9] [--only NAME ...] [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --tiny --device cpu        all of it at toy sizes, to see that it runs

Results are written after every part, so that a cut loses nothing; a part that fails leaves its traceback in its place
and the rest goes on. Training should reach 40% of the measured bfloat16 matrix-product rate, decoding 60% of the
measured memory rate. (Called gpu and not cuda, since torch imports a package of that name.)
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import gpu_ops
import torch
from gpu_ops import Found

from open_mythos import MythosConfig, OpenMythos
from open_mythos.diagnostics import parameters
from open_mythos.diagnostics.machine import describe, matmul_rate, read_rate
from open_mythos.diagnostics.speed import decode_speed, train_speed
from open_mythos.generation.engine import Depth
from open_mythos.generation.engines import check_engine
from open_mythos.ops.dispatch import use_tf32
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer
from open_mythos.variants import variant

ROOT = Path(__file__).parent.parent
BARS = {"train": 0.40, "decode": 0.60}
SMALL = ("batch_size=8", "model.dim=64", "task.max_difficulty=8", "loops.per=sequence", "loops.maximum=4")


class Bench:
    """Sizes and device, and what has been measured so far.

    Args:
        device: cuda, or cpu to see that everything runs.
        tiny: toy sizes.
    """

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.results: dict[str, Found] = {}
        use_tf32(device)
        self.seconds = 0.0 if tiny else 6.0

    def machine(self) -> Found:
        """The rates that the others are shares of."""
        if self.tiny:
            return {"matmul_flops_per_second": 1e11, "read_bytes_per_second": 1e10, "invented": True}
        matmul, read = matmul_rate(torch.bfloat16, self.device, 5.0), read_rate(self.device)
        return {"matmul_flops_per_second": matmul, "read_bytes_per_second": read}

    def train(self, cfg: MythosConfig, compiled: bool) -> Found:
        """bfloat16 autocast, blocks compiled one by one, fused AdamW; the batch is halved until it fits."""
        batch, tokens = (2, 16) if self.tiny else (32, 1024)
        while True:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            torch.manual_seed(0)
            model = OpenMythos(cfg).to(self.device)
            if compiled:
                for block in (*model.prelude, model.recurrent.block, *model.coda):
                    block.compile(backend=gpu_ops.compiler(self.device))
            try:
                found = train_speed(model, batch, tokens, cfg.max_loop_iters, torch.bfloat16, self.seconds)
                break
            except torch.cuda.OutOfMemoryError:
                if batch == 1:
                    raise
            del model
            torch.cuda.empty_cache()
            batch //= 2
        share = found.flops_per_second / self.results["machine"]["matmul_flops_per_second"]
        return asdict(found) | {
            "tokens_per_second": found.tokens_per_second, "share": share, "bar": BARS["train"],
            "parameters": asdict(parameters(cfg)),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
        }  # fmt: skip

    def decode(self, cfg: MythosConfig, batch: int, engine: str) -> Found:
        """New tokens in bfloat16, by the engine of this name."""
        torch.manual_seed(0)
        model = OpenMythos(cfg).to(self.device, torch.bfloat16).eval()
        if (why := why_not(engine, model, Depth(cfg.max_loop_iters))) is not None:
            return {"skipped": why}
        found = decode_speed(model, batch, 16 if self.tiny else 1024, cfg.max_loop_iters, self.seconds, engine)
        share = (found.bytes_per_second or 0.0) / self.results["machine"]["read_bytes_per_second"]
        return asdict(found) | {"tokens_per_second": found.tokens_per_second, "share": share, "bar": BARS["decode"]}

    def waits(self) -> Found:
        """How often a step of the Trainer makes the host wait for the device, by micro-batches: once, however many."""
        found: Found = {}
        for parts in (1, 4):
            trainer = Trainer(configured("parity", [f"device={self.device.type}", f"accumulate={parts}", *SMALL]))
            trainer.step()  # what is made once may wait
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if self.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    trainer.step()
                finally:
                    if self.device.type == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
            messages = [str(warning.message) for warning in caught]
            found[f"{parts} micro-batches"] = sum("synchronizing" in message for message in messages)
        return found


def why_not(engine: str, model: OpenMythos, depth: Depth) -> str | None:
    try:
        check_engine(engine, model, depth)
    except ValueError as error:
        return str(error)
    return None


def models(tiny: bool) -> dict[str, MythosConfig]:
    """About 0.1B parameters: sparse with latent attention, and dense with grouped queries."""
    dense = MythosConfig(
        vocab_size=32000, dim=1024, n_heads=16, n_kv_heads=4, max_loop_iters=8, prelude_layers=2, coda_layers=2,
        attn_type="gqa", n_experts=1, n_experts_per_tok=1, n_shared_experts=0, expert_dim=4096,
    )  # fmt: skip
    found = {"gqa-dense": dense, "mla-moe": variant("100m")}
    if tiny:
        small = dict(vocab_size=97, dim=64, n_heads=4, n_kv_heads=2, max_loop_iters=2, expert_dim=32, lora_rank=4)
        latent = dict(kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
        found = {name: MythosConfig(**vars(cfg) | small | latent) for name, cfg in found.items()}
    for cfg in found.values():
        cfg.halting = False
    return found


def parts(bench: Bench) -> dict[str, Callable[[], Found]]:
    """What is measured, by name, the most important first; each needs what ``machine`` found."""
    made: dict[str, Callable[[], Found]] = {}
    sizes, rows = models(bench.tiny), (1, 2) if bench.tiny else (1, 32)
    for name, cfg in sizes.items():
        made[f"train {name}"] = partial(bench.train, cfg, compiled=True)
    for name, cfg in sizes.items():
        for batch in rows:
            for engine in ("graph", "fused", "modules"):
                made[f"decode {engine} {name}, batch {batch}"] = partial(bench.decode, cfg, batch, engine)
    made["waits"] = bench.waits
    for n_experts in (4, 8) if bench.tiny else (32, 256):
        made[f"experts {n_experts}"] = partial(gpu_ops.experts, bench.device, n_experts, bench.tiny)
    for kind in ("gqa", "mla"):
        for work in ("train", "decode"):
            made[f"attention {kind} {work}"] = partial(gpu_ops.attention, bench.device, kind, work, bench.tiny)
    for name, cfg in sizes.items():
        made[f"train {name}, not compiled"] = partial(bench.train, cfg, compiled=False)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes and invented rates")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no part is begun")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="parts whose name begins so")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny shows that the script runs")
    bench = Bench(torch.device(args.device), args.tiny)
    begun, failed = time.perf_counter(), False
    wanted = {name: part for name, part in parts(bench).items() if name.startswith(tuple(args.only))}
    for name, part in {"machine": bench.machine, **wanted}.items():
        started = time.perf_counter()
        try:
            late = started - begun > 60 * args.minutes
            found = {"skipped": f"{args.minutes:g} minutes are over"} if late else part()
        except Exception:
            found, failed = {"failed": traceback.format_exc()}, True
        bench.results[name] = found | {"took": time.perf_counter() - started}
        torch.cuda.empty_cache()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        conditions = describe(bench.device) | {"tiny": args.tiny}
        args.out.write_text(json.dumps({"conditions": conditions, "results": bench.results}, indent=1) + "\n")
        print(f"{name}: {summary(found)}", flush=True)
    print(f"Results: {args.out}")
    sys.exit(failed)


def summary(found: Found) -> str:
    """One line about a part."""
    if "share" in found:
        return f"{found['tokens_per_second']:,.0f} tokens/s, {found['share']:.0%} (bar {found['bar']:.0%})"
    if "failed" in found:
        return found["failed"].splitlines()[-1]
    values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}
    return ", ".join(f"{key} {value}" for key, value in values.items())


if __name__ == "__main__":
    main()
