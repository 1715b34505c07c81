"""Linear layers whose effective learning rate does not depend on their width, and RMSNorm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_STD = 0.02
"""Default of ``MythosConfig.weight_std``, for layers built without a config."""


def fan_in_scale(fan_in: int, gain: float, std: float) -> float:
    """The factor that brings a matrix stored at ``std`` to ``gain / sqrt(fan_in)``."""
    return gain / (std * math.sqrt(fan_in))


def residual_gain(n_layers: int) -> float:
    """Gain of a layer's two projections into the residual stream (GPT-2: ``1 / sqrt(2 n_layers)``)."""
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

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        """(..., in_features) -> (..., out_features); ``scale``, if given, replaces the layer's own."""
        return scaled_linear(x, self.weight, self.scale if scale is None else scale)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, scale={self.scale:.3g}"


class Head(nn.Linear):
    """``y = x @ weight.T``: states to logits, with a weight that may be the embedding's."""


class RMSNorm(nn.RMSNorm):
    """``weight * x / rms(x)`` over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    The mean square is taken in float32, so half-precision inputs of any size neither overflow nor vanish.
    """

    eps: float

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)


def scaled_linear(x: Tensor, weight_OI: Tensor, scale: float) -> Tensor:
    """``scale * x @ weight.T``: (..., I) -> (..., O), with the scale as alpha of one matrix product."""
    if scale == 1:
        return F.linear(x, weight_OI)
    if type(weight_OI) not in (Tensor, nn.Parameter):  # quantised and distributed weights support F.linear only
        return F.linear(x, weight_OI) * scale
    ignored = weight_OI.detach()[:1, 0]  # beta is 0
    out_NO = torch.addmm(ignored, x.reshape(-1, x.shape[-1]), weight_OI.t(), beta=0, alpha=scale)
    return out_NO.view(*x.shape[:-1], len(weight_OI))


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, for a :class:`Linear` or a module that wraps one as ``base_layer``, as PEFT's adapters do.

    A wrapped layer's scale is applied to the sum of layer and adapter, so that merging the adapter into the stored
    weight does not change the output.
    """
    if isinstance(layer, Linear):
        return layer(x)
    inner: object = layer
    while not isinstance(inner, Linear):
        inner = getattr(inner, "base_layer", None)
        if inner is None:
            return layer(x)
    return layer(x, scale=1.0) * inner.scale


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """The outputs of several layers for one input."""
    scales = [layer.scale for layer in layers if isinstance(layer, Linear)]
    if x.requires_grad and len(scales) == len(layers) and len(set(scales)) == 1:
        x = x * scales[0]  # scale the input once, and its gradient once, not each layer's weight
        return [layer(x, scale=1.0) for layer in layers]
    return [call(layer, x) for layer in layers]


def swiglu(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202), from its layers."""
    gate_out, up_out = project(x, gate, up)
    return call(down, F.silu(gate_out) * up_out)
