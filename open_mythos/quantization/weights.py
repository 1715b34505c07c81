"""torchao's int8 tensors as weights of this library's layers. Imported only where torchao is there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow

from open_mythos.nn.moe import MoEFFN
from open_mythos.ops.experts import grouped_swiglu

_FEW = 16  # rows up to which PyTorch's int8 product is faster than turning the weight back


class Int8Weight(Int8Tensor):
    """Int8 numbers ``qdata`` (..., O, I) and a float32 ``scale`` (..., O, 1), for ``F.linear`` or for experts.

    torchao's own eager product writes the whole weight in the input's dtype first, which costs more than int8 saves
    where rows are few. There PyTorch's int8 product is used, which reads the numbers as they stand.
    """

    @classmethod
    def parameter(cls, weight: Tensor) -> nn.Parameter:
        """``weight`` (..., O, I) quantised, as a parameter that needs no gradient."""
        return nn.Parameter(cls.from_hp(weight.detach(), granularity=PerRow()), requires_grad=False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            x, weight = args
            if is_fast(x, weight.qdata):
                return product(x, weight.qdata, weight.scale)
        return super().__torch_function__(func, types, args, kwargs)


def is_fast(x: Tensor, *weights: Tensor) -> bool:
    """Whether :func:`product` takes ``x`` (..., I) and int8 ``weights`` (..., O, I), and is the fastest way."""
    return (
        x.dtype == torch.bfloat16  # others have slow kernels
        and x.device.type == "cpu"
        and 0 < x.numel() <= _FEW * x.shape[-1]
        and all(q.shape[-1] % 32 == 0 for q in weights)  # the kernel reads beyond the end of other widths
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # a compiler joins torchao's steps by itself
    )


def product(x: Tensor, q_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """``x @ (scale * q).T`` for few rows (..., I) of bfloat16: (..., O)."""
    x_NI = x.reshape(-1, x.shape[-1]).contiguous()
    return torch._weight_int8pack_mm(x_NI, q_OI, scale_O1.flatten().to(x.dtype)).view(*x.shape[:-1], -1)


class _Int8MoEFFN(MoEFFN):
    """:class:`MoEFFN` in eval mode, whose ``gate_up`` and ``down`` are :class:`Int8Weight` of three axes."""

    gate_up: Any
    down: Any

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(tokens)
        weights = weights * self.down_scale
        if is_fast(tokens, self.gate_up.qdata, self.down.qdata):
            out = self._expert_by_expert(tokens, chosen, weights)
        else:
            gate_up, down = (weight.dequantize(tokens.dtype) for weight in (self.gate_up, self.down))
            out = grouped_swiglu(tokens, gate_up, down, chosen, weights, self.gate_up_scale).to(tokens.dtype)
        return (out if self.shared is None else out + self.shared(tokens)).view(x.shape)

    def _expert_by_expert(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """For few tokens: the chosen experts' numbers as they stand, and no others."""
        out_ND, weights_NK = torch.zeros_like(x_ND), weights_NK.to(x_ND.dtype)
        x_ND = x_ND * self.gate_up_scale
        for expert in chosen_NK.unique().tolist():
            token_P, k_P = (chosen_NK == expert).nonzero(as_tuple=True)
            gate_PF, up_PF = product(x_ND[token_P], self.gate_up.qdata[expert], self.gate_up.scale[expert]).chunk(2, 1)
            act_PF = F.silu(gate_PF).mul_(up_PF).mul_(weights_NK[token_P, k_P].unsqueeze(1))
            out_ND.index_add_(0, token_P, product(act_PF, self.down.qdata[expert], self.down.scale[expert]))
        return out_ND


def use_int8_experts(ffn: MoEFFN) -> None:
    """Quantise the routed experts, each output channel of each with its own scale."""
    ffn.gate_up, ffn.down = Int8Weight.parameter(ffn.gate_up), Int8Weight.parameter(ffn.down)
    ffn.__class__ = _Int8MoEFFN  # in place, so that names, buffers and whoever holds the module stay
