"""What a training step does besides the caller's loss: it balances the experts, and trains the gate to halt.

A plain training loop, ``loss = f(model(ids)); loss.backward(); optimizer.step()``, gets all of it without another line:

- **Expert balance** (DeepSeek-V3, arXiv:2412.19437): forward passes count how many tokens each expert gets; after the
  optimizer's step each router's bias moves towards the mean load.
- **Gate**: one row in eight is also run to full depth without gradient. The gate is trained to tell which of its states
  have converged; the gradient of that loss joins the caller's backward pass.
- **Warm starts** (``cfg.warm_start``): the step then starts these rows from their own states after some loops.
- **Trained loops**: depth-wise LoRA records the largest number of loops trained.

None of it happens in eval mode, without gradient, or with ``auxiliary=False``, for where two models are compared (DPO,
GRPO); frozen experts and a frozen gate stay as they are. The :class:`~open_mythos.training.trainer.Trainer` has its own
schedule of loops, and calls :func:`balance` itself.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from open_mythos.config import MythosConfig
from open_mythos.context import Context
from open_mythos.nn.halting import gate_loss
from open_mythos.nn.modes import evaluating
from open_mythos.ops.dispatch import in_backward, is_training_step

EXPLORED_ROWS = 8  # one row in this many of a batch is also run to full depth
GATE_LOSS_WEIGHT = 0.02  # no matter to Adam; small, so that the gate hardly adds to the gradient norm that is clipped


class Loops(Protocol):
    """What this module needs of a :class:`~open_mythos.nn.recurrent.RecurrentBlock`."""

    cfg: MythosConfig
    training: bool
    act: nn.Module
    lora: Any

    def modules(self) -> Iterator[nn.Module]: ...
    def states(self, h: Tensor, e: Tensor, ctx: Context, n_loops: int) -> list[Tensor]: ...


def experts(model: Any) -> list[Any]:
    """The sparse layers of a model: those that have a ``router_bias``."""
    return [module for module in model.modules() if "router_bias" in getattr(module, "_buffers", {})]


# -- expert balance


def count_choices(load: Tensor, chosen_NK: Tensor, tokens_ND: Tensor) -> None:
    """Add the number of real tokens that chose each expert to ``load`` (E,), in a training step; padding is all zeros.

    The second forward pass of activation checkpointing is not counted.
    """
    if tokens_ND.requires_grad:
        torch.ops.open_mythos.count_choices(load, chosen_NK, tokens_ND.detach())


@torch.library.custom_op("open_mythos::count_choices", mutates_args=("load",))
def _count(load: Tensor, chosen_NK: Tensor, tokens_ND: Tensor) -> None:
    """A custom operator, so that compiled code evaluates :func:`in_backward` at every call."""
    if not in_backward():
        # After a norm, only an all-zero token has a squared norm of 0.
        live_N1 = torch.linalg.vecdot(tokens_ND, tokens_ND).ne(0).unsqueeze(-1)
        load.scatter_add_(0, chosen_NK.flatten(), live_N1.expand_as(chosen_NK).flatten().to(load.dtype))


@_count.register_fake
def _(load: Tensor, chosen_NK: Tensor, tokens_ND: Tensor) -> None:
    return None


@torch.no_grad()
def balance(model: nn.Module | Loops) -> None:
    """Move each router's bias by ``cfg.router_bias_rate`` towards the mean load, and start a new count.

    Routers of frozen experts, as under adapters, stay as they are: an adapter's file could not store the change. With
    several processes, every one has to call it: the load is summed over all.
    """
    for ffn in experts(model):
        if not ffn.gate_up.requires_grad:
            ffn.expert_load.zero_()
            continue
        load = ffn.expert_load.float()
        if _has_peers():
            dist.all_reduce(load)
        ffn.router_bias += ffn.bias_rate * torch.sign(load.mean() - load)
        ffn.expert_load.zero_()


# -- in the forward pass of a plain training loop


def training_states(core: Any, h: Tensor, e: Tensor, ctx: Context, n_loops: int) -> tuple[Tensor, Callable]:
    """The states (B, T, dim) that a training step starts its loops from, and a function for those it ends with.

    The first rows of the batch, one in ``EXPLORED_ROWS``, are run without gradient for all ``cfg.max_loop_iters``
    loops. The gate is trained to tell which of their states have converged. With ``cfg.warm_start`` the step then
    starts these rows not from ``h`` but from their states after 1, 2, ... loops, evenly spread over the loops; a batch
    of fewer than ``EXPLORED_ROWS`` rows has no warm starts.

    Args:
        core: the recurrent block, in training mode.
        h, e: first states and encoded input, (B, T, dim).
        ctx: of the tokens.
        n_loops: that the step runs.

    Returns:
        The states to start from; and a function that returns the last states unchanged, and adds the gate's gradient to
        any backward pass through them.
    """
    if not is_training_step():
        return h, lambda last: last
    cfg, gate = core.cfg, [p for p in core.act.parameters() if p.requires_grad]
    if core.lora is not None:
        core.lora.note_loops(n_loops)
    _watch(core)
    learns = cfg.halting and cfg.recurrence == "injected" and bool(gate)
    n_warm = len(e) // EXPLORED_ROWS if cfg.warm_start else 0
    n = math.ceil(len(e) / EXPLORED_ROWS) if learns else n_warm
    gradients = [torch.zeros_like(p) for p in gate]
    if n:
        depth = max(2, cfg.max_loop_iters)
        with torch.no_grad():
            states = torch.stack(evaluating(None, core.states, h[:n], e[:n], ctx.rows(slice(n)), depth))
        if n_warm:
            depths = torch.arange(n_warm, device=h.device) * depth // n_warm
            h = torch.cat([states[1 + depths, torch.arange(n_warm, device=h.device)].to(h.dtype), h[n_warm:]])
        if learns:
            live = ctx.mask.without_padding(torch.ones_like(e[..., 0], dtype=torch.bool))[:n]
            with torch.enable_grad():
                loss = GATE_LOSS_WEIGHT * gate_loss(core.act, states, live, cfg.halting_tolerance)
                if loss.requires_grad:  # not if the gate was replaced
                    gradients = list(torch.autograd.grad(loss, gate, allow_unused=True, materialize_grads=True))
            _pending[core].add(gradients)
    if cfg.recurrence != "injected" or not gate or not (learns or _has_peers()):
        return h, lambda last: last
    return h, lambda last: _WithGradients.apply(last, gradients, *gate)


class _WithGradients(torch.autograd.Function):
    """Identity on ``x`` whose backward pass also gives each of ``parameters`` a gradient computed beforehand.

    With several processes each parameter needs one, if only zeros: DistributedDataParallel waits for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *ctx.gradients


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized()


# -- at the optimizer's step


@dataclass
class _Pending:
    """What forward passes of a block have left to do at the next optimizer step.

    Attributes:
        is_counted: whether experts are to be balanced.
        n_runs: forward passes that train the gate.
        gradients: of the gate, summed over these passes.
    """

    is_counted: bool = True
    n_runs: int = 0
    gradients: list[Tensor] = field(default_factory=list)

    def add(self, gradients: list[Tensor]) -> None:
        """Add a pass's gradients; zeros if they are not finite, as a skipped step does not clear this sum."""
        self.n_runs += 1
        finite = torch.stack([x.isfinite().all() for x in gradients]).all()
        gradients = [torch.where(finite, x, 0) for x in gradients]
        before = self.gradients or [torch.zeros_like(x) for x in gradients]
        self.gradients = [a + b for a, b in zip(before, gradients, strict=True)]


_pending: weakref.WeakKeyDictionary[Any, _Pending] = weakref.WeakKeyDictionary()
"""Blocks that ran forward in training since the last step of their optimizer."""


def _watch(core: Any) -> None:
    _register_hooks()
    _pending.setdefault(core, _Pending()).is_counted = True


def _updated(optimizer: Optimizer, module: Any) -> list[Tensor]:
    """The parameters of a module that the optimizer updates."""
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in module.parameters() if id(p) in updated]


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Set the gate's gradient to its mean over the forward passes of a step, however the caller scaled the loss.

    The loss may be divided by the number of micro-batches, or scaled up for float16.
    """
    for core, pending in list(_pending.items()):
        mine = {id(p) for p in _updated(optimizer, core.act)} if pending.n_runs else set()
        gate = [p for p in core.act.parameters() if p.requires_grad]
        for parameter, gradient in zip(gate, pending.gradients, strict=False):
            if parameter.grad is None or id(parameter) not in mine:
                continue
            if _has_peers():  # the gradient is already averaged over processes; ours is of this one alone
                parameter.grad /= pending.n_runs
                continue
            parameter.grad.copy_(gradient / pending.n_runs)
            scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler, if the optimizer itself unscales
            if scale is not None:
                parameter.grad *= scale


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Balance experts after the first of a block's optimizers, and clear the pending work after the gate's own."""
    for core, pending in list(_pending.items()):
        if not _updated(optimizer, core):
            continue
        if pending.is_counted:
            balance(core)
            pending.is_counted = False
        if not pending.n_runs or _updated(optimizer, core.act):
            del _pending[core]


_hooks: list[Any] = []


def _register_hooks() -> None:
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
