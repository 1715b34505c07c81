"""One gradient for all uses of a weight: what may join, and what may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from open_mythos.ops.experts import grouped_swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("watched", [False, True])
def test_a_fused_optimizers_step_is_seen_by_the_next_use(dtype: torch.dtype, watched: bool) -> None:
    """Fused ones leave version counters alone, and a loss that nobody differentiates keeps the uses of it open."""

    def trained(fused: bool) -> list[Tensor]:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(4, 8, 8))]
        optimizer = torch.optim.AdamW(weights, lr=0.1, fused=fused)
        inputs = torch.randn(5, 8), *weights, torch.randint(4, (5, 2)), torch.full((5, 2), 0.5)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return grouped_swiglu(*inputs).float().square().mean()

        losses, kept = [], []
        for _ in range(3):
            losses.append(loss())
            for weight, grad in zip(weights, torch.autograd.grad(losses[-1], weights), strict=True):
                weight.grad = grad
            if watched:
                kept.append(loss())
            optimizer.step()
        return [x.detach() for x in (*losses, *weights)]

    for actual, expected in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
