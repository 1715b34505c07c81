"""The methods of a model that generate text."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from open_mythos.arguments import checked
from open_mythos.generation.depth_batching import generate_many
from open_mythos.generation.generate import stream
from open_mythos.generation.sampling import Sampling, random_state
from open_mythos.generation.speculative import Draft
from open_mythos.interface import Model
from open_mythos.nn.exits import Exit


class Generates(Model):
    """``generate``, ``stream`` and ``generate_many`` of :class:`~open_mythos.OpenMythos`."""

    @checked
    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 64, n_loops: int | None = None, temperature: float = 1.0,
        top_k: int | None = 50, top_p: float | None = None, min_p: float | None = None,
        eos_token_id: int | tuple[int, ...] | None = None, attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None, exit: Exit | None = None, *, sampling: Sampling | None = None,
        draft: Draft | None = None, engine: str = "auto", **options: Any,
    ) -> Tensor:  # fmt: skip
        """Continue every row by ``max_new_tokens``, computing as in eval mode, with a cache.

        Args:
            input_ids: (B, T) prompt, padded on the left where rows differ in length; or embeddings (B, T, dim).
            max_new_tokens: how many tokens to add.
            n_loops: loops for every token; ``cfg.max_loop_iters`` if None.
            temperature, top_k, top_p, min_p: see :class:`~open_mythos.generation.sampling.Sampling`; 0 is greedy.
            eos_token_id: a token, or a tuple of several; a row that produced one repeats it from then on.
            attention_mask: (B, T), 0 at padding.
            generator: random state to draw from.
            exit: the early-exit rule; see :meth:`forward`.
            sampling: in place of the four keywords above.
            draft: draft tokens at fewer loops and verify several at once (:mod:`open_mythos.generation.speculative`):
                faster for one row or few, with the same greedy tokens, or the same distribution of sampled ones.
            engine: what computes the new tokens, the same up to rounding; "auto" takes the fastest that can serve. See
                :mod:`open_mythos.generation.engines`.
            options: ``cache_loops``, the number of :class:`~open_mythos.cache.KVCache` slots that the loops share, to
                save memory; ``warm_start``, to start each new token from the previous token's last state (Huginn,
                arXiv:2502.05171), for models with ``state_init="noise"``; and, for one more version, ``draft_loops``,
                ``draft_tokens`` and ``compile``.

        Returns:
            (B, T + max_new_tokens); after embeddings, the new tokens alone.

        Raises:
            ValueError: for input, sampling options or lengths that do not fit, before anything is computed; and once
                logits are not finite, naming the first layer whose output was not.
        """
        put_back = random_state(generator, self.embed.weight.device)
        try:
            stream = self.stream(
                input_ids, max_new_tokens, n_loops, temperature, top_k, top_p, min_p, eos_token_id, attention_mask,
                generator, exit, sampling=sampling, draft=draft, engine=engine, **options,
            )  # fmt: skip
            new = list(stream)
            new += new[-1:] * (max_new_tokens - len(new))  # all rows have ended
            ids = input_ids[:, :0, 0].long() if input_ids.is_floating_point() else input_ids
            return torch.cat([ids, *(tokens.unsqueeze(1).to(ids.dtype) for tokens in new)], dim=1)
        except BaseException:
            put_back()
            raise

    @checked
    def stream(
        self, input_ids: Tensor, max_new_tokens: int = 64, n_loops: int | None = None, temperature: float = 1.0,
        top_k: int | None = 50, top_p: float | None = None, min_p: float | None = None,
        eos_token_id: int | tuple[int, ...] | None = None, attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None, exit: Exit | None = None, *, sampling: Sampling | None = None,
        draft: Draft | None = None, engine: str = "auto", **options: Any,
    ) -> Iterator[Tensor]:  # fmt: skip
        """As :meth:`generate`, yielding one (B,) tensor of new tokens at a time, as they are computed."""
        sampling = sampling or Sampling(temperature, top_k, top_p, min_p)
        return stream(
            self, input_ids, max_new_tokens, n_loops=n_loops, sampling=sampling, eos_token_id=eos_token_id,
            attention_mask=attention_mask, generator=generator, exit=exit, draft=draft, engine=engine, **options,
        )  # fmt: skip

    @checked
    def generate_many(
        self, prompts: Sequence[Tensor], max_new_tokens: int = 64, n_loops: int | Sequence[int] | None = None,
        temperature: float = 1.0, top_k: int | None = 50, top_p: float | None = None, min_p: float | None = None,
        eos_token_id: int | tuple[int, ...] | None = None, generator: torch.Generator | None = None,
        exit: Exit | None = None, max_rows: int = 32, *, sampling: Sampling | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Continue prompts of any lengths together, such that no token waits for another sequence's loops.

        Greedy tokens are those that :meth:`generate` gives for each prompt alone. It pays off with an exit, or with
        different ``n_loops``: see :class:`~open_mythos.generation.depth_batching.DepthBatch`.

        Args:
            prompts: (T,) token ids each, without padding.
            max_new_tokens: how many tokens to add to each, at most.
            n_loops: loops for every token; one number for each prompt, or one for all.
            temperature, top_k, top_p, min_p, sampling: as :meth:`generate`.
            eos_token_id: a token that ends a sequence, or a tuple of several.
            generator: random state to draw from, in the order in which tokens are computed.
            exit: as :meth:`forward`, but not one that reads predictions.
            max_rows: most sequences decoded at once; others start as these end.

        Returns:
            For each prompt, it and its new tokens, (T + new,); ends with a token of ``eos_token_id`` if that came.

        Raises:
            ValueError: for input, options or lengths that do not fit, before anything is computed.
        """
        requests = dict(
            max_new_tokens=max_new_tokens, sampling=sampling or Sampling(temperature, top_k, top_p, min_p),
            eos_token_id=eos_token_id, generator=generator,
        )  # fmt: skip
        put_back = random_state(generator, self.embed.weight.device)
        try:
            return generate_many(self, prompts, n_loops, exit, max_rows, **requests)
        except BaseException:
            put_back()
            raise
