"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) as complex products.

Shape letters: B batch, T tokens, H heads, D channels of a head.
"""

import torch
from torch import Tensor

from open_mythos.ops.dispatch import is_traced

LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0  # of Llama 3.1's rope_scaling


def rope_frequencies(
    dim: int,
    theta: float = 500000.0,
    factor: float = 1.0,
    context: int = 8192,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angle in radians by which each channel pair rotates per position: (dim // 2,) float64.

    Args:
        dim: channels to rotate, even.
        theta: base of the geometric frequencies, ``theta ** (-2i / dim)``.
        factor: by which wavelengths longer than ``context`` are stretched (Llama 3.1, arXiv:2407.21783, as published
            with its weights); those from a quarter of that on by less.
        context: positions that the model was trained on before its context was extended.
        device: of the result.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    if factor == 1:
        return frequencies
    wavelengths_in_context = context * frequencies / (2 * torch.pi)
    kept = ((wavelengths_in_context - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rope_table(
    positions: Tensor, dim: int, theta: float = 500000.0, factor: float = 1.0, context: int = 8192
) -> Tensor:
    """Cosines and sines that rotate channel pairs at ``positions``.

    Made anew for the positions at hand rather than kept in a buffer, so that no ``.to(dtype)`` can round
    it and no context length is built in.

    Args:
        positions: integer positions, any shape (...).
        dim, theta, factor, context: as :func:`rope_frequencies`.

    Returns:
        (..., dim // 2, 2) float32; last axis holds (cos, sin).
    """
    frequencies = rope_frequencies(dim, theta, factor, context, positions.device)
    angles = positions.double().unsqueeze(-1) * frequencies  # float32 is 0.03 rad off at a million positions
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def precompute_rope_freqs(dim: int, max_len: int, theta: float = 500000.0) -> Tensor:
    """Unit phasors for positions 0 to ``max_len - 1``: (max_len, dim // 2) complex64."""
    return torch.view_as_complex(rope_table(torch.arange(max_len), dim, theta))


def apply_rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotate the channel pairs (2i, 2i+1) of ``x``; the arithmetic is float32, the result has x's dtype.

    Args:
        x: (B, T, H, D).
        freqs: phasors for the T positions: (T, D/2) or (B, T, D/2) complex, or the same with a last axis
            of (cos, sin).

    Returns:
        (B, T, H, D).

    Raises:
        RuntimeError: if ``freqs`` does not hold T positions.
    """
    is_complex = freqs.is_complex()
    if freqs.shape[-2 if is_complex else -3] != x.shape[1]:
        held = freqs.shape[-2 if is_complex else -3]
        raise RuntimeError(f"freqs hold {held} positions and x has {x.shape[1]}; pass one row per token")
    if not is_complex or is_traced():
        freqs = (torch.view_as_real(freqs) if is_complex else freqs).unsqueeze(-3)
        (cos, sin), (even, odd) = freqs.unbind(-1), x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
    pairs = x.float().unflatten(-1, (-1, 2))
    if pairs.stride(-1) != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # view_as_complex needs aligned pairs
    return torch.view_as_real(torch.view_as_complex(pairs) * freqs.unsqueeze(-2)).flatten(-2).to(x.dtype)


def rope_rows(freqs: Tensor, start: int, n: int) -> Tensor:
    """The ``n`` positions from ``start`` on of a table (P, D/2), or ``freqs`` itself if it has one row per token.

    Args:
        freqs: complex phasors or (cos, sin) pairs, (P, D/2) or (B, n, D/2), as for :func:`apply_rope`.
    """
    is_table = freqs.ndim == (2 if freqs.is_complex() else 3) and len(freqs) > n
    return freqs[start : start + n] if is_table else freqs
