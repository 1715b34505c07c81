"""Continuous depth batching: sequences that are decoded together, each at its own token and its own loop.

In a plain batch every token waits for the slowest row's. Here a step runs one loop of the recurrent block for all rows,
whichever loop each is at. A row whose token has halted leaves, gives its next token and comes back at loop 0, while the
others go on (continuous batching as in Orca, OSDI 2022, with loops in place of tokens; for looped models
arXiv:2608.09444).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from open_mythos.cache import KVCache, coda_slot, prelude_slot
from open_mythos.generation.generate import check_lengths
from open_mythos.generation.lanes import LaneCache, Place
from open_mythos.generation.sampling import Sampling
from open_mythos.nn.exits import Exit, LoopState
from open_mythos.nn.modes import eval_mode
from open_mythos.nn.recurrent import check_n_loops
from open_mythos.ops.mask import CausalMask

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos


_COMPANY = 0.25
"""Rows that have left the loops go on once they are this share of all: prelude, coda and head take a small model about
as long for several rows as for one."""


@dataclass(eq=False)
class Request:
    """One sequence, from :meth:`DepthBatch.add`; ``tokens`` grows until it is ``done``.

    Attributes:
        prompt: (T,) token ids.
        max_new_tokens, n_loops, sampling, eos_token_id, generator: as :meth:`OpenMythos.generate_many`.
        tokens: made so far, with ``eos_token_id`` if it came.
        loops: run by each token that was fed in after the prompt.
        done: whether there will be no more.
    """

    prompt: Tensor
    max_new_tokens: int
    n_loops: int
    sampling: Sampling
    eos_token_id: int | None
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    done: bool = False


@dataclass(eq=False)
class _Row:
    """A request that is being decoded: its lane of the cache, and where its newest token is."""

    request: Request
    lane: int
    position: int
    loop: int = 0  # the next to run
    left_with: tuple[Tensor, Tensor] | None = None  # state (1, 1, dim) and freqs, once it has left the loops


class DepthBatch:
    """Decodes requests together, every row at its own depth; what a greedy request gets is what it gets alone.

    Args:
        model: in eval mode.
        exit: when a token stops looping; with None, when the gate says so if ``cfg.halting``, else after its last loop.
        max_rows: requests decoded at once; others wait.

    Raises:
        ValueError: for a model in training mode, and for an exit that reads predictions.
    """

    def __init__(self, model: OpenMythos, exit: Exit | None = None, max_rows: int = 32) -> None:
        if model.training:
            raise ValueError("the model is in training mode, where nothing halts; call model.eval() first")
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise ValueError(f"max_rows={max_rows!r}; use an integer of at least 1")
        self.exit = model.recurrent.choose_exit(exit)
        if self.exit is not None and self.exit.needs_predictions:
            raise ValueError(
                f"exit={self.exit} reads predictions, which rows at different loops do not make together; use Gate, "
                f"StateChange or Acceleration, or model.generate for a plain batch"
            )
        self.model = model
        cfg = model.cfg
        # How far back the recurrent block looks: if all its heads are local, a window, and what is convolved into it.
        local = cfg.n_local_heads == cfg.n_heads
        self._reach = cfg.local_window + max(0, cfg.conv_taps - 1) if local else None
        self._layers = [prelude_slot(i) for i in range(cfg.prelude_layers)]
        self._layers += [coda_slot(i) for i in range(cfg.coda_layers)]
        self._cache = LaneCache(max_rows, cfg.core_layers)
        self._free = list(reversed(range(max_rows)))
        self._queue: deque[Request] = deque()
        self._running: list[_Row] = []
        self._left: list[_Row] = []
        # Of the running rows: h, e, freqs, loop, and what the exit carries, (n, 1, ...) each; and where they are.
        self._state: tuple[Tensor, ...] = ()
        self._place: Place

    def add(
        self,
        prompt: Tensor,
        max_new_tokens: int = 64,
        n_loops: int | None = None,
        sampling: Sampling | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Request:
        """Queue a sequence; arguments as :meth:`OpenMythos.generate_many`, ``prompt`` (T,).

        Raises:
            ValueError: for a prompt, a length or a number of loops that does not fit the model.
        """
        if not isinstance(prompt, Tensor) or prompt.ndim != 1:
            what = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
            raise ValueError(f"prompt is {what}; pass a (tokens,) tensor of int64 or int32")
        check_lengths(self.model, prompt.unsqueeze(0), max_new_tokens)
        n_loops = check_n_loops(n_loops, self.model.cfg.max_loop_iters)
        request = Request(prompt, max_new_tokens, n_loops, sampling or Sampling(), eos_token_id, generator)
        if max_new_tokens == 0:
            request.done = True
        else:
            self._queue.append(request)
        return request

    @property
    def busy(self) -> bool:
        """Whether some request is not done."""
        return bool(self._queue or self._running or self._left)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Start what waits for a place, and run one loop of every row. Returns the requests that got a token."""
        served = []
        while self._queue and self._free:
            served.append(self._start(self._queue.popleft()))
        n_rows = len(self._left) + len(self._running)
        if self._left and len(self._left) >= _COMPANY * n_rows:
            served += [row.request for row in self._left]
            self._next_tokens()
        if self._running:
            self._loop()
        return served

    def _start(self, request: Request) -> Request:
        """Run the prompt through the model as it is; its last token's answer is the first new one."""
        cache, T = KVCache(), len(request.prompt)
        last = self.model.hidden(request.prompt.unsqueeze(0), request.n_loops, cache, exit=self.exit)[:, -1]
        token = int(request.sampling.draw(self.model.head(last), request.generator))
        if self._accept(request, token):
            row = _Row(request, self._free.pop(), T)
            self._cache.reserve(T + request.max_new_tokens, 1, last.device)
            self._cache.fill(row.lane, cache, self._layers, request.n_loops)
            self._enter([row])
        return request

    @staticmethod
    def _accept(request: Request, token: int) -> bool:
        """Note a new token; whether another one is wanted."""
        request.tokens.append(token)
        request.done = token == request.eos_token_id or len(request.tokens) == request.max_new_tokens
        return not request.done

    def _loop(self) -> None:
        """One loop of every running row, from which those that have halted leave."""
        rows, (h, e, freqs, loop, *carried) = self._running, self._state
        deepest = max(row.loop for row in rows)
        self._cache.reserve(0, deepest + 1, h.device)
        self._cache.go_to(self._place, loop)
        before, h = h, self.model.recurrent.step(h, e, loop, freqs, self._place.mask, self._cache)
        stops = [False] * len(rows)
        if self.exit is not None:
            state = LoopState(deepest, h, torch.ones_like(loop, dtype=torch.bool), before, self.model.recurrent.act)
            stopped, kept = self.exit.check(tuple(carried), state)
            stops, carried = stopped.squeeze(1).tolist(), list(kept)
        stay = []
        for i, row in enumerate(rows):
            row.loop += 1
            if stops[i] or row.loop == row.request.n_loops:
                row.left_with = h[i : i + 1], freqs[i : i + 1]
                self._left.append(row)
            else:
                stay.append(i)
        self._state = (h, e, freqs, loop + 1, *carried)
        if len(stay) < len(rows):
            self._running = [rows[i] for i in stay]
            at = torch.tensor(stay, dtype=torch.int64, device=h.device)
            self._state = tuple(x[at] for x in self._state)
            self._place = self._place.select(at)

    def _next_tokens(self) -> None:
        """Coda, head and choice of a token for the rows that have left the loops; those that go on enter them again."""
        rows, self._left = self._left, []
        lanes, positions = [row.lane for row in rows], [row.position for row in rows]
        self._cache.leave(lanes, positions, [row.loop - 1 for row in rows])
        left_with = [row.left_with for row in rows if row.left_with is not None]
        h, freqs = (torch.cat(parts) for parts in zip(*left_with, strict=True))
        mask = self._outside_loops(lanes, positions)
        logits = self.model.head(self.model.decode(h, freqs, mask, self._cache))[:, -1]
        on = []
        for row, token in zip(rows, self._draw(rows, logits), strict=True):
            row.request.loops.append(row.loop)
            if self._accept(row.request, token):
                row.position, row.loop = row.position + 1, 0
                on.append(row)
            else:
                self._free.append(row.lane)
        if on:
            self._enter(on)

    def _outside_loops(self, lanes: list[int], positions: list[int]) -> CausalMask:
        """Turn the cache to these tokens, for prelude and coda; the mask that they need."""
        if not self._layers:
            return CausalMask(1, 1)
        place = self._cache.place(lanes, positions)
        self._cache.go_to(place)
        return place.mask

    @staticmethod
    def _draw(rows: list[_Row], logits: Tensor) -> list[int]:
        """A token for each row of ``logits`` (n, vocab_size), as its request wants it drawn."""
        greedy = logits.argmax(-1).tolist()
        return [
            token if row.request.sampling.temperature == 0
            else int(row.request.sampling.draw(logits[i : i + 1], row.request.generator))
            for i, (row, token) in enumerate(zip(rows, greedy, strict=True))
        ]  # fmt: skip

    def _enter(self, rows: list[_Row]) -> None:
        """Run the prelude on the newest token of each row and put it before its first loop."""
        lanes, positions = [row.lane for row in rows], [row.position for row in rows]
        device = self.model.embed.weight.device
        ids = torch.tensor([[row.request.tokens[-1]] for row in rows], device=device)
        mask = self._outside_loops(lanes, positions)
        e, freqs = self.model.encode_at(ids, torch.tensor(positions, device=device).unsqueeze(1), mask, self._cache)
        h = self.model.first_state(e)
        new = (h, e, freqs, torch.zeros_like(ids), *(self.exit.init(h) if self.exit is not None else ()))
        if self._running:
            new = tuple(torch.cat(pair) for pair in zip(self._state, new, strict=True))
        self._running, self._state = self._running + rows, new
        self._place = self._cache.place(
            [row.lane for row in self._running], [row.position for row in self._running], self._reach
        )


def generate_many(
    model: OpenMythos,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    n_loops: int | Sequence[int] | None,
    sampling: Sampling,
    eos_token_id: int | None,
    generator: torch.Generator | None,
    exit: Exit | None,
    max_rows: int,
) -> list[Tensor]:
    """See :meth:`OpenMythos.generate_many`."""
    loops = list(n_loops) if isinstance(n_loops, Sequence) else [n_loops] * len(prompts)
    if len(loops) != len(prompts):
        raise ValueError(f"n_loops holds {len(loops)} numbers for {len(prompts)} prompts; give one for each, or one")
    with eval_mode(model):
        batch = DepthBatch(model, exit, max_rows)
        requests = [
            batch.add(prompt, max_new_tokens, count, sampling, eos_token_id, generator)
            for prompt, count in zip(prompts, loops, strict=True)
        ]
        while batch.busy:
            batch.step()
    return [torch.cat([done.prompt, done.prompt.new_tensor(done.tokens)]) for done in requests]
