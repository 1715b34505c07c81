"""The recurrent block, and the driver of its loops for training, decoding and measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_mythos.cache import KVCache, Slot, fill_skipped_loops
from open_mythos.config import MythosConfig
from open_mythos.context import Context, as_context
from open_mythos.inputs import check_n_loops
from open_mythos.nn.active import ActiveTokens
from open_mythos.nn.auxiliary import training_states
from open_mythos.nn.block import CoreBlocks, TransformerBlock
from open_mythos.nn.exits import Carried, Exit, Gate, LoopState
from open_mythos.nn.halting import OWN_GATE, ACTHalting
from open_mythos.nn.injection import Bridge, LoRAAdapter, LTIInjection
from open_mythos.nn.linear import RMSNorm
from open_mythos.nn.modes import is_evaluating
from open_mythos.nn.schedule import Schedule, Stage, put, take
from open_mythos.ops.attention import AttentionMask
from open_mythos.ops.dispatch import shapes_follow_values
from open_mythos.ops.loop_index import loop_index_embedding

Readout = Callable[[Tensor, int], Tensor]
"""From the states (B, T, dim) after a loop, and its number, to predictions (B, T, vocab_size)."""


class LoopInput(NamedTuple):
    """What every loop reads besides its state, (B, T, ...): the encoded input, and what is computed from it once.

    Attributes:
        e: the encoded input, (B, T, dim).
        injected: ``B * e``.
        low_rank: LoRA's down projection of e, (B, T, rank); None without LoRA.
        scales: LoRA's scale of each loop, (rank,).
        decay: A of the injection, (dim,).
    """

    e: Tensor
    injected: Tensor | None = None
    low_rank: Tensor | None = None
    scales: tuple[Tensor, ...] = ()
    decay: Tensor | None = None

    def map(self, select: Callable[[Tensor], Tensor]) -> LoopInput:
        """The input of some rows or positions, as ``select`` picks them."""
        injected, low_rank = (None if x is None else select(x) for x in (self.injected, self.low_rank))
        return self._replace(e=select(self.e), injected=injected, low_rank=low_rank)


class LoopBlock(nn.Module):
    """What one loop computes: ``norm(u + Transformer(u))`` with ``u = A h + B e``, plus ``bridge(h, e)`` if
    ``cfg.bridge_dim`` is above 0 (:class:`Bridge`).

    ``Transformer`` is what the attention and feed-forward of ``cfg.core_layers`` blocks, run one after the other, add
    to the residual stream.

    Args:
        cfg: the model's config.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.block = TransformerBlock(cfg, use_moe=True) if cfg.core_layers == 1 else CoreBlocks(cfg)
        self.injection = LTIInjection(cfg.dim, cfg.injection_decay, cfg.injection_gain)
        self.bridge = Bridge(cfg.dim, cfg.bridge_dim, cfg.norm_eps, cfg.weight_std) if cfg.bridge_dim else None
        self.lora = LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters, cfg.weight_std) if cfg.lora_rank else None
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.state_norm else nn.Identity()

    @property
    def layers(self) -> list[TransformerBlock]:
        """The transformer blocks that a loop runs, in order."""
        return [module for module in self.block.modules() if isinstance(module, TransformerBlock)]

    def prepare(self, e: Tensor) -> LoopInput:
        """What all loops read of the encoded input (B, T, dim), computed once."""
        decay, injected = self.injection(None, e)
        low_rank, scales = (None, ()) if self.lora is None else self.lora.prepare(e)
        return LoopInput(e, injected, low_rank, scales, decay)

    def step(self, h: Tensor, e: LoopInput | Tensor, loop: int | Tensor, ctx: Context) -> Tensor:
        """One loop: (B, T, dim) -> (B, T, dim), or (1, N, dim) of the positions that still run, see ``ctx.active``.

        ``loop`` may be (B, 1) integers, one for each row, with a :class:`~open_mythos.generation.lanes.LaneCache`.
        """
        e = e if isinstance(e, LoopInput) else self.prepare(e)
        assert e.injected is not None and e.decay is not None
        u = torch.addcmul(e.injected, e.decay, h)
        if self.bridge is not None:
            u = u + self.bridge(h, e.e)
        u = self._with_loop_index(u, loop, ctx)
        u = self.block(u, ctx, cache_key=step_slot(loop, ctx))
        if self.lora is not None:
            u = u + self.lora(e.e, loop, (e.low_rank, e.scales))
        h = self.norm(u)
        if self.training and self.cfg.state_noise and not is_evaluating():
            h = h + _without_padding(self.cfg.state_noise * ctx.noise(h, step_slot(loop, ctx)), ctx)
        return h

    def _with_loop_index(self, x: Tensor, loop: int | Tensor, ctx: Context) -> Tensor:
        """``x`` plus the embedding of the loop number, if ``cfg.loop_index_dim`` is above 0."""
        if not self.cfg.loop_index_dim:
            return x
        return _without_padding(loop_index_embedding(x, loop, self.cfg.loop_index_dim), ctx)


class Loops(nn.Module):
    """The driver: runs :meth:`step` loop after loop. Base of :class:`RecurrentBlock` and :class:`UntiedBlocks`."""

    cfg: MythosConfig
    act: ACTHalting
    lora: Any
    step: Callable[..., Tensor]
    prepare: Callable[[Tensor], LoopInput]

    @property
    def layers(self) -> list[TransformerBlock]:
        """The transformer blocks that loops run, in order."""
        raise NotImplementedError

    @property
    def is_compiled(self) -> bool:
        """Whether the blocks are compiled: then no values are kept between loops, as finding them would recompile."""
        return any(layer._compiled_call_impl is not None for layer in self.layers)

    def forward(
        self, h: Tensor, e: Tensor, freqs: Context | Tensor, mask: AttentionMask | Tensor | None = None,
        n_loops: int | None = None, kv_cache: KVCache | dict[str, Any] | None = None, exit: Exit | None = None,
        readout: Readout | None = None, auxiliary: bool = True, recompute: bool = False,
        seen: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the loops.

        In training every position runs every loop. In eval mode a position stops when the exit in use, by default the
        gate if ``cfg.halting``, says so: its state is frozen, it is no longer computed, and others go on reading its
        last keys and values.

        Args:
            h: first state, (B, T, dim), as :meth:`begin` gives it.
            e: encoded input, injected again at every loop, (B, T, dim).
            freqs, mask, kv_cache: a :class:`Context`, or what makes one; see :meth:`Attention.forward`.
            n_loops: at least 1; ``cfg.max_loop_iters`` if None.
            exit: the early-exit rule; with None, the gate if ``cfg.halting``, else none.
            readout: computes predictions from states, for an exit that needs them; called after every loop.
            auxiliary: in a training step, also do what :mod:`open_mythos.nn.auxiliary` describes.
            recompute: in training, keep only each loop's input state, and compute the loop again in the backward pass.
            seen: a list to which the states before the first loop and after each one, (B, T, dim), are added.

        Returns:
            (B, T, dim): each position's state at the loop where it halted, or after the last.

        Raises:
            ValueError: for an exit in training mode, or one that needs a readout and has none.
        """
        ctx = freqs
        if not isinstance(ctx, Context):
            ctx = as_context(ctx, mask, kv_cache, Slot("core", 0, 0), e.shape[1])
        finish: Callable[[Tensor], Tensor] = lambda last: last  # noqa: E731
        if auxiliary and ctx.cache is None and self.training and not is_evaluating():
            n_loops = check_n_loops(n_loops, self.cfg.max_loop_iters)
            h, finish = training_states(self, h, e, ctx, n_loops)
        states = [h]
        for state in self.iterate(h, e, ctx, n_loops, exit, readout, recompute=recompute):
            h = state.h
            states.append(h)
        if seen is not None:
            seen += states
        return finish(h)

    def begin(self, h: Tensor) -> Tensor:
        """The state that the first loop starts from, given an initial ``h`` (B, T, dim): here ``h`` itself."""
        return h

    def output(self, state: Tensor) -> Tensor:
        """What the coda reads, (B, T, dim), given a state: here the state itself."""
        return state

    def states(self, h: Tensor, e: Tensor, ctx: Context, n_loops: int) -> list[Tensor]:
        """The state before the first loop and after each one, (B, T, dim), with every position running every loop."""
        ctx = ctx if self.is_compiled else ctx.looping()
        loops = self._all_positions(h, self.prepare(e), ctx, range(n_loops), recompute=False)
        return [h, *(state.h for state in loops)]

    def iterate(
        self, h: Tensor, e: Tensor, ctx: Context, n_loops: int | None = None, exit: Exit | None = None,
        readout: Readout | None = None, first_loop: int = 0, recompute: bool = False,
    ) -> Iterator[LoopState]:  # fmt: skip
        """As :meth:`forward`, yielding the state after every loop; ends early when all positions have halted.

        Args:
            first_loop: how many loops ``h`` has already run; above 0 only without an exit.
        """
        if type(n_loops) is not int or n_loops < 1:
            n_loops = check_n_loops(n_loops, self.cfg.max_loop_iters)
        exit = self.choose_exit(exit)
        if exit is not None and exit.needs_predictions and readout is None:
            raise ValueError(f"exit={exit} reads predictions; pass it to the model, or pass a readout to the block")
        if not 0 <= first_loop < n_loops:
            raise ValueError(f"first_loop={first_loop} of n_loops={n_loops}; use 0 to {n_loops - 1}")
        if first_loop and exit is not None:
            raise ValueError(f"exit={exit} has not seen the loops before first_loop={first_loop}; use first_loop=0")
        loop_input = self.prepare(e)
        recompute = recompute and ctx.cache is None and self.training and not is_evaluating()
        ctx = ctx if recompute or self.is_compiled else ctx.looping()
        if exit is None:
            return self._all_positions(h, loop_input, ctx, range(first_loop, n_loops), recompute)
        return self._running_positions(h, loop_input, ctx, n_loops, exit, readout)

    def choose_exit(self, exit: Exit | None) -> Exit | None:
        """``exit``, or if None the gate if ``cfg.halting``; None in training. ValueError for an exit in training."""
        trains = self.training and not is_evaluating()
        if exit is None:
            return Gate(self.cfg.act_threshold) if self.cfg.halting and not trains else None
        if trains:
            raise ValueError(f"exit={exit} in training mode, where every position runs every loop; call eval() first")
        return exit

    def _all_positions(
        self, h: Tensor, e: LoopInput, ctx: Context, loops: range, recompute: bool
    ) -> Iterator[LoopState]:
        live, trains = _live(e.e, ctx), self.training and not is_evaluating()
        for loop in loops:
            args = h, e, loop, ctx
            before, h = h, checkpoint(self.step, *args, use_reentrant=False) if recompute else self.step(*args)
            state = LoopState(loop, h, live) if trains else LoopState(loop, h, live, before, self.act)
            if not trains and getattr(self.act.forward, "__func__", None) is not OWN_GATE:
                _ = state.halting  # a user's replacement gate may record calls, so it is always evaluated
            yield state

    def _running_positions(
        self, h: Tensor, e: LoopInput, ctx: Context, n_loops: int, exit: Exit, readout: Readout | None
    ) -> Iterator[LoopState]:
        carried, running = exit.init(h), _live(e.e, ctx)
        # Padding runs the first loop too, so that every position has key/value rows. On a GPU all positions are
        # computed, at fixed shapes: the host would have to wait for the number of those that still run.
        active = ActiveTokens(torch.ones_like(running), packs=shapes_follow_values(h))
        e_N, ctx_N = e, active.context(ctx)
        for loop in range(n_loops):
            h_N = self.step(active.gather(h), e_N, loop, ctx_N)
            before, h = h, active.scatter(h_N, into=h)
            logits = readout(h, loop) if readout is not None and exit.needs_predictions else None
            state = LoopState(loop, h, running, before, self.act, logits)
            yield state
            stops, carried = exit.check(carried, state)
            running = running & ~stops
            if (still := active.only(running)) is active:
                continue
            if still.packs and len(still) == 0:
                break
            active = still
            e_N, ctx_N = e.map(active.gather), active.context(ctx)
        if ctx.cache is not None:
            fill_skipped_loops(ctx.cache, loop, n_loops, ctx.mask.first, self.cfg.core_layers)

    def scheduled(self, h: Tensor, e: Tensor, ctx: Context, schedule: Schedule) -> Iterator[Stage]:
        """Run every sequence for its own number of loops, in training mode; yield the loops that have gradient.

        A loop computes only the rows that still run.
        """
        assert int(schedule.n_loops.min()) >= 1 and int(schedule.n_grad.min()) >= 1
        last, damping = schedule.last, schedule.damping
        if self.lora is not None:  # first, as the scales of loops beyond trained_loops are not read, nor trained
            self.lora.note_loops(last)
        loop_input = self.prepare(e)
        no_grad_ctx = ctx if self.is_compiled else ctx.looping()
        grad_ctx = ctx if self.is_compiled or schedule.recompute else ctx.looping()

        def step(h: Tensor, rows: Tensor, others: Tensor, loop: int, ctx: Context) -> Tensor:
            if schedule.among is not None:
                schedule.among.meet(others, h.shape[1])
            own = ctx if len(rows) == len(e) else ctx.rows(rows.to(e.device, non_blocking=True))
            return self.step(h, loop_input.map(lambda x: take(x, rows)), loop, own)

        for loop in range(last):
            for rows, others, with_grad in schedule.groups(loop):
                before = take(h, rows)
                if not with_grad:
                    with torch.no_grad():
                        after = step(before, rows, others, loop, no_grad_ctx)
                    h = put(h, rows, after)  # outside of no_grad, to keep the other rows' graphs
                    continue
                before = before.detach() if schedule.detach else before
                if schedule.recompute:
                    args = schedule.around(before, loop), rows, others, loop, grad_ctx
                    after = checkpoint(step, *args, use_reentrant=False)
                    after = schedule.around(after, 0) if loop == last - 1 else after
                else:
                    after = step(before, rows, others, loop, grad_ctx)
                if damping < 1:
                    after = before + damping * (after - before)
                h = put(h, rows, after)
                yield Stage(rows, before, after, schedule.n_loops[rows] - 1 - loop)


class RecurrentBlock(LoopBlock, Loops):
    """``h <- norm(A h + B e + Transformer(A h + B e))``, ``n_loops`` times with the same weights.

    Args:
        cfg: the model's config.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__(cfg)
        self.act = ACTHalting(cfg.dim, cfg.weight_std)


def step_slot(loop: int | Tensor, ctx: Context) -> Slot:
    """The cache slot of the core's first layer at ``loop``; ``Slot("loops")`` for rows at different loops."""
    if isinstance(loop, Tensor):
        return Slot("loops")
    n_slots = ctx.cache.cache_loops if ctx.cache is not None else None
    return Slot("core", 0, loop if n_slots is None else loop % n_slots)


def advance(
    core: RecurrentBlock, h: Tensor, e: LoopInput, loop: Tensor, ctx: Context, exit: Exit | None, carried: Carried
) -> tuple[Tensor, Tensor | None, Carried]:
    """Run one loop of rows (B, 1, dim), each at its own loop number, ``loop`` (B, 1), for depth batching.

    Returns:
        The states after it, (B, 1, dim); whether each row stops, (B, 1) bool, None without an exit; the exit's state.
    """
    before, h = h, core.step(h, e, loop, ctx)
    if exit is None:
        return h, None, carried
    stops, carried = exit.check(carried, LoopState(0, h, torch.ones_like(loop, dtype=torch.bool), before, core.act))
    return h, stops, carried


def _live(e: Tensor, ctx: Context) -> Tensor:
    """(B, T) bool, True at real tokens, False at padding."""
    if ctx.mask.valid is not None:
        return ctx.mask.valid[:, -e.shape[1] :]
    return torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)


def _without_padding(x: Tensor, ctx: Context) -> Tensor:
    """``x`` (B, T, dim) with zeros at padding; unchanged where running positions are packed, as none is padding."""
    is_packed = ctx.active is not None and ctx.active.is_packed
    return x if is_packed else ctx.mask.without_padding(x)
