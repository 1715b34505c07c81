"""Adaptive halting: which positions have finished thinking."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ACTHalting(nn.Module):
    """The halting gate: a probability for each position, from its state alone: (B, T, dim) -> (B, T).

    Args:
        dim: width of the state.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.halt = nn.Linear(dim, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, -4.0)  # a new gate halts nothing within 50 loops

    def forward(self, h: Tensor) -> Tensor:
        return self.halt(h).squeeze(-1).sigmoid()


class HaltingState:
    """Which of the (B, T) positions still run, after Graves 2016 (arXiv:1603.08983).

    A position halts after the loop at which the sum of its probabilities reaches the threshold. Its output is its
    state at that loop, not Graves' mean over loops, which ties a model to its trained depth: the halting weights
    are one for that loop and zero for the others, and at the last loop whatever still runs is taken.

    Args:
        running: (B, T) bool, False for positions that never run (padding).
        threshold: in (0, 1].
    """

    def __init__(self, running: Tensor, threshold: float) -> None:
        self.running = running
        self.threshold = threshold
        self.mass = torch.zeros(running.shape, device=running.device)

    def update(self, probability: Tensor) -> None:
        """Account for the gate's ``probability`` (B, T) after a loop."""
        self.mass = self.mass + torch.where(self.running, probability.detach().float(), 0.0)
        self.running = self.running & (self.mass < self.threshold)
