"""Decoding on CUDA: one captured graph per token, over caches of fixed size, with the position in a tensor.

A loop of one token is some fifty small operations, whose launches take longer than their work on a GPU. A graph
launches all of them at once. It reads the weights in place, and is captured again when a cache buffer has grown.
"""

import torch
from torch import Tensor

from open_mythos.cache import CacheSlot, KVCache, Slot
from open_mythos.generation.engine import Depth, ModuleEngine
from open_mythos.generation.fused import fuse, why_not_fused
from open_mythos.interface import Model
from open_mythos.ops.attention import AttentionMask
from open_mythos.ops.dispatch import grouping_waits
from open_mythos.ops.experts import MAX_GATHERED


def why_not(model: Model, depth: Depth, drafts: bool) -> str | None:
    """Why tokens cannot be decoded by a graph; None if they can."""
    if model.embed.weight.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if drafts:
        return "a graph runs every token for all loops, but drafts do not"
    if depth.exit is not None:
        return f"a graph runs every token for all loops, but {depth.exit} stops some early"
    return why_not_fused(model)


class Place:
    """A token's indices into buffers of fixed size, computed once for all buffers.

    Args:
        at: (1,) its position: the tensor that captured graphs read.
    """

    def __init__(self, at: Tensor) -> None:
        self.at = at
        self._in_rings = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]()

    def in_ring(self, size: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices in the ring: (1,) its own, (n,) of those before it, (1, n, 1, 1) which of these do not exist."""
        if (size, n) not in self._in_rings:
            positions = self.at + torch.arange(-n, 1, device=self.at.device)
            before, own = (positions % size).split([n, 1])
            self._in_rings[size, n] = own, before, (positions[:n] < 0).view(1, n, 1, 1)
        return self._in_rings[size, n]


class FixedSlot:
    """A :class:`CacheSlot` with fixed buffers, read as a whole, and written at the index that a tensor holds."""

    def __init__(self, slot: CacheSlot, place: Place) -> None:
        assert slot._rows is not None
        self._rows, self._ring, self._place = slot._rows, slot._raw, place

    def raw_before(self, at: int, n: int) -> Tensor | None:
        if self._ring is None or n == 0:
            return None
        _, before, is_none = self._place.in_ring(self._ring.shape[1], n)
        return self._ring.index_select(1, before).masked_fill(is_none, 0)

    def update(self, rows: Tensor, raw: Tensor | None = None, at: int | None = None, n_raw: int = 0) -> Tensor:
        self._rows.index_copy_(1, self._place.at, rows)
        if raw is not None:
            assert self._ring is not None
            self._ring.index_copy_(1, self._place.in_ring(self._ring.shape[1], n_raw)[0], raw)
        return self._rows


class FixedCache:
    """All slots of a :class:`KVCache` as :class:`FixedSlot`, for one token of each row."""

    def __init__(self, cache: KVCache, at: Tensor) -> None:
        self.cache_loops, self._cache, self._place = cache.cache_loops, cache, Place(at)

    def open(self, slot: Slot | str, at: int, n_raw: int) -> tuple[FixedSlot, Tensor | None]:
        held = FixedSlot(self._cache.slot(slot), self._place)
        return held, held.raw_before(at, n_raw)


class GraphEngine(ModuleEngine):
    """:class:`ModuleEngine` that replays a graph for single tokens, unless computing one makes the host wait.

    Args:
        model, depth, room: as :class:`ModuleEngine`.
    """

    def __init__(self, model: Model, depth: Depth, room: int = 0) -> None:
        super().__init__(model, depth, room, fuse(model))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capacity = 0

    @torch.no_grad()
    def step(self, tokens: Tensor, first: Tensor | None = None) -> Tensor:
        if first is not None:
            return super().step(tokens, first)
        past, slots = self.cache.length, self.cache._slots.values()
        for slot in slots:
            slot._catch_up()
            assert slot._rows is not None
            slot._reserve(slot._rows, past + 1)
        capacity = min(slot._rows.shape[1] for slot in slots if slot._rows is not None)
        if capacity != self._capacity:
            self._open(tokens, capacity)
        self._tokens.copy_(tokens)
        self._at.fill_(past)
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        for slot in slots:
            slot.length = slot._written = past + 1
            slot._base = None
            if slot._raw is not None:
                slot._raw_start = max(slot._raw_start, past + 1 - slot._raw.shape[1])
        if self.cache.valid is not None:
            self.cache.valid = self._valid[:, : past + 1]
        self.state = self._state.clone()
        return self._logits_out.clone()

    def _open(self, tokens: Tensor, capacity: int) -> None:
        """Set up fixed buffers for ``capacity`` tokens, and on CUDA capture a graph over them."""
        self._capacity, self._tokens = capacity, tokens.clone()
        self._at = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        for slot in self.cache._slots.values():  # rows not yet written are read, and then masked
            assert slot._rows is not None
            slot._rows[:, slot.length :] = 0
        valid, self._padding = self.cache.valid, None
        if valid is not None:
            self._valid = torch.nn.functional.pad(valid, (0, capacity - valid.shape[1]), value=True)
            self._padding = (~valid).sum(1, keepdim=True)
        if tokens.device.type != "cuda" or self._waits(len(tokens)):
            return
        self._at.fill_(self.cache.length)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up: kernels and workspaces are chosen outside of the capture
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._compute()

    def _waits(self, rows: int) -> bool:
        """Whether the host waits for the device while a token is computed, which a captured graph must not do."""
        cfg = self.model.cfg
        is_grouped = cfg.n_experts > 1 and rows * cfg.n_experts_per_tok > MAX_GATHERED
        return is_grouped and grouping_waits(self.model.embed.weight)

    def _compute(self) -> None:
        """Compute one token of each row, at ``_at``, from fixed inputs into fixed outputs; only its own rows change."""
        model, B = self.step_model, len(self._tokens)
        valid = None if self._padding is None else self._valid
        at = self._at.expand(B, 1)
        mask = AttentionMask(1, self._capacity, positions=at, first=0)
        rotary_at = self._at if self._padding is None else at - self._padding
        if valid is not None:
            mask = AttentionMask(1, self._capacity, valid, positions=at, first=0)
        e, ctx = model.encode_at(self._tokens, rotary_at, mask, FixedCache(self.cache, self._at))
        h = model.first_state(e, ctx)
        for state in model.recurrent.iterate(h, e, ctx, self.depth.n_loops):
            h = state.h
        self._state = h
        self._logits_out = model.head(model.decode(h, ctx)[:, -1])
