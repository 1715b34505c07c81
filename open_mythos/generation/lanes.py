"""A cache whose rows stand at different tokens and different loops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.cache import LOOPS_SLOT, CacheSlot, KVCache, loop_slot
from open_mythos.ops.attention import CausalMask

_NOT_YET = 1 << 40  # loop at which a token left that still runs


@dataclass
class Place:
    """Where the newest token of each of n lanes is written, and where what it may look at is read."""

    write: Tensor  # (n,) in a buffer's flat (lanes * tokens * loops)
    read: Tensor  # (n * S,)


class LaneSlot(CacheSlot):
    """Rows of one layer, or of all loops of the recurrent block: buffers (lanes, 1 + tokens, loops, ...).

    What stands before a lane's first token is read from its place 0, which is zeros.
    """

    def __init__(self, lanes: LaneCache, is_looped: bool) -> None:
        super().__init__()
        self._lanes, self._is_looped = lanes, is_looped

    def update(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``new`` rows, (n, 1, ...) each, and return what their tokens may look at, (n, S, ...)."""
        place, found = self._lanes.place, {}
        assert place is not None, "LaneCache.at says where"
        for name, rows in new.items():
            flat = self.buffer(name, rows).flatten(0, 2)
            flat.index_copy_(0, place.write, rows.squeeze(1))
            found[name] = flat.index_select(0, place.read).unflatten(0, (len(rows), -1))
        return found

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """(lanes, 1 + tokens, loops, ...), made or made larger as the cache has become."""
        shape = (self._lanes.n_lanes, self._lanes.tokens + 1, self._lanes.depth if self._is_looped else 1)
        old = self._buffers.get(name)
        if old is not None and old.shape[:3] == shape:
            return old
        grown = like.new_empty(*shape, *like.shape[2:])  # nothing is read that has not been written, but place 0
        grown[:, 0] = 0
        if old is not None:
            grown[:, : old.shape[1], : old.shape[2]] = old
        self._buffers[name] = grown
        return grown


class LaneCache(KVCache):
    """Keys and values of ``n_lanes`` sequences, each at its own token and, within it, at its own loop.

    A token that left after fewer loops than a later one runs is read at the last loop that it had: that is looked up
    at reading, nothing is copied when a token leaves.

    Args:
        n_lanes: sequences held at once.
    """

    def __init__(self, n_lanes: int) -> None:
        super().__init__()
        self.n_lanes, self.tokens, self.depth = n_lanes, 0, 1
        self.place: Place | None = None
        self._lane_slots: dict[str, LaneSlot] = {}
        self._left_at = torch.empty(n_lanes, 1, dtype=torch.int64)  # the last loop of each token, (lanes, 1 + tokens)

    def slot(self, name: str) -> LaneSlot:
        if name not in self._lane_slots:
            self._lane_slots[name] = LaneSlot(self, is_looped=name == LOOPS_SLOT)
        return self._lane_slots[name]

    def reserve(self, tokens: int, device: torch.device) -> None:
        """Make room for sequences of so many tokens."""
        if tokens > self.tokens:
            grown = torch.full((self.n_lanes, tokens + 1), _NOT_YET, device=device)
            grown[:, : self.tokens + 1] = self._left_at.to(device)
            grown[:, 0] = 0
            self.tokens, self._left_at = tokens, grown

    def fill(self, lane: int, prompt: KVCache, layers: Iterable[str], n_loops: int) -> None:
        """Let a lane hold what one row of an ordinary cache does, and nothing else.

        Args:
            lane: which.
            prompt: of one row, filled by one call.
            layers: its slots that are not of a loop.
            n_loops: that the call was allowed.
        """
        found = [(self.slot(name), 0, prompt.slot(name).rows) for name in layers]
        for loop in range(n_loops):
            if prompt.slot(loop_slot(loop)).batch_size == 0:  # no token came that deep
                break
            self._deepen(loop + 1)
            found.append((self.slot(LOOPS_SLOT), loop, prompt.slot(loop_slot(loop)).rows))
            deepest = loop
        self._left_at[lane, 1 : prompt.length + 1] = deepest
        self._left_at[lane, prompt.length + 1 :] = _NOT_YET
        for slot, loop, rows in found:
            for name, x in rows.items():
                slot.buffer(name, x)[lane, 1 : x.shape[1] + 1, loop] = x[0]

    def at(
        self, lanes: list[int], positions: list[int], loops: list[int] | None = None, reach: int | None = None
    ) -> CausalMask:
        """Say where the next updates write, one token of each of ``lanes``, and what its queries may look at.

        Args:
            lanes: n of them.
            positions: of each one's token.
            loops: of each one's token, for updates of ``LOOPS_SLOT``; None for those of other slots.
            reach: how many last tokens are looked at, at most; None for all.
        """
        n_keys = min(max(positions) + 1, reach or max(positions) + 1)
        device = self._left_at.device
        lane, place, loop = torch.tensor([lanes, positions, loops or lanes], device=device).unsqueeze(-1)
        keys = (place + torch.arange(2 - n_keys, 2, device=device)).clamp_(min=0)
        first = lane * (self.tokens + 1)
        read, write = keys + first, place + 1 + first
        if loops is not None:
            self._deepen(max(loops) + 1)
            read = torch.add(torch.minimum(self._left_at.take(read), loop), read, alpha=self.depth)
            write = torch.add(loop, write, alpha=self.depth)
        self.place = Place(write.squeeze(1), read.flatten())
        return CausalMask(1, n_keys, keys > 0 if min(positions) + 1 < n_keys else None)

    def leave(self, lanes: list[int], positions: list[int], loops: list[int]) -> None:
        """These tokens run no loop after these: whoever looks from deeper ones finds what they had there."""
        lane, place, loop = torch.tensor([lanes, positions, loops], device=self._left_at.device)
        self._left_at[lane, place + 1] = loop

    def _deepen(self, depth: int) -> None:
        if depth > self.depth:
            self.depth = max(depth, 2 * self.depth)
