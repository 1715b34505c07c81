"""Temporary eval mode for the current thread only: modules' own modes stay, as other threads may be using them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from torch import nn

from open_mythos.fields import must
from open_mythos.ops.dispatch import is_traced

Result = TypeVar("Result")
_evaluates: ContextVar[bool] = ContextVar("evaluates", default=False)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """:func:`evaluating` as a context manager, whose block must not ``yield`` to other code, as in a generator."""
    _check_modes(model)
    before = _evaluates.get()
    try:
        _evaluates.set(True)
        yield
    finally:
        _evaluates.set(before)


def evaluating(model: nn.Module | None, call: Callable[..., Result], *args: Any) -> Result:
    """``call(*args)`` with this library's modules computing as in eval mode, in this thread only; their modes stay.

    Raises:
        ValueError: for a ``model`` in training mode with dropout or batch norm that only their own mode switches.
    """
    if model is not None:
        _check_modes(model)
    return copy_context().run(_evaluate, call, *args)  # the copy ends with the call, wherever it is interrupted


def _evaluate(call: Callable[..., Result], *args: Any) -> Result:
    _evaluates.set(True)
    return call(*args)


def is_evaluating() -> bool:
    """Whether modules in training mode are to compute as in eval mode; always False in code that is traced."""
    return not is_traced() and _evaluates.get()


def _check_modes(model: nn.Module) -> None:
    training = {module for module in model.modules() if module.training}
    is_compiled = any(module._compiled_call_impl is not None for module in training)
    for name, module in model.named_modules() if training else ():
        noisy = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        own = getattr(module, "is_stopped", False) and not is_compiled
        must(
            module not in training or own or not (noisy or isinstance(module, nn.modules.batchnorm._BatchNorm)),
            f"{name} ({type(module).__name__}) is in training mode, and switching it would disturb other threads; call "
            f"model.eval() first, and model.train() after",
        )
