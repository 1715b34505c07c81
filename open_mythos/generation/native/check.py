"""Which models, and which ways of decoding, compiled code knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from open_mythos.generation.decoder import is_own, is_plain
from open_mythos.generation.native.code import compiled
from open_mythos.nn.exits import Exit, Gate, StateChange
from open_mythos.nn.halting import ACTHalting, is_replaced
from open_mythos.nn.linear import Head, Linear
from open_mythos.nn.lora import LoRAAdapter
from open_mythos.nn.norm import RMSNorm

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos

_GATE = ACTHalting, Linear, nn.Linear
_AROUND = (RMSNorm, LoRAAdapter, Linear, Head, nn.Embedding, nn.Identity)


def check_compilable(model: OpenMythos, exit: Exit | None, drafted: bool) -> None:
    """ValueError, saying what to change, unless compiled code can continue a text with this model.

    Args:
        model: as generation got it.
        exit: what stops positions, if anything does.
        drafted: whether tokens are drafted ahead.
    """
    weight = model.embed.weight
    if weight.device.type != "cpu" or any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError(
            f"compile=True runs on the CPU in float32, and the model is {weight.dtype} on {weight.device}; leave "
            f"compile out, or use model.float().cpu()"
        )
    if type(exit) not in (Gate, StateChange, type(None)):
        raise ValueError(
            f"compile=True knows the exits Gate and StateChange, not {exit}; use one, or leave compile out"
        )
    if drafted:
        raise ValueError("compile=True makes tokens one by one, and draft_loops several at once; leave out one of them")
    if model.cfg.recurrence != "injected" or model.cfg.router_score != "sigmoid":
        raise ValueError(
            f"compile=True knows recurrence='injected' and router_score='sigmoid', and the model has "
            f"{model.cfg.recurrence!r} and {model.cfg.router_score!r}; leave compile out"
        )
    around = model.embed, model.input_norm, model.recurrent.norm, model.recurrent.lora, model.norm, model.head
    if not is_plain(model) or not all(part is None or is_own(part, _AROUND) for part in around):
        raise ValueError(
            "compile=True knows this library's own modules alone, and the model has hooks, replaced or quantised "
            "layers, or autocast is on; leave compile out, or take those off"
        )
    if isinstance(exit, Gate) and (is_replaced(model.recurrent.act) or not is_own(model.recurrent.act, _GATE)):
        raise ValueError(
            f"compile=True asks this library's own gate alone, and the model has another, or one that is watched; use "
            f"StateChange in place of {exit}, or leave compile out"
        )
    compiled()
