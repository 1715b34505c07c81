"""A model whose blocks run fewer, larger matrix products, for a few new tokens at a time.

At one token a step, the time depends on the number of operations, not of multiplications. So all that depends on the
weights alone is done once for a whole text: scales, norm weights and the projections of one input are merged into one
matrix. The result is that of the modules up to rounding; they are the reference.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.cache import Slot
from open_mythos.context import Context
from open_mythos.interface import Model
from open_mythos.nn.attention import Attention, GQAttention, LatentUp, MLAttention, ShortConv
from open_mythos.nn.block import CoreBlocks, Dropout, TransformerBlock
from open_mythos.nn.feed_forward import Expert, MoEFFN
from open_mythos.nn.injection import LTIInjection
from open_mythos.nn.linear import Linear, RMSNorm
from open_mythos.nn.recurrent import RecurrentBlock
from open_mythos.ops.dispatch import autocasts
from open_mythos.ops.experts import swiglu_experts


class Matrix(nn.Module):
    """A product with a matrix (O, I) that was computed beforehand."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self.weight_OI = weight_OI

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_OI)


def folded(layer: nn.Module, norm: nn.Module | None = None) -> Tensor:
    """The matrix (O, I) of a layer with its scale, and the weight of the ``norm`` before it, multiplied in."""
    assert isinstance(layer, Linear)
    weight = layer.weight.detach().float() * layer.scale
    return (weight if norm is None else weight * cast(RMSNorm, norm).weight.float()).to(layer.weight.dtype)


class FusedGQA(GQAttention):
    """:class:`GQAttention` of normalised tokens, with one matrix for queries, keys and values."""

    def __init__(self, attn: GQAttention, norm: RMSNorm) -> None:
        _take_settings(self, attn)
        self.w_in = torch.cat([folded(layer, norm) for layer in (attn.wq, attn.wk, attn.wv)])
        self.widths = [(attn.n_heads + attn.n_kv_heads) * attn.head_dim, attn.n_kv_heads * attn.head_dim]
        self.wo = cast(Any, Matrix(folded(attn.wo)))
        self.taps = attn.kernel().detach() if attn.n_taps else None

    def project(self, x: Tensor, rotary: Tensor) -> tuple[list[Tensor], Tensor]:
        qk, v = F.linear(x, self.w_in).split(self.widths, -1)
        return self.rotate(qk, v, rotary)

    def kernel(self, own: int = 0) -> Tensor:
        assert self.taps is not None
        return self.taps


class FusedMLA(MLAttention):
    """:class:`MLAttention` of normalised tokens, in fewer products."""

    def __init__(self, attn: MLAttention, norm: RMSNorm) -> None:
        _take_settings(self, attn)
        self.w_in = torch.cat([folded(attn.q_down, norm), folded(attn.kv_down, norm)])
        self.widths = [len(attn.q_down.weight), attn.latent_dim, attn.rope_dim]
        self.w_q, self.eps = folded(attn.q_up, attn.q_norm), attn.q_norm.eps
        self.kv_norm, self.kv_up = attn.kv_norm, attn.kv_up
        self.wo = cast(Any, Matrix(folded(attn.wo)))
        self.taps = attn.kernel().detach() if attn.n_taps else None

    def project(self, x: Tensor, rotary: Tensor) -> tuple[list[Tensor], Tensor]:
        q, c_kv, k_rope = F.linear(x, self.w_in).split(self.widths, -1)
        q = F.linear(_normed(q, self.eps), self.w_q)
        return self.rotate(q, self.kv_norm(c_kv), k_rope, rotary)

    def kernel(self, own: int = 0) -> Tensor:
        assert self.taps is not None
        return self.taps


class FusedBlock(nn.Module):
    """:class:`TransformerBlock` with norm weights merged, and shared expert and router in one product."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        attn, ffn = block.attn, block.ffn
        fused = FusedGQA if isinstance(attn, GQAttention) else FusedMLA
        self.attn: FusedGQA | FusedMLA = fused(attn, block.attn_norm)  # type: ignore[arg-type]
        self.eps, self.moe = block.attn_norm.eps, [ffn] if isinstance(ffn, MoEFFN) else []
        dense = ffn.shared if isinstance(ffn, MoEFFN) else ffn
        parts = [] if dense is None else [folded(dense.gate, block.ffn_norm), folded(dense.up, block.ffn_norm)]
        self.w_down = None if dense is None else folded(dense.down)
        if isinstance(ffn, MoEFFN):
            parts.append(folded(ffn.router, block.ffn_norm))
            self.expert_norm = block.ffn_norm.weight.detach() * ffn.gate_up_scale
        self.w_ffn = torch.cat(parts)
        self.widths = [len(weight) for weight in parts]

    def forward(
        self, x: Tensor, ctx: Context, mask: None = None, kv_cache: None = None, cache_key: Slot | str = "default",
        last: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As :meth:`TransformerBlock.forward`."""
        attended = self.attn(_normed(x, self.eps), ctx, cache_key=cache_key, last=last)
        x = (x if last is None else x[:, -last:]) + attended
        normed = _normed(x, self.eps)
        parts = F.linear(normed, self.w_ffn).split(self.widths, -1)
        if self.w_down is not None:
            x = x + F.linear(F.silu(parts[0]) * parts[1], self.w_down)
        for moe in self.moe:
            chosen, weights = moe.choose(parts[-1].float().flatten(0, 1))
            tokens, scales = (normed * self.expert_norm).flatten(0, 1), (1.0, moe.down_scale)
            x = swiglu_experts(tokens, moe.gate_up, moe.down, chosen, weights, scales, x.flatten(0, 1)).view(x.shape)
        return x


def _normed(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def _take_settings(new: Attention, attn: Attention) -> None:
    """Initialise ``new`` as a module with the plain attributes of ``attn``, but none of its layers."""
    nn.Module.__init__(new)
    own = vars(nn.Module()).keys()
    new.__dict__.update({name: value for name, value in vars(attn).items() if name not in own})


@torch.no_grad()
def fuse(model: Model) -> Model:
    """A model that shares everything with ``model`` but its blocks, which are fused from the current weights."""
    fused: Any = shallow_copy(model)
    fused.recurrent = shallow_copy(model.recurrent)
    for part in ("prelude", "coda"):
        setattr(fused, part, nn.ModuleList(_fused(block) for block in getattr(model, part)))
    fused.recurrent.block = _fused(model.recurrent.block)
    return fused


def _fused(block: nn.Module) -> nn.Module:
    if isinstance(block, CoreBlocks):
        blocks = shallow_copy(block)
        blocks._modules = {str(i): FusedBlock(cast(TransformerBlock, part)) for i, part in enumerate(block)}
        return blocks
    return FusedBlock(cast(TransformerBlock, block))


def shallow_copy(module: Any) -> Any:
    """A module that shares the submodules of ``module``; replacing one does not change ``module``."""
    new = object.__new__(type(module))
    new.__dict__.update(vars(module) | {"_modules": dict(module._modules)})
    return new


_OWN = (
    TransformerBlock, CoreBlocks, GQAttention, MLAttention, MoEFFN, Expert, Linear, LatentUp, RMSNorm, ShortConv,
    LTIInjection, nn.ModuleList, Dropout,
)  # fmt: skip


def why_not_fused(model: Model) -> str | None:
    """Why the blocks cannot be fused; None if they can.

    Hooks would not run on fused blocks, adapters in place of layers would be left out, quantised weights cannot be
    merged, and autocast chooses dtypes by operation, while the operations differ here.
    """
    if autocasts(model.embed.weight.device):
        return "autocast is on"
    if type(model.recurrent) is not RecurrentBlock or vars(model.recurrent).keys() & {"forward", "iterate", "step"}:
        return "the recurrent block is not this library's own"
    parts = *model.prelude, model.recurrent.block, model.recurrent.injection, *model.coda
    if not all(is_own(part, _OWN) for part in parts):
        return "the model has hooks, or replaced or quantised layers"
    return None


def is_own(part: nn.Module, own: tuple[type[nn.Module], ...]) -> bool:
    """Whether all submodules are exactly of the classes ``own``, with plain weights, and without hooks."""
    for module in part.modules():
        if type(module) not in own or module._forward_hooks or module._forward_pre_hooks:
            return False
        if any(type(weight) is not nn.Parameter for weight in module.parameters(recurse=False)):
            return False
        if "forward" in vars(module) or (isinstance(module, MoEFFN) and module.engine is not swiglu_experts):
            return False
    return True
