"""Short causal convolution over rows of a cache.

Shape letters: B rows, S keys, C channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x_BSC: Tensor, taps_KC: Tensor, starts_BS: Tensor | None = None) -> Tensor:
    """Depth-wise causal convolution ``y[s] = sum_k taps[k] * x[s - k]``, zeros before the first row.

    With ``starts_BS``, also zeros before the first row of each document.
    """
    if starts_BS is None:
        return conv_end(F.pad(x_BSC, (0, 0, len(taps_KC) - 1, 0)), taps_KC, x_BSC.shape[1])
    S = x_BSC.shape[1]
    since = torch.arange(S, device=x_BSC.device) - starts_BS
    out = x_BSC * taps_KC[0]
    for j in range(1, min(len(taps_KC), S)):
        before = F.pad(x_BSC[:, : S - j], (0, 0, j, 0)).masked_fill((since < j).unsqueeze(-1), 0)
        out = torch.addcmul(out, before, taps_KC[j])
    return out


def conv_end(x_BSC: Tensor, taps_KC: Tensor, n: int) -> Tensor:
    """The last ``n`` rows of a :func:`causal_conv`, from ``n + K - 1`` rows at least."""
    S = x_BSC.shape[1]
    out = x_BSC[:, S - n :] * taps_KC[0]
    for j in range(1, len(taps_KC)):
        out = torch.addcmul(out, x_BSC[:, S - n - j : S - j], taps_KC[j])
    return out


def window_end(x: Tensor, taps: Tensor, window: int) -> Tensor:
    """The last ``window`` rows, or all if there are fewer, of a :func:`causal_conv` of (B, S, ...) with (K, ...)."""
    more = len(taps) - 1
    if x.shape[1] < window + more:  # the text's start is in sight
        window = min(window, x.shape[1])
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (more, 0))
    return conv_end(x, taps, window)
