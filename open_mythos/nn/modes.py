"""Running modules as in eval mode, whatever their own modes are: other threads may be using them, so these are left."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.fields import must
from open_mythos.ops.dispatch import is_traced

_evaluates: ContextVar[bool] = ContextVar("evaluates", default=False)


def is_training(module: nn.Module) -> bool:
    """Whether ``module`` is to compute as in training. Code that is traced goes by the module's mode alone."""
    return module.training and (is_traced() or not _evaluates.get())


@contextmanager
def evaluating() -> Iterator[None]:
    """Inside, and in this thread alone, this library's modules compute as in eval mode."""
    token = _evaluates.set(True)
    try:
        yield
    finally:
        _evaluates.reset(token)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """:func:`evaluating`, with a ``model`` that can be run so.

    Raises:
        ValueError: for one in training mode with dropout or batch norm that only its own mode would stop.
    """
    check_modes(model)
    with evaluating():
        yield


def check_modes(model: nn.Module) -> None:
    """ValueError for modules that draw or gather numbers while they are in training mode, and know no other one."""
    if not model.training:
        return
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    for name, module in model.named_modules():
        noisy = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        own = isinstance(module, Dropout) and not is_compiled
        must(
            not module.training or own or not (noisy or isinstance(module, nn.modules.batchnorm._BatchNorm)),
            f"{name} ({type(module).__name__}) is in training mode, which is not switched behind the back of other "
            f"threads; call model.eval() first, and model.train() after",
        )


class Dropout(nn.Dropout):
    """Dropout that :func:`evaluating` stops too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, is_training(self), self.inplace)
