"""A cache whose rows stand at different tokens and different loops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.cache import LOOPS_SLOT, CacheSlot, KVCache, core_slot, loop_slot
from open_mythos.ops.mask import CausalMask

_STILL_RUNS = 1 << 40  # the loop at which a token left that has not


class LaneMask(CausalMask):
    """One query a row, and rows of different lengths, which end together: the newest token is the last key of each.

    Unlike ``valid`` of a plain mask it says nothing of the new tokens, which are all real here.

    Args:
        real: (n, S) bool, False before a row's first token.
    """

    def __init__(self, real: Tensor) -> None:
        super().__init__(1, real.shape[1])
        self._real = real

    @property
    def real(self) -> Tensor:
        return self._real

    @property
    def is_plain(self) -> bool:
        return False

    def near(self, window: int, more: int) -> LaneMask:
        seen = self.real[:, -(window + more) :].clone()
        seen[:, :-window] = False
        return LaneMask(seen)

    def dense(self, device: torch.device) -> Tensor:
        return self.real[:, None, None]

    def band(self, key_positions: Tensor) -> Tensor:
        missing = max(0, key_positions.shape[-1] - self.n_keys)
        near = self.real[:, -key_positions.shape[-1] :].unsqueeze(1)
        return torch.nn.functional.pad(near, (missing, 0))


@dataclass
class Place:
    """Where n tokens stand, one of each of n lanes, and what each may look at; made by :meth:`LaneCache.place`.

    Attributes:
        write: (n, 1), where the token is, counted through all lanes.
        read: (n, S), where the tokens are that it may look at, itself the last; (n, 1) zeros stand for none.
        left_at: (n, S), the last loop that each of these has run.
        mask: of these queries and keys.
    """

    write: Tensor
    read: Tensor
    left_at: Tensor
    mask: CausalMask

    def select(self, rows: Tensor) -> Place:
        """Some of the n."""
        mask = LaneMask(self.mask.real[rows]) if isinstance(self.mask, LaneMask) else self.mask
        return Place(self.write[rows], self.read[rows], self.left_at[rows], mask)


class LaneSlot(CacheSlot):
    """Rows of one layer, or of all loops of the recurrent block: buffers (lanes, 1 + tokens, loops, ...).

    What stands before a lane's first token is read from its place 0, which is zeros.
    """

    def __init__(self, lanes: LaneCache, is_looped: bool) -> None:
        super().__init__()
        self._lanes, self._is_looped = lanes, is_looped

    def update(self, new: dict[str, Tensor], at: int | None = None) -> dict[str, Tensor]:
        """Write ``new`` rows, (n, 1, ...) each, and return what their tokens may look at, (n, S, ...).

        Where each stands, its lane knows; ``at`` plays no part.
        """
        place, loop = self._lanes.now
        write, read, found = place.write, place.read, {}
        if self._is_looped:
            assert loop is not None, "LaneCache.go_to says at which loops"
            write = torch.add(loop, write, alpha=self._lanes.depth)
            read = torch.add(torch.minimum(place.left_at, loop), read, alpha=self._lanes.depth)
        write, read = write.squeeze(1), read.flatten()
        for name, rows in new.items():
            flat = self.buffer(name, rows).flatten(0, 2)
            flat.index_copy_(0, write, rows.squeeze(1))
            found[name] = flat.index_select(0, read).unflatten(0, (len(rows), -1))
        return found

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """(lanes, 1 + tokens, loops, ...), made, or made larger, as the cache has become."""
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
    """Keys and values of ``n_lanes`` sequences, each at its own token and, with that, at its own loop.

    A token that left after fewer loops than a later one runs is read at the last loop that it had: this is looked up
    when it is read, and nothing is copied when it leaves.

    Args:
        n_lanes: sequences held at once.
        n_layers: of the recurrent block.
    """

    def __init__(self, n_lanes: int, n_layers: int = 1) -> None:
        super().__init__()
        self.n_lanes, self.n_layers, self.tokens, self.depth = n_lanes, n_layers, 0, 1
        self._left_at = torch.zeros(n_lanes, 1, dtype=torch.int64)  # the last loop of each token, (lanes, 1 + tokens)
        self._lane_slots: dict[str, LaneSlot] = {}
        self.now: tuple[Place, Tensor | None]

    def slot(self, name: str) -> LaneSlot:
        if name not in self._lane_slots:
            self._lane_slots[name] = LaneSlot(self, is_looped=name.startswith(LOOPS_SLOT))
        return self._lane_slots[name]

    def reserve(self, tokens: int, depth: int, device: torch.device) -> None:
        """Make room for sequences of so many tokens, at so many loops."""
        if depth > self.depth:
            self.depth = max(depth, 2 * self.depth)
        if tokens > self.tokens:
            grown = torch.full((self.n_lanes, tokens + 1), _STILL_RUNS, device=device)
            grown[:, : self.tokens + 1] = self._left_at.to(device)
            self.tokens, self._left_at = tokens, grown

    def fill(self, lane: int, prompt: KVCache, layers: Iterable[str], n_loops: int) -> None:
        """Let a lane hold what one row of an ordinary cache does, and nothing else.

        Args:
            lane: which; there is room.
            prompt: of one row, filled by one call.
            layers: its slots that are not of a loop.
            n_loops: that the call was allowed.
        """
        filled = [loop for loop in range(n_loops) if prompt.slot(loop_slot(loop)).batch_size]  # as deep as a token came
        self.reserve(prompt.length, len(filled), self._left_at.device)
        self._left_at[lane, 1:] = _STILL_RUNS
        self._left_at[lane, 1 : prompt.length + 1] = filled[-1]
        found = [(self.slot(name), 0, prompt.slot(name).rows) for name in layers]
        for layer in range(self.n_layers):
            slot = self.slot(core_slot(LOOPS_SLOT, layer))
            found += [(slot, loop, prompt.slot(core_slot(loop_slot(loop), layer)).rows) for loop in filled]
        for slot, loop, rows in found:
            for name, x in rows.items():
                slot.buffer(name, x)[lane, 1 : x.shape[1] + 1, loop] = x[0]

    def place(self, lanes: list[int], positions: list[int], reach: int | None = None) -> Place:
        """The place of tokens at ``positions`` of ``lanes``, n each, that see the ``reach`` last tokens, or all."""
        n_keys = min(max(positions) + 1, reach or max(positions) + 1)
        device = self._left_at.device
        lane, position = torch.tensor([lanes, positions], device=device).unsqueeze(-1)
        first = lane * (self.tokens + 1)
        tokens = (position + torch.arange(2 - n_keys, 2, device=device)).clamp_(min=0)
        read = tokens + first
        mask = CausalMask(1, n_keys) if min(positions) + 1 >= n_keys else LaneMask(tokens > 0)
        return Place(read[:, -1:], read, self._left_at.take(read), mask)

    def go_to(self, place: Place, loop: Tensor | None = None) -> None:
        """Let updates be of the tokens at ``place``; ``loop`` (n, 1) is the one that each runs, for ``LOOPS_SLOT``."""
        self.now = place, loop

    def leave(self, lanes: list[int], positions: list[int], loops: list[int]) -> None:
        """These tokens run no loop after these: whoever looks from deeper ones finds what they had there."""
        lane, position, loop = torch.tensor([lanes, positions, loops], device=self._left_at.device)
        self._left_at[lane, position + 1] = loop
