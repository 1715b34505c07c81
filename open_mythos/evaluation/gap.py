"""The value of looping: the share it closes of the gap between models without a loop, and the loop exponent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from open_mythos.evaluation.grid import mean_interval, t_quantile


@dataclass(frozen=True)
class OverSeeds:
    """Statistics over the seeds for which a number is defined.

    Attributes:
        mean, worst: over these seeds; the worst is the least.
        low, high: 95% interval of the mean (Student's t); None for a single seed.
        seeds: number of these seeds.
    """

    mean: float
    worst: float
    low: float | None
    high: float | None
    seeds: int


def over_seeds(values: Sequence[float | None]) -> OverSeeds | None:
    """Aggregate one value per seed, None where it is undefined; None if it is undefined for all."""
    found = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if len(found) == 0:
        return None
    low = high = None
    if len(found) > 1:
        low, high = map(float, mean_interval(found, t_quantile(len(found))))
    return OverSeeds(float(found.mean()), float(found.min()), low, high, len(found))


Losses = tuple[float, float, float]
"""Losses of single, looped and unrolled at one seed, in any unit; scores where higher is better are given negated."""


def gap_closed(losses: Losses, least: float = 0.0) -> float | None:
    """The share of the gap between single and unrolled that the looped model closes.

    0 where looping gains nothing, 1 where it gains as much as separate weights for every loop. None if there is no gap
    to close: unrolled is not better than single by more than ``least``.
    """
    single, looped, unrolled = losses
    gap = single - unrolled
    return (single - looped) / gap if gap > least else None


def loop_exponent(losses: Losses, once: int, looped: int, n_loops: int, least: float = 0.0) -> float | None:
    """φ of ``N_eff = N_once + r^φ N_looped`` (Schwethelm et al. 2026, arXiv:2604.21106), of one seed.

    A model of r loops has the loss of a model of N_eff parameters without a loop: φ = 0 means that loops add nothing,
    1 that each is worth a block of its own. The paper fits φ with ``L = E + A N_eff^-α + B D^-β`` to many runs. Here
    the amount of data is the same for all, so ``L ∝ N^-α`` is fitted to the two models without a loop, single and
    unrolled, of ``N_1 = N_once + N_looped`` and ``N_r = N_once + r N_looped`` parameters::

        α = ln(L_single / L_unrolled) / ln(N_r / N_1)
        N_eff = N_1 (L_single / L_looped)^(1/α)
        φ = ln((N_eff - N_once) / N_looped) / ln r

    Args:
        losses: bits or nats, whose minimum is 0.
        once, looped: N_once and N_looped: parameters that are used once, and in every loop; embedding and head count
            in neither.
        n_loops: r.
        least: as of :func:`gap_closed`.

    Returns:
        None where it is not defined: with one loop, without a gap between single and unrolled, or with a loop so
        harmful that N_eff is not above N_once.
    """
    single, at_r, unrolled = losses
    if n_loops < 2 or single - unrolled <= least or unrolled <= 0:
        return None
    alpha = math.log(single / unrolled) / math.log((once + n_loops * looped) / (once + looped))
    effective = (once + looped) * (single / at_r) ** (1 / alpha)
    return math.log((effective - once) / looped) / math.log(n_loops) if effective > once else None
