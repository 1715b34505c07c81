"""Continuous depth batching: sequences that are decoded together, each at its own token and its own loop.

In a plain batch every token waits for the slowest row's. Here a step runs one loop of the recurrent block for all rows,
whichever loop each is at. A row whose token has halted leaves the batch, computes its next token and comes back at loop
0, while the others go on (continuous batching as in Orca, OSDI 2022, with loops in place of tokens; for looped models
arXiv:2608.09444).
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from open_mythos.arguments import checked
from open_mythos.cache import Slot
from open_mythos.context import Context
from open_mythos.fields import must
from open_mythos.generation.engine import Depth, ModuleEngine
from open_mythos.generation.finite import not_finite
from open_mythos.generation.fused import fuse, why_not_fused
from open_mythos.generation.lanes import LaneCache, Place
from open_mythos.generation.sampling import Sampling, random_state
from open_mythos.inputs import check_generator, check_lengths, check_n_loops, end_tokens
from open_mythos.interface import Model
from open_mythos.nn.exits import Exit
from open_mythos.nn.modes import evaluating, is_evaluating
from open_mythos.nn.recurrent import LoopInput, advance
from open_mythos.ops.attention import AttentionMask

MIN_FINISHED_FRACTION = 0.25
"""Run coda, head and sampling only when this fraction of rows has finished looping, to amortise their fixed cost."""


@dataclass(eq=False)
class Request:
    """One sequence, from :meth:`DepthBatch.add`; ``tokens`` grows until it is ``done``.

    Attributes:
        prompt: (T,) token ids.
        max_new_tokens, n_loops, sampling, generator: as :meth:`OpenMythos.generate_many`.
        ends: tokens that end it.
        tokens: new tokens so far, including the one that ended it.
        loops: number of loops of each token that was fed in after the prompt.
        done: whether there will be no more tokens.
        error: why the request ended early, if it did.
    """

    prompt: Tensor
    max_new_tokens: int
    n_loops: int
    sampling: Sampling
    ends: tuple[int, ...]
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    done: bool = False
    error: ValueError | None = None


@dataclass(eq=False)
class _Row:
    """A request that is being decoded: its lane of the cache, and where its newest token is.

    Attributes:
        loop: the next loop to run.
        finished: its state (1, 1, dim) and rotary phasors, once it has finished looping.
    """

    request: Request
    lane: int
    position: int
    loop: int = 0
    finished: tuple[Tensor, Tensor] | None = None


class DepthBatch:
    """Decodes requests together, every row at its own loop; greedy tokens are those that a request gets alone.

    Args:
        model: in eval mode.
        exit: the early-exit rule; with None, the gate if ``cfg.halting``, else none.
        max_rows: most requests decoded at once; others wait.

    Raises:
        ValueError: for a model in training mode, and for an exit that reads predictions.
    """

    @checked
    def __init__(self, model: Model, exit: Exit | None = None, max_rows: int = 32) -> None:
        must(
            not model.training or is_evaluating(),
            "the model is in training mode, where nothing halts; call model.eval() first",
        )
        must(max_rows >= 1, f"max_rows={max_rows!r}; use an integer of at least 1")
        self.exit = model.recurrent.choose_exit(exit)
        must(
            self.exit is None or not self.exit.needs_predictions,
            f"exit={self.exit} reads predictions, which rows at different loops cannot make together; use Gate, "
            f"StateChange or Acceleration, or model.generate for a plain batch",
        )
        self.model = model
        self._steps = model if why_not_fused(model) else fuse(model)  # the model for single tokens
        cfg = model.cfg
        # How many tokens the recurrent block attends to, if all its heads are local.
        self._reach = cfg.local_window if cfg.n_local_heads == cfg.n_heads else None
        self._layers = [Slot("prelude", i) for i in range(cfg.prelude_layers)]
        self._layers += [Slot("coda", i) for i in range(cfg.coda_layers)]
        self._lanes = max_rows, cfg.core_layers, max(cfg.conv_taps - 1, 0)
        self._queue: deque[Request] = deque()
        self._forget()
        # Of the running rows, (n, 1, ...) each: h, rotary phasors, loop, the input of all loops, the exit's state.
        self._state: tuple[Tensor, Tensor, Tensor, LoopInput, tuple[Tensor, ...]]
        self._place: Place

    def _forget(self) -> None:
        """Drop all rows and the cache."""
        self._cache = LaneCache(*self._lanes)
        self._free = list(reversed(range(self._cache.n_lanes)))
        self._running: list[_Row] = []
        self._finished: list[_Row] = []

    @checked
    def add(
        self, prompt: Tensor, max_new_tokens: int = 64, n_loops: int | None = None, sampling: Sampling | None = None,
        eos_token_id: int | tuple[int, ...] | None = None, generator: torch.Generator | None = None,
    ) -> Request:  # fmt: skip
        """Queue a sequence; arguments as :meth:`OpenMythos.generate_many`, ``prompt`` (T,).

        Raises:
            ValueError: for a prompt, a length or a number of loops that does not fit the model.
        """
        cfg = self.model.cfg
        must(prompt.ndim == 1, f"prompt is {tuple(prompt.shape)}; pass a (tokens,) tensor of int64 or int32")
        check_lengths(cfg, prompt.unsqueeze(0), max_new_tokens, "prompt as input_ids")
        n_loops, ends = check_n_loops(n_loops, cfg.max_loop_iters), end_tokens(eos_token_id, cfg.vocab_size)
        check_generator(generator, prompt.device)
        request = Request(prompt, max_new_tokens, n_loops, sampling or Sampling(), ends, generator)
        if max_new_tokens == 0:
            request.done = True
        else:
            self._queue.append(request)
        return request

    @property
    def busy(self) -> bool:
        """Whether some request is not done."""
        return bool(self._queue or self._running or self._finished)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Start requests that fit, and run one loop of every row. Returns the requests that got a token.

        If a step is interrupted, all requests are restored to their state before it, and the next step continues.

        Raises:
            ValueError: if the logits of a request are not finite. It is ``done``, with this ``error``; others go on.
        """
        rows = [row.request for row in (*self._finished, *self._running)]
        rows += itertools.islice(self._queue, len(self._free))
        before = [(r, len(r.tokens), len(r.loops), random_state(r.generator, r.prompt.device)) for r in rows]
        try:
            return self._step(rows)
        except BaseException as error:
            if any(error is request.error for request in rows):
                raise
            self._forget()
            self._queue = deque([*rows, *(request for request in self._queue if request not in rows)])
            for request, n_tokens, n_loops, put_back in before:
                del request.tokens[n_tokens:], request.loops[n_loops:]
                request.done, request.error = False, None
                put_back()
            raise

    def _step(self, requests: list[Request]) -> list[Request]:
        served = []
        for _ in range(min(len(self._queue), len(self._free))):  # those in ``requests``, even if some end at once
            request = self._queue.popleft()
            served += [request] * self._start(request)
        n_rows = len(self._finished) + len(self._running)
        if self._finished and len(self._finished) >= MIN_FINISHED_FRACTION * n_rows:
            served += [row.request for row in self._finished]
            self._next_tokens()
        if self._running:
            self._loop()
        for request in requests:
            if request.error is not None:
                raise request.error
        return served

    def _start(self, request: Request) -> bool:
        """Read the prompt, draw the first new token, and add the row to the batch; return whether there is a new token.

        A request that was interrupted already has tokens; these are read too, and decoding goes on from the last.
        """
        engine, is_new = ModuleEngine(self.model, Depth(request.n_loops, self.exit)), not request.tokens
        text = torch.cat([request.prompt, request.prompt.new_tensor(request.tokens[:-1])])
        logits = engine.extend(text.unsqueeze(0))
        if not is_new or self._accept(request, self._draw([request], logits)[0]):
            row = _Row(request, self._free.pop(), len(text))
            self._cache.reserve(len(request.prompt) + request.max_new_tokens, 1, engine.state.device)
            self._cache.fill(row.lane, engine.cache, self._layers, request.n_loops)
            self._enter([row])
        return is_new

    def _accept(self, request: Request, token: int | None) -> bool:
        """Append a new token, or set the error if it is None; return whether the request goes on."""
        if token is None:
            depth, text = Depth(request.n_loops, self.exit), [*request.prompt.tolist(), *request.tokens]
            request.error = not_finite(self.model, depth, [request.prompt.new_tensor(text).unsqueeze(0)])
            request.done = True
            return False
        request.tokens.append(token)
        request.done = token in request.ends or len(request.tokens) == request.max_new_tokens
        return not request.done

    def _loop(self) -> None:
        """Run one loop of every running row; rows that halt, or have run all their loops, become finished."""
        rows, (h, rotary, loop, e, carried) = self._running, self._state
        self._cache.reserve(0, max(row.loop for row in rows) + 1, h.device)
        self._cache.go_to(self._place, loop)
        ctx = Context(rotary, self._place.mask, self._cache)
        h, stopped, carried = advance(self._steps.recurrent, h, e, loop, ctx, self.exit, carried)
        stops = [False] * len(rows) if stopped is None else stopped.squeeze(1).tolist()
        stay = []
        for i, row in enumerate(rows):
            row.loop += 1
            if stops[i] or row.loop == row.request.n_loops:
                row.finished = h[i : i + 1], rotary[i : i + 1]
                self._finished.append(row)
            else:
                stay.append(i)
        self._state = h, rotary, loop + 1, e, carried
        if len(stay) < len(rows):
            self._running = [rows[i] for i in stay]
            at = torch.tensor(stay, dtype=torch.int64, device=h.device)
            h, rotary, loop, e, carried = self._state
            self._state = h[at], rotary[at], loop[at], e.map(lambda x: x[at]), tuple(x[at] for x in carried)
            self._place = self._place.select(at)

    def _next_tokens(self) -> None:
        """Run coda and head and draw a token for the finished rows; rows that go on enter the loops again."""
        rows, self._finished = self._finished, []
        lanes, positions = [row.lane for row in rows], [row.position for row in rows]
        self._cache.retire(lanes, positions, [row.loop - 1 for row in rows])
        h, rotary = (torch.cat(parts) for parts in zip(*(row.finished for row in rows if row.finished), strict=True))
        ctx = Context(rotary, self._outside_loops(lanes, positions), self._cache)
        logits = self.model.head(self._steps.decode(h, ctx))[:, -1]
        on = []
        for row, token in zip(rows, self._draw([row.request for row in rows], logits), strict=True):
            row.request.loops.append(row.loop)
            if self._accept(row.request, token):
                row.position, row.loop = row.position + 1, 0
                on.append(row)
            else:
                self._free.append(row.lane)
        if on:
            self._enter(on)

    def _outside_loops(self, lanes: list[int], positions: list[int]) -> AttentionMask:
        """Set the cache to these tokens for prelude and coda, and return their mask."""
        if not self._layers:
            return AttentionMask(1, 1)
        place = self._cache.place(lanes, positions)
        self._cache.go_to(place)
        return place.mask

    @staticmethod
    def _draw(requests: list[Request], logits: Tensor) -> list[int | None]:
        """A token for each row of ``logits`` (n, vocab_size), drawn as its request says; None if not finite."""
        greedy, finite = torch.stack([logits.argmax(-1), logits.amax(-1).isfinite()]).tolist()
        return [
            None if not fine
            else token if request.sampling.temperature == 0
            else int(request.sampling.draw(logits[i : i + 1], request.generator))
            for i, (request, token, fine) in enumerate(zip(requests, greedy, finite, strict=True))
        ]  # fmt: skip

    def _enter(self, rows: list[_Row]) -> None:
        """Run the prelude on the newest token of each row, and add the rows to those that run loops."""
        lanes, positions = [row.lane for row in rows], [row.position for row in rows]
        device = self.model.embed.weight.device
        ids = torch.tensor([[row.request.tokens[-1]] for row in rows], device=device)
        mask, at = self._outside_loops(lanes, positions), torch.tensor(positions, device=device).unsqueeze(1)
        e, ctx = self._steps.encode_at(ids, at, mask, self._cache)
        h, loop_input = self.model.first_state(e, ctx), self._steps.recurrent.prepare(e)
        carried = () if self.exit is None else self.exit.init(h)
        new: tuple[Any, ...] = h, ctx.rotary, torch.zeros_like(ids), loop_input, carried
        self._state = tuple(map(_joined, self._state, new)) if self._running else new
        self._running = self._running + rows
        self._place = self._cache.place(
            [row.lane for row in self._running], [row.position for row in self._running], self._reach
        )


def _joined(old: Any, new: Any) -> Any:
    """The rows of two batches, concatenated; in tensors or in tuples of them."""
    if isinstance(old, LoopInput):
        e, injected, low_rank = (
            None if x is None else torch.cat([x, y]) for x, y in zip(old[:3], new[:3], strict=True)
        )
        return new._replace(e=e, injected=injected, low_rank=low_rank)
    if isinstance(old, tuple):
        return tuple(torch.cat(pair) for pair in zip(old, new, strict=True))
    return torch.cat([old, new])


def generate_many(
    model: Model, prompts: Sequence[Tensor], n_loops: int | Sequence[int] | None, exit: Exit | None, max_rows: int,
    **request: Any,
) -> list[Tensor]:  # fmt: skip
    """See :meth:`OpenMythos.generate_many`; ``request`` holds further arguments of :meth:`DepthBatch.add`."""
    loops = list(n_loops) if isinstance(n_loops, Sequence) else [n_loops] * len(prompts)
    if len(loops) != len(prompts):
        raise ValueError(
            f"n_loops has {len(loops)} numbers for {len(prompts)} prompts; give one for each, or a single one"
        )

    def run() -> list[Request]:
        batch = DepthBatch(model, exit, max_rows)
        requests = [batch.add(prompt, n_loops=count, **request) for prompt, count in zip(prompts, loops, strict=True)]
        while batch.busy:
            batch.step()
        return requests

    requests = evaluating(model, run)
    return [torch.cat([done.prompt, done.prompt.new_tensor(done.tokens)]) for done in requests]
