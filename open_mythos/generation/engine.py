"""The protocol of engines, and the one that works for every model: its own modules."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from open_mythos.cache import KVCache
from open_mythos.context import Context
from open_mythos.interface import Model
from open_mythos.nn.exits import Exit
from open_mythos.ops.attention import AttentionMask
from open_mythos.ops.dispatch import use_tf32


@dataclass(frozen=True)
class Depth:
    """How many loops an engine runs for every token.

    Args:
        n_loops: loops, or the maximum with an exit.
        exit: early-exit rule; None for a fixed number of loops.
        cache_loops: number of cache slots that the loops share; see :class:`KVCache`.
    """

    n_loops: int
    exit: Exit | None = None
    cache_loops: int | None = None


class Engine(Protocol):
    """Maps tokens to logits, with a cache of its own."""

    @property
    def cache(self) -> KVCache:
        """The cache of the tokens read so far."""

    @property
    def state(self) -> Tensor:
        """The last position's state after its last loop, (B, 1, dim)."""

    def extend(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read tokens (B, T) after those of the cache; logits (B, vocab_size) of the next token."""

    def step(self, tokens: Tensor, first: Tensor | None = None) -> Tensor:
        """As :meth:`extend`, for one token of each row, (B, 1); the loops start from ``first`` (B, 1, dim) if given."""

    def draft(self, tokens: Tensor, n_loops: int) -> Tensor:
        """As :meth:`step`, for the first ``n_loops`` loops only; :meth:`verify` then runs the rest."""

    def verify(self) -> Tensor:
        """Full-depth logits (B, n, vocab_size) after each of the n tokens drafted since the last call."""

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""


class ModuleEngine:
    """The engine that calls the modules of the model, or of a fused model with fewer and larger ones.

    Args:
        model: in eval mode while it is used.
        depth: how many loops each token runs.
        room: tokens to allocate in the cache.
        step_model: the model for single tokens, if not ``model``, which reads prompts.
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
        first = model.first_state(e, ctx) if first is None else first
        h = model.recurrent(first, e, ctx, n_loops=depth.n_loops, exit=depth.exit)
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
        tokens = -2 if contexts[0].rotary.is_complex() else -3  # the tokens' axis; compiled blocks have real pairs
        ctx = replace(contexts[0], rotary=torch.cat([x.rotary for x in contexts], tokens), mask=mask)
        for state in model.recurrent.iterate(h, e, ctx, self.depth.n_loops, first_loop=self._draft_loops):
            h = state.h
        self.state = h[:, -1:]
        return model.head(model.decode(h, ctx))

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Context]:
        """The encoded input and context of new tokens, unchecked: they are known to fit."""
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
