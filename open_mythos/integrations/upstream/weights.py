"""The reference's tensors as those of this library's model, with what differs only by a factor folded in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from open_mythos.checkpoint import CheckpointError
from open_mythos.integrations.upstream.files import Checkpoint
from open_mythos.integrations.upstream.shape import table_of
from open_mythos.model import OpenMythos
from open_mythos.nn.feed_forward import MoEFFN
from open_mythos.nn.linear import Linear

_NEEDED = (
    "embed.weight", "norm.weight", "recurrent.injection.log_A", "recurrent.injection.log_dt",
    "recurrent.act.halt.weight", "recurrent.lora.scale.weight", "recurrent.norm.weight",
    "recurrent.block.ffn.router.weight", "recurrent.block.ffn.routed_experts.0.gate.weight",
    "recurrent.block.attn.wo.weight",
)  # fmt: skip
_GQA = ("recurrent.block.attn.wq.weight", "recurrent.block.attn.wk.weight")
_MLA = tuple(f"recurrent.block.attn.{name}.weight" for name in ("q_norm", "q_up_nope", "q_up_rope", "kv_norm"))
_TABLES = {"freqs_cis", "freqs_cis_mla"}


def check_architecture(checkpoint: Checkpoint) -> None:
    """CheckpointError unless the tensors are those of a model of the reference."""
    names, path = checkpoint.tensors.keys(), checkpoint.path
    if any(name.endswith("recurrent.injection.raw_A") for name in names):  # transformers writes "core." before it
        raise CheckpointError(f"{path} is of this library already; load it with OpenMythos.from_pretrained")
    attention = _MLA if "recurrent.block.attn.kv_down.weight" in names else _GQA
    lacks = [name for name in (*_NEEDED, *attention) if name not in names]
    if "recurrent.injection.log_A" in lacks:
        raise CheckpointError(
            f"{path} is a model of another architecture: its tensors are called {', '.join(sorted(names)[:3])} and so "
            f"on, and a model of the reference (open-mythos 0.5.0, class OpenMythos) has recurrent.injection.log_A. Of "
            f"a pretrained Llama, mythos retrofit makes a recurrent-depth model"
        )
    if lacks:
        raise CheckpointError(
            f"{path} lacks {len(lacks)} tensors, such as {lacks[0]}: it is incomplete, or of a changed version of the "
            f"reference; 0.5.0 can be converted"
        )
    flat = [name for name, tensor in checkpoint.tensors.items() if name.endswith("weight") and not tensor.ndim]
    if flat:
        raise CheckpointError(f"{path} is damaged: {flat[0]} has no dimensions; download or save it again")


def folded(checkpoint: Checkpoint, model: OpenMythos) -> dict[str, Tensor]:
    """Everything that ``model`` loads but the tied head, in float32.

    Args:
        checkpoint: of the reference.
        model: its shape in this library, with storage or without.

    Raises:
        CheckpointError: for a tensor that is missing, of another shape, not finite, or not known.
    """
    source = _Source(checkpoint)
    scales = {f"{name}.weight": part.scale for name, part in model.named_modules() if isinstance(part, Linear)}
    made = {}
    for name, like in model.state_dict().items():
        if name == "head.weight":
            continue
        tensor = _made(name, like, source, model)
        made[name] = tensor if not tensor.is_floating_point() else tensor / scales.get(name, 1.0)
    source.check_all_taken()
    return made


class _Source:
    """Tensors of a checkpoint, each checked when it is taken, and a record of which were."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path, self.tensors = checkpoint.path, checkpoint.tensors
        self._taken: set[str] = set()

    def take(self, name: str, *shape: int) -> Tensor:
        """One tensor in float32; -1 stands for any size."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} lacks {name}: it is incomplete, or its config is not that of this model"
            )
        tensor = self.tensors[name]
        fits = tensor.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, tensor.shape, strict=True))
        if not fits:
            raise CheckpointError(
                f"{name} of {self.path} is {tuple(tensor.shape)} and its config makes it {shape}; give the config that "
                f"this checkpoint was made with"
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
        """CheckpointError for tensors that nobody asked for; RoPE tables are made anew, and a tied head is no news."""
        rest = {name for name, tensor in self.tensors.items() if tensor.numel()} - self._taken - _TABLES
        if "head.weight" in rest:
            rest.remove("head.weight")
            if not torch.equal(self.tensors["head.weight"], self.tensors["embed.weight"]):
                raise CheckpointError(
                    f"{self.path} has a head.weight of its own, and the reference, like this library, ties it to "
                    f"embed.weight; such a model cannot be converted"
                )
        if rest:
            raise CheckpointError(
                f"{self.path} has {len(rest)} tensors that version 0.5.0 of the reference has not, such as "
                f"{min(rest)}: it is of a newer or changed version and may compute something else; only what 0.5.0 can "
                f"load can be converted"
            )


def _made(name: str, like: Tensor, source: _Source, model: OpenMythos) -> Tensor:
    """The tensor ``name`` of this library, before the factor that its layer applies."""
    cfg, (place, _, last) = model.cfg, name.rpartition(".")
    match last:
        case "gate_up" | "down":
            return _experts(name, source, model)
        case "expert_load":
            return torch.zeros(like.shape, dtype=like.dtype)
        case "trained_loops":  # rows of the table that may be used, which is all
            return torch.tensor(len(source.tensors["recurrent.lora.scale.weight"]), dtype=like.dtype)
        case "raw_A":
            # As the reference computes it, to the last bit
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
    if ".ffn.shared." in name:
        return _shared(name, source, model)
    return source.take(name, *like.shape)


def _experts(name: str, source: _Source, model: OpenMythos) -> Tensor:
    """(n_experts, 2 expert_dim, dim) or (n_experts, dim, expert_dim): all routed experts, and their layers' factor."""
    cfg, ffn = model.cfg, model.recurrent.block.ffn
    assert isinstance(ffn, MoEFFN)
    place = name.rpartition(".")[0] + ".routed_experts"
    if name.endswith("down"):
        down = [source.take(f"{place}.{i}.down.weight", cfg.dim, cfg.expert_dim) for i in range(cfg.n_experts)]
        return torch.stack(down) / ffn.down_scale
    gate_up = [
        torch.cat([source.take(f"{place}.{i}.{part}.weight", cfg.expert_dim, cfg.dim) for part in ("gate", "up")])
        for i in range(cfg.n_experts)
    ]
    return torch.stack(gate_up) / ffn.gate_up_scale


def _shared(name: str, source: _Source, model: OpenMythos) -> Tensor:
    """One layer of the one wide expert that all shared ones make."""
    cfg, (before, _, layer) = model.cfg, name.partition(".shared.")
    width = cfg.shared_dim // cfg.n_shared_experts
    wide = layer.startswith("down")
    shape = (cfg.dim, width) if wide else (width, cfg.dim)
    parts = [source.take(f"{before}.shared_experts.{i}.{layer}", *shape) for i in range(cfg.n_shared_experts)]
    return torch.cat(parts, 1 if wide else 0)


def without_table(checkpoint: Checkpoint) -> bool:
    """Whether a stored RoPE table has lost its imaginary half."""
    return bool(_TABLES & checkpoint.tensors.keys()) and table_of(checkpoint.tensors) is None
