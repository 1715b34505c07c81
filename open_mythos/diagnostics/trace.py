"""A forward pass with a record of every loop."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from open_mythos.arguments import checked
from open_mythos.inputs import check_n_loops
from open_mythos.model import OpenMythos
from open_mythos.nn.feed_forward import MoEFFN
from open_mythos.nn.halting import halting_probability
from open_mythos.nn.modes import eval_mode


@dataclass
class Trace:
    """Record of a forward pass. Logits and halting are meaningless at padding; all else is 0 there.

    Once every position has halted no loop is run: ``delta`` and ``expert_load`` are 0 from then on, and ``halting``
    stays as it was.

    Attributes:
        logits: (B, T, vocab_size), those of ``model(input_ids, n_loops)`` in eval mode.
        loops_used: (B, T) int64, loops that each position ran.
        halting: (n_loops, B, T) probability given by the halting gate after each loop.
        delta: (n_loops, B, T) float32, ``|h_t - h_{t-1}| / |h_t|``; 0 for a position that did not run.
        expert_load: (n_loops, n_experts) float32, tokens routed to each expert, padding left out; summed over the
            layers of the recurrent block, if it has several.
    """

    logits: Tensor
    loops_used: Tensor
    halting: Tensor
    delta: Tensor
    expert_load: Tensor


@checked
@torch.no_grad()
def trace(
    model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, attention_mask: Tensor | None = None
) -> Trace:
    """Run ``model`` in eval mode, without gradients, and record every loop; other threads may use it meanwhile.

    Args:
        model, input_ids: the model, and its input, (B, T).
        n_loops: loops to run; ``cfg.max_loop_iters`` if None.
        attention_mask: (B, T), 0 at padding.

    Raises:
        ValueError: for input that does not fit the model.
    """
    n_loops = check_n_loops(n_loops, model.cfg.max_loop_iters)
    halting, delta = [], []
    with eval_mode(model), _expert_load(model) as load:
        e, ctx = model.encode(input_ids, attention_mask=attention_mask)
        h = model.first_state(e, ctx)
        loops_used = torch.zeros_like(input_ids, dtype=torch.int64)
        for state in model.recurrent.iterate(h, e, ctx, n_loops):
            loops_used += state.ran
            assert state.halting is not None and state.change is not None, "both are there in eval mode"
            halting.append(state.halting)
            delta.append(torch.where(state.ran, state.change, 0.0))
            h = state.h
        logits = model.head(model.decode(h, ctx))
        idle = n_loops - len(delta)
        still = torch.zeros(input_ids.shape, device=h.device)
        halting += [halting_probability(model.recurrent.act, h, still)] * idle
        delta += [still] * idle
        load += [torch.zeros(model.cfg.n_experts, device=h.device)] * idle
    return Trace(logits, loops_used, torch.stack(halting), torch.stack(delta), torch.stack(load))


@contextmanager
def _expert_load(model: OpenMythos) -> Iterator[list[Tensor]]:
    """Yield a list to which each loop run inside appends its (n_experts,) counts, summed over layers.

    Forward hooks also see the calls of a model whose ``ffn.forward`` has been replaced; those of other threads are
    ignored.
    """
    loads, own = list[Tensor](), threading.get_ident()

    def begin(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() != own:
            return
        loads.append(torch.zeros(model.cfg.n_experts, device=inputs[0].device))

    def count(ffn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() != own:
            return
        tokens = inputs[0].flatten(0, -2)
        chosen, _ = ffn.route(tokens)  # type: ignore[operator]
        real = tokens.ne(0).any(-1)  # padding is all zeros here
        loads[-1] += chosen[real].flatten().bincount(minlength=model.cfg.n_experts)

    layers = model.recurrent.layers
    ffns = [layer.ffn for layer in layers if isinstance(layer.ffn, MoEFFN)]
    hooks = [layer.register_forward_pre_hook(begin) for layer in layers[:: model.cfg.core_layers]]  # a loop's first
    hooks += [ffn.register_forward_pre_hook(count) for ffn in ffns]
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()
