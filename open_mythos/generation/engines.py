"""Engines: what computes new tokens. All give the same logits up to rounding, behind one protocol.

========  ===========================================================================================================
modules   the model's own layers, called: for every model, with hooks, adapters, offload, quantised weights and all
fused     the same with projections of one input in one matrix (:mod:`open_mythos.generation.fused`)
graph     on CUDA: fused, over a cache of fixed size, in a captured graph (:mod:`open_mythos.generation.graph`)
native    on a CPU in float32: a whole token in one call of C code, which the machine's compiler makes
========  ===========================================================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from open_mythos.cache import KVCache
from open_mythos.context import AttentionMask, Context
from open_mythos.fields import must, nearest
from open_mythos.generation.fused import fuse, why_not_fused
from open_mythos.interface import Model
from open_mythos.nn.exits import Exit
from open_mythos.ops.dispatch import use_tf32

NAMES = ("auto", "modules", "fused", "graph", "native")
_reported: set[str] = set()


@dataclass(frozen=True)
class Depth:
    """How deep an engine runs every token.

    Args:
        n_loops: loops, or the most.
        exit: stops positions earlier; None if nothing does.
        cache_loops: slots that the loops share; see :class:`KVCache`.
    """

    n_loops: int
    exit: Exit | None = None
    cache_loops: int | None = None


class Engine(Protocol):
    """Tokens in, logits out, over a cache of its own.

    Attributes:
        cache: the tokens that were given so far.
        state: the last position's state after its last loop, (B, 1, dim).
    """

    cache: KVCache
    state: Tensor

    def extend(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read tokens (B, T), behind those of the cache: logits (B, vocab_size) of what follows."""

    def step(self, tokens: Tensor, first: Tensor | None = None) -> Tensor:
        """Read one token of each row, (B, 1), from the states ``first`` (B, 1, dim) on, if given: as :meth:`extend`."""

    def draft(self, tokens: Tensor, n_loops: int) -> Tensor:
        """As :meth:`step`, at fewer loops; :meth:`verify` then runs the others."""

    def verify(self) -> Tensor:
        """Logits (B, n, vocab_size) after all n tokens since the last call that were drafted, at full depth."""

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""


class ModuleEngine:
    """The model's own modules; those of a fused model are few and large.

    Args:
        model: in eval mode while it is used.
        depth: of every token.
        room: tokens to make room for in the cache.
        step_model: what computes tokens that come one by one, if it is another than reads prompts.
    """

    def __init__(self, model: Model, depth: Depth, room: int = 0, step_model: Model | None = None) -> None:
        self.model, self.depth, self.step_model = model, depth, step_model or model
        self.cache = KVCache(depth.cache_loops, room)
        use_tf32(model.embed.weight.device)
        self.state: Tensor
        self._drafted: list[tuple[Tensor, Tensor, Context]] = []
        self._draft_loops = 0

    @torch.no_grad()
    def extend(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h, ctx = self.model.states(
            ids, self.depth.n_loops, self.cache, attention_mask=attention_mask, exit=self.depth.exit
        )
        return self._logits(self.model, h, ctx)

    @torch.no_grad()
    def step(self, tokens: Tensor, first: Tensor | None = None) -> Tensor:
        model, depth = self.step_model, self.depth
        if depth.exit is not None and depth.exit.needs_predictions:
            h, ctx = self.model.states(tokens, depth.n_loops, self.cache, exit=depth.exit, first=first)
            return self._logits(self.model, h, ctx)
        e, ctx = self._encode(tokens)
        h = model.first_state(e, ctx) if first is None else first
        for state in model.recurrent.iterate(h, e, ctx, depth.n_loops, depth.exit):
            h = state.h
        return self._logits(model, h, ctx)

    @torch.no_grad()
    def draft(self, tokens: Tensor, n_loops: int) -> Tensor:
        e, ctx = self._encode(tokens)
        self._draft_loops = n_loops
        for state in self.step_model.recurrent.iterate(self.step_model.first_state(e, ctx), e, ctx, n_loops):
            h = state.h
        self._drafted.append((h, e, ctx))
        return self._logits(self.step_model, h, ctx)

    @torch.no_grad()
    def verify(self) -> Tensor:
        model, (states, inputs, contexts) = self.step_model, zip(*self._drafted, strict=True)
        self._drafted = []
        e, h, T = torch.cat(inputs, 1), torch.cat(states, 1), len(states)
        mask = AttentionMask(T, self.cache.length, self.cache.valid)
        ctx = replace(contexts[0], rotary=torch.cat([x.rotary for x in contexts], -2), mask=mask)
        for state in model.recurrent.iterate(h, e, ctx, self.depth.n_loops, first_loop=self._draft_loops):
            h = state.h
        self.state = h[:, -1:]
        return model.head(model.decode(h, ctx))

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Context]:
        """The encoded input of tokens that are known to fit."""
        (B, T), past, cache = tokens.shape, self.cache.length, self.cache
        if cache.valid is None:
            positions = torch.arange(past, past + T, device=tokens.device)
        else:
            cache.valid = torch.cat([cache.valid, cache.valid.new_ones(B, T)], 1)
            positions = (cache.valid.cumsum(1) - 1)[:, -T:]
        return self.step_model.encode_at(tokens, positions, AttentionMask(T, past + T, cache.valid), cache)

    def _logits(self, model: Model, h: Tensor, ctx: Context) -> Tensor:
        self.state = h[:, -1:]
        return model.head(model.decode(h, ctx, last=1)[:, -1])


@dataclass
class _Choice:
    """An engine by name: why it cannot serve, or how to make it."""

    why_not: Callable[[Model, Depth, bool], str | None]
    make: Callable[[Model, Depth, int], Engine]
    is_expected: Callable[[Model], bool] = field(default=lambda model: False)


def _native() -> Any:
    """The C engine's module; ImportError where it did not come along, as in a folder for transformers."""
    from open_mythos.generation.native import engine

    return engine


def _why_not_native(model: Model, depth: Depth, drafts: bool) -> str | None:
    try:
        return _native().why_not(model, depth, drafts)
    except ImportError as error:
        return f"it is not part of this installation ({error})"


def _graph() -> Any:
    from open_mythos.generation import graph

    return graph


_ENGINES: dict[str, _Choice] = {
    "native": _Choice(_why_not_native, lambda model, depth, room: _native().NativeEngine(model, depth, room)),
    "graph": _Choice(
        lambda model, depth, drafts: _graph().why_not(model, depth, drafts),
        lambda model, depth, room: _graph().GraphEngine(model, depth, room),
    ),
    "fused": _Choice(
        lambda model, depth, drafts: why_not_fused(model),
        lambda model, depth, room: ModuleEngine(model, depth, room, fuse(model)),
    ),
    "modules": _Choice(lambda model, depth, drafts: None, ModuleEngine),
}
"""From the fastest on."""


def check_engine(name: str, model: Model, depth: Depth, drafts: bool = False) -> None:
    """ValueError, saying what to change, unless there is an engine of this name and it serves."""
    must(name in NAMES, f"there is no engine {name!r}; {nearest(name, NAMES)}")
    if name != "auto" and (why := _ENGINES[name].why_not(model, depth, drafts)) is not None:
        raise ValueError(f"engine={name!r} cannot be had: {why}; use engine='auto', or change that")


def make_engine(name: str, model: Model, depth: Depth, room: int = 0, drafts: bool = False) -> Engine:
    """The engine of this name; for "auto" the fastest that serves. A missing compiler is reported, once.

    Args:
        name: of :data:`NAMES`.
        model: in eval mode while the engine is used.
        depth: of every token.
        room: tokens to make room for.
        drafts: whether tokens will be drafted.
    """
    if name != "auto":
        return _ENGINES[name].make(model, depth, room)
    for choice in _ENGINES.values():
        why = choice.why_not(model, depth, drafts)
        if why is None:
            return choice.make(model, depth, room)
        if why.startswith("no C compiler") and why not in _reported:
            _reported.add(why)
            logging.getLogger("open_mythos").warning("decoding goes slower than it could: %s", why)
    raise AssertionError("modules serve every model")
