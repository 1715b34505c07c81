"""A plain reference implementation of halting, one loop at a time, to compare exits and loops with."""

import torch
from torch import Tensor


def halting(states_LBTD: Tensor, probabilities_LBT: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each position's state at the first loop where its summed probability reaches ``threshold``, else at the last.

    Args:
        states_LBTD: state after every loop.
        probabilities_LBT: the gate's output for each.
        threshold: in (0, 1].

    Returns:
        Output states (B, T, D); weights (L, B, T), which sum to one over the loops; loops used (B, T) int64.
    """
    n_loops = len(states_LBTD)
    mass_BT = torch.zeros_like(probabilities_LBT[0])
    running_BT = torch.ones_like(mass_BT, dtype=torch.bool)
    weights, used_BT = [], torch.zeros_like(running_BT, dtype=torch.int64)
    for loop in range(n_loops):
        used_BT = used_BT + running_BT
        mass_BT = mass_BT + torch.where(running_BT, probabilities_LBT[loop], 0.0)
        stops_BT = running_BT if loop == n_loops - 1 else running_BT & (mass_BT >= threshold)
        weights.append(stops_BT.to(states_LBTD.dtype))
        running_BT = running_BT & ~stops_BT
    weights_LBT = torch.stack(weights)
    return (weights_LBT[..., None] * states_LBTD).sum(0), weights_LBT, used_BT
