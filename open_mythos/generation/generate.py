"""Prefill once, then decode: one token at a time, or drafted ahead."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from open_mythos.arguments import checked
from open_mythos.cache import KVCache
from open_mythos.fields import must, nearest
from open_mythos.generation.engine import Depth, Engine
from open_mythos.generation.engines import check_engine, make_engine
from open_mythos.generation.finite import not_finite
from open_mythos.generation.sampling import Sampling, Undrawn
from open_mythos.generation.speculative import Draft, drafted
from open_mythos.inputs import check_generator, check_left_padding, check_lengths, check_n_loops, end_tokens
from open_mythos.interface import Model
from open_mythos.nn.exits import Exit
from open_mythos.nn.modes import evaluating

ROOM = 512  # most new tokens that a cache is allocated for at first


class _Watched:
    """An engine that checks its logits, and raises an error if they are not finite.

    On CUDA nothing waits for the check: its result is read when it has arrived, a token or so later, and at the end.

    Args:
        engine, model, depth: the engine, and the arguments that it was made with.
    """

    def __init__(self, engine: Engine, model: Model, depth: Depth) -> None:
        self._engine, self._model, self._depth = engine, model, depth
        self._text: list[Tensor] = []
        self._mask: Tensor | None = None
        self._pending: deque[tuple[Any, Tensor]] = deque()

    @property
    def cache(self) -> KVCache:
        return self._engine.cache

    @property
    def state(self) -> Tensor:
        return self._engine.state

    def extend(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self._text, self._mask = [ids], attention_mask
        return self._seen(self._engine.extend(ids, attention_mask))

    def step(self, tokens: Tensor, first: Tensor | None = None) -> Tensor:
        self._text.append(tokens)
        return self._seen(self._engine.step(tokens, first))

    def draft(self, tokens: Tensor, n_loops: int) -> Tensor:
        self._text.append(tokens)
        return self._seen(self._engine.draft(tokens, n_loops))

    def verify(self) -> Tensor:
        return self._seen(self._engine.verify())

    def truncate(self, length: int) -> None:
        del self._text[len(self._text) - (self.cache.length - length) :]  # drafted one by one
        self._engine.truncate(length)

    def end(self) -> None:
        """Wait for the pending checks; ValueError if one fails."""
        while self._pending:
            arrived, total = self._pending.popleft()
            arrived.synchronize()
            self._check(total)

    def _seen(self, logits: Tensor) -> Tensor:
        # The sum of the rows' maxima is not finite if a row has a NaN or +inf, or only -inf.
        total = logits.amax() if len(logits) == 1 else logits.amax(-1).sum(dtype=torch.float64)
        if not logits.is_cuda:
            self._check(total)
            return logits
        arrived, copy = torch.cuda.Event(), total.to("cpu", non_blocking=True)
        arrived.record()
        self._pending.append((arrived, copy))
        while self._pending and self._pending[0][0].query():
            self._check(self._pending.popleft()[1])
        return logits

    def _check(self, total: Tensor) -> None:
        if not math.isfinite(total.item()):
            raise not_finite(self._model, self._depth, self._text, self._mask)


@checked
def stream(
    model: Model, input_ids: Tensor, max_new_tokens: int = 64, n_loops: int | None = None,
    sampling: Sampling | None = None, eos_token_id: int | tuple[int, ...] | None = None,
    attention_mask: Tensor | None = None, generator: torch.Generator | None = None, exit: Exit | None = None,
    draft: Draft | None = None, engine: str = "auto", cache_loops: int | None = None, warm_start: bool = False,
    **old: Any,
) -> Iterator[Tensor]:  # fmt: skip
    """New tokens as they are computed, (B,) at a time; ends early once every row has produced an ``eos_token_id``.

    Args:
        model: computes as in eval mode, whatever mode it is in.
        input_ids, max_new_tokens, n_loops, eos_token_id, attention_mask, exit, draft, engine, cache_loops, warm_start:
            as :meth:`OpenMythos.generate`.
        sampling: how to draw; ``Sampling()`` if None.
        generator: random state to draw from; on the model's device.
        old: arguments of the previous version: ``draft_loops``, ``draft_tokens``, ``compile``.

    Raises:
        ValueError: at the call, before anything is computed, for input or lengths that do not fit.
    """
    for name in old.keys() - _OLD_NAMES:
        raise TypeError(f"generate and stream have no argument {name!r}; {nearest(name, _NAMES)}")
    draft, engine = _old_names(draft, engine, **old)
    sampling = sampling or Sampling()
    check_lengths(model.cfg, input_ids, max_new_tokens)
    n_loops, ends = check_n_loops(n_loops, model.cfg.max_loop_iters), end_tokens(eos_token_id, model.cfg.vocab_size)
    check_left_padding(attention_mask, input_ids)
    check_generator(generator, input_ids.device)
    if warm_start:
        _check_warm_start(model, draft)
    depth = Depth(n_loops, evaluating(model, model.recurrent.choose_exit, exit), cache_loops)
    evaluating(None, check_engine, engine, model, depth, draft is not None)
    if draft is not None:
        _check_draft(draft, depth)
    room = input_ids.shape[1] + min(max_new_tokens, ROOM)

    running: _Watched | None = None

    def blocks() -> Iterator[Tensor]:
        nonlocal running
        with torch.no_grad():
            made = evaluating(model, make_engine, engine, model, depth, room, draft is not None)
            running = _Watched(made, model, depth)
            logits = evaluating(None, running.extend, input_ids, attention_mask)
        if draft is not None:
            yield from drafted(model, running, logits, draft, sampling, ends, generator, max_new_tokens)
        else:
            yield from _one_by_one(model, running, logits, sampling, generator, warm_start)

    def end() -> None:
        if running is not None:
            running.end()

    tokens = _until_done(blocks(), max_new_tokens, ends, end)
    return tokens if sampling.temperature == 0 else Undrawn(tokens, generator, model.embed.weight.device)


def _one_by_one(
    model: Model, engine: Engine, logits: Tensor, sampling: Sampling, generator: torch.Generator | None, warm: bool
) -> Iterator[Tensor]:
    """(B, 1) tokens, one after the other, without end."""
    trains = any(module.training for module in model.modules())
    while True:
        tokens = sampling.draw(logits, generator).unsqueeze(1)
        yield tokens
        first = engine.state if warm else None
        if trains or model.training:
            logits = evaluating(model, engine.step, tokens, first)
        else:
            logits = engine.step(tokens, first)


def _until_done(
    blocks: Iterator[Tensor], max_new_tokens: int, ends: tuple[int, ...], end: Callable[[], None]
) -> Iterator[Tensor]:
    """The columns of (B, n) blocks, with each row's first end token repeated, until all rows have one."""
    columns = itertools.chain.from_iterable(block.unbind(1) for block in blocks)
    last: Tensor | None = None  # each row's end token, -1 before it
    for new in itertools.islice(columns, max_new_tokens):
        if ends:
            new = new if last is None else torch.where(last >= 0, last, new)
            is_end = torch.isin(new, torch.tensor(ends, device=new.device))
            last = torch.where(is_end, new, -1)
        yield new
        if last is not None and bool((last >= 0).all()):
            break
    end()


_OLD_NAMES = {"draft_loops", "draft_tokens", "compile"}
_NAMES = sorted({*signature(stream).parameters, *_OLD_NAMES} - {"model", "old"})


@checked
def _old_names(
    draft: Draft | None, engine: str, draft_loops: int | None = None, draft_tokens: int = 4, compile: bool = False
) -> tuple[Draft | None, str]:
    if draft_loops is not None:
        draft = Draft(draft_loops, draft_tokens)
    return draft, "native" if compile else engine


def _check_draft(draft: Draft, depth: Depth) -> None:
    """ValueError unless drafting can give the tokens of plain decoding."""
    n_loops, cache_loops = depth.n_loops, depth.cache_loops
    must(draft.loops < n_loops, f"draft_loops={draft.loops} of n_loops={n_loops}; use fewer, or leave it out")
    must(
        depth.exit is None,
        f"with draft_loops={draft.loops} every token runs all {n_loops} loops, but {depth.exit} stops some early; "
        f"leave out draft_loops, or leave out the exit and set model.cfg.halting=False",
    )
    must(
        cache_loops is None or cache_loops >= n_loops,
        f"draft_loops={draft.loops} needs the cached keys and values of every loop, but cache_loops={cache_loops} "
        f"keeps those of {cache_loops} of {n_loops}; leave out one of them",
    )


def _check_warm_start(model: Model, draft: Draft | None) -> None:
    """ValueError unless the model was trained to start from noise, and tokens are computed one by one."""
    must(
        model.cfg.state_init == "noise",
        f"warm_start=True, but the model was trained to start only from state_init={model.cfg.state_init!r}; leave "
        f"warm_start out, or use a model that was trained with state_init='noise'",
    )
    must(
        draft is None,
        f"warm_start=True starts each token from the last state of the one before, but draft_loops="
        f"{draft and draft.loops} drafts it before that is known; leave out one of them",
    )
