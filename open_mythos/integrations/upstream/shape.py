"""The reference's config of a checkpoint: fields that are given, inferred from its tensors, or left at defaults."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from open_mythos.checkpoint import CheckpointError
from open_mythos.config import OF_TRANSFORMERS, MythosConfig
from open_mythos.fields import nearest
from open_mythos.integrations.upstream.files import Checkpoint
from open_mythos.ops.rope import precompute_rope_freqs

SPECS = {spec.name: spec for spec in dataclasses.fields(MythosConfig)[:23]}
"""The fields of the reference's config, which are the first ones of ``MythosConfig``, with the same defaults."""
_HUGGING_FACE = OF_TRANSFORMERS - {"lora_loops", "quantization_config"} | {"model_type"}
_MAY_DIFFER = {"max_seq_len", "max_loop_iters"}  # may be changed at any time, in both libraries
# Required fields that may not follow from the tensors, with example values
_ASKED = {"act_threshold": "0.99", "n_experts_per_tok": "4", "n_heads": "8", "rope_theta": "500000"}
_LATENT_ONLY = {"kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"}
_HERE = "recurrent.block.attn."


def complete(checkpoint: Checkpoint, settings: Iterable[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """All fields of the reference's config, and the names of those left at their default for want of information.

    ``settings`` take precedence over the checkpoint's own config. CheckpointError for fields that the reference does
    not have, that contradict the tensors, or that are required and unknown.
    """
    strange = sorted(checkpoint.fields.keys() - SPECS.keys() - _HUGGING_FACE)
    if strange:
        raise CheckpointError(
            f"{checkpoint.fields_from} has {', '.join(strange)}, which version 0.5.0 of the reference does not know; "
            f"it is from another version, whose models may compute something else. If these fields do not matter, "
            f"remove them from the config and give it with --config"
        )
    given = {name: value for name, value in checkpoint.fields.items() if name in SPECS} | parse(settings)
    seen, table = inferred(checkpoint.tensors), table_of(checkpoint.tensors)
    for name in given.keys() & seen.keys() - _MAY_DIFFER:
        if name == "rope_theta" and _turns(table, seen[name], given[name]):
            continue
        if given[name] != seen[name]:
            raise CheckpointError(
                f"the config says {name}={given[name]!r}, but the tensors of {checkpoint.path} say {seen[name]!r}; use "
                f"the config that this checkpoint was trained with, or leave {name} out"
            )
    fields = seen | given
    turns_by_one = {"rope_theta"} if table is not None and table.shape[-1] == 1 else set()  # the one pair of channels
    missing = sorted(_ASKED.keys() - fields.keys() - turns_by_one)
    if missing:
        examples = " ".join(f"--set {name}={_ASKED[name]}" for name in missing)
        raise CheckpointError(
            f"{checkpoint.path} does not say {', '.join(missing)}, and no tensor implies it; give what the model was "
            f"trained with, as in {examples}, or its config with --config config.json"
        )
    idle = {"n_kv_heads"} if fields["attn_type"] == "mla" else _LATENT_ONLY
    assumed = [name for name in SPECS if name not in fields and name not in idle]
    defaults = {name: spec.default for name, spec in SPECS.items()}
    fields = defaults | fields | {name: defaults[name] for name in idle}
    if fields["attn_type"] == "mla":
        fields["n_kv_heads"] = fields["n_heads"]  # unused by MLA; any valid number will do
    return fields, assumed


def parse(settings: Iterable[str]) -> dict[str, Any]:
    """Parse ``name=value`` texts to values by name; CheckpointError for anything else."""
    found = {}
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or name not in SPECS:
            raise CheckpointError(
                f"--set {setting}: write name=value, as in n_heads=8"
                + (f"; the reference has no {name!r}, {nearest(name, SPECS)}" if equals else "")
            )
        kind = SPECS[name].metadata["kind"]
        try:
            found[name] = kind(text)
        except ValueError as error:
            raise CheckpointError(f"--set {setting}: {text!r} is not a {kind.__name__}") from error
    return found


def inferred(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields that follow from the tensors, whose names were checked before."""
    experts = tensors["recurrent.block.ffn.routed_experts.0.gate.weight"]
    shared = tensors.get("recurrent.block.ffn.shared_experts.0.gate.weight")
    found: dict[str, Any] = {
        "vocab_size": len(tensors["embed.weight"]),
        "dim": tensors["embed.weight"].shape[-1],
        "prelude_layers": _count(tensors, "prelude.{}.attn_norm.weight"),
        "coda_layers": _count(tensors, "coda.{}.attn_norm.weight"),
        "attn_type": "mla" if f"{_HERE}kv_down.weight" in tensors else "gqa",
        "n_experts": len(tensors["recurrent.block.ffn.router.weight"]),
        "n_shared_experts": _count(tensors, "recurrent.block.ffn.shared_experts.{}.gate.weight"),
        "expert_dim": len(experts),
        "max_loop_iters": len(tensors["recurrent.lora.scale.weight"]),
        "lora_rank": tensors["recurrent.lora.scale.weight"].shape[-1],
    }
    if shared is not None:
        found["n_experts_per_tok"] = len(shared) // len(experts)
    elif found["n_experts"] == 1:
        found["n_experts_per_tok"] = 1
    table = table_of(tensors)
    if found["attn_type"] == "mla":
        latent = len(tensors[f"{_HERE}kv_norm.weight"])
        rope = len(tensors[f"{_HERE}kv_down.weight"]) - latent
        heads = max(1, len(tensors[f"{_HERE}q_up_rope.weight"]) // max(1, rope))
        found |= {
            "n_heads": heads,
            "kv_lora_rank": latent,
            "q_lora_rank": len(tensors[f"{_HERE}q_norm.weight"]),
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": len(tensors[f"{_HERE}q_up_nope.weight"]) // heads,
            "v_head_dim": tensors[f"{_HERE}wo.weight"].shape[-1] // heads,
        }
    elif table is not None:
        head_dim = 2 * table.shape[-1]
        found["n_heads"] = len(tensors[f"{_HERE}wq.weight"]) // head_dim
        found["n_kv_heads"] = len(tensors[f"{_HERE}wk.weight"]) // head_dim
    if table is not None:
        found["max_seq_len"] = len(table)
        if table.shape[-1] > 1 and len(table) > 1:
            found["rope_theta"] = _theta(table)
    return found


def _count(tensors: dict[str, Tensor], name: str) -> int:
    """How many tensors are named ``name``, with 0, 1, ... in place of ``{}``."""
    return next(n for n in itertools.count() if name.format(n) not in tensors)


def table_of(tensors: dict[str, Tensor]) -> Tensor | None:
    """The rotary phasors (positions, channels / 2) of the attention in use, complex; None if they are not stored.

    Casting a reference model to another dtype keeps only their real parts, for which None is returned too.
    """
    table = tensors.get("freqs_cis_mla" if f"{_HERE}kv_down.weight" in tensors else "freqs_cis")
    if table is not None and not table.is_complex():
        table = torch.view_as_complex(table.float().contiguous()) if table.ndim == 3 else None
    return table


def _theta(table: Tensor) -> float:
    """The base of the frequencies that made a table of phasors."""
    pairs = table.shape[-1]
    angle = float(table[1, -1].angle())  # of position 1, in the channel pair that rotates slowest
    theta = angle ** (-pairs / (pairs - 1)) if angle > 0 else math.nan
    short = float(f"{theta:.5g}")
    theta = short if math.isclose(short, theta, rel_tol=2e-6) else theta
    if not (math.isfinite(theta) and _turns(table, theta)):
        raise CheckpointError(
            "the stored RoPE table is not that of plain rotary embedding at any rope_theta; a model with scaled or "
            "other positions cannot be converted"
        )
    return theta


def _turns(table: Tensor | None, *thetas: Any) -> bool:
    """Whether each of ``thetas`` gives this table, within the error of its float32 angles."""
    if table is None or not all(isinstance(theta, int | float) and theta > 0 for theta in thetas):
        return False
    first = table[:64]
    made = (precompute_rope_freqs(2 * table.shape[-1], len(first), float(theta)) for theta in thetas)
    return all(bool((first - wanted).abs().max() < 1e-4) for wanted in made)
