"""The recurrent block: one transformer block, or a few in turn, run for any number of loops."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_mythos.cache import LOOPS_SLOT, Cache, as_cache, loop_slot, stand_in
from open_mythos.config import MythosConfig
from open_mythos.nn.active import ActiveTokens
from open_mythos.nn.block import CoreBlocks, TransformerBlock
from open_mythos.nn.exits import Exit, Gate, LoopState
from open_mythos.nn.halting import ACTHalting, gate_loss, is_replaced, with_loss
from open_mythos.nn.injection import LTIInjection
from open_mythos.nn.lora import LoRAAdapter
from open_mythos.nn.modes import eval_mode
from open_mythos.nn.moe import MoEFFN
from open_mythos.nn.norm import RMSNorm
from open_mythos.ops.loop_index import loop_index_embedding
from open_mythos.ops.mask import CausalMask
from open_mythos.ops.rope import rope_rows

_EXPLORED = 8  # one row in so many of a training batch is also run to full depth
_GATE_WEIGHT = 0.02  # Adam does not mind, and gradient clipping then barely notices the gate


Readout = Callable[[Tensor, int], Tensor]
"""From the states (B, T, dim) after a loop, and its number, to predictions (B, T, vocab_size)."""


class RecurrentBlock(nn.Module):
    """``h <- norm(A h + B e + Transformer(A h + B e))``, ``n_loops`` times with the same weights.

    ``Transformer`` is what the block's attention and feed-forward, or those of ``cfg.core_layers`` blocks one after the
    other, add to their residual stream. In training every
    position runs every loop. In eval mode a position stops when an exit says so, which is the gate with
    ``cfg.halting``: its state stays, it is no longer computed, and others go on reading its last keys and values.

    Args:
        cfg: the model's config.

    Attributes:
        recompute: in training, keep only each loop's first state, and compute the loop again in the backward pass.
    """

    recompute = False

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.block = TransformerBlock(cfg, use_moe=True) if cfg.core_layers == 1 else CoreBlocks(cfg)
        self.injection = LTIInjection(cfg.dim, cfg.injection_decay, cfg.injection_gain)
        self.act = ACTHalting(cfg.dim, cfg.weight_std)
        self.lora = LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters, cfg.weight_std) if cfg.lora_rank else None
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.state_norm else nn.Identity()

    @property
    def layers(self) -> list[TransformerBlock]:
        """The transformer blocks that a loop runs, in order."""
        return [module for module in self.block.modules() if isinstance(module, TransformerBlock)]

    def forward(
        self,
        h: Tensor,
        e: Tensor,
        freqs: Tensor,
        mask: CausalMask | None = None,
        n_loops: int | None = None,
        kv_cache: Cache | dict[str, Any] | None = None,
        exit: Exit | None = None,
        readout: Readout | None = None,
        first_loop: int = 0,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the loops.

        Args:
            h: first state, (B, T, dim), as :meth:`begin` gives it.
            e: encoded input, injected again at every loop, (B, T, dim).
            freqs: rotary phasors of the T positions.
            mask: who sees whom; plain causal if None.
            n_loops: at least 1; ``cfg.max_loop_iters`` if None.
            kv_cache: one slot per loop.
            exit: when a position stops; with None, when the gate says so if ``cfg.halting``, else after the last loop.
            readout: predictions from states, called after every loop for an exit that needs them, and else never.
            first_loop: loops that were run before, if ``h`` is the state after them; no exit may be in use then.
            seen: gets the states before the first loop and after each one, (B, T, dim).

        Returns:
            (B, T, dim): each position's state at the loop where it halted, or after the last.

        Raises:
            ValueError: for an exit in training mode, or one that needs a readout and has none, or a ``first_loop``
                that is not below ``n_loops``.
        """
        loss = None
        for layer in self.layers if self.training else ():
            if isinstance(layer.ffn, MoEFFN):
                layer.ffn.update_bias()  # before any loop of this step, explored ones and a compiled block's too
        if self.training and torch.is_grad_enabled() and kv_cache is None:
            h, loss = self._explore(h, e, freqs, mask)
        if seen is not None:
            seen.append(h)
        for state in self.iterate(h, e, freqs, mask, n_loops, kv_cache, exit, readout, first_loop):
            h = state.h
            if seen is not None:
                seen.append(h)
        return h if loss is None else with_loss(h, _GATE_WEIGHT * loss)

    def begin(self, h: Tensor) -> Tensor:
        """The state that the loops start from and hand on, given a first ``h`` (B, T, dim): here ``h`` itself."""
        return h

    def output(self, state: Tensor) -> Tensor:
        """What goes on to the coda, (B, T, dim), of a state: here the state itself."""
        return state

    def _explore(self, h: Tensor, e: Tensor, freqs: Tensor, mask: CausalMask | None) -> tuple[Tensor, Tensor | None]:
        """What a training step learns from depths that it does not itself reach.

        The first rows of the batch, one in ``_EXPLORED``, are run without gradient for all ``cfg.max_loop_iters``
        loops. Their states teach the gate which of them have settled. With ``cfg.warm_start`` the step then starts
        these rows not from ``h`` but from their states after 1, 2, ... loops, evenly spread; a batch too small for
        a whole row has none.

        Args:
            h, e, freqs, mask: as :meth:`forward`.

        Returns:
            The states to start from, (B, T, dim), and the gate's loss, whose gradient reaches the gate alone.
        """
        n_warm = len(e) // _EXPLORED if self.cfg.warm_start else 0
        n = math.ceil(len(e) / _EXPLORED) if self.cfg.halting else n_warm
        if n == 0:
            return h, None
        with eval_mode(self), torch.no_grad():
            rows = rope_rows(freqs, 0, e.shape[1])
            rows = rows[:n] if rows.ndim == 4 else rows
            whole = CausalMask(e.shape[1], e.shape[1]) if mask is None else mask.rows(slice(n))
            n_loops, explored = max(2, self.cfg.max_loop_iters), [h[:n]]
            for loop in range(n_loops):
                explored.append(self.step(explored[-1], e[:n], loop, rows, whole))
            states = torch.stack(explored)
        if n_warm:
            depths = torch.arange(n_warm, device=h.device) * n_loops // n_warm
            h = torch.cat([states[1 + depths, torch.arange(n_warm, device=h.device)].to(h.dtype), h[n_warm:]])
        if not self.cfg.halting:
            return h, None
        loss = gate_loss(self.act, states, e[:n].detach().ne(0).any(-1), self.cfg.halting_tolerance)
        return h, loss if loss.requires_grad else None

    def iterate(
        self,
        h: Tensor,
        e: Tensor,
        freqs: Tensor,
        mask: CausalMask | None = None,
        n_loops: int | None = None,
        kv_cache: Cache | dict[str, Any] | None = None,
        exit: Exit | None = None,
        readout: Readout | None = None,
        first_loop: int = 0,
    ) -> Iterator[LoopState]:
        """As :meth:`forward`, handing out the state after every loop; ends early when all positions have halted."""
        n_loops = check_n_loops(n_loops, self.cfg.max_loop_iters)
        exit = self.choose_exit(exit)
        if exit is not None and exit.needs_predictions and readout is None:
            raise ValueError(f"exit={exit} reads predictions; give it to the model, or a readout to the block")
        if not 0 <= first_loop < n_loops:
            raise ValueError(f"first_loop={first_loop} of n_loops={n_loops}; use 0 to {n_loops - 1}")
        if first_loop and exit is not None:
            raise ValueError(f"exit={exit} has not seen the loops before first_loop={first_loop}; start at 0")
        cache = as_cache(kv_cache)
        B, T, _ = e.shape
        past = cache.slot_length(loop_slot(first_loop, cache)) if cache is not None else 0
        freqs = rope_rows(freqs, past, T)
        mask = mask or CausalMask(T, past + T)
        live = mask.valid[:, -T:] if mask.valid is not None else torch.ones(B, T, dtype=torch.bool, device=e.device)
        if exit is None:
            yield from self._all_positions(h, e, freqs, mask, range(first_loop, n_loops), cache, live)
        else:
            yield from self._running_positions(h, e, freqs, mask, n_loops, cache, live, exit, readout)

    def choose_exit(self, exit: Exit | None) -> Exit | None:
        """``exit``, or for None the gate if ``cfg.halting``; None in training. ValueError for an exit in training."""
        if exit is None:
            return Gate(self.cfg.act_threshold) if self.cfg.halting and not self.training else None
        if self.training:
            raise ValueError(f"exit={exit} in training mode, where every position runs every loop; call eval() first")
        return exit

    def step(
        self,
        h: Tensor,
        e: Tensor,
        loop: int | Tensor,
        freqs: Tensor,
        mask: CausalMask | None = None,
        kv_cache: Cache | None = None,
        active: ActiveTokens | None = None,
    ) -> Tensor:
        """One loop: (B, T, dim) -> (B, T, dim), or (1, N, dim) for the positions in ``active``.

        ``loop`` may be (B, 1) integers, one of each row, with a cache that knows them: rows are then in ``LOOPS_SLOT``.
        """
        u = self.with_loop_index(self.injection(h, e), e, loop)
        u = self.block(u, freqs, mask, kv_cache, step_slot(loop, kv_cache), active)
        if self.lora is not None:
            u = u + self.lora(e, loop)
        h = self.norm(u)
        if self.training and self.cfg.state_noise:
            noise = self.cfg.state_noise * torch.randn_like(h)
            if mask is not None and mask.valid is not None:
                noise = noise * mask.valid[:, -h.shape[1] :].unsqueeze(-1)
            h = h + noise
        return h

    def with_loop_index(self, x: Tensor, e: Tensor, loop: int | Tensor) -> Tensor:
        """``x`` with the code of the loop's number, if the config has one. Padding, where e is zero, stays zero."""
        if not self.cfg.loop_index_dim:
            return x
        return loop_index_embedding(x, loop, self.cfg.loop_index_dim) * e.ne(0).any(-1, keepdim=True)

    def _all_positions(
        self, h: Tensor, e: Tensor, freqs: Tensor, mask: CausalMask, loops: range, cache: Cache | None, live: Tensor
    ) -> Iterator[LoopState]:
        recompute = self.recompute and self.training and torch.is_grad_enabled() and cache is None
        for loop in loops:
            args = h, e, loop, freqs, mask, cache
            before, h = h, checkpoint(self.step, *args, use_reentrant=False) if recompute else self.step(*args)
            state = LoopState(loop, h, live) if self.training else LoopState(loop, h, live, before, self.act)
            if not self.training and is_replaced(self.act):
                _ = state.halting  # whoever puts a gate there watches it, and nobody else may be asking
            yield state

    def _running_positions(
        self,
        h: Tensor,
        e: Tensor,
        freqs: Tensor,
        mask: CausalMask,
        n_loops: int,
        cache: Cache | None,
        live: Tensor,
        exit: Exit,
        readout: Readout | None,
    ) -> Iterator[LoopState]:
        carried, running = exit.init(h), live
        freqs = freqs.expand(len(e), *freqs.shape[-3:])
        active = ActiveTokens(torch.ones_like(live))  # padding runs the first loop, so that every position has rows
        e_N, freqs_N, mask_N = e, freqs, mask
        for loop in range(n_loops):
            h_N = self.step(active.gather(h), e_N, loop, freqs_N, mask_N, cache, active)
            before, h = h, active.scatter(h_N, into=h)
            logits = readout(h, loop) if readout is not None and exit.needs_predictions else None
            state = LoopState(loop, h, running, before, self.act, logits)
            yield state
            stops, carried = exit.check(carried, state)
            running = running & ~stops
            if (still := active.only(running)) is active:
                continue
            if len(still) == 0:
                break
            active = still
            e_N, freqs_N, mask_N = active.gather(e), active.gather(freqs), active.mask(mask)
        if cache is not None:
            stand_in(cache, loop, n_loops, mask.n_keys - mask.n_queries, self.cfg.core_layers)


def step_slot(loop: int | Tensor, cache: Cache | None) -> str:
    """The slot of a :meth:`RecurrentBlock.step`."""
    return LOOPS_SLOT if isinstance(loop, Tensor) else loop_slot(loop, cache)


def check_n_loops(n_loops: Any, default: int) -> int:
    """``n_loops``, or ``default`` for None.

    Raises:
        ValueError: unless it is an integer of at least 1.
    """
    if n_loops is None:
        n_loops = default
    if isinstance(n_loops, bool) or not isinstance(n_loops, numbers.Integral) or n_loops < 1:
        raise ValueError(f"n_loops={n_loops!r}; use an integer of at least 1, or None for max_loop_iters={default}")
    return int(n_loops)
