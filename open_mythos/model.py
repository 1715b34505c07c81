"""The recurrent-depth transformer: embedding, prelude, recurrent block, coda, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos import checkpoint
from open_mythos.cache import Cache, KVCache, as_cache, coda_slot, loop_slot, prelude_slot, repeat_rows
from open_mythos.config import MythosConfig
from open_mythos.generation.depth_batching import generate_many
from open_mythos.generation.generate import check_ids, generate, stream
from open_mythos.generation.sampling import Sampling
from open_mythos.generation.speculative import Draft
from open_mythos.nn.block import TransformerBlock
from open_mythos.nn.exits import Exit, LoopState
from open_mythos.nn.linear import Head
from open_mythos.nn.mixture import MixtureBlock
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.recurrent import Readout, RecurrentBlock, check_n_loops
from open_mythos.ops.mask import CausalMask, document_starts
from open_mythos.ops.rope import rope_table


class OpenMythos(nn.Module):
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

    def forward(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        kv_cache: KVCache | dict[str, Any] | None = None,
        start_pos: int | None = None,
        attention_mask: Tensor | None = None,
        exit: Exit | None = None,
    ) -> Tensor:
        """Logits for the next token at every position.

        Args:
            input_ids: (B, T) integers in [0, vocab_size).
            n_loops: loops to run, any integer of at least 1; ``cfg.max_loop_iters`` if None.
            kv_cache: a :class:`KVCache` or a plain dict. Tokens it holds come before these; these are appended.
            start_pos: position of the first token. Inferred from the cache; give it only to have it checked, or,
                without a cache, to start later than 0.
            attention_mask: (B, T) for these tokens or (B, past + T) for all, 0 at padding, which stands on the left
                or the right of a row. A padded row gives the logits that it gives alone; those at padding mean nothing.
                Without a cache, it may number documents packed in a row, 1, 2, …: each gives the logits it gives alone.
            exit: when a position stops looping, from :mod:`open_mythos.nn.exits`; eval mode only. With None, when the
                gate says so if ``cfg.halting``, else after the last loop. Calls that share a cache share the exit.

        Returns:
            (B, T, vocab_size).

        Raises:
            ValueError: for input that does not fit; nothing has been written to the cache then.
        """
        return self.head(self.hidden(input_ids, n_loops, kv_cache, start_pos, attention_mask, exit))

    def hidden(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        kv_cache: KVCache | dict[str, Any] | None = None,
        start_pos: int | None = None,
        attention_mask: Tensor | None = None,
        exit: Exit | None = None,
        last: int | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, dim), or of the ``last`` positions alone; arguments as :meth:`forward`."""
        cache = as_cache(kv_cache)
        return self.decode(*self.states(input_ids, n_loops, cache, start_pos, attention_mask, exit), cache, last=last)

    def states(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        kv_cache: Cache | dict[str, Any] | None = None,
        start_pos: int | None = None,
        attention_mask: Tensor | None = None,
        exit: Exit | None = None,
        first: Tensor | None = None,
        positions: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, CausalMask]:
        """The states after the last loop, (B, T, dim), with the (cos, sin) and the mask that :meth:`decode` takes.

        Args:
            input_ids, positions: as :meth:`encode`.
            n_loops, kv_cache, start_pos, attention_mask, exit: as :meth:`forward`.
            first: states to start from, (B, T, dim); those of :meth:`first_state` if None.
            seen: gets the states before the first loop and after each one, (B, T, dim).
        """
        n_loops = check_n_loops(n_loops, self.cfg.max_loop_iters)
        cache = as_cache(kv_cache)
        exit = self.recurrent.choose_exit(exit)
        predicting = cache if exit is not None and exit.needs_predictions else None
        past = cache.length if cache is not None else 0
        if predicting is not None:
            self._check_predictions(predicting, past, exit, n_loops)
        e, freqs, mask = self.encode(input_ids, cache, start_pos, attention_mask, n_loops, positions)
        readout = self.readout(freqs, mask, cache)
        first = self.first_state(e) if first is None else first
        h = self.recurrent(first, e, freqs, mask, n_loops, cache, exit, readout, seen=seen)
        if predicting is not None:
            for layer in range(len(self.coda)):
                repeat_rows(predicting, [coda_slot(layer, loop) for loop in range(n_loops)], past)
        return h, freqs, mask

    def encode(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        start_pos: int | None = None,
        attention_mask: Tensor | None = None,
        n_loops: int = 1,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, CausalMask]:
        """Check the input and run the prelude.

        Args:
            input_ids: (B, T), or what ``model.embed`` makes of them, (B, T, dim).
            cache, start_pos, attention_mask, n_loops: as :meth:`forward`.
            positions: (B or 1, T) integers for rotary embedding; counted from each row's first real token if None.

        Returns:
            The encoded input e (B, T, dim), rotary (cos, sin) of its positions, and the causal mask.
        """
        past, valid = self._checked(input_ids, cache, start_pos, attention_mask, n_loops)
        T = input_ids.shape[1]
        starts = None if attention_mask is None else document_starts(attention_mask)
        if starts is not None and (cache is not None or start_pos):
            raise ValueError("attention_mask numbers documents, which start at 0 and no cache holds; use 0 and 1")
        mask = CausalMask(T, past + T, valid, starts=starts)
        if positions is None and starts is not None:
            positions = torch.arange(T, device=input_ids.device) - starts
        elif positions is None and valid is None:
            first = past if cache is not None else start_pos or 0
            positions = torch.arange(first, first + T, device=input_ids.device)
        elif positions is None:
            assert valid is not None
            positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -T:]
        if cache is not None:
            cache.valid = valid
        return *self.encode_at(input_ids, positions, mask, cache), mask

    def encode_at(
        self, input_ids: Tensor, positions: Tensor, mask: CausalMask, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`encode` of tokens whose ``positions`` (T,) or (B, T) and mask are known to fit: e and (cos, sin)."""
        x = (input_ids if input_ids.is_floating_point() else self.embed(input_ids)) * math.sqrt(self.cfg.dim)
        if mask.valid is not None:
            x = x * mask.valid[:, -x.shape[1] :].unsqueeze(-1)
        freqs = rope_table(positions, *self.cfg.rope)
        for layer, block in enumerate(self.prelude):
            x = block(x, freqs, mask, cache, prelude_slot(layer))
        return self.input_norm(x), freqs

    def first_state(self, e: Tensor) -> Tensor:
        """The state before the first loop, as ``cfg.state_init`` says: (B, T, dim), or what the loops carry."""
        if self.cfg.state_init == "input":
            return self.recurrent.begin(e)
        if self.cfg.state_init == "noise" and self.training:
            return torch.randn_like(e) * e.ne(0).any(-1, keepdim=True)
        return self.recurrent.begin(torch.zeros_like(e))

    def decode(
        self,
        h: Tensor,
        freqs: Tensor,
        mask: CausalMask,
        cache: Cache | None = None,
        loop: int | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Run the coda and the last norm on states (B, T, dim): (B, T or last, dim), ready for the head.

        Args:
            h, freqs, mask: as :meth:`states` gave them.
            cache: gets the rows of all T.
            loop: for states that are not the last: what each loop's states give the coda is cached apart.
            last: how many of the last positions are asked for, 1 to T; all if None. The coda's last block, where
                nothing goes on to other positions, does no more.
        """
        h, end = self.recurrent.output(h), len(self.coda) - 1
        for layer, block in enumerate(self.coda):
            h = block(h, freqs, mask, cache, coda_slot(layer, loop), last=last if layer == end else None)
        h = self.norm(h if last is None else h[:, -last:])
        return h if mask.valid is None else h.masked_fill(~mask.valid[:, -h.shape[1] :].unsqueeze(-1), 0)

    def readout(self, freqs: Tensor, mask: CausalMask, cache: Cache | None = None) -> Readout:
        """Reads predictions from states: ``(h (B, T, dim), loop) -> (B, T, vocab_size)``, as exits ask for them.

        Args:
            freqs, mask: as :meth:`encode` gave them.
            cache: keeps what each loop's states give the coda apart; with None, the loop plays no part.
        """
        return lambda h, loop: self.head(self.decode(h, freqs, mask, cache, loop))

    def iterate(
        self, input_ids: Tensor, n_loops: int | None = None, exit: Exit | None = None, **inputs: Any
    ) -> Iterator[tuple[LoopState, Tensor]]:
        """After every loop, what happened in it and the logits (B, T, vocab_size) if it were the last.

        Args:
            input_ids: (B, T).
            n_loops, exit: as :meth:`forward`.
            inputs: ``start_pos`` and ``attention_mask``, as :meth:`forward`.
        """
        e, freqs, mask = self.encode(input_ids, **inputs)
        readout = self.readout(freqs, mask)
        for state in self.recurrent.iterate(self.first_state(e), e, freqs, mask, n_loops, exit=exit, readout=readout):
            yield state, readout(state.h, state.loop) if state.logits is None else state.logits

    def _checked(
        self, input_ids: Tensor, cache: Cache | None, start_pos: int | None, attention_mask: Tensor | None, n_loops: int
    ) -> tuple[int, Tensor | None]:
        """Tokens held by the cache, and (B, past + T) bool of real tokens or None. ValueError if input does not fit."""
        embedded = isinstance(input_ids, Tensor) and input_ids.is_floating_point() and input_ids.ndim == 3
        if embedded and input_ids.shape[2] != self.cfg.dim:
            raise ValueError(f"embeddings are {tuple(input_ids.shape)}; use (batch, tokens, {self.cfg.dim})")
        check_ids(input_ids[..., 0].long() if embedded else input_ids)
        B, T = input_ids.shape[:2]
        if not embedded and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.cfg.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"input_ids holds {bad}; tokens of this model are 0 to {self.cfg.vocab_size - 1}")
        past = cache.length if cache is not None else 0
        if cache is not None:
            self._check_slots(cache, past, n_loops)
            if past and cache.batch_size != B:
                raise ValueError(f"input_ids has {B} rows and the cache {cache.batch_size}; use a new cache")
            if start_pos is not None and start_pos != past:
                raise ValueError(f"start_pos={start_pos} but the cache holds {past} tokens; leave start_pos out")
        if start_pos is not None and start_pos < 0:
            raise ValueError(f"start_pos={start_pos}; use 0 or more")
        end = (start_pos or 0) + T if cache is None else past + T
        if end > self.cfg.max_seq_len:
            raise ValueError(
                f"{end} positions ({end - T} before, {T} new) do not fit max_seq_len={self.cfg.max_seq_len}; "
                f"shorten the input or raise model.cfg.max_seq_len"
            )
        return past, self._valid(attention_mask, B, T, past, cache)

    def _check_slots(self, cache: Cache, past: int, n_loops: int) -> None:
        # No slot holds more than that of the loop before, so one tells of all.
        if past == 0 or cache.slot_length(loop_slot(n_loops - 1)) == past:
            return
        lengths = cache.lengths()
        for loop in range(n_loops):
            held = lengths.get(loop_slot(loop, cache), 0)
            if held != past:
                raise ValueError(
                    f"n_loops={n_loops}, but loop {loop + 1} of the cache holds {held} of its {past} tokens; "
                    f"use n_loops of at most {loop}, or fill a new cache with {n_loops} loops"
                )

    def _check_predictions(self, cache: Cache, past: int, exit: Exit | None, n_loops: int) -> None:
        lengths = cache.lengths()
        for loop in range(n_loops) if past and self.coda else ():
            if lengths.get(coda_slot(0, loop), 0) != past:
                raise ValueError(
                    f"exit={exit} reads predictions, and the cache lacks those of its {past} tokens after loop "
                    f"{loop + 1} of n_loops={n_loops}; give the exit, and as many loops, from the first call on, or "
                    f"start a new cache"
                )

    def _valid(self, attention_mask: Tensor | None, B: int, T: int, past: int, cache: Cache | None) -> Tensor | None:
        known = cache.valid if cache is not None else None
        if attention_mask is None:
            if known is None:
                return None
            return torch.cat([known, known.new_ones(B, T)], 1)
        shape = tuple(attention_mask.shape)
        if shape not in ((B, T), (B, past + T)):
            wanted = f"({B}, {T})" if past == 0 else f"({B}, {T}) or, with the {past} cached tokens, ({B}, {past + T})"
            raise ValueError(f"attention_mask is {shape}; use {wanted}")
        valid = attention_mask.bool()
        earlier = known if known is not None else valid.new_ones(B, past)
        if shape[1] == T:
            valid = torch.cat([earlier, valid], 1)
        elif not torch.equal(valid[:, :past], earlier):
            raise ValueError(
                f"attention_mask differs from that of the {past} cached tokens; pass theirs again, or ({B}, {T}) for "
                f"the new ones alone"
            )
        return None if bool(valid.all()) else valid

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenMythos:
        """Keep a tied head and the embedding one tensor, which leaving the meta device would undo."""
        super()._apply(fn, recurse)
        if self.cfg.tied_head:
            self.head.weight = self.embed.weight
        return self

    # -- text

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 64,
        n_loops: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        exit: Exit | None = None,
        cache_loops: int | None = None,
        draft_loops: int | None = None,
        draft_tokens: int = 4,
        warm_start: bool = False,
        compile: bool = False,
    ) -> Tensor:
        """Continue every row by ``max_new_tokens``, in eval mode, with a cache.

        Args:
            input_ids: (B, T) prompt, padded on the left where rows differ in length.
            max_new_tokens: how many tokens to add.
            n_loops: loops for every token; ``cfg.max_loop_iters`` if None.
            temperature, top_k, top_p, min_p: see :class:`~open_mythos.generation.sampling.Sampling`; 0 is greedy.
            eos_token_id: a row that produced it repeats it from then on.
            attention_mask: (B, T), 0 at padding.
            generator: random state to draw from.
            exit: when a position stops looping; see :meth:`forward`.
            cache_loops: share the loops' keys and values among so many slots, to need less memory; see
                :class:`~open_mythos.cache.KVCache`.
            draft_loops: guess tokens at so few loops first, 1 or 2, and verify several at once: faster for one row or
                few, with the same tokens, or the same distribution of them; see
                :mod:`open_mythos.generation.speculative`.
            draft_tokens: how many to guess at a time, with ``draft_loops``.
            warm_start: start each new token from the last state of the one before it (Huginn, arXiv:2502.05171), for
                models with ``state_init="noise"``. Meant to save loops where an exit ends them; on the models
                measured here it does not (``benchmarks/decoding.py``).
            compile: decode by C code, which the machine's C compiler makes at the first such call: the same logits up
                to rounding, several times as fast for one row or few, padded or not. For float32 on the CPU; positions
                may stop by the gate or a :class:`~open_mythos.nn.exits.StateChange`, each row at its own loop.

        Returns:
            (B, T + max_new_tokens).

        Raises:
            ValueError: for input, sampling options or lengths that do not fit.
        """
        return generate(
            self, input_ids, max_new_tokens, n_loops=n_loops, sampling=Sampling(temperature, top_k, top_p, min_p),
            eos_token_id=eos_token_id, attention_mask=attention_mask, generator=generator, exit=exit,
            cache_loops=cache_loops, draft=None if draft_loops is None else Draft(draft_loops, draft_tokens),
            warm_start=warm_start, compile=compile,
        )  # fmt: skip

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 64,
        n_loops: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        exit: Exit | None = None,
        cache_loops: int | None = None,
        draft_loops: int | None = None,
        draft_tokens: int = 4,
        warm_start: bool = False,
        compile: bool = False,
    ) -> Iterator[Tensor]:
        """As :meth:`generate`, handing out one (B,) tensor of new tokens at a time, as they are made."""
        return stream(
            self, input_ids, max_new_tokens, n_loops=n_loops, sampling=Sampling(temperature, top_k, top_p, min_p),
            eos_token_id=eos_token_id, attention_mask=attention_mask, generator=generator, exit=exit,
            cache_loops=cache_loops, draft=None if draft_loops is None else Draft(draft_loops, draft_tokens),
            warm_start=warm_start, compile=compile,
        )  # fmt: skip

    def generate_many(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int = 64,
        n_loops: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        exit: Exit | None = None,
        max_rows: int = 32,
    ) -> list[Tensor]:
        """Continue prompts of any lengths together; no token waits for the loops of another sequence's.

        Greedy tokens are those that :meth:`generate` gives for each prompt alone. It pays with an exit, or with
        ``n_loops`` that differ: see :class:`~open_mythos.generation.depth_batching.DepthBatch`.

        Args:
            prompts: (T,) token ids each, without padding.
            max_new_tokens: how many tokens to add to each, at most.
            n_loops: loops for every token; one number for each prompt, or one for all.
            temperature, top_k, top_p, min_p: as :meth:`generate`.
            eos_token_id: ends a sequence.
            generator: random state to draw from, in the order in which tokens come.
            exit: as :meth:`forward`; none that reads predictions.
            max_rows: sequences decoded at once; others follow as these end.

        Returns:
            For each prompt, it and its new tokens, (T + new,); ends with ``eos_token_id`` if that came.

        Raises:
            ValueError: for input, options or lengths that do not fit, before anything is computed.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        return generate_many(
            self, prompts, max_new_tokens, n_loops, sampling, eos_token_id, generator, exit, max_rows
        )  # fmt: skip

    # -- files

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; see :func:`open_mythos.checkpoint.save`."""
        checkpoint.save(self, directory)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> OpenMythos:
        """A model that :meth:`save_pretrained` wrote, or one that comes with the package, by its name, in eval mode.

        See :func:`open_mythos.checkpoint.load`.
        """
        return checkpoint.load(cls, source)
