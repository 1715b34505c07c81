"""Convergence of the loop: the spectral radius of its linear part, and that of the whole loop's Jacobian."""

import math

import torch
from torch import Tensor

from open_mythos.inputs import check_n_loops
from open_mythos.model import OpenMythos
from open_mythos.nn.modes import eval_mode
from open_mythos.nn.untied import UntiedBlocks


def spectral_radius(model: OpenMythos) -> float:
    """Largest entry of the diagonal A of ``h <- A h + B e``: below 1, the linear part forgets its initial state.

    1 for a plain transformer, whose blocks add to their input."""
    injection = model.recurrent.injection
    return 1.0 if injection is None else float(injection.get_A().detach().max())


def loop_gain(model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, iterations: int = 50) -> float:
    """Asymptotic factor by which one more loop multiplies a small perturbation of the state.

    An estimate of the spectral radius of the loop's Jacobian, at the state after ``n_loops`` loops without halting.
    Below 1, the state converges to a fixed point; above 1, it keeps moving. It is found by power iteration on the
    *transposed* Jacobian: that has the same eigenvalues, and its products are plain backward passes, exact where
    forward-mode differentiation does not exist (grouped matrix products have none).

    Args:
        model: run in eval mode; its own mode is restored.
        input_ids: (B, T), without padding.
        n_loops: loops before the one that is measured; ``cfg.max_loop_iters`` if None.
        iterations: backward passes. The result is the geometric mean of the growth in the second half of them: with
            complex eigenvalues growth is uneven, and tokens that feed later tokens delay it at first.

    Raises:
        ValueError: for input that does not fit the model, or fewer than 2 iterations.
    """
    if iterations < 2:
        raise ValueError(f"iterations={iterations}; use at least 2, and a few dozen for a stable result")
    n_loops = check_n_loops(n_loops, model.cfg.max_loop_iters)
    if isinstance(model.recurrent, UntiedBlocks) and n_loops >= (most := len(model.recurrent.blocks)):
        raise ValueError(f"n_loops={n_loops} of {most} blocks, but the gain is that of the next block; use fewer loops")
    growth = []
    with eval_mode(model), torch.enable_grad():
        with torch.no_grad():
            e, ctx = model.encode(input_ids)
            h = model.recurrent.states(model.first_state(e, ctx), e, ctx, n_loops)[-1]
        # What a mixture carries beside its state is passed on, but never feeds back into the state.
        h, others = h.detach().tensor_split([model.cfg.dim], -1)
        h.requires_grad_()
        after = model.recurrent.step(torch.cat([h, others], -1), e, n_loops, ctx)[..., : model.cfg.dim]
        v = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
        v = v / v.norm()
        for _ in range(iterations):
            (v,) = torch.autograd.grad(after, h, v, retain_graph=True)
            growth.append(float(v.norm()))
            v = v / max(growth[-1], torch.finfo(v.dtype).tiny)
    settled = growth[iterations // 2 :]
    return math.exp(sum(map(math.log, settled)) / len(settled)) if min(settled) > 0 else 0.0
