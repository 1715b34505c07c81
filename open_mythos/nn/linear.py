"""Linear layer whose learning speed does not depend on its width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.ops.linear import linear, linears

WEIGHT_STD = 0.02
"""Default of ``MythosConfig.weight_std``, for layers built without a config."""


def fan_in_scale(fan_in: int, gain: float, std: float) -> float:
    """The factor that brings a matrix stored at ``std`` to ``gain / sqrt(fan_in)``."""
    return gain / (std * math.sqrt(fan_in))


def residual_gain(n_layers: int) -> float:
    """Gain of the two projections a layer adds to the residual stream (GPT-2: ``1 / sqrt(2 n_layers)``)."""
    return 1.0 / math.sqrt(2 * n_layers)


class Linear(nn.Linear):
    """``y = scale * x @ weight.T`` without bias, with effective weights of standard deviation ``gain / sqrt(fan_in)``.

    All matrices are *stored* at the one standard deviation ``std`` and scaled in the forward pass, so an Adam step of
    a given learning rate is the same relative change in a layer of any width (the reasoning of muP,
    arXiv:2203.03466, with the scale in the layer rather than in the optimizer): a learning rate that suits a model
    of width 64 suits one of 2048.

    Args:
        in_features: fan-in.
        out_features: fan-out.
        gain: effective standard deviation times sqrt(fan_in).
        std: standard deviation as stored; halved, the layer learns twice as fast.
    """

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0, std: float = WEIGHT_STD) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=False)  # calls reset_parameters
        self.scale = fan_in_scale(in_features, gain, std)
        self._is_wrapped = False

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self._is_wrapped else linear(x, self.weight, self.scale)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, scale={self.scale:.3g}"


class Head(nn.Linear):
    """``y = x @ weight.T``: states to logits, with a weight that may be the embedding's."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """What a :class:`Linear` makes of ``x``, or one that PEFT has put an adapter around.

    The scale is then applied to the sum of layer and adapter, so that an adapter that is merged into the weight, as it
    is stored, computes what it did before.
    """
    base = _base(layer)
    if base is layer or base is None:
        return layer(x)
    base._is_wrapped = True
    try:
        return layer(x) * base.scale
    finally:
        base._is_wrapped = False


def side_by_side(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What several layers make of one input, faster than one after the other, unless one of them has an adapter."""
    plain = [layer for layer in layers if isinstance(layer, Linear)]
    if len(plain) < len(layers):
        return tuple(apply(layer, x) for layer in layers)
    return linears(x, [layer.weight for layer in plain], [layer.scale for layer in plain])


def effective_weight(layer: nn.Module) -> Tensor:
    """The matrix (out_features, in_features) that :func:`apply` multiplies by."""
    if isinstance(layer, Linear):
        return layer.weight * layer.scale
    base = _base(layer)
    assert base is not None, "there is a Linear inside"
    return apply(layer, torch.eye(base.in_features, dtype=base.weight.dtype, device=base.weight.device)).T


def _base(layer: nn.Module) -> Linear | None:
    """The :class:`Linear` inside what PEFT puts around it."""
    while not isinstance(layer, Linear):
        if (inner := getattr(layer, "base_layer", None)) is None:
            return None
        layer = inner
    return layer
