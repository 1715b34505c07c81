"""``mythos info``: cost of a model, from its config alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from open_mythos import files
from open_mythos.cli.console import console, mythos, note, si, table
from open_mythos.config import MythosConfig
from open_mythos.fields import must
from open_mythos.variants import VARIANTS, variant

if TYPE_CHECKING:
    from open_mythos.training.config import TrainConfig

CACHE_DTYPE, CACHE_BYTES = "bfloat16", 2


def info(
    model: Annotated[
        str, typer.Argument(help="A variant such as 1b, a run, a model's directory, a config.json, or a shipped model.")
    ],
) -> None:
    """Show the cost of a variant or a checkpoint: parameters, FLOPs, cache."""
    from open_mythos.models import model_dir

    show(model, find_config(model))
    try:
        model_dir(model)
    except ValueError:  # a variant, a config, or a run that has not ended: there are no weights yet
        note(f"Next: {mythos('demo')} trains a model; {mythos('diagnose', 'runs/demo')} looks inside.")
    else:
        note(f"Next: look inside it with {mythos('diagnose', model)}.")


def find_config(name: str) -> MythosConfig:
    """The config of a file, a run, a model's directory, a shipped model or a variant; existing paths take precedence.

    Raises:
        ValueError: if ``name`` is none of them, or its config is bad.
    """
    from open_mythos.checkpoint import CONFIG_FILE, MODEL, SHIPPED

    path = Path(name)
    for file in (path, *(place / CONFIG_FILE for place in (path / MODEL, path, SHIPPED / name))):
        if file.is_file():
            return MythosConfig.load(file) if (job := training_at(file)) is None else job.model
    must(not path.is_dir(), f"{path / CONFIG_FILE} is missing; a checkpoint directory contains one")
    if len(path.parts) > 1 or path.suffix:
        known = ", ".join(VARIANTS)
        raise ValueError(f"{path} does not exist; give a config file, a checkpoint directory or one of {known}")
    return variant(name)


def training_at(file: Path) -> "TrainConfig | None":
    """The training config in a file; None if it holds a model's config; ValueError for an invalid one."""
    if not {"task", "model"} <= files.read_json(file).keys():
        return None
    from open_mythos.training.config import TrainConfig

    return TrainConfig.load(file)


def show(name: str, cfg: MythosConfig) -> None:
    from open_mythos.diagnostics.cost import cache_bytes_per_token, flops_per_token, parameters

    count = parameters(cfg)
    if cfg.attn_type == "gqa":
        attention = f"GQA, {cfg.n_heads} heads of {cfg.head_dim}, {cfg.n_kv_heads} key/value heads"
    else:
        attention = f"MLA, {cfg.n_heads} heads, latent {cfg.kv_lora_rank} + rotary {cfg.qk_rope_head_dim}"
    experts = {
        "routed experts": f"{cfg.n_experts} of width {cfg.expert_dim:,}, {cfg.n_experts_per_tok} per token",
        "shared experts": f"{cfg.n_shared_experts}, total width {cfg.shared_dim:,}",
    }
    shape = {
        "width": f"{cfg.dim:,}",
        "vocabulary": f"{cfg.vocab_size:,}",
        "context": f"{cfg.max_seq_len:,} tokens",
        "layers": f"{cfg.prelude_layers} prelude, {cfg.core_layers} recurrent, {cfg.coda_layers} coda",
        "loops by default": f"{cfg.max_loop_iters}",
        "attention": attention,
        **(experts if cfg.n_experts else {"feed-forward": f"dense, of width {cfg.ffn_dim:,}"}),
        **({"bridge": f"of width {cfg.bridge_dim:,}, between loops"} if cfg.bridge_dim else {}),
        "parameters": f"{count.total:,}",
        "active per token": f"{count.active:,} ({count.active / count.total:.0%})",
    }
    console.print(table(name, "shape", "", rows=shape.items()))
    context = cfg.max_seq_len
    cost = table(
        f"cost of decoding by loops (cache in {CACHE_DTYPE})",
        "loops", "FLOPs/token, first", f"at {context:,} tokens", "cache/token", f"at {context:,} tokens",
    )  # fmt: skip
    for loops in loop_counts(cfg):
        per_token = cache_bytes_per_token(cfg, loops, CACHE_BYTES)
        first, last = flops_per_token(cfg, loops, 1), flops_per_token(cfg, loops, context)
        cost.add_row(str(loops), si(first), si(last), si(per_token, "B"), si(per_token * context, "B"))
    console.print(cost)


def loop_counts(cfg: MythosConfig) -> list[int]:
    """Powers of two up to twice the default number of loops, and those two numbers."""
    maximum = 2 * cfg.max_loop_iters
    return sorted({2**i for i in range(maximum.bit_length())} | {cfg.max_loop_iters, maximum})
