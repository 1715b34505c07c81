"""One gradient for a weight that is used many times: every use adds to it in place.

A weight of a recurrent block is used once a loop. Autograd makes a gradient for every use and then adds them up; for
many experts, most of a training step goes by writing and reading those.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from open_mythos.ops.product import add_grouped_outers, add_products, is_native

_ENOUGH = 64  # rows for each matrix, from which on products cost more than adding them up

_n_steps = 0  # of all optimizers


def _count_step(*_: Any) -> None:
    global _n_steps
    _n_steps += 1


register_optimizer_step_post_hook(_count_step)


class OneGradient:
    """A weight as its uses see it, and what they have added to its gradient in the backward pass that is under way.

    Args:
        weight: a leaf that requires a gradient.
        dtype: of the products it is used in; the gradient is summed in the weight's own.

    Attributes:
        weight: what uses compute with, in ``dtype``.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._sum: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._grouped: list[tuple[Tensor, Tensor, Tensor]] = []
        self._half = False  # of grouped products, as :func:`open_mythos.ops.product.arithmetic` says
        self._leaf = weight.detach()
        self._made_of = _state(weight, dtype)
        self._is_open = True
        self.weight = _Used.apply(weight, dtype, weakref.ref(self))

    def serves(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether a new use may join: the weight is as it was, and no backward pass has come by yet."""
        return self._is_open and self._made_of == _state(weight, dtype)

    @property
    def is_wanted(self) -> bool:
        """In the backward pass of a use: whether this pass asks for the weight's gradient."""
        return torch._C._will_engine_execute_node(self.weight.grad_fn)

    @property
    def sum(self) -> Tensor:
        """What uses add their share to, in place."""
        if self._sum is None:
            self._sum = torch.zeros_like(self._leaf, memory_format=torch.contiguous_format)
        return self._sum

    def add_products(self, x_ECI: Tensor, y_ECO: Tensor) -> None:
        """Add ``x^T y`` of each matrix of a weight (E, I, O).

        A product in another dtype than the sum's has to be written before it can be added. With few rows C that is
        nearly all of the work, so the rows of several uses wait until it is worth it.
        """
        if x_ECI.dtype == self._leaf.dtype:
            add_products(self.sum, x_ECI.transpose(1, 2), y_ECO)
            return
        self._waiting.append((x_ECI, y_ECO))
        if sum(x.shape[1] for x, _ in self._waiting) >= _ENOUGH:
            self._add_waiting()

    def add_grouped_outer(self, x_PI: Tensor, y_PO: Tensor, ends_E: Tensor, half: bool) -> None:
        """Add ``x^T y`` of each group's rows to each matrix of a weight (E, I, O).

        With few rows to a matrix, nearly all of the work is to bring the sum from memory and back. So those of several
        uses wait for each other where the C code then adds them all at once.
        """
        if half != self._half:
            self._add_waiting()
        self._half = half
        self._grouped.append((x_PI, y_PO, ends_E))
        waits = half or is_native(x_PI, y_PO, y_PO.shape[1])
        if not waits or sum(len(x) for x, _, _ in self._grouped) >= _ENOUGH * len(ends_E):
            self._add_waiting()

    def _add_waiting(self) -> None:
        if self._grouped:
            is_new = self._sum is None
            if self._sum is None:
                self._sum = torch.empty_like(self._leaf, memory_format=torch.contiguous_format)
            add_grouped_outers(self._sum, self._grouped, self._half, is_new)
            self._grouped = []
        if self._waiting:
            x_ECI, y_ECO = (torch.cat(parts, 1) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            add_products(self.sum, x_ECI.transpose(1, 2), y_ECO)

    def take(self) -> Tensor | None:
        """The sum of all uses, once they have added to it."""
        self._add_waiting()
        total, self._sum, self._is_open = self._sum, None, False
        return total


def _state(weight: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """What differs once the weight, or what is wanted of it, has changed; fused optimizers leave versions alone."""
    return weight.data_ptr(), weight._version, _n_steps, dtype


class _Used(torch.autograd.Function):
    """The weight itself. Its gradient comes not from what uses return, which is nothing, but from what they added."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, owner: weakref.ref[OneGradient]) -> Tensor:
        ctx.owner = owner
        ctx.set_materialize_grads(False)
        return weight.view_as(weight) if weight.dtype == dtype else weight.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        assert grad is None, "a use returns no gradient of its own"
        owner = ctx.owner()
        return None if owner is None else owner.take(), None, None


_latest: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> weak reference to its OneGradient


def one_gradient(weight: Tensor, dtype: torch.dtype) -> OneGradient:
    """The :class:`OneGradient` that earlier uses of ``weight`` hold and this one may join, else a new one."""
    reference = _latest.get(weight)
    one = None if reference is None else reference()
    if one is None or not one.serves(weight, dtype):
        one = OneGradient(weight, dtype)
        _latest[weight] = weakref.ref(one)
    return one
