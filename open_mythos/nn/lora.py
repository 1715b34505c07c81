"""Depth-wise LoRA: a small adaptation of the shared block, different at every loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.nn.linear import WEIGHT_STD, Linear, apply


class LoRAAdapter(nn.Module):
    """``B(scale[loop] * down(x))``, added to the block's output (after Relaxed Recursive Transformers, 2410.20672).

    The recurrent block gives it the encoded input e, not the state: a low-rank map of the state that is applied at
    every loop grows like a power and undoes solved states at depths beyond the trained one. ``B`` starts at zero, so
    a new model computes exactly what it would without the adapter. Loops deeper than any seen in training use the
    scale of the deepest loop that was.

    Args:
        dim: model width.
        rank: width of the adapter.
        max_loops: rows of the table of scales; deeper loops are allowed and use the last.
        std: see :class:`Linear`.
    """

    trained_loops: Tensor

    def __init__(self, dim: int, rank: int, max_loops: int, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.down = Linear(dim, rank, std=std)
        self.B = nn.Parameter(torch.zeros(dim, rank))
        self.scale = nn.Embedding(max_loops, rank)
        nn.init.ones_(self.scale.weight)
        self.register_buffer("trained_loops", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, loop_t: int | Tensor) -> Tensor:
        """(..., dim) -> (..., dim) for loop ``loop_t``, counted from 0; (B, 1) integers for one of each row."""
        if self.training:
            self.trained_loops.clamp_(min=loop_t + 1)
        return nn.functional.linear(apply(self.down, x) * self.row(loop_t), self.B)

    def row(self, loop_t: int | Tensor) -> Tensor:
        """The scale of loop ``loop_t``: (rank,), or (B, 1, rank) for one of each row."""
        deepest = (self.trained_loops - 1).clamp(min=0, max=self.scale.num_embeddings - 1)
        return self.scale(deepest.clamp(max=loop_t))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Fit a table saved with another ``max_loops``: grow to it, or repeat its last row. Nothing trained is cut."""
        key = prefix + "scale.weight"
        if key in state_dict:
            n_saved, rank = state_dict[key].shape
            if n_saved > self.scale.num_embeddings:
                self.scale = nn.Embedding(n_saved, rank).to(self.scale.weight)
            rows = torch.arange(self.scale.num_embeddings).clamp(max=n_saved - 1)
            state_dict[key] = state_dict[key][rows.to(state_dict[key].device)]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
