"""The workloads of benchmarks/speed.py: the task of each side, and which sides are compared."""

from dataclasses import dataclass
from typing import Any

from open_mythos import MythosConfig
from open_mythos.diagnostics import flops_per_token, flops_per_trained_token

SHAPE: dict[str, Any] = dict(
    vocab_size=4096, dim=256, n_heads=8, n_kv_heads=4, max_seq_len=8192, max_loop_iters=8, prelude_layers=1,
    coda_layers=1, attn_type="gqa", kv_lora_rank=64, q_lora_rank=128, qk_rope_head_dim=16, qk_nope_head_dim=32,
    v_head_dim=32, n_experts=8, n_shared_experts=2, n_experts_per_tok=2, expert_dim=64, lora_rank=16,
)  # fmt: skip
DENSE: dict[str, Any] = dict(n_experts=1, n_experts_per_tok=1, n_shared_experts=0, expert_dim=768)


@dataclass(frozen=True)
class Task:
    """The task of one worker; speed_worker.py defines how it is done.

    Attributes:
        side: ours, reference or llama.
        work: train, prefill, decode or memory.
        model: arguments of the side's config.
        loops, batch, tokens: the size of the work; for decoding, ``tokens`` is the length of the prompt.
        bf16, recompute, spread: variants of the work.
        engine: the engine that decodes, for ours.
    """

    side: str
    work: str
    model: dict[str, Any]
    loops: int
    batch: int
    tokens: int
    bf16: bool = False
    recompute: bool = False
    spread: bool = False
    engine: str = "modules"


@dataclass(frozen=True)
class Case:
    """Sides that take turns, and the pairs that ratios are computed for; ``bar`` is the goal of the ratios."""

    what: str
    sides: dict[str, Task]
    ratios: list[tuple[str, str]]
    bar: float | None = None


# -- workloads


def training(attn: str, experts: int, topk: int, loops: int, batch: int, spread: bool = False) -> Case:
    model = SHAPE | dict(attn_type=attn, n_experts=experts, n_experts_per_tok=topk, max_loop_iters=loops)
    reference = Task("reference", "train", model, loops, batch, 128, spread=spread)
    sides = {
        "ours": Task("ours", "train", model, loops, batch, 128, spread=spread),
        "ours, bf16": Task("ours", "train", model, loops, batch, 128, bf16=True, spread=spread),
        "reference": reference,
    }
    what = f"training, {attn.upper()}, {experts} experts, top {topk}, {loops} loops, {batch} x 128 tokens"
    what += ", router made to spread its tokens" if spread else ""
    return Case(what, sides, [("ours", "reference"), ("ours, bf16", "ours"), ("ours, bf16", "reference")])


def prefill(attn: str) -> Case:
    model = SHAPE | dict(attn_type=attn)
    sides = {side: Task(side, "prefill", model, 8, 1, 1024) for side in ("ours", "reference")}
    return Case(f"prefill, {attn.upper()}, 8 loops, 1024 tokens", sides, [("ours", "reference")])


def decoding(attn: str) -> Case:
    model = SHAPE | dict(attn_type=attn)
    sides = {
        "ours": Task("ours", "decode", model, 8, 1, 512),
        "ours, auto": Task("ours", "decode", model, 8, 1, 512, engine="auto"),
        "reference": Task("reference", "decode", model, 8, 1, 512),
    }
    ratios = [("ours", "reference"), ("ours, auto", "ours"), ("ours, auto", "reference")]
    return Case(f"decoding, {attn.upper()}, 8 loops, batch 1, after 512 tokens", sides, ratios)


def flatness(attn: str) -> Case:
    """A ratio of 1.2 means that a token after 4000 tokens takes 1.2 times as long as one after 64."""
    model, sides, ratios = SHAPE | dict(attn_type=attn), {}, []
    for name, side, engine in (
        ("ours", "ours", "modules"),
        ("ours, auto", "ours", "auto"),
        ("reference", "reference", ""),
    ):
        near, far = f"{name}, 64", f"{name}, 4000"
        sides |= {at: Task(side, "decode", model, 8, 1, n, engine=engine) for at, n in ((near, 64), (far, 4000))}
        ratios.append((near, far))
    return Case(f"time of a token at 4000 tokens over one at 64, {attn.upper()}, 8 loops, batch 1", sides, ratios)


def memory() -> Case:
    model = SHAPE | dict(max_loop_iters=32)
    sides = {
        "ours, recomputed": Task("ours", "memory", model, 32, 8, 128, recompute=True),
        "ours": Task("ours", "memory", model, 32, 8, 128),
        "reference": Task("reference", "memory", model, 32, 8, 128),
    }
    what = "greatest resident size of a training step, GQA, 8 experts, 32 loops, 8 x 128 tokens"
    return Case(what, sides, [("ours, recomputed", "reference"), ("ours", "reference")])


def beside_llama(work: str, what: str, changes: dict[str, Any]) -> Case:
    batch, tokens, loops = (8, 128, 8) if work == "train" else (1, 512, 8)
    model = SHAPE | changes
    llama = llama_config(model, loops, tokens, training=work == "train")
    sides = {
        "ours": Task("ours", work, model, loops, batch, tokens),
        "llama": Task("llama", work, llama, loops, batch, tokens),
    }
    ratios = [("ours", "llama")]
    if work == "decode":
        sides["ours, auto"] = Task("ours", work, model, loops, batch, tokens, engine="auto")
        ratios.append(("ours, auto", "llama"))
    where = f"{batch} x {tokens} tokens" if work == "train" else f"batch {batch}, after {tokens} tokens"
    return Case(f"{work}, beside Llama of equal operations, {what}, {loops} loops, {where}", sides, ratios, bar=1.0)


def llama_config(model: dict[str, Any], loops: int, tokens: int, training: bool) -> dict[str, Any]:
    """A dense Llama as deep as our unrolled loops, as wide, with as many heads, and an MLP that equalises operations.

    Counted are the matrix products of a forward pass, including scores and values of attention, per token: for
    training at the mean context of a row of ``tokens``, otherwise for the token after ``tokens`` others.
    """
    cfg = MythosConfig(**model)
    ours = flops_per_trained_token(cfg, loops, tokens) / 3 if training else flops_per_token(cfg, loops, tokens)
    llama: dict[str, Any] = dict(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads, num_hidden_layers=cfg.prelude_layers + loops + cfg.coda_layers,
        max_position_embeddings=cfg.max_seq_len, tie_word_embeddings=True, intermediate_size=0,
    )  # fmt: skip
    context = (tokens + 1) / 2 if training else tokens
    per_width = llama_flops(llama | {"intermediate_size": 1}, context) - llama_flops(llama, context)
    return llama | {"intermediate_size": round((ours - llama_flops(llama, context)) / per_width)}


def llama_flops(llama: dict[str, Any], context: float) -> float:
    """Operations of one token that attends to ``context`` tokens, counted as in open_mythos.diagnostics.cost."""
    dim, heads, kv_heads = llama["hidden_size"], llama["num_attention_heads"], llama["num_key_value_heads"]
    attention = 2 * dim * dim * (1 + kv_heads / heads) + 2 * dim * context
    layer = attention + 3 * dim * llama["intermediate_size"]
    return 2 * (llama["num_hidden_layers"] * layer + llama["vocab_size"] * dim)


CASES = {
    "train-gqa": training("gqa", 8, 2, loops=4, batch=8),
    "train-mla": training("mla", 64, 4, loops=8, batch=4),
    "train-256": training("mla", 256, 4, loops=8, batch=4),
    "train-256-spread": training("mla", 256, 4, loops=8, batch=4, spread=True),
    "prefill-gqa": prefill("gqa"),
    "prefill-mla": prefill("mla"),
    "decode-gqa": decoding("gqa"),
    "decode-mla": decoding("mla"),
    "flat-gqa": flatness("gqa"),
    "flat-mla": flatness("mla"),
    "memory": memory(),
    "llama-train-dense": beside_llama("train", "GQA, one expert", DENSE),
    "llama-train-moe": beside_llama("train", "GQA, 8 experts, top 2", {}),
    "llama-decode-dense": beside_llama("decode", "GQA, one expert", DENSE),
    "llama-decode-moe": beside_llama("decode", "GQA, 8 experts, top 2", {}),
}
