"""How a loop reads the encoded input: linear injection, a bridge for pretrained layers, and depth-wise LoRA."""

from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.nn.feed_forward import Expert
from open_mythos.nn.linear import WEIGHT_STD, Linear, RMSNorm, call

MARGIN = 2.0**-7
"""Least distance of A from 0 and 1; exact in bfloat16 and float16, so A stays inside (0, 1) there too."""


class LTIInjection(nn.Module):
    """``A * h + B * e + transformer_out`` with diagonal A and B, and every entry of A strictly inside (0, 1).

    A linear time-invariant recurrence ``h <- A h + B e`` is stable when the spectral radius of A is below one
    (Parcae, arXiv:2604.12946). Here A *is* its parameter, ``raw_A``, and where an update pushes a value past
    [margin, 1 - margin] it is folded back like light between two mirrors. So A is inside (0, 1) for every finite
    parameter value and in every dtype, and dA/dparameter is +1 or -1 everywhere: the gradient cannot die, as it
    does at the ends of a sigmoid or under a clamp.

    Args:
        dim: channels.
        decay: initial A.
        gain: initial B.
        margin: least distance of A from 0 and 1; with 0, A may be 1, which is not stable.
    """

    def __init__(self, dim: int, decay: float = 0.7, gain: float = 0.7, margin: float = MARGIN) -> None:
        super().__init__()
        self.margin = margin
        self.raw_A = nn.Parameter(torch.full((dim,), decay))
        self.B = nn.Parameter(torch.full((dim,), gain))

    def get_A(self, raw_A: Tensor | None = None) -> Tensor:
        """The decay of each channel: (dim,), strictly inside (0, 1). Its maximum is the spectral radius.

        ``raw_A``, if given, is read in place of the parameter.
        """
        width = 1.0 - 2 * self.margin
        phase = torch.remainder((self.raw_A if raw_A is None else raw_A).float() - self.margin, 2 * width)
        folded = torch.where(phase <= width, phase, 2 * width - phase)
        return (self.margin + folded).to(self.raw_A.dtype)

    def forward(self, h: Tensor | None, e: Tensor, transformer_out: Tensor | None = None) -> Any:
        """One step of the recurrence, (..., dim).

        Args:
            h: state, (..., dim); with None, the pair A and ``B * e``, the same in every loop, is returned.
            e: encoded input, (..., dim).
            transformer_out: what the block adds, (..., dim); if None, only the linear part is returned.
        """
        decay, injected = self.get_A(), self.B * e
        if h is None:
            return decay, injected
        out = torch.addcmul(injected, decay, h)
        return out if transformer_out is None else out + transformer_out


class Bridge(nn.Module):
    """``SwiGLU(RMSNorm(h - e))``, added to what a loop reads: an adapter for pretrained layers that are looped.

    Such layers were trained to read the prelude's output e, not their own output; the bridge maps what the loops have
    changed, ``h - e``, to something that they can read. There are no biases, so it adds nothing where ``h = e``: in the
    first loop with ``state_init="input"``, and so in a model at one loop, whatever its weights. Its ``down`` starts at
    zero, so that a new one adds nothing in any loop.

    Args:
        dim: model width.
        bridge_dim: hidden width.
        eps: of the norm.
        std: see :class:`Linear`.
    """

    def __init__(self, dim: int, bridge_dim: int, eps: float = 1e-6, std: float = WEIGHT_STD) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)
        self.ffn = Expert(dim, bridge_dim, std=std)
        nn.init.zeros_(self.ffn.down.weight)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """State and encoded input, (..., dim) each -> (..., dim)."""
        return self.ffn(self.norm(h - e))


class LoRAAdapter(nn.Module):
    """``B(scale[loop] * down(x))``, added to the block's output (after Relaxed Recursive Transformers, 2410.20672).

    The recurrent block applies it to the encoded input e, not the state: a low-rank map of the state that is applied at
    every loop compounds like a power and destroys solved states beyond the trained depth. ``B`` starts at zero, so
    a new model computes exactly what it would without the adapter. Loops beyond the trained ones
    (``trained_loops``, see :mod:`open_mythos.nn.auxiliary`) use the scale of the last trained one.

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

    def forward(
        self, x: Tensor, loop_t: int | Tensor, prepared: tuple[Tensor, tuple[Tensor, ...]] | None = None
    ) -> Tensor:
        """(..., dim) -> (..., dim) for loop ``loop_t``, counted from 0; or (B, 1) integers, one for each row.

        ``prepared``, if given, is :meth:`prepare` of ``x``.
        """
        low_rank, scales = self.prepare(x) if prepared is None else prepared
        last = len(scales) - 1
        row = torch.stack(scales)[loop_t.clamp(max=last)] if isinstance(loop_t, Tensor) else scales[min(loop_t, last)]
        return nn.functional.linear(low_rank * row, self.B)

    def prepare(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What is computed once for all loops: ``down(x)`` (..., rank), and the scale (rank,) of each loop."""
        loops = torch.arange(self.scale.num_embeddings, device=x.device)
        return call(self.down, x), self.scale(loops.clamp(max=(self.trained_loops - 1).clamp(min=0))).unbind(0)

    def note_loops(self, n: int) -> None:
        """Record that ``n`` loops are trained, unless the scales are frozen, as under adapters."""
        if self.scale.weight.requires_grad:
            self.trained_loops.clamp_(min=n)

    def grow(self, n: int) -> None:
        """Make room for the scales of ``n`` loops, if the table has fewer; the rows are to be loaded then."""
        rows, rank = self.scale.weight.shape
        if n > rows:
            self.scale = nn.Embedding(n, rank, device=self.scale.weight.device, dtype=self.scale.weight.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load a table saved with another ``max_loops``: grow to a longer one, repeat the last row of a shorter one."""
        key = prefix + "scale.weight"
        if key in state_dict:
            n_saved = len(state_dict[key])
            self.grow(n_saved)
            rows = torch.arange(self.scale.num_embeddings).clamp(max=n_saved - 1)
            state_dict[key] = state_dict[key][rows.to(state_dict[key].device)]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
