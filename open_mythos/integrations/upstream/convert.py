"""Conversion of a reference checkpoint to a model of this library, with constant factors folded into the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.checkpoint import CheckpointError
from open_mythos.config import MythosConfig
from open_mythos.integrations.upstream.files import Checkpoint, read, read_config
from open_mythos.integrations.upstream.shape import complete, table_of
from open_mythos.model import OpenMythos
from open_mythos.nn.feed_forward import MoEFFN
from open_mythos.nn.linear import Linear

SEMANTICS: dict[str, Any] = dict(
    recurrence="mixture", router_score="softmax", state_norm=True, state_init="input", input_norm=False, conv_taps=0,
    local_window=0, halting=False, warm_start=False, state_noise=0.0,
)  # fmt: skip
"""Config fields with which this library's model computes what the reference does, besides ``loop_index_dim``."""
_NEEDED = (
    "embed.weight", "norm.weight", "recurrent.injection.log_A", "recurrent.injection.log_dt",
    "recurrent.act.halt.weight", "recurrent.lora.scale.weight", "recurrent.norm.weight",
    "recurrent.block.ffn.router.weight", "recurrent.block.ffn.routed_experts.0.gate.weight",
    "recurrent.block.attn.wo.weight",
)  # fmt: skip
_GQA, _MLA = ("wq", "wk"), ("q_norm", "q_up_nope", "q_up_rope", "kv_norm")  # in recurrent.block.attn
_TABLES = {"freqs_cis", "freqs_cis_mla"}


@dataclass
class Conversion:
    """A converted model, with a report of the conversion.

    Attributes:
        model: in eval mode, float32.
        folded: phrases that say what was folded into the weights.
        notes: sentences on what the user should know or check.
    """

    model: OpenMythos
    folded: list[str]
    notes: list[str]


@torch.no_grad()
def convert(source: str | Path, config: str | Path | None = None, settings: Iterable[str] = ()) -> Conversion:
    """Convert a checkpoint of the reference to a model of this library with the same logits.

    Args:
        source: a file of ``torch.save`` (a ``state_dict``, or what the reference's training script saves), a
            safetensors file, or a Hugging Face folder with either and ``config.json``.
        config: JSON file with the reference's config, used instead of the checkpoint's own.
        settings: ``name=value`` texts, which take precedence over both.

    Raises:
        CheckpointError: for another kind of checkpoint, or if something is missing, saying what to do. No code in a
            file is ever run.
    """
    checkpoint = read(Path(source))
    _check_architecture(checkpoint)
    if config is not None:
        checkpoint.fields, checkpoint.fields_from = read_config(Path(config)), str(config)
    fields, assumed = complete(checkpoint, settings)
    try:
        cfg = MythosConfig(**fields, **SEMANTICS, loop_index_dim=fields["dim"] // 8)
    except ValueError as error:
        raise CheckpointError(f"the config of {source} does not make a model of this library: {error}") from error
    with torch.device("meta"):
        model = OpenMythos(cfg)
    missing, unexpected = model.load_state_dict(_tensors(checkpoint, model), strict=False, assign=True)
    assert missing == ["head.weight"] and not unexpected, (missing, unexpected)
    model.head.weight = model.embed.weight
    notes = [
        f"not in the checkpoint, so taken from the reference's defaults: {name}={fields[name]}" for name in assumed
    ]
    if _TABLES & checkpoint.tensors.keys() and table_of(checkpoint.tensors) is None:
        notes.append(
            "its RoPE table has lost its imaginary part, as happens when a model of the reference is cast; rebuilt "
            "from rope_theta, so the logits are those of the model before the cast"
        )
    A = model.recurrent.injection.get_A()
    folded = [
        "matrices over the factors that this library's layers apply",
        f"embedding over sqrt(dim), last norm times it (dim={cfg.dim})",
        f"log_A and log_dt to A itself, here {float(A.min()):.4g} to {float(A.max()):.4g}",
        f"{cfg.n_experts} routed experts into one tensor each for gate with up, and down",
        f"RoPE tables into rope_theta={cfg.rope_theta:g}",
    ]
    if cfg.n_shared_experts > 1:
        folded.append(f"{cfg.n_shared_experts} shared experts into one of width {cfg.shared_dim}")
    if cfg.attn_type == "mla":
        folded.append("q_up_nope and q_up_rope into q_up")
    return Conversion(model.eval(), folded, notes)


def _check_architecture(checkpoint: Checkpoint) -> None:
    """CheckpointError unless the tensors are those of a model of the reference."""
    names, path = checkpoint.tensors.keys(), checkpoint.path
    if any(name.endswith("recurrent.injection.raw_A") for name in names):  # transformers writes "core." before it
        raise CheckpointError(f"{path} is already a model of this library; load it with OpenMythos.from_pretrained")
    attention = _MLA if "recurrent.block.attn.kv_down.weight" in names else _GQA
    needed = [*_NEEDED, *(f"recurrent.block.attn.{part}.weight" for part in attention)]
    lacks = [name for name in needed if name not in names]
    if "recurrent.injection.log_A" in lacks:
        raise CheckpointError(
            f"{path} is a model of another architecture: its tensors are {', '.join(sorted(names)[:3])} and so on, but "
            f"a model of the reference (open-mythos 0.5.0, class OpenMythos) has recurrent.injection.log_A. To convert "
            f"a pretrained Llama to a recurrent-depth model, use mythos retrofit"
        )
    if lacks:
        raise CheckpointError(
            f"{path} lacks {len(lacks)} tensors, such as {lacks[0]}: it is incomplete, or from another version of the "
            f"reference; only 0.5.0 can be converted"
        )
    flat = [name for name, tensor in checkpoint.tensors.items() if name.endswith("weight") and not tensor.ndim]
    if flat:
        raise CheckpointError(f"{path} is damaged: {flat[0]} has no dimensions; download or save it again")


def _tensors(checkpoint: Checkpoint, model: OpenMythos) -> dict[str, Tensor]:
    """All tensors of ``model`` but the tied head, made from the checkpoint.

    CheckpointError for a tensor that is missing, of another shape, not finite, or unknown.
    """
    source = _Source(checkpoint)
    scales = {f"{name}.weight": part.scale for name, part in model.named_modules() if isinstance(part, Linear)}
    state = {name: like for name, like in model.state_dict().items() if name != "head.weight"}
    made = {name: _made(name, like, source, model) / scales.get(name, 1) for name, like in state.items()}
    source.check_all_taken()
    return {name: tensor.to(state[name].dtype) for name, tensor in made.items()}


class _Source:
    """The tensors of a checkpoint: each is checked when it is taken, and the names taken are recorded."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path, self.tensors, self._taken = checkpoint.path, checkpoint.tensors, set[str]()

    def take(self, name: str, *shape: int) -> Tensor:
        """One tensor in float32; -1 stands for any size."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} lacks {name}: it is incomplete, or its config is not that of this model"
            )
        tensor = self.tensors[name]
        if tensor.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True)):
            raise CheckpointError(
                f"{name} of {self.path} has shape {tuple(tensor.shape)}, but {shape} by its config; give the config "
                f"that this checkpoint was trained with"
            )
        tensor = tensor.to(torch.float32, copy=True)  # it may be a view of the file
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{name} of {self.path} holds numbers that are not finite: the file is damaged, or training had "
                f"diverged; convert an earlier checkpoint"
            )
        self._taken.add(name)
        return tensor

    def check_all_taken(self) -> None:
        """CheckpointError for tensors that were not used, other than RoPE tables and a tied head."""
        rest = {name for name, tensor in self.tensors.items() if tensor.numel()} - self._taken - _TABLES
        if "head.weight" in rest:
            rest.remove("head.weight")
            if not torch.equal(self.tensors["head.weight"], self.tensors["embed.weight"]):
                raise CheckpointError(
                    f"{self.path} has a separate head.weight, but the reference, like this library, ties it to "
                    f"embed.weight; such a model cannot be converted"
                )
        if rest:
            raise CheckpointError(
                f"{self.path} has {len(rest)} tensors that version 0.5.0 of the reference does not have, such as "
                f"{min(rest)}: it is from another version, which may compute something else; only models that 0.5.0 "
                f"can load can be converted"
            )


def _made(name: str, like: Tensor, source: _Source, model: OpenMythos) -> Tensor:
    """The tensor ``name`` of this library, before the factor that its layer applies."""
    cfg, ffn, (place, _, last) = model.cfg, model.recurrent.block.ffn, name.rpartition(".")
    assert isinstance(ffn, MoEFFN)
    match last:
        case "down":  # of all routed experts, (n_experts, dim, expert_dim)
            shape, experts = (cfg.dim, cfg.expert_dim), range(cfg.n_experts)
            parts = [source.take(f"{place}.routed_experts.{i}.down.weight", *shape) for i in experts]
            return torch.stack(parts) / ffn.down_scale
        case "gate_up":  # of all routed experts, (n_experts, 2 expert_dim, dim)
            shape, layers = (cfg.expert_dim, cfg.dim), [(i, n) for i in range(cfg.n_experts) for n in ("gate", "up")]
            parts = [source.take(f"{place}.routed_experts.{i}.{layer}.weight", *shape) for i, layer in layers]
            return torch.cat(parts).view(like.shape) / ffn.gate_up_scale
        case "expert_load":
            return torch.zeros(like.shape)
        case "trained_loops":  # all rows of the LoRA table count as trained
            return torch.tensor(len(source.tensors["recurrent.lora.scale.weight"]))
        case "raw_A":
            # The same operations as in the reference, for the same bits
            rate = source.take(f"{place}.log_dt", 1) + source.take(f"{place}.log_A", cfg.dim)
            return torch.exp(-torch.exp(rate.clamp(-20, 20)))
    if name == "embed.weight":  # which this library multiplies by the root of dim
        return source.take(name, *like.shape) / math.sqrt(cfg.dim)
    if name == "norm.weight":  # before the head, which is the embedding
        return source.take(name, *like.shape) * math.sqrt(cfg.dim)
    if name == "recurrent.lora.B":
        return source.take(name, cfg.lora_rank, cfg.dim).T.contiguous()
    if name == "recurrent.lora.scale.weight":
        return source.take(name, -1, cfg.lora_rank)
    if place.endswith("q_up"):
        heads = [
            source.take(f"{place}_{kind}.weight", cfg.n_heads * width, cfg.q_lora_rank).unflatten(0, (cfg.n_heads, -1))
            for kind, width in (("nope", cfg.qk_nope_head_dim), ("rope", cfg.qk_rope_head_dim))
        ]
        return torch.cat(heads, 1).flatten(0, 1)
    if ".ffn.shared." in name:  # one wide expert, made of all shared ones
        before, _, layer = name.partition(".shared.")
        axis, experts = 1 if layer.startswith("down") else 0, range(cfg.n_shared_experts)
        sizes = [n // cfg.n_shared_experts if i == axis else n for i, n in enumerate(like.shape)]
        return torch.cat([source.take(f"{before}.shared_experts.{i}.{layer}", *sizes) for i in experts], axis)
    return source.take(name, *like.shape)
