"""torchao's int8 tensors as weights of this library's layers. Imported only where torchao is there."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow

from open_mythos.nn.feed_forward import MoEFFN
from open_mythos.ops.dispatch import is_plain_inference

_FEW = 16  # rows up to which PyTorch's int8 product is faster than turning the weight back


class Int8Weight(Int8Tensor):
    """Int8 numbers ``qdata`` (..., O, I) and a float32 ``scale`` (..., O, 1), for ``F.linear`` or for experts."""

    @classmethod
    def parameter(cls, weight: Tensor) -> nn.Parameter:
        """``weight`` (..., O, I) quantised, as a parameter that needs no gradient."""
        return nn.Parameter(cls.from_hp(weight.detach(), granularity=PerRow()), requires_grad=False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) == 2 and isinstance(args[1], cls):  # no layer here has a bias
            return product(args[0], args[1].qdata, args[1].scale)
        return super().__torch_function__(func, types, args, kwargs)


def product(x: Tensor, q_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """``x @ (scale * q).T`` of (..., I): (..., O).

    For few rows on a CPU by PyTorch's int8 product, which reads the numbers as they stand. torchao's way, which is the
    other, first writes them all in the input's dtype: a compiler joins that to the product, and many rows share it.
    """
    if not is_fast(x, q_OI):
        return F.linear(x, q_OI.to(x.dtype)) * scale_O1.flatten().to(x.dtype)
    x_NI = x.reshape(-1, x.shape[-1]).contiguous()
    return torch._weight_int8pack_mm(x_NI, q_OI, scale_O1.flatten().to(x.dtype)).view(*x.shape[:-1], -1)


def is_fast(x: Tensor, q_OI: Tensor) -> bool:
    """Whether PyTorch's int8 product takes these, and is the faster way."""
    return (
        x.dtype == torch.bfloat16  # others have slow kernels
        and x.device.type == "cpu"
        and x.shape[-1] % 32 == 0  # it reads beyond the end of other widths
        and 0 < x.numel() <= _FEW * x.shape[-1]
        and q_OI.is_contiguous()
        and is_plain_inference(x)
    )


class _Int8MoEFFN(MoEFFN):
    """:class:`MoEFFN` in eval mode, whose ``gate_up`` and ``down`` are :class:`Int8Weight` of three axes."""

    gate_up: Any
    down: Any

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(tokens)
        out = self._expert_by_expert(tokens, chosen, weights * self.down_scale)
        return (out if self.shared is None else out + self.shared(tokens)).view(x.shape)

    @torch.compiler.disable  # a graph cannot hold a loop over the experts that were chosen
    def _expert_by_expert(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """One expert's numbers are turned back at a time, and of those that nobody chose none."""
        out_ND, weights_NK = torch.zeros_like(x_ND), weights_NK.to(x_ND.dtype)
        x_ND = x_ND * self.gate_up_scale
        for expert in chosen_NK.unique().tolist():
            token_P, k_P = (chosen_NK == expert).nonzero(as_tuple=True)
            hidden_P2F = product(x_ND[token_P], self.gate_up.qdata[expert], self.gate_up.scale[expert])
            gate_PF, up_PF = hidden_P2F.chunk(2, dim=-1)
            act_PF = F.silu(gate_PF) * up_PF * weights_NK[token_P, k_P].unsqueeze(1)
            found_PD = product(act_PF, self.down.qdata[expert], self.down.scale[expert])
            out_ND = out_ND.index_add(0, token_P, found_PD.to(out_ND.dtype))
        return out_ND


def use_int8_experts(ffn: MoEFFN) -> None:
    """Quantise the routed experts, each output channel of each with its own scale."""
    ffn.gate_up, ffn.down = Int8Weight.parameter(ffn.gate_up), Int8Weight.parameter(ffn.down)
    ffn.__class__ = _Int8MoEFFN  # in place, so that names, buffers and whoever holds the module stay
