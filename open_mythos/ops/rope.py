"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) as complex products.

Shape letters: B batch, T tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from open_mythos.ops.kernels import address, has_kernels, kernels

_WAVES = 1.0, 4.0  # in a context: with as few or fewer a frequency is stretched whole, with as many or more not at all
_MANY = 2**14  # numbers from which on several threads turn them


@functools.lru_cache(maxsize=32)
def _frequencies(dim: int, theta: float, factor: float, context: int, device: torch.device) -> Tensor:
    """:func:`rope_frequencies`, which every call of a model asks for; never written to."""
    return rope_frequencies(dim, theta, factor, context).to(device)


def rope_frequencies(dim: int, theta: float = 500000.0, factor: float = 1.0, context: int = 8192) -> Tensor:
    """Radians that each channel pair turns from one position to the next: (dim // 2,) float64.

    Args:
        dim: channels to turn, even.
        theta: base of the geometric frequencies, ``theta ** (-2i / dim)``.
        factor: what wavelengths that hardly fit ``context`` are multiplied by (Llama 3.1, arXiv:2407.21783, as
            published with its weights); those in between by less.
        context: positions that the model had learned with before it was stretched.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if factor == 1:
        return frequencies
    few, many = _WAVES
    kept = ((context * frequencies / (2 * torch.pi) - few) / (many - few)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rope_table(
    positions: Tensor, dim: int, theta: float = 500000.0, factor: float = 1.0, context: int = 8192
) -> Tensor:
    """Cosines and sines that turn channel pairs at ``positions``.

    Made anew for the positions at hand rather than kept in a buffer, so that no ``.to(dtype)`` can round
    it and no context length is built in.

    Args:
        positions: integer positions, any shape (...).
        dim, theta, factor, context: as :func:`rope_frequencies`.

    Returns:
        (..., dim // 2, 2) float32; last axis holds (cos, sin).
    """
    frequencies = _frequencies(dim, theta, factor, context, positions.device)
    angles = positions.double().unsqueeze(-1) * frequencies  # float32 is 0.03 rad off at a million positions
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def precompute_rope_freqs(dim: int, max_len: int, theta: float = 500000.0) -> Tensor:
    """Unit phasors for positions 0 to ``max_len - 1``: (max_len, dim // 2) complex64."""
    return torch.view_as_complex(rope_table(torch.arange(max_len), dim, theta))


def apply_rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Turn the channel pairs (2i, 2i+1) of ``x``; the arithmetic is float32, the result has x's dtype.

    Args:
        x: (B, T, H, D).
        freqs: phasors for the T positions: (T, D/2) or (B, T, D/2) complex, or the same with a last axis
            of (cos, sin).

    Returns:
        (B, T, H, D).

    Raises:
        RuntimeError: if ``freqs`` does not hold T positions.
    """
    if freqs.is_complex():
        freqs = torch.view_as_real(freqs)
    if freqs.shape[-3] != x.shape[1]:
        raise RuntimeError(f"freqs hold {freqs.shape[-3]} positions and x has {x.shape[1]}; pass one row per token")
    if _is_native(x, freqs):
        return _Turned.apply(x, freqs) if torch.is_grad_enabled() and x.requires_grad else _turn(x, freqs, 1.0)
    freqs = freqs.unsqueeze(-3)  # (T or B,T) x 1 x D/2 x 2
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers know no complex numbers
        (cos, sin), (even, odd) = freqs.unbind(-1), pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        pairs = pairs.contiguous()
        if pairs.storage_offset() % 2:  # between two complex numbers
            pairs = pairs.clone()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(freqs))
    return turned.flatten(-2).to(x.dtype)


def _is_native(x: Tensor, freqs: Tensor) -> bool:
    """Whether C code turns ``x``: heads of a token side by side, and tokens evenly apart."""
    (B, T, _, D), (batch, token, head, channel) = x.shape, x.stride()
    return head == D and channel == 1 and (B == 1 or batch == T * token) and has_kernels(x, freqs)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs: Tensor) -> Tensor:
        ctx.freqs = freqs
        return _turn(x, freqs, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _turn(grad.contiguous(), ctx.freqs, -1.0), None


def _turn(x: Tensor, freqs: Tensor, sign: float) -> Tensor:
    """:func:`apply_rope` in C; with ``sign`` -1 back."""
    code, (B, T, H, D), freqs = kernels(), x.shape, freqs.contiguous()
    assert code is not None
    out = x.new_empty(B, T, H, D)
    threads = torch.get_num_threads() if x.numel() >= _MANY else 1
    code.mythos_turn(
        address(out), address(x), address(freqs), B * T, H, D, x.stride(1),
        freqs.numel() // D, sign, threads,
    )  # fmt: skip
    return out


def rope_rows(freqs: Tensor, start: int, n: int) -> Tensor:
    """The ``n`` positions from ``start`` on of a table (P, D/2), or ``freqs`` itself if it has one row per token.

    Args:
        freqs: complex phasors or (cos, sin) pairs, (P, D/2) or (B, n, D/2), as for :func:`apply_rope`.

    Returns:
        (cos, sin) pairs, (n, D/2, 2) or (B, n, D/2, 2).
    """
    if freqs.is_complex():
        freqs = torch.view_as_real(freqs)
    return freqs[start : start + n] if freqs.ndim == 3 and len(freqs) > n else freqs
