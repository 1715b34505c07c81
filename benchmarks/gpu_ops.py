"""Operators for benchmarks/gpu.py, timed against each other in bfloat16: attention kernels, and ways to run experts."""

import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from open_mythos.diagnostics.machine import repeat
from open_mythos.ops.experts import swiglu_experts

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
# Query heads, key/value heads, their widths. MLA trains in its expanded form and decodes in the absorbed one.
HEADS = {
    ("gqa", "train"): (16, 4, 64, 64), ("gqa", "decode"): (16, 4, 64, 64),
    ("mla", "train"): (16, 16, 96, 64), ("mla", "decode"): (16, 1, 288, 256),
}  # fmt: skip
Found = dict[str, Any]


def compiler(device: torch.device) -> str:
    """The backend of torch.compile. On a CPU, generated code takes a minute to build and says nothing about a GPU."""
    return "inductor" if device.type == "cuda" else "eager"


def experts(device: torch.device, n_experts: int, tiny: bool) -> Found:
    """Milliseconds of forward and backward of the routed experts, by one grouped product and by a loop over experts."""
    N, D, width, K = (32, 16, 16, 2) if tiny else (8192, 768, 768, 4)
    new = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x_ND, gate_up_E2FD = new(N, D), new(n_experts, 2 * width, D) * D**-0.5
    down_EDF, weights_NK = new(n_experts, D, width) * width**-0.5, torch.rand(N, K, device=device)
    experts_NK = torch.rand(N, n_experts, device=device).topk(K).indices
    inputs = [tensor.requires_grad_() for tensor in (x_ND, gate_up_E2FD, down_EDF)]

    def passes(mix: Callable[..., Tensor]) -> None:
        out = mix(*inputs, experts_NK, weights_NK)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    ways = {"grouped": swiglu_experts, "loop": looped_swiglu}
    return {name: milliseconds(partial(passes, mix), device, tiny) for name, mix in ways.items()}


def looped_swiglu(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """The same as ``swiglu_experts``, computing one expert after the other."""
    order_M = experts_NK.flatten().argsort(stable=True)
    token_M, weight_M1 = order_M // experts_NK.shape[1], weights_NK.flatten()[order_M].unsqueeze(-1)
    ends = experts_NK.flatten().bincount(minlength=len(gate_up_E2FD)).cumsum(0).tolist()
    out_ND, start = torch.zeros_like(x_ND), 0
    for gate_up_2FD, down_DF, end in zip(gate_up_E2FD, down_EDF, ends, strict=True):
        gate, up = F.linear(x_ND[token_M[start:end]], gate_up_2FD).chunk(2, -1)
        found = F.linear(F.silu(gate) * up, down_DF) * weight_M1[start:end].to(x_ND.dtype)
        out_ND, start = out_ND.index_add(0, token_M[start:end], found), end
    return out_ND


def attention(device: torch.device, kind: str, work: str, tiny: bool) -> Found:
    """Milliseconds of SDPA's backends and FlexAttention at one shape: forward and backward, or forward in decoding.

    For a kernel that cannot run, the reason is given instead. ``padded`` is the flash kernel with values padded to the
    width of the keys, which it requires.
    """
    B, S = (2, 32) if tiny else (8, 2048) if work == "train" else (8, 4096)
    (H, G, D, Dv), T = HEADS[kind, work], S if work == "train" else 1
    new = partial(torch.randn, device=device, dtype=torch.bfloat16, requires_grad=work == "train")
    q, k, v = new(B, H, T, D), new(B, G, S, D), new(B, G, S, Dv)

    def passes(attend: Callable[..., Tensor]) -> None:
        out = attend(q, k, v, enable_gqa=G != H)
        if q.requires_grad:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    sdpa = partial(F.scaled_dot_product_attention, is_causal=T > 1)

    def padded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return sdpa(q, k, F.pad(v, (0, D - Dv)), **options)[..., :Dv]

    found: Found = {"shape": dict(zip(("B", "T", "S", "H", "G", "D", "Dv"), (B, T, S, H, G, D, Dv), strict=True))}
    for backend in BACKENDS:
        with sdpa_kernel(backend):
            found[backend.name.lower()] = milliseconds_or_why(partial(passes, sdpa), device, tiny)
    if Dv != D:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found["padded"] = milliseconds_or_why(partial(passes, padded), device, tiny)
    mask = create_block_mask(causal, None, None, T, S, device=str(device)) if T > 1 else None
    flex = partial(torch.compile(flex_attention, backend=compiler(device)), block_mask=mask)
    found["flex"] = milliseconds_or_why(partial(passes, flex), device, tiny)
    return found


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def milliseconds(work: Callable[[], Any], device: torch.device, tiny: bool) -> float:
    return 1000 * median(repeat(work, device, 0.0 if tiny else 1.0))


def milliseconds_or_why(work: Callable[[], Any], device: torch.device, tiny: bool) -> float | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason why a kernel cannot run is warned of more than once
            return milliseconds(work, device, tiny)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).strip().splitlines()[0][:120]
