"""The recurrent-depth transformer: embedding, prelude, recurrent block, coda, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos import checkpoint
from open_mythos.arguments import checked
from open_mythos.cache import Cache, KVCache, Slot, loop_slot, repeat_rows
from open_mythos.config import MythosConfig
from open_mythos.context import Context
from open_mythos.dict_cache import as_cache, whole
from open_mythos.fields import must
from open_mythos.generation.methods import Generates
from open_mythos.inputs import check_input, check_mask, check_n_loops
from open_mythos.interface import Model
from open_mythos.nn.block import TransformerBlock
from open_mythos.nn.exits import Exit, LoopState
from open_mythos.nn.linear import Head, RMSNorm
from open_mythos.nn.mixture import MixtureBlock
from open_mythos.nn.modes import is_evaluating
from open_mythos.nn.recurrent import Readout, RecurrentBlock
from open_mythos.nn.untied import PlainBlock, UntiedBlocks
from open_mythos.ops.attention import (
    AttentionMask,
    document_numbers,
    document_starts,
    ends_in_padding,
    has_documents,
)


class OpenMythos(Generates):
    """A causal language model whose depth is chosen at every call.

    ``model(input_ids, n_loops=T)`` runs the prelude once, the recurrent block T times, the coda once. The three
    stages are also there one by one: :meth:`encode`, ``model.recurrent.iterate``, :meth:`decode`.

    Args:
        cfg: shape and behaviour; kept as ``model.cfg``. ``max_seq_len`` and ``max_loop_iters`` may be changed there
            at any time.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._rope = cfg.rope
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        nn.init.normal_(self.embed.weight, std=cfg.dim**-0.5)
        self.prelude = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.prelude_layers))
        self.input_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.input_norm else nn.Identity()
        self.recurrent = MixtureBlock(cfg) if cfg.recurrence == "mixture" else RecurrentBlock(cfg)
        self.coda = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.coda_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head: nn.Linear = Head(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.tied_head:
            self.head.weight = self.embed.weight
        else:
            nn.init.normal_(self.head.weight, std=cfg.dim**-0.5)
        self.register_load_state_dict_post_hook(_tie_assigned)

    @checked
    def forward(
        self, input_ids: Tensor, n_loops: int | None = None, kv_cache: KVCache | dict[str, Any] | None = None,
        start_pos: int | None = None, attention_mask: Tensor | None = None, exit: Exit | None = None,
        auxiliary: bool = True,
    ) -> Tensor:  # fmt: skip
        """Logits for the next token at every position.

        Args:
            input_ids: (B, T) integers in [0, vocab_size).
            n_loops: loops to run, any integer of at least 1; ``cfg.max_loop_iters`` if None.
            kv_cache: a :class:`KVCache` or a plain dict. Tokens it holds come before these; these are appended.
            start_pos: position of the first token. Inferred from the cache; give it only to have it checked, or,
                without a cache, to start later than 0.
            attention_mask: (B, T) for these tokens or (B, past + T) for all, 0 at padding, which stands on the left
                or the right of a row. Padding does not change a row's logits; logits at padding are meaningless.
                Without a cache, it may number documents packed in a row, 1, 2, …: each gets the logits it gets alone.
            exit: the early-exit rule, from :mod:`open_mythos.nn.exits`; eval mode only. With None, the gate decides if
                ``cfg.halting``, else every position runs all loops. Calls that share a cache must use the same exit.
            auxiliary: in a training step, also balance experts, train the gate and use warm starts, as
                :mod:`open_mythos.nn.auxiliary` describes; pass False where two models are compared.

        Returns:
            (B, T, vocab_size).

        Raises:
            ValueError: for input that does not fit. After this or any other error the cache is as it was before.
        """
        options: dict[str, Any] = dict(
            start_pos=start_pos, attention_mask=attention_mask, exit=exit, auxiliary=auxiliary
        )
        cache = as_cache(kv_cache)
        if cache is None:
            return self.head(self.hidden(input_ids, n_loops, **options))
        n_new = input_ids.shape[1:2].numel()
        return whole(cache, n_new, lambda: self.head(self.hidden(input_ids, n_loops, cache, **options)))

    def hidden(
        self, input_ids: Tensor, n_loops: int | None = None, *args: Any, last: int | None = None, **options: Any
    ) -> Tensor:
        """The head's input, (B, T, dim), or only that of the ``last`` positions; arguments as :meth:`states`."""
        return self.decode(*self.states(input_ids, n_loops, *args, **options), last=last)

    def states(
        self, input_ids: Tensor, n_loops: int | None = None, kv_cache: Cache | dict[str, Any] | None = None,
        start_pos: int | None = None, attention_mask: Tensor | None = None, exit: Exit | None = None,
        first: Tensor | None = None, positions: Tensor | None = None, **loops: Any,
    ) -> tuple[Tensor, Context]:  # fmt: skip
        """The states after the last loop, (B, T, dim), and the context that :meth:`decode` takes.

        Args:
            input_ids, positions: as :meth:`encode`.
            n_loops, kv_cache, start_pos, attention_mask, exit: as :meth:`forward`.
            first: states to start from, (B, T, dim); those of :meth:`first_state` if None.
            loops: ``auxiliary``, ``recompute`` and ``seen`` of :meth:`RecurrentBlock.forward`.
        """
        n_loops = check_n_loops(n_loops, self.cfg.max_loop_iters)
        cache = as_cache(kv_cache)
        exit = self.recurrent.choose_exit(exit)
        predicting = cache if exit is not None and exit.needs_predictions else None
        past = cache.length if cache is not None else 0
        if predicting is not None:
            self._check_predictions(predicting, past, exit, n_loops)
        e, ctx = self.encode(input_ids, cache, start_pos, attention_mask, n_loops, positions)
        first = self.first_state(e, ctx) if first is None else first
        h = self.recurrent(first, e, ctx, n_loops=n_loops, exit=exit, readout=self.readout(ctx), **loops)
        if predicting is not None:
            for layer in range(len(self.coda)):
                repeat_rows(predicting, [Slot("coda", layer, loop) for loop in range(n_loops)], past)
        return h, ctx

    def encode(
        self, input_ids: Tensor, cache: Cache | None = None, start_pos: int | None = None,
        attention_mask: Tensor | None = None, n_loops: int = 1, positions: Tensor | None = None,
        keys: Tensor | None = None, rope_factor: float | None = None,
    ) -> tuple[Tensor, Context]:  # fmt: skip
        """Check the input and run the prelude.

        Args:
            input_ids: (B, T) tokens, or their embeddings as ``model.embed`` returns them, (B, T, dim).
            cache, start_pos, attention_mask, n_loops: as :meth:`forward`.
            positions: (B or 1, T) integers for rotary embedding; counted from each row's first real token if None.
            keys: (B,) int64, each row's key for random draws (:mod:`open_mythos.ops.draws`).
            rope_factor: used for these tokens in place of ``cfg.rope_factor``.

        Returns:
            The encoded input e (B, T, dim), and the context of its tokens.
        """
        past, valid = self._checked(input_ids, cache, start_pos, attention_mask, n_loops)
        T, device = input_ids.shape[1], input_ids.device
        documents = None if attention_mask is None else document_numbers(attention_mask)
        # A mask on the CPU was checked above without waiting for the device; it is copied to the device here.
        valid, documents = (None if x is None else x.to(device, non_blocking=True) for x in (valid, documents))
        must(
            documents is None or (cache is None and not start_pos),
            "attention_mask numbers documents, which needs positions that start at 0 and no key/value cache; leave out "
            "the cache (use_cache=False in transformers) and start_pos, or use a mask of 0 and 1",
        )
        mask = AttentionMask(T, past + T, valid, documents, causal=self.cfg.causal)
        if positions is None and documents is not None:
            index = torch.arange(T, device=device).expand_as(documents)
            positions = index - (document_starts(documents) * index).cummax(1).values
        elif positions is None and valid is None:
            first = past if cache is not None else start_pos or 0
            positions = torch.arange(first, first + T, device=device)
        elif positions is None:
            assert valid is not None
            positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -T:]
        if cache is not None:
            must(
                self.cfg.causal, "a cache needs a causal model, but this one was built with causal=False; leave it out"
            )
            cache.valid = valid
        return self.encode_at(input_ids, positions, mask, cache, keys, rope_factor)

    def encode_at(
        self, input_ids: Tensor, positions: Tensor, mask: AttentionMask, cache: Cache | None = None,
        keys: Tensor | None = None, rope_factor: float | None = None,
    ) -> tuple[Tensor, Context]:  # fmt: skip
        """:meth:`encode` without its checks, given ``positions`` (T,) or (B, T) and a mask that are known to fit."""
        x = (input_ids if input_ids.is_floating_point() else self.embed(input_ids)) * math.sqrt(self.cfg.dim)
        if mask.valid is not None:
            x = mask.without_padding(x)
        rope_dim, theta, factor, context = self._rope
        rope = rope_dim, theta, factor if rope_factor is None else rope_factor, context
        ctx = replace(Context.of(positions, rope, mask, cache, self.recurrent.is_compiled), keys=keys)
        for layer, block in enumerate(self.prelude):
            x = block(x, ctx, cache_key=Slot("prelude", layer))
        return self.input_norm(x), ctx

    def first_state(self, e: Tensor, ctx: Context) -> Tensor:
        """The initial state, set by ``cfg.state_init``: (B, T, dim), or the recurrent block's own form."""
        if self.cfg.state_init == "input":
            return self.recurrent.begin(e)
        if self.cfg.state_init == "noise" and self.training and not is_evaluating():
            return ctx.mask.without_padding(ctx.noise(e, Slot("prelude")))
        return self.recurrent.begin(torch.zeros_like(e))

    def decode(self, h: Tensor, ctx: Context, loop: int | None = None, last: int | None = None) -> Tensor:
        """Run the coda and the last norm on states (B, T, dim): (B, T or last, dim), ready for the head.

        Args:
            h, ctx: as :meth:`states` returned them; a cache gets the key/value rows of all T.
            loop: the loop of intermediate states, None for the final ones: the coda's rows are cached for each loop.
            last: return only this many last positions, 1 to T; all if None. The coda's last block then skips the
                others, as no later block attends to them.
        """
        h, end = self.recurrent.output(h), len(self.coda) - 1
        for layer, block in enumerate(self.coda):
            h = block(h, ctx, cache_key=Slot("coda", layer, loop), last=last if layer == end else None)
        h = self.norm(h if last is None else h[:, -last:])
        return h if ctx.mask.valid is None else ctx.mask.without_padding(h)

    def readout(self, ctx: Context) -> Readout:
        """A function from states to logits, for exits: ``(h (B, T, dim), loop) -> (B, T, vocab_size)``.

        With a cache in ``ctx``, the coda's rows are cached for each loop; without one, ``loop`` is ignored.
        """
        return lambda h, loop: self.head(self.decode(h, ctx, loop))

    @checked
    def iterate(
        self, input_ids: Tensor, n_loops: int | None = None, exit: Exit | None = None, **inputs: Any
    ) -> Iterator[tuple[LoopState, Tensor]]:
        """Yield, for every loop, its :class:`LoopState` and the logits (B, T, vocab_size) if it were the last.

        Args:
            input_ids: (B, T).
            n_loops, exit: as :meth:`forward`.
            inputs: ``start_pos`` and ``attention_mask``, as :meth:`forward`.
        """
        n_loops, exit = check_n_loops(n_loops, self.cfg.max_loop_iters), self.recurrent.choose_exit(exit)
        e, ctx = self.encode(input_ids, **inputs)
        readout = self.readout(ctx)
        for state in self.recurrent.iterate(self.first_state(e, ctx), e, ctx, n_loops, exit, readout):
            yield state, readout(state.h, state.loop) if state.logits is None else state.logits

    def _checked(
        self, input_ids: Tensor, cache: Cache | None, start_pos: int | None, attention_mask: Tensor | None, n_loops: int
    ) -> tuple[int, Tensor | None]:
        """Check input; return the number of cached tokens, and the mask of real tokens, (B, past + T) bool or None."""
        check_input(self.cfg, input_ids)
        B, T = input_ids.shape[:2]
        past = cache.length if cache is not None else 0
        if cache is not None:
            self._check_slots(cache, past, n_loops)
            if past and cache.batch_size != B:
                raise ValueError(f"input_ids has {B} rows, but the cache {cache.batch_size}; use a new cache")
            if start_pos is not None and start_pos != past:
                raise ValueError(f"start_pos={start_pos} but the cache holds {past} tokens; leave start_pos out")
        if start_pos is not None and start_pos < 0:
            raise ValueError(f"start_pos={start_pos}; use 0 or more")
        end = (start_pos or 0) + T if cache is None else past + T
        if end > self.cfg.max_seq_len:
            raise ValueError(
                f"{end} positions ({end - T} before, {T} new) do not fit max_seq_len={self.cfg.max_seq_len}; "
                f"shorten the input or raise max_seq_len in the model's config"
            )
        return past, self._valid(attention_mask, B, T, past, cache)

    def _check_slots(self, cache: Cache, past: int, n_loops: int) -> None:
        # No slot holds more tokens than that of an earlier loop, so it is enough to look at the last slot in use.
        last = min(n_loops, cache.cache_loops or n_loops) - 1
        if past == 0 or cache.slot_length(loop_slot(last, cache)) == past:
            return
        lengths = cache.lengths()
        for loop in range(n_loops):
            held = lengths.get(loop_slot(loop, cache).name, 0)
            if held != past:
                raise ValueError(
                    f"n_loops={n_loops}, but loop {loop + 1} of the cache holds {held} of its {past} tokens; "
                    f"use n_loops of at most {loop}, or fill a new cache with {n_loops} loops"
                )

    def _check_predictions(self, cache: Cache, past: int, exit: Exit | None, n_loops: int) -> None:
        lengths = cache.lengths()
        for loop in range(n_loops) if past and self.coda else ():
            if lengths.get(Slot("coda", 0, loop).name, 0) != past:
                raise ValueError(
                    f"exit={exit} reads predictions, but the cache lacks those of its {past} tokens after loop "
                    f"{loop + 1} of n_loops={n_loops}; pass this exit and n_loops from the first call on, or start a "
                    f"new cache"
                )

    def _valid(self, attention_mask: Tensor | None, B: int, T: int, past: int, cache: Cache | None) -> Tensor | None:
        known = cache.valid if cache is not None else None
        if attention_mask is None:
            if known is None:
                return None
            assert cache is not None
            self._check_sides(not cache.ends_in_padding)
            return torch.cat([known, known.new_ones(B, T)], 1)
        check_mask(attention_mask)
        shape = tuple(attention_mask.shape)
        if shape not in ((B, T), (B, past + T)):
            wanted = f"({B}, {T})" if past == 0 else f"({B}, {T}) or, with the {past} cached tokens, ({B}, {past + T})"
            raise ValueError(f"attention_mask has shape {shape}; use {wanted}")
        valid = attention_mask.bool() if known is None else attention_mask.bool().to(known.device)
        earlier = known if known is not None else valid.new_ones(B, past)
        if shape[1] == T:
            valid = torch.cat([earlier, valid], 1) if past else valid
        elif not torch.equal(valid[:, :past], earlier):
            raise ValueError(
                f"attention_mask differs from that of the {past} cached tokens; repeat their mask, or pass shape "
                f"({B}, {T}) for the new tokens only"
            )
        if bool(valid.all()):
            return None
        begun = valid.cumsum(1) > 0
        is_outside = not bool((begun[:, :-1] & ~valid[:, :-1] & valid[:, 1:]).any())
        self._check_sides(is_outside or has_documents(attention_mask))  # documents may have padding between them
        if cache is not None:
            cache.ends_in_padding = ends_in_padding(valid)
        return valid

    def _check_sides(self, is_outside: bool) -> None:
        reads_neighbours = self.cfg.conv_taps > 1 or (self.cfg.local_window > 0 and self.cfg.n_local_heads > 0)
        must(
            is_outside or not reads_neighbours,
            f"attention_mask has padding between tokens of a row, but conv_taps={self.cfg.conv_taps} and "
            f"local_window={self.cfg.local_window} read neighbouring positions; pad on the left, or after the last "
            f"token of a row",
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenMythos:
        """Keep a tied head tied: moving off the meta device would make two tensors of the shared one."""
        was_tied = getattr(self.head, "weight", None) is self.embed.weight
        super()._apply(fn, recurse)
        if was_tied and self.head.weight is not self.embed.weight:
            self.head.weight = self.embed.weight
        return self

    # -- files

    @checked
    def save_pretrained(self, directory: str | Path, max_shard_size: int | str = checkpoint.SHARD) -> None:
        """Write ``config.json`` and ``model.safetensors``, or several; see :func:`open_mythos.checkpoint.save`."""
        checkpoint.save(self, directory, max_shard_size)

    @classmethod
    @checked
    def from_pretrained(cls, source: str | Path, verify: bool = True) -> OpenMythos:
        """Load a model that :meth:`save_pretrained` wrote, or a shipped one by its name, in eval mode.

        See :func:`open_mythos.checkpoint.load`.
        """
        return checkpoint.load(cls, source, verify)


class UnrolledMythos(OpenMythos):
    """:class:`OpenMythos` whose loops have weights of their own (:class:`UntiedBlocks`): at most ``max_loop_iters``."""

    LAYERS = (*Model.LAYERS, "max_loop_iters")

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__(replace(cfg, recurrence="injected", halting=False, warm_start=False))
        self.recurrent = UntiedBlocks(self.cfg)


class PlainMythos(UnrolledMythos):
    """A plain pre-norm transformer as deep as :class:`UnrolledMythos`: the control for what that one adds.

    A block reads only the previous output: no injection of e, no decay A, no LoRA, no norms but the blocks' and head's.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        plain = replace(cfg, state_init="input", input_norm=False, state_norm=False, lora_rank=0, loop_index_dim=0)
        super().__init__(replace(plain, state_noise=0.0, bridge_dim=0))
        self.recurrent = UntiedBlocks(self.cfg, PlainBlock)


def _tie_assigned(model: OpenMythos, incompatible_keys: Any) -> None:
    """Keep a tied head tied where tensors were assigned (``assign=True``), as to a model on the meta device."""
    head, embed = model.head.weight, model.embed.weight
    if not model.cfg.tied_head or head is embed:
        return
    missing = [".".join(key.split(".")[-2:]) for key in incompatible_keys.missing_keys]
    if ("head.weight" in missing and "embed.weight" not in missing) or _is_same(head, embed):
        model.head.weight = embed


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share their memory or are equal."""
    if a.is_meta or a.data_ptr() == b.data_ptr():
        return True
    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b)
