"""Prefill once, then decode: one token at a time, or drafted ahead."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from open_mythos.cache import KVCache
from open_mythos.generation.decoder import Decoder, make_decoder
from open_mythos.generation.native.decoder import CompiledDecoder, check_compilable
from open_mythos.generation.sampling import Sampling
from open_mythos.generation.speculative import Draft, Speculation
from open_mythos.nn.exits import Exit
from open_mythos.nn.modes import eval_mode
from open_mythos.nn.recurrent import check_n_loops

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos


_INTEGERS = (torch.int64, torch.int32)
_ROOM = 512  # new tokens that a cache has room for before it grows


def stream(
    model: OpenMythos,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    n_loops: int | None = None,
    sampling: Sampling | None = None,
    eos_token_id: int | None = None,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    exit: Exit | None = None,
    cache_loops: int | None = None,
    draft: Draft | None = None,
    warm_start: bool = False,
    compile: bool = False,
) -> Iterator[Tensor]:
    """New tokens as they are made, (B,) at a time; ends early once every row has produced ``eos_token_id``.

    Args:
        model: run in eval mode for each token, and put back after it.
        input_ids: (B, T) prompt, padded on the left where rows differ in length.
        max_new_tokens: how many, at most.
        n_loops: loops for every token; ``cfg.max_loop_iters`` if None.
        sampling: how to draw; ``Sampling()`` if None.
        eos_token_id: a row that produced it repeats it from then on.
        attention_mask: (B, T), 0 at padding.
        generator: random state to draw from; on the model's device.
        exit: when a position stops looping; see :meth:`OpenMythos.forward`.
        cache_loops: slots for the loops' keys and values; see :class:`KVCache`.
        draft: guess tokens at fewer loops first; see :mod:`open_mythos.generation.speculative`.
        warm_start: start each new token from the last state of the one before it; see :meth:`OpenMythos.generate`.
        compile: decode by compiled code; see :mod:`open_mythos.generation.native.decoder`.

    Raises:
        ValueError: at the call, before anything is computed, for input or lengths that do not fit.
    """
    sampling = sampling or Sampling()
    check_lengths(model, input_ids, max_new_tokens)
    n_loops = check_n_loops(n_loops, model.cfg.max_loop_iters)
    if attention_mask is not None and attention_mask.bool().int().diff(dim=1).lt(0).any():
        raise ValueError("attention_mask has padding after tokens; pad prompts on the left")
    if warm_start:
        _check_warm_start(model, draft)
    if compile:
        padded = attention_mask is not None and not bool(attention_mask.all())
        adaptive = exit is not None or model.cfg.halting
        check_compilable(model, adaptive, padded, drafted=draft is not None)
    cache = KVCache(cache_loops, room=input_ids.shape[1] + min(max_new_tokens, _ROOM))
    if draft is None:
        new = _one_by_one(
            model, input_ids, n_loops, cache, sampling, attention_mask, generator, exit, warm_start, compile
        )
    else:
        _check_draft(model, draft, n_loops, exit, cache_loops)
        speculation = Speculation(model, n_loops, draft, sampling, eos_token_id, generator, cache)
        new = speculation.blocks(input_ids, max_new_tokens, attention_mask)
    return _until_done(new, max_new_tokens, eos_token_id)


def _one_by_one(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int,
    cache: KVCache,
    sampling: Sampling,
    attention_mask: Tensor | None,
    generator: torch.Generator | None,
    exit: Exit | None,
    warm_start: bool,
    compile: bool,
) -> Iterator[Tensor]:
    """(B, 1) tokens without end."""
    with eval_mode(model), torch.no_grad():
        h, freqs, mask = model.states(input_ids, n_loops, cache, attention_mask=attention_mask, exit=exit)
        logits = model.head(model.decode(h, freqs, mask, cache, last=1)[:, -1])
        compiled = CompiledDecoder(model, n_loops) if compile else None
        stopping = model.recurrent.choose_exit(exit)
        decoder = make_decoder(model, n_loops, padded=cache.valid is not None) if compiled is None else None
        # One token alone stops by itself; several are the modules' work, and so are predictions that an exit reads.
        alone = isinstance(decoder, Decoder) and len(input_ids) == 1
        by_modules = stopping is not None and (not alone or stopping.needs_predictions)
    while True:
        tokens = sampling.draw(logits, generator).unsqueeze(1)
        yield tokens
        first = h[:, -1:] if warm_start else None
        if compiled is not None:
            h, logits = compiled.step(tokens, cache, first)
            continue
        with eval_mode(model), torch.no_grad():
            if by_modules:
                h, freqs, mask = model.states(tokens, n_loops, cache, exit=exit, first=first)
                logits = model.head(model.decode(h, freqs, mask, cache)[:, -1])
                continue
            assert decoder is not None
            e, seen = decoder.encode(tokens, cache)
            first = decoder.first_state(e) if first is None else first
            if stopping is None:
                h = decoder.loops(first, e, seen, 0, n_loops)
            else:
                assert isinstance(decoder, Decoder)
                h = decoder.loops_until(stopping, first, e, seen, n_loops)
            logits = decoder.decode(h, seen)[:, -1]


def _until_done(blocks: Iterator[Tensor], max_new_tokens: int, eos_token_id: int | None) -> Iterator[Tensor]:
    """The columns of (B, n) blocks, each row's first ``eos_token_id`` repeated, until all rows have one."""
    columns = itertools.chain.from_iterable(block.unbind(1) for block in blocks)
    done: Tensor | None = None
    for new in itertools.islice(columns, max_new_tokens):
        if eos_token_id is not None:
            new = new if done is None else torch.where(done, eos_token_id, new)
            done = new == eos_token_id
        yield new
        if done is not None and bool(done.all()):
            return


def generate(
    model: OpenMythos, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None, **options
) -> Tensor:
    """The prompt and ``max_new_tokens`` more, (B, T + max_new_tokens); arguments as :func:`stream`."""
    new = list(stream(model, input_ids, max_new_tokens, eos_token_id=eos_token_id, **options))
    if eos_token_id is not None:
        new += [torch.full_like(input_ids[:, 0], eos_token_id)] * (max_new_tokens - len(new))
    return torch.cat([input_ids, *(tokens.unsqueeze(1).to(input_ids.dtype) for tokens in new)], dim=1)


def check_ids(input_ids: Any) -> None:
    """ValueError unless ``input_ids`` is a (B, T) tensor of integers with something in it."""
    is_tensor = isinstance(input_ids, Tensor)
    if not is_tensor or input_ids.ndim != 2 or input_ids.dtype not in _INTEGERS or not input_ids.numel():
        what = f"{tuple(input_ids.shape)} {input_ids.dtype}" if is_tensor else type(input_ids).__name__
        raise ValueError(f"input_ids is {what}; pass a non-empty (batch, tokens) tensor of int64 or int32")


def check_lengths(model: OpenMythos, input_ids: Tensor, max_new_tokens: int) -> None:
    """ValueError unless the prompt is (B, T) and prompt and continuation fit the model."""
    check_ids(input_ids)
    limit = model.cfg.max_output_tokens
    if not isinstance(max_new_tokens, numbers.Integral) or not 0 <= max_new_tokens <= limit:
        raise ValueError(f"max_new_tokens={max_new_tokens}; use 0 to max_output_tokens={limit}")
    total, limit = input_ids.shape[1] + max_new_tokens, model.cfg.max_seq_len
    if total > limit:
        raise ValueError(
            f"{input_ids.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} make {total}, more than "
            f"max_seq_len={limit}; ask for at most {max(0, limit - input_ids.shape[1])} or raise model.cfg.max_seq_len"
        )


def _check_draft(model: OpenMythos, draft: Draft, n_loops: int, exit: Exit | None, cache_loops: int | None) -> None:
    """ValueError unless drafted tokens can be what a plain run makes."""
    if draft.loops >= n_loops:
        raise ValueError(f"draft_loops={draft.loops} of n_loops={n_loops}; use fewer, or leave draft_loops out")
    if exit is not None or model.cfg.halting:
        which = f"exit={exit}" if exit is not None else "the halting gate"
        raise ValueError(
            f"draft_loops={draft.loops} runs every token for all {n_loops} loops, but {which} stops some early; leave "
            f"out draft_loops, or the exit and set model.cfg.halting=False"
        )
    if cache_loops is not None and cache_loops < n_loops:
        raise ValueError(
            f"draft_loops={draft.loops} goes on from the keys of every loop, and cache_loops={cache_loops} keeps "
            f"{cache_loops} of {n_loops}; leave out one of them"
        )


def _check_warm_start(model: OpenMythos, draft: Draft | None) -> None:
    """ValueError unless the model was trained to start anywhere, and tokens are made one by one."""
    if model.cfg.state_init != "noise":
        raise ValueError(
            f"warm_start=True, but the model was trained to start from state_init={model.cfg.state_init!r} and nothing "
            f"else; leave warm_start out, or use a model that was trained with state_init='noise'"
        )
    if draft is not None:
        raise ValueError(
            f"warm_start=True needs the last state of a token for the next, and draft_loops={draft.loops} makes the "
            f"next before; leave out one of them"
        )
