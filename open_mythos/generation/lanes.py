"""A cache whose rows stand at different tokens and different loops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from open_mythos.cache import CacheSlot, KVCache, Slot, loop_slot
from open_mythos.ops.attention import AttentionMask

_STILL_RUNS = 1 << 40  # stands for the last loop of a token that has not retired


@dataclass
class Place:
    """Buffer indices of n tokens, one of each of n lanes, and of what each attends to; see :meth:`LaneCache.place`.

    Attributes:
        write: (n, 1), flat index of the token, counted through all lanes.
        read: (n, S), flat indices of the tokens that it may attend to, itself the last; place 0 of its lane for none.
        retired_at: (n, S), the last loop that each of these has run.
        ring: (n, K), flat indices of the raw rows of the token and of those before it, the token's own last.
        ring_retired_at: (n, K), the last loop that each of these has run.
        mask: attention mask of these queries and keys.
    """

    write: Tensor
    read: Tensor
    retired_at: Tensor
    ring: Tensor
    ring_retired_at: Tensor
    mask: AttentionMask

    def select(self, rows: Tensor) -> Place:
        """The place of some of the n tokens."""
        mask = self.mask if self.mask.valid is None else replace(self.mask, valid=self.mask.valid[rows])
        tensors = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, mask=mask, **tensors)


class LaneSlot(CacheSlot):
    """Rows of one layer, or of all loops of a layer of the core: a buffer (lanes, 1 + tokens, loops, G, W).

    Place 0 of a lane is zeros, and is read for positions before its first token. Raw rows are in a ring for each lane,
    (lanes, 1 + K, loops, G, W), whose place 0 is zeros too.
    """

    def __init__(self, lanes: LaneCache, is_looped: bool) -> None:
        super().__init__()
        self._lanes, self._is_looped = lanes, is_looped
        self._ring: Tensor | None = None

    def raw_before(self, at: int, n: int) -> Tensor | None:
        """The ``n`` raw rows before each lane's token, (lanes, n, G, W); positions are the cache's, not ``at``."""
        place, loop = self._lanes.now
        if n == 0 or self._ring is None:
            return None
        self._ring = self._grown(self._ring, self._lanes.n_raw + 1)
        return self._gathered(self._ring, place.ring[:, :-1], place.ring_retired_at[:, :-1], loop)

    def update(self, rows: Tensor, raw: Tensor | None = None, at: int | None = None, n_raw: int = 0) -> Tensor:
        """Write ``rows`` (n, 1, G, W) and return the rows that their tokens may attend to, (n, S, G, W)."""
        place, loop = self._lanes.now
        if raw is not None:
            self.raw_buffer(raw)
            assert self._ring is not None
            self._scatter(self._ring, place.ring[:, -1:], raw, loop)
        buffer = self.buffer(rows)
        self._scatter(buffer, place.write, rows, loop)
        return self._gathered(buffer, place.read, place.retired_at, loop)

    def buffer(self, like: Tensor) -> Tensor:
        """The buffer of rows, grown to the current size of the cache."""
        self._rows = self._grown(self._rows, self._lanes.tokens, like)
        return self._rows

    def raw_buffer(self, like: Tensor) -> Tensor:
        """The ring buffer of raw rows, likewise."""
        self._ring = self._grown(self._ring, self._lanes.n_raw + 1, like)
        return self._ring

    def _grown(self, old: Tensor | None, tokens: int, like: Tensor | None = None) -> Tensor:
        shape = self._lanes.n_lanes, tokens + 1, self._lanes.depth if self._is_looped else 1
        if old is not None and old.shape[:3] == shape:
            return old
        like = old[:, :, 0] if old is not None else like
        assert like is not None
        grown = like.new_empty(*shape, *like.shape[2:])  # only place 0 is read without having been written
        grown[:, 0] = 0
        if old is not None:
            grown[:, : old.shape[1], : old.shape[2]] = old
        return grown

    def _scatter(self, buffer: Tensor, at: Tensor, rows: Tensor, loop: Tensor | None) -> None:
        at = at if not self._is_looped else torch.add(loop, at, alpha=self._lanes.depth)  # type: ignore[arg-type]
        buffer.flatten(0, 2).index_copy_(0, at.squeeze(1), rows.squeeze(1))

    def _gathered(self, buffer: Tensor, at: Tensor, retired_at: Tensor, loop: Tensor | None) -> Tensor:
        if self._is_looped:
            assert loop is not None, "LaneCache.go_to says at which loops"
            at = torch.add(torch.minimum(retired_at, loop), at, alpha=self._lanes.depth)
        return buffer.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, at.shape)


class LaneCache(KVCache):
    """Keys and values of ``n_lanes`` sequences, each at its own token and, in that token, at its own loop.

    If a token retired after fewer loops than a later one runs, the later one reads the rows of its last loop: these are
    looked up when they are read, and nothing is copied when a token retires.

    Args:
        n_lanes: sequences held at once.
        n_layers: number of layers of the recurrent block.
        n_raw: how many raw rows before its own a token's convolution reads.
    """

    def __init__(self, n_lanes: int, n_layers: int = 1, n_raw: int = 0) -> None:
        super().__init__()
        self.n_lanes, self.n_layers, self.n_raw, self.tokens, self.depth = n_lanes, n_layers, n_raw, 0, 1
        self._retired_at = torch.zeros(n_lanes, 1, dtype=torch.int64)  # the last loop of each token
        self._lane_slots: dict[Slot | str, LaneSlot] = {}
        self.now: tuple[Place, Tensor | None]

    def slot(self, slot: Slot | str) -> LaneSlot:
        if slot not in self._lane_slots:
            is_looped = isinstance(slot, Slot) and slot.part == "loops"
            self._lane_slots[slot] = LaneSlot(self, is_looped)
        return self._lane_slots[slot]

    def reserve(self, tokens: int, depth: int, device: torch.device) -> None:
        """Make room for sequences of up to ``tokens`` tokens and ``depth`` loops."""
        if depth > self.depth:
            self.depth = max(depth, 2 * self.depth)
        if tokens > self.tokens:
            grown = torch.full((self.n_lanes, tokens + 1), _STILL_RUNS, device=device)
            grown[:, : self.tokens + 1] = self._retired_at.to(device)
            self.tokens, self._retired_at = tokens, grown

    def fill(self, lane: int, prompt: KVCache, layers: Iterable[Slot], n_loops: int) -> None:
        """Fill a lane with the content of an ordinary cache of one row, replacing what it held.

        Args:
            lane: index of the lane; it has room for the prompt.
            prompt: a cache of one row, filled by one call.
            layers: the slots of prelude and coda.
            n_loops: maximum number of loops of that call.
        """
        filled = [loop for loop in range(n_loops) if prompt.slot(loop_slot(loop)).batch_size]  # loops that were run
        length = prompt.length
        self.reserve(length, len(filled), self._retired_at.device)
        self._retired_at[lane, 1:] = _STILL_RUNS
        self._retired_at[lane, 1 : length + 1] = filled[-1]
        slots = [(self.slot(name), 0, prompt.slot(name)) for name in layers]
        for layer in range(self.n_layers):
            slot = self.slot(Slot("loops", layer))
            slots += [(slot, loop, prompt.slot(loop_slot(loop, layer=layer))) for loop in filled]
        for slot, loop, held in slots:
            slot.buffer(held.rows)[lane, 1 : length + 1, loop] = held.rows[0]
            if self.n_raw and (raw := held.raw_before(length, min(length, self.n_raw))) is not None:
                places = torch.arange(length - raw.shape[1], length, device=raw.device) % (self.n_raw + 1) + 1
                slot.raw_buffer(raw)[lane, places, loop] = raw[0]

    def place(self, lanes: list[int], positions: list[int], reach: int | None = None) -> Place:
        """The :class:`Place` of n tokens at ``positions`` of ``lanes``, which see the last ``reach`` tokens, or all."""
        n_keys, device = min(max(positions) + 1, reach or max(positions) + 1), self._retired_at.device
        lane, position = torch.tensor([lanes, positions], device=device).unsqueeze(-1)
        first = lane * (self.tokens + 1)
        tokens = (position + torch.arange(2 - n_keys, 2, device=device)).clamp_(min=0)
        read = tokens + first
        valid = None if min(positions) + 1 >= n_keys else tokens > 0
        before = (position + torch.arange(1 - self.n_raw, 2, device=device)).clamp_(min=0)
        ring = torch.where(before > 0, (before - 1) % (self.n_raw + 1) + 1, 0) + lane * (self.n_raw + 2)
        return Place(
            read[:, -1:], read, self._retired_at.take(read), ring, self._retired_at.take(before + first),
            AttentionMask(1, n_keys, valid),
        )  # fmt: skip

    def go_to(self, place: Place, loop: Tensor | None = None) -> None:
        """Set the tokens that the next updates are for; ``loop`` (n, 1) is the loop that each of them runs."""
        self.now = place, loop

    def retire(self, lanes: list[int], positions: list[int], loops: list[int]) -> None:
        """Record the last loop of tokens that stopped: at deeper loops, later tokens read their rows of that loop."""
        lane, position, loop = torch.tensor([lanes, positions, loops], device=self._retired_at.device)
        self._retired_at[lane, position + 1] = loop
