"""Causal attention in C (``native/attention.h``), for local and global heads in one call.

Shape letters: B rows, T queries, S keys, H query heads, G key/value heads, D channels of a head, V of a value.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor

from open_mythos.ops.kernels import address, has_kernels, kernels
from open_mythos.ops.mask import CausalMask

_ENOUGH = 2**17  # pairs of queries and keys, of all heads, below which the call costs more than it saves


def is_native(q: Tensor, k: Tensor, mask: CausalMask) -> bool:
    """Whether the C code attends: many queries, which are the last T tokens, in single precision or trained in half.

    In half precision the backward pass of PyTorch's kernel on a CPU takes four times as long as in single.
    """
    if mask.positions is not None or mask.window is not None or q.shape[1] < 2:
        return False
    B, T, H, _ = q.shape
    return B * T * H * k.shape[1] >= _ENOUGH and has_kernels(q if q.dtype == torch.float32 else _as_trained(q))


def _as_trained(q: Tensor) -> Tensor:
    is_half = q.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled()
    return q.new_empty(0, dtype=torch.float32 if is_half else q.dtype)


def attend_heads(q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, scale: float, n_local: int, window: int) -> Tensor:
    """Local attention for the first ``n_local`` heads, global for the rest.

    Args:
        q: (B, T, H, D).
        k: (B, S, G, D), G dividing H.
        v: (B, S, G, V).
        mask: who sees whom, beside ``window``.
        scale: of the scores.
        n_local, window: so many heads see so many last keys alone, the query's own included.

    Returns:
        (B, T, H, V).
    """
    out = _Attend.apply(q.float(), k.float(), v.float(), mask.valid, mask.starts, scale, n_local, window)
    return out.to(q.dtype)


# The structs of attention.h and few.h, whose fields are integers and pointers but for the scale, which comes last. To
# fill in ctypes structures by names takes longer than what some of them describe.
_Numbers = ctypes.c_int64 * 40


def _place(x: Tensor | None) -> tuple[int, ...]:
    """A ``Rows`` of vectors.h; of nothing for None."""
    if x is None:
        return 0, 0, 0, 0
    assert x.stride(3) == 1 or x.shape[3] == 1
    return x.data_ptr(), *x.stride()[:3]


def _run(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: tuple[Any, ...], grads: tuple[Tensor, ...] | None = None
) -> None:
    """Forward into ``out``, or from the gradient ``out`` back into those of q, k and v."""
    code, (valid, starts, scale, n_local, window), (S, G, V) = kernels(), options, v.shape[1:]
    assert code is not None
    places = [_place(x) for x in (q, k, v, out, *(grads or (None, None, None)))]
    described = _Numbers(
        *itertools.chain.from_iterable(places),
        address(valid) or 0, address(starts) or 0, len(q), q.shape[1], S, q.shape[2], G, q.shape[3], V, n_local, window,
    )  # fmt: skip
    if code.mythos_attend(described, scale, grads is not None, torch.get_num_threads()):
        raise MemoryError(f"no memory for the scores of {q.shape[1]} queries and {S} keys")


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, starts: Tensor | None, scale: float,
        n_local: int, window: int,
    ) -> Tensor:  # fmt: skip
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        valid, starts = (None if x is None else x.contiguous() for x in (valid, starts))
        ctx.options = valid, starts, scale, n_local, window
        ctx.save_for_backward(q, k, v)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        _run(q, k, v, out, ctx.options)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grads = (
            torch.empty_like(q, memory_format=torch.contiguous_format),
            *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v)),
        )
        _run(q, k, v, grad if grad.stride(-1) == 1 else grad.contiguous(), ctx.options, grads)
        return *grads, None, None, None, None, None


# -- few queries


def is_native_for_few(q: Tensor, mask: CausalMask) -> bool:
    """Whether the C code reads a cache for these queries, which are then the last T tokens of one document."""
    is_last = mask.positions is None and mask.window is None and mask.starts is None
    return is_last and not torch.is_grad_enabled() and has_kernels(q)


def attend_few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_taps: Tensor,
    v_taps: Tensor,
    mask: CausalMask,
    scale: float,
    n_local: int,
    window: int,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`attend_heads` for few queries, to keys and values that have still to pass a short convolution.

    Args:
        q, k, v, mask, scale, n_local, window: as :func:`attend_heads`; ``v`` may be ``k``.
        k_taps: (K, G, D).
        v_taps: (K, G, V).
        beside: channels of queries (B, T, H, P) and keys (B, S, G, P) whose products are added to the scores, and
            which no convolution touches.

    Returns:
        (B, T, H, V).
    """
    code, (B, T, H, D), (_, S, G, V) = kernels(), q.shape, v.shape
    assert code is not None
    k_taps, v_taps = k_taps.contiguous(), v_taps.contiguous()
    out = q.new_empty(B, T, H, V)
    real = None if mask.real is None else mask.real.contiguous()
    q_beside, k_beside = beside or (None, None)
    described = _Numbers(
        *_place(q), *_place(k), *_place(v), *_place(out), *_place(q_beside), *_place(k_beside), k_taps.data_ptr(),
        v_taps.data_ptr(), address(real) or 0, B, T, S, H, G, D, V, 0 if q_beside is None else q_beside.shape[3],
        len(k_taps), n_local, window, v is k,
    )  # fmt: skip
    if code.mythos_attend_few(described, scale, torch.get_num_threads()):
        raise MemoryError(f"no memory to look through {S} keys for {T} queries")
    return out
