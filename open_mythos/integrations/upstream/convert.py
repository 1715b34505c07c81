"""From a checkpoint of the reference to a model of this library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from open_mythos.checkpoint import CheckpointError
from open_mythos.config import MythosConfig
from open_mythos.integrations.upstream.files import read, read_config
from open_mythos.integrations.upstream.shape import complete
from open_mythos.integrations.upstream.weights import check_architecture, folded, without_table
from open_mythos.model import OpenMythos

SEMANTICS: dict[str, Any] = dict(
    recurrence="mixture", router_score="softmax", state_norm=True, state_init="input", input_norm=False, conv_taps=0,
    local_window=0, halting=False, warm_start=False, state_noise=0.0,
)  # fmt: skip
"""Fields of this library's config with which a model computes what the reference does, besides ``loop_index_dim``."""


@dataclass
class Conversion:
    """A converted model and how it came about.

    Attributes:
        model: in eval mode, float32.
        folded: sentences, what the weights now hold.
        notes: sentences, what the user should know or check.
    """

    model: OpenMythos
    folded: list[str]
    notes: list[str]


@torch.no_grad()
def convert(source: str | Path, config: str | Path | None = None, settings: Iterable[str] = ()) -> Conversion:
    """A model of this library that gives the logits of a reference's checkpoint.

    Args:
        source: a file of ``torch.save`` (a ``state_dict``, or what the reference's training script saves), a
            safetensors file, or a Hugging Face folder with either and ``config.json``.
        config: JSON file with the reference's config, before any that the checkpoint holds.
        settings: ``name=value`` texts that come before both, for what neither says.

    Raises:
        CheckpointError: saying what the checkpoint is instead, or what is missing, and what to do. Nothing in a file is
            ever run.
    """
    checkpoint = read(Path(source))
    check_architecture(checkpoint)
    if config is not None:
        checkpoint.fields, checkpoint.fields_from = read_config(Path(config)), str(config)
    fields, assumed = complete(checkpoint, settings)
    try:
        cfg = MythosConfig(**fields, **SEMANTICS, loop_index_dim=fields["dim"] // 8)
    except ValueError as error:
        raise CheckpointError(f"the config of {source} does not make a model of this library: {error}") from error
    with torch.device("meta"):
        model = OpenMythos(cfg)
    missing, unexpected = model.load_state_dict(folded(checkpoint, model), strict=False, assign=True)
    assert missing == ["head.weight"] and not unexpected, (missing, unexpected)
    model.head.weight = model.embed.weight
    notes = [f"not said by the checkpoint, so of the reference's defaults: {name}={fields[name]}" for name in assumed]
    if without_table(checkpoint):
        notes.append(
            "its RoPE table has lost its imaginary half, as casting a model of the reference does; made anew from "
            "rope_theta, so logits are those of the model before it was cast"
        )
    return Conversion(model.eval(), _folded(cfg, model), notes)


def _folded(cfg: MythosConfig, model: OpenMythos) -> list[str]:
    A = model.recurrent.injection.get_A()
    done = [
        "matrices over the factors that this library's layers apply",
        f"embedding over sqrt(dim), last norm times it (dim={cfg.dim})",
        f"log_A and log_dt to A itself, here {float(A.min()):.4g} to {float(A.max()):.4g}",
        f"{cfg.n_experts} routed experts into one tensor each for gate with up, and down",
        f"RoPE tables into rope_theta={cfg.rope_theta:g}",
    ]
    if cfg.n_shared_experts > 1:
        done.append(f"{cfg.n_shared_experts} shared experts into one of width {cfg.shared_dim}")
    if cfg.attn_type == "mla":
        done.append("q_up_nope and q_up_rope into q_up")
    return done
