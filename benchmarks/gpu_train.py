"""Training for benchmarks/gpu.py: a looped model by the library's own Trainer, and a plain Llama of equal operations.

Both use bfloat16 autocast over float32 weights, with the same batch, loss, fused AdamW, clipping and averaged weights,
and both are compiled block by block.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from gpu_ops import Found, compiler
from pretend import NAME
from speed_cases import llama_config, llama_flops
from torch import Tensor, nn

from open_mythos import MythosConfig
from open_mythos.diagnostics import flops_per_trained_token, parameters
from open_mythos.diagnostics.machine import repeat, synchronize
from open_mythos.model import PlainMythos
from open_mythos.nn.block import TransformerBlock
from open_mythos.planning.job import Job, Layout, Settings
from open_mythos.planning.sheet import Sheet
from open_mythos.tasks import Batch
from open_mythos.training.config import LoopConfig, TaskConfig, TrainConfig
from open_mythos.training.objective import MAX_LOGITS, readout
from open_mythos.training.optim import EMA, Optimizer
from open_mythos.training.trainer import Drawn, Trainer
from open_mythos.variants import variant

FUSED = {  # forward attention kernels that do not write T x S scores, as patterns of their names
    "cudnn": r"cudnn.*(sdpa|fprop|flash)(?!.*bprop)", "flash": r"flash_fwd|flash.*fprop",
    "efficient": r"fmha_cutlassF|_scaled_dot_product_efficient_attention$", "flex": r"flex_attention|tem_fused_flex",
}  # fmt: skip


def models(tiny: bool) -> dict[str, MythosConfig]:
    """Looped mixtures of experts of about 0.1B parameters: many small experts with latent attention (the variant
    100m), and a few wide experts with grouped-query attention.
    """
    wide = MythosConfig(
        vocab_size=32000, dim=1024, n_heads=16, n_kv_heads=4, max_seq_len=2048, max_loop_iters=8, prelude_layers=1,
        coda_layers=1, attn_type="gqa", n_experts=8, n_shared_experts=1, n_experts_per_tok=2, expert_dim=1536,
        lora_rank=8,
    )  # fmt: skip
    found = {"mla-moe": variant("100m"), "gqa-moe": wide}
    return {name: without_gate(toy(cfg) if tiny else cfg) for name, cfg in found.items()}


def large(tiny: bool) -> MythosConfig:
    """3B parameters in three wide dense blocks, too large for any on-chip cache."""
    cfg = MythosConfig(
        vocab_size=32000, dim=8192, n_heads=64, n_kv_heads=8, max_seq_len=2048, max_loop_iters=4, prelude_layers=1,
        coda_layers=1, attn_type="gqa", n_experts=0, n_experts_per_tok=1, n_shared_experts=0, dense_dim=28672,
        lora_rank=0,
    )  # fmt: skip
    return without_gate(replace(toy(cfg), dense_dim=64) if tiny else cfg)


LARGE = {"1b": lambda tiny: without_gate(toy(variant("1b")) if tiny else variant("1b")), "3b-dense": large}


def toy(cfg: MythosConfig) -> MythosConfig:
    small = dict(vocab_size=97, dim=64, n_heads=4, n_kv_heads=2, max_loop_iters=2, expert_dim=32, lora_rank=4)
    latent = dict(kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
    few = dict(n_experts=min(4, cfg.n_experts), n_experts_per_tok=min(2, cfg.n_experts_per_tok))
    return MythosConfig(**vars(cfg) | small | latent | few)


def without_gate(cfg: MythosConfig) -> MythosConfig:
    return replace(cfg, halting=False, warm_start=False)


class Training:
    """A looped model, and a Llama to compare it with, each built when it is first used.

    Args:
        cfg: config of the looped model, which is trained at ``max_loop_iters`` loops with gradient through all.
        device: the device; for the looped model, "pretend" (simulated) is possible too.
        rows, tokens: the size of a step.
        use_llama: use transformers' Llama where it is installed; else this library's plain stack of the same size.
    """

    def __init__(self, cfg: MythosConfig, device: torch.device, rows: int, tokens: int, use_llama: bool = True) -> None:
        self.cfg, self.device, self.rows, self.tokens, self.use_llama = cfg, device, rows, tokens, use_llama
        self.peak: int | None = None

    @cached_property
    def trainer(self) -> Trainer:
        """The trainer after its first steps; on CUDA, ``peak`` is the peak memory of one further step."""
        trainer = self._made()
        for _ in range(1 if self.device.type == NAME else 3):
            trainer.step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            trainer.step()
            self.peak = torch.cuda.max_memory_allocated()
        return trainer

    def _made(self) -> Trainer:
        n = self.cfg.max_loop_iters
        loops = LoopConfig("fixed", mean=float(n), maximum=n, gradient="all")
        one_length = TaskConfig(min_difficulty=8, max_difficulty=8)  # unused: batches are made here
        how = {"precision": "bf16", "device": str(self.device), "compile": self.device.type == "cuda"}
        trainer = Trainer(TrainConfig(model=self.cfg, task=one_length, loops=loops, batch_size=self.rows, **how))
        if self.device.type == "cpu":
            compile_all(trainer.model, TransformerBlock, self.device)
        if self.device.type == NAME:
            for group in trainer.optimizer.parts[0].param_groups:
                group |= {"fused": True, "foreach": False}
        batch = Batch(self.ids[:, :-1], self.ids[:, 1:])
        trainer.draw = lambda: [Drawn(batch)]  # type: ignore[method-assign]
        return trainer

    @property
    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.cfg.vocab_size, (self.rows, self.tokens + 1), generator=generator)

    @property
    def flops_per_token(self) -> float:
        return flops_per_trained_token(self.cfg, self.cfg.max_loop_iters, self.tokens)

    @cached_property
    def llama_shape(self) -> dict[str, Any]:
        """The config of a Llama of equal operations, its feed-forward rounded to a width that suits tensor cores."""
        shape = llama_config(asdict(self.cfg), self.cfg.max_loop_iters, self.tokens, training=True)
        multiple = 64 if shape["intermediate_size"] > 640 else 8
        return shape | {"intermediate_size": multiple * round(shape["intermediate_size"] / multiple)}

    def llama_step(self) -> tuple[str, Callable[[], float]]:
        """The name of the model that ours is compared with, and a function that runs a step and returns its loss."""
        torch.manual_seed(0)
        name, model, read, head, layer = self._llama()
        model.to(self.device).train()
        compile_all(model, layer, self.device)
        cfg = self.trainer.cfg
        optimizer, average = Optimizer(model, cfg.optim), EMA(dict(model.named_parameters()), cfg.optim.ema)
        ids, chunk = self.ids.to(self.device), MAX_LOGITS // self.cfg.vocab_size
        weights = torch.full((self.rows * self.tokens,), 1 / self.rows / self.tokens, device=self.device)

        def step() -> float:
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16):
                x = read(ids[:, :-1]).flatten(0, 1)
                loss = readout(head, x, ids[:, 1:].flatten(), weights, chunk)[0][0]
            loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            found, size = torch.stack([loss.detach(), norm]).tolist()
            if size > cfg.optim.clip:
                torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], cfg.optim.clip / size)
            optimizer.step()
            average.update()
            return found

        return name, step

    def _llama(self) -> tuple[str, nn.Module, Callable[[Tensor], Tensor], nn.Module, type[nn.Module]]:
        shape = self.llama_shape
        try:
            if not self.use_llama:
                raise ImportError
            import transformers
            from transformers.models.llama.modeling_llama import LlamaDecoderLayer
        except ImportError:
            outside = self.cfg.prelude_layers + self.cfg.coda_layers
            plain = replace(
                self.cfg, attn_type="gqa", n_experts=0, n_shared_experts=0, dense_dim=shape["intermediate_size"],
                lora_rank=0, conv_taps=0, local_window=0, max_loop_iters=shape["num_hidden_layers"] - outside,
            )  # fmt: skip
            ours = PlainMythos(plain)
            return "plain stack of this library", ours, lambda ids: ours.hidden(ids), ours.head, TransformerBlock
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, attn_implementation="sdpa"))
        read = lambda ids: model.model(ids, use_cache=False).last_hidden_state  # noqa: E731
        return f"Llama of transformers {transformers.__version__}", model, read, model.lm_head, LlamaDecoderLayer

    # -- what is measured

    def speed(self, seconds: float) -> Found:
        """Tokens per second of both models, which take turns, and what the compiler did meanwhile."""
        from torch._dynamo.utils import counters

        trainer, (name, llama) = self.trainer, self.llama_step()
        for _ in range(3):
            last = llama()
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        times: dict[str, list[float]] = {"ours": [], "llama": []}

        def turn() -> None:
            for side, step in (("ours", trainer.step), ("llama", llama)):
                times[side] += repeat(step, self.device, 0.0)

        repeat(turn, self.device, seconds, warm_up=0)
        n = self.rows * self.tokens
        ours, theirs = (n / median(found) for found in times.values())
        share = llama_flops(self.llama_shape, (self.tokens + 1) / 2) * 3 / self.flops_per_token
        return {
            "beside": name, "rows": self.rows, "tokens": self.tokens, "loops": self.cfg.max_loop_iters,
            "parameters": asdict(parameters(self.cfg)), "tokens_per_second": ours, "llama_tokens_per_second": theirs,
            "ratio": ours / theirs, "llama_operations": share, "llama": self.llama_shape, "llama_loss": last,
            "flops_per_token": self.flops_per_token, "flops_per_second": ours * self.flops_per_token,
            "graph_breaks": breaks, "graphs": graphs, "seconds": times,
            "compiled_while_timed": counters["stats"]["unique_graphs"] - graphs,
        }  # fmt: skip

    def launched(self, count: Callable[[], int]) -> Found:
        """Launches per step and per loop, from ``count`` at half of the loops and at all of them."""
        loops, most, found = self.trainer.cfg.loops, self.cfg.max_loop_iters, []
        for n in (most // 2, most):
            loops.mean = float(n)
            found.append(count())
        return {"launches": found[1], "launches_a_loop": (found[1] - found[0]) / (most - most // 2)}

    def profiled(self) -> Counter[str]:
        """Kernels of a step by name, according to the profiler: those run on a GPU, or operators on a CPU."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        is_gpu = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
        with profile(activities=kinds) as seen:
            self.trainer.step()
            synchronize(self.device)
        where = DeviceType.CUDA if is_gpu else DeviceType.CPU
        ran = (event for event in seen.events() if event.device_type == where and not event.is_user_annotation)
        return Counter(event.name for event in ran)

    @property
    def n_attentions(self) -> tuple[int, int]:
        """Attention calls in a forward pass: for heads that attend to all tokens, and for local heads, if separate."""
        cfg, in_loops = self.cfg, self.cfg.max_loop_iters * self.cfg.core_layers
        return cfg.prelude_layers + cfg.coda_layers + in_loops, in_loops * (0 < cfg.n_local_heads < cfg.n_heads)

    def plan(self) -> Sheet:
        """The plan of ``mythos plan`` for the same step."""
        cfg = self.cfg
        job = Settings(batch_size=self.rows, length=self.tokens, loops=cfg.max_loop_iters, checkpoint_loops="false")
        return Sheet(Job(cfg, 1, job, n_parameters=parameters(cfg).total), Layout(rows=self.rows))


def attention_kernels(names: Counter[str]) -> dict[str, int]:
    """How often each of the forward kernels ran."""
    found = {kind: sum(n for name, n in names.items() if re.search(of, name)) for kind, of in FUSED.items()}
    found["flash"] -= sum(n for name, n in names.items() if re.search(FUSED["cudnn"], name) and "flash" in name)
    return {kind: n for kind, n in found.items() if n > 0}


def compile_all(model: nn.Module, kind: type[nn.Module], device: torch.device) -> None:
    """Compile blocks the way the trainer compiles those whose shapes do not change."""
    for module in model.modules():
        if isinstance(module, kind):
            module.compile(backend=compiler(device))
