"""What the library reaches on a GPU, in ten minutes, unattended; without a GPU, what a CPU can show of it.

    python benchmarks/gpu.py [--minutes 10] [--only NAME ...] [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --device cpu [--tiny]

Parts, in this order: agreement with the CPU's numbers; training of a looped mixture of experts of the 100M class next
to a Llama of equal operations; its attention kernels; launches, graph breaks and synchronisations of a step; memory
compared with the plan; decoding by captured graphs; operators. Results are written after every part, so an interruption
loses nothing that was measured. If a part fails, its traceback is recorded and the others run. The exit code is 1 if a
part failed or a bar (a required value) was missed.

On a CPU, speed is not judged. Steps at toy sizes show graph breaks and the CPU's kernels. Steps at full size run on a
simulated GPU (benchmarks/pretend.py) and show kernel launches, synchronisations, attention kernels and memory.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import gpu_ops
import torch
import torch.nn.functional as F
from gpu_ops import Found
from gpu_train import LARGE, Training, attention_kernels, models
from pretend import NAME, Pretend, register
from rich.console import Console
from rich.table import Table

from open_mythos import MythosConfig, OpenMythos
from open_mythos.diagnostics.machine import copy_rate, describe, matmul_rate, read_rate
from open_mythos.diagnostics.speed import decode_speed
from open_mythos.generation.engine import Depth
from open_mythos.generation.engines import check_engine
from open_mythos.generation.graph import GraphEngine
from open_mythos.ops.dispatch import use_tf32
from open_mythos.planning.hardware import DEVICES

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ROWS, TOKENS, CONTEXT = 32, 1024, 1024  # rows and tokens of a step; tokens before decoding
SECONDS = {"train": 25.0, "decode": 4.0}  # each, of ten minutes; compilation takes most of the rest
PEAK, BESIDE_LLAMA, BANDWIDTH = 0.40, 1.0, 0.60  # bars: shares, and a ratio
CLOSE = {"float32": 1e-4, "bfloat16": 5e-2}  # bars: relative norm of the difference
PLANNED = 1.1  # bar: at most this multiple of the planned bytes
WAITED, WAITS = "waits for the device a step", 1  # its figures are read at its end


class Bench:
    """Device, sizes, and the results so far.

    Args:
        device: cuda or cpu.
        tiny: toy sizes everywhere, to test that everything runs.
        minutes: after this time no further part is started.
    """

    def __init__(self, device: torch.device, tiny: bool = False, minutes: float = 10.0) -> None:
        self.device, self.tiny, self.scale, self.is_gpu = device, tiny, minutes / 10, device.type == "cuda"
        self.ends = time.perf_counter() + 60 * minutes
        self.results: dict[str, Found] = {}
        self.rows = ROWS
        self.trainings: dict[tuple[str, str], Training] = {}
        use_tf32(device)

    def seconds(self, work: str) -> float:
        return self.scale * SECONDS[work] if self.is_gpu else 0.0

    def training(self, name: str, device: torch.device | None = None) -> Training:
        """The training of the model of this name, built once; at full size on a GPU, whether real or simulated."""
        device = device or self.device
        small = self.tiny or device.type == "cpu"
        if (name, device.type) not in self.trainings:
            rows, tokens = (4, 96) if small else (self.rows, TOKENS)
            made = Training(models(small)[name], device, rows, tokens, use_llama=not self.tiny)
            self.trainings[name, device.type] = made
        return self.trainings[name, device.type]

    # -- parts

    def machine(self) -> Found:
        """The peak rates, to which others are compared: the manufacturer's for known devices, else those measured."""
        if not self.is_gpu:
            return {"not judged": "speed, on a CPU"}
        name = torch.cuda.get_device_name(self.device).lower().replace(" ", "")
        known = next((made for key, made in DEVICES.items() if key in name), None)
        found = {
            "matmul_flops_per_second": matmul_rate(torch.bfloat16, self.device, 5.0),
            "read_bytes_per_second": read_rate(self.device), "copied_bytes_per_second": copy_rate(self.device),
        }  # fmt: skip
        peak = known.flops if known else found["matmul_flops_per_second"]
        fastest = max(found["read_bytes_per_second"], found["copied_bytes_per_second"])
        return found | {"peak_flops_per_second": peak, "catalogue": known and asdict(known), "bandwidth": fastest}

    def parity(self) -> Found:
        """Logits and gradients, in float32 without TF32 and in bfloat16, against those of the CPU in float32."""
        found: Found = {}
        for kind, cfg in models(tiny=True).items():
            torch.manual_seed(0)
            model, ids = OpenMythos(cfg), torch.randint(cfg.vocab_size, (3, 40))
            expected = outcome(model, ids, CPU, "float32")
            for dtype in CLOSE:
                pairs = zip(outcome(model, ids, self.device, dtype), expected, strict=True)
                found[f"{kind}, {dtype}"] = max(float((x - y).norm() / y.norm()) for x, y in pairs)
        of_dtype = {dtype: max(v for name, v in found.items() if dtype in name) for dtype in CLOSE}
        bars = [at_most(f"differs from the CPU in {dtype}", of_dtype[dtype], most) for dtype, most in CLOSE.items()]
        return found | {"bars": bars}

    def train(self, name: str) -> Found:
        """Tokens per second next to a Llama's, and the share of peak FLOP/s; rows are halved until both models fit."""
        try:
            found = self.training(name).speed(self.seconds("train"))
        except torch.cuda.OutOfMemoryError:
            if self.rows == 1:
                raise
            self.rows //= 2
        else:
            return found if not self.is_gpu else self._judged(found)
        end(self, name)
        return self.train(name)

    def _judged(self, found: Found) -> Found:
        share = found["flops_per_second"] / self.results["machine"]["peak_flops_per_second"]
        ratio = found["ratio"]
        bars = [at_least("share of the peak", share, PEAK), at_least("tokens/s over Llama's", ratio, BESIDE_LLAMA)]
        bars.append(at_most("compiled while timed", found["compiled_while_timed"], 0))
        return found | {"share": share, "bars": bars}

    def attention(self, name: str) -> Found:
        """The attention kernels of a step: required are flash, cuDNN's or Flex's, and none that writes all scores."""
        training = self.training(name)
        names, (n_full, n_local) = training.profiled(), training.n_attentions
        if self.is_gpu:
            found: Found = attention_kernels(names)
            full = sum(found.get(kind, 0) for kind in ("cudnn", "flash", "flex"))
            fused = at_least("fused kernels a forward pass", sum(found.values()), n_full + n_local)
            return found | {"bars": [at_least("by cuDNN, flash or Flex", full, n_full), fused]}
        flash = names["aten::_scaled_dot_product_flash_attention_for_cpu"]
        return {"flash": flash, "bars": [at_least("by flash attention for CPUs", flash, n_full + n_local)]}

    def step(self, name: str) -> Found:
        """Graph breaks; on a GPU also launches per step and per loop, and synchronisations with the device."""
        from torch._dynamo.utils import counters

        training = self.training(name)
        _ = training.trainer
        breaks, graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
        found: Found = {"graph_breaks": sum(breaks.values()), "why": breaks}
        bars = [at_most("graph breaks", found["graph_breaks"], 0)]
        if self.is_gpu:
            found |= training.launched(lambda: sum(training.profiled().values()))
            found["waits"] = waited(training.trainer.step)
            bars.append(at_most(WAITED, len(found["waits"]), WAITS))
        else:
            training.trainer.step()
        again = counters["stats"]["unique_graphs"] - graphs
        return found | {"bars": [*bars, at_most("compiled again", again, 0)]}

    def memory(self, name: str) -> Found:
        """Peak bytes of a step, compared with the plan."""
        training = self.training(name)
        _ = training.trainer
        return beside_plan(training, training.peak)

    def pretended(self, name: str) -> Found:
        """A full-size step, not compiled, on a simulated GPU: launches, synchronisations, attention kernels, bytes."""
        with Pretend() as gpu:
            training = self.training(name, torch.device(NAME, 0))
            step = training.trainer.step

            def launches() -> int:
                gc.collect()  # reference cycles of earlier steps
                gpu.reset()
                step()
                return sum(gpu.launches.values())

            found = training.launched(launches) | {"waits": gpu.waits, "attention": dict(gpu.kernels)}
        kernels, (n_full, n_local) = gpu.kernels, training.n_attentions
        beside = beside_plan(training, gpu.peak)
        bars = [
            at_most(WAITED, len(gpu.waits), WAITS),
            at_least("attention by flash", kernels["flash"], n_full),
            at_least("attention by fused kernels", kernels["flash"] + kernels["efficient"], n_full + n_local),
            at_most("attention by the math kernel", kernels["math"], 0),
        ]
        return found | beside | {"operators": dict(gpu.launches), "bars": bars + beside["bars"]}

    def decode(self, name: str, batch: int, engine: str) -> Found:
        """Decoding in bfloat16; without a GPU, the launches and synchronisations of a token of the graph engine."""
        cfg = models(self.tiny)[name] if name in models(False) else LARGE[name](self.tiny)
        if not self.is_gpu:
            return self.token(cfg, batch) if engine == "graph" else {"skipped": "for a GPU"}
        with self.device:
            torch.manual_seed(0)
            model = OpenMythos(cfg).to(torch.bfloat16).eval()
        if (why := why_not(engine, model, Depth(cfg.max_loop_iters))) is not None:
            return {"skipped": why}
        found = decode_speed(model, batch, CONTEXT, cfg.max_loop_iters, self.seconds("decode"), engine)
        share = (found.bytes_per_second or 0.0) / self.results["machine"]["bandwidth"]
        bars = [at_least("share of bandwidth", share, BANDWIDTH)] if (engine, batch) == ("graph", 1) else []
        return asdict(found) | {"tokens_per_second": found.tokens_per_second, "share": share, "bars": bars}

    def token(self, cfg: MythosConfig, batch: int) -> Found:
        """What :class:`GraphEngine` computes for a token, on a simulated GPU."""
        found = []
        with Pretend() as gpu, torch.inference_mode():
            with torch.device("meta"):
                model = OpenMythos(cfg)
            model = model.to(torch.bfloat16).to_empty(device=NAME).eval()
            token = torch.zeros(batch, 1, dtype=torch.int64).to(NAME)
            for loops in (cfg.max_loop_iters // 2, cfg.max_loop_iters):
                engine = GraphEngine(model, Depth(loops))
                engine.extend(token.expand(-1, 16 if self.tiny else CONTEXT))
                engine.step(token)
                gpu.reset()
                engine.step(token)
                found.append(sum(gpu.launches.values()))
        each = (found[1] - found[0]) / (cfg.max_loop_iters - cfg.max_loop_iters // 2)
        counts = {"launches": found[1], "launches_a_loop": each, "attention": dict(gpu.kernels), "waits": gpu.waits}
        bars = [at_most("waits for the device a token", len(gpu.waits), 0)]
        return counts | {"bars": [*bars, at_most("attention by the math kernel", gpu.kernels["math"], 0)]}


def beside_plan(training: Training, peak: int | None) -> Found:
    """Peak bytes of a step, and those that ``mythos plan`` predicts."""
    planned = training.plan().memory
    share = (peak or 0) / planned.total
    found = {"rows": training.rows, "peak_bytes": peak, "planned_bytes": planned.total, "plan": asdict(planned)}
    return found | {"share_of_plan": share, "bars": [at_most("bytes over the plan's", share, PLANNED)]}


def outcome(model: OpenMythos, ids: torch.Tensor, device: torch.device, dtype: str) -> list[torch.Tensor]:
    """Logits and gradients computed on ``device`` in ``dtype``, returned on the CPU in float32."""
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    model, ids = model.to(device).eval(), ids.to(device)
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(ids[:, :-1], 3)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found = [x.detach().float().cpu() for x in (logits, gradients)]
    model.to(CPU)
    return found


def waited(step: Callable[[], Any]) -> list[str]:
    """The lines at which a step made the host wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing" in str(one.message)]


def why_not(engine: str, model: OpenMythos, depth: Depth) -> str | None:
    try:
        check_engine(engine, model, depth)
    except ValueError as error:
        return str(error)
    return None


def at_least(what: str, value: float, bar: float) -> Found:
    return {"what": what, "value": value, "bar": f">= {bar:g}", "is_met": bool(value >= bar)}


def at_most(what: str, value: float, bar: float) -> Found:
    return {"what": what, "value": value, "bar": f"<= {bar:g}", "is_met": bool(value <= bar)}


# -- parts in order


def parts(bench: Bench) -> dict[str, Callable[[], Found]]:
    """The parts by name, the most important first; each needs the results of ``machine``."""
    made: dict[str, Callable[[], Found]] = {"parity": bench.parity}
    for name in models(bench.tiny):
        for part in (bench.train, bench.attention, bench.step, bench.memory if bench.is_gpu else bench.pretended):
            made[f"{part.__name__} {name}"] = partial(part, name)
        made[f"end {name}"] = partial(end, bench, name)
    for name in (*models(bench.tiny), *LARGE):
        made[f"decode graph {name}, batch 1"] = partial(bench.decode, name, 1, "graph")
    for name in models(bench.tiny):
        made[f"decode graph {name}, batch 32"] = partial(bench.decode, name, 32, "graph")
        made[f"decode fused {name}, batch 1"] = partial(bench.decode, name, 1, "fused")
    if bench.tiny or bench.is_gpu:  # these say nothing about a CPU
        for n_experts in (4, 8) if bench.tiny else (32, 256):
            made[f"experts {n_experts}"] = partial(gpu_ops.experts, bench.device, n_experts, bench.tiny)
        for kind in ("gqa", "mla"):
            for work in ("train", "decode"):
                made[f"kernels {kind} {work}"] = partial(gpu_ops.attention, bench.device, kind, work, bench.tiny)
    if bench.is_gpu:
        made["tests"] = partial(tests, bench)
    return made


def tests(bench: Bench) -> Found:
    """Run tests/test_cuda.py in the time that is left; skipped if that is not enough."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "tests/test_cuda.py"]
    left = max(30.0, bench.ends - time.perf_counter())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done in the {left:.0f} s that were left"}
    return {"said": done.stdout[-3000:], "bars": [at_most("exit code of the tests", done.returncode, 0)]}


def end(bench: Bench, name: str) -> Found:
    """Free the memory of this model's training for the next one."""
    for key in [key for key in bench.trainings if key[0] == name]:
        del bench.trainings[key]
    gc.collect()
    if bench.is_gpu:
        torch.cuda.empty_cache()
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes in all parts")
    parser.add_argument("--minutes", type=float, default=10.0, help="no part is started after this time")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="only parts whose names begin so")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --device cpu")
    if args.device == "cpu":
        register()
    bench = Bench(torch.device(args.device), args.tiny, args.minutes)
    console = Console()
    wanted = {name: part for name, part in parts(bench).items() if name.startswith(("end", *args.only))}
    conditions = describe(bench.device) | {"tiny": args.tiny, "date": date.today().isoformat()}
    conditions["dtype"] = "training: bfloat16 autocast over float32 weights; decoding: bfloat16"
    for name, part in {"machine": bench.machine, **wanted}.items():
        started = time.perf_counter()
        try:
            late = started > bench.ends
            found = {"skipped": f"{args.minutes:g} minutes are over"} if late else part()
        except Exception:
            found = {"failed": traceback.format_exc()}
        bench.results[name] = found | {"took": time.perf_counter() - started}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"conditions": conditions, "results": bench.results}, indent=1) + "\n")
        if not name.startswith("end"):
            console.print(f"{name}: {summary(found)}", highlight=False, markup=False, soft_wrap=True)
    console.print(table(bench.results))
    missed = [name for name, found in bench.results.items() if "failed" in found or not are_met(found)]
    ending = f"; failed or missed: {', '.join(missed)}" if missed else ""
    console.print(f"Results: {args.out}{ending}", highlight=False, markup=False, soft_wrap=True)
    sys.exit(1 if missed else 0)


def are_met(found: Found) -> bool:
    return all(bar["is_met"] for bar in found.get("bars", []))


def table(results: dict[str, Found]) -> Table:
    """Every bar, and whether it was met."""
    made = Table("part", "what", "found", "bar", "")
    for name, found in results.items():
        for bar in found.get("bars", []):
            made.add_row(name, bar["what"], f"{bar['value']:.3g}", bar["bar"], "" if bar["is_met"] else "missed")
        if "failed" in found:
            made.add_row(name, "failed", "", "", "missed")
    return made


def summary(found: Found) -> str:
    """One line about a part."""
    if "failed" in found:
        return found["failed"].splitlines()[-1]
    speed = [f"{found['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in found else []
    plain = {k: v for k, v in found.items() if isinstance(v, int | float | str) and k != "tokens_per_second"}
    return ", ".join(speed + [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items()])


if __name__ == "__main__":
    main()
