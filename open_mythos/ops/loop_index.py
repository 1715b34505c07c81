"""Sinusoidal embedding of the loop index."""

import torch
from torch import Tensor


def loop_index_embedding(h: Tensor, loop_t: int | Tensor, loop_dim: int, theta: float = 10000.0) -> Tensor:
    """Add a sinusoidal code of the loop number to the first ``loop_dim`` channels.

    The code is that of Vaswani et al. 2017 (arXiv:1706.03762, 3.5) with the loop in place of the position;
    it is bounded and defined for every loop number, trained or not.

    Args:
        h: state, (..., dim).
        loop_t: loop number, from 0; or integers that broadcast with h's axes but the last, as (B, 1), one for each row.
        loop_dim: channels to add to, at most dim; if odd, the last cosine is left out.
        theta: base of the frequencies.

    Returns:
        (..., dim), in h's dtype.
    """
    exponent = torch.arange(0, loop_dim, 2, device=h.device, dtype=torch.float32) / loop_dim
    angles = (loop_t.unsqueeze(-1) if isinstance(loop_t, Tensor) else loop_t) * theta**-exponent
    code = torch.cat([angles.sin(), angles.cos()], -1)[..., :loop_dim]
    return h + torch.nn.functional.pad(code, (0, h.shape[-1] - loop_dim)).to(h.dtype)
