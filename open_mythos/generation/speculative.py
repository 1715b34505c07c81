"""Self-speculative decoding: few loops draft, the other loops verify (Leviathan et al. 2023, arXiv:2211.17192).

A looped model holds its own draft model, the same weights run for fewer loops, and what that computes is the beginning
of what the whole model computes: state, keys and values of a token after the draft's loops are those of the full pass.
So nothing is computed twice but the coda. Tokens are drafted one by one, and then the loops that are left run once for
all of them together, which where one token does not fill the machine costs little more than for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from open_mythos.cache import KVCache
from open_mythos.fields import must
from open_mythos.generation.decoder import ModuleDecoder, make_decoder, together
from open_mythos.generation.sampling import Sampling, choose
from open_mythos.nn.modes import eval_mode

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos


@dataclass(frozen=True)
class Draft:
    """How tokens are drafted, checked when it is made.

    Args:
        loops: of a draft; few enough to be cheap, enough to agree mostly.
        tokens: drafted at a time, at most.

    Raises:
        ValueError: naming what is out of range.
    """

    loops: int
    tokens: int = 4

    def __post_init__(self) -> None:
        for name, value in (("draft_loops", self.loops), ("draft_tokens", self.tokens)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            must(whole and value >= 1, f"{name}={value!r}; use a whole number of at least 1")


@dataclass
class Speculation:
    """One continuation, drafted and verified.

    Args:
        model: run in eval mode, and put back after each block.
        n_loops: loops for every token that comes out.
        draft: loops and tokens of a draft.
        sampling: how to draw, both draft and output.
        eos_token_id: rows that have produced it go on with anything.
        generator: random state to draw from.
        cache: empty; holds in the end every token but the last.
    """

    model: OpenMythos
    n_loops: int
    draft: Draft
    sampling: Sampling
    eos_token_id: int | None = None
    generator: torch.Generator | None = None
    cache: KVCache = field(default_factory=KVCache)
    _decoder: ModuleDecoder = field(init=False, repr=False)

    def blocks(self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None) -> Iterator[Tensor]:
        """New tokens as they are accepted, ``max_new_tokens`` in all: (B, 1 to draft.tokens + 1) at a time."""
        with eval_mode(self.model), torch.no_grad():
            padded = attention_mask is not None and not bool(attention_mask.all())
            self._decoder = make_decoder(self.model, self.n_loops, padded)
            last = self.model.hidden(input_ids, self.n_loops, self.cache, attention_mask=attention_mask, last=1)
            new = self.sampling.draw(self.model.head(last[:, 0]), self.generator).unsqueeze(1)
        done, left = torch.zeros_like(new, dtype=torch.bool), max_new_tokens
        while True:
            yield new
            done, left = done | self._is_eos(new).any(1, keepdim=True), left - new.shape[1]
            if not left:
                return
            with eval_mode(self.model), torch.no_grad():
                new = self._round(new[:, -1:], min(self.draft.tokens, left - 1), done)

    def _round(self, token: Tensor, n_drafted: int, done: Tensor) -> Tensor:
        """The tokens that follow ``token`` (B, 1), the last one given out and not yet in the cache."""
        decoder, cache, past = self._decoder, self.cache, self.cache.length
        drafted, guesses, seen = [token], [], []
        for i in range(n_drafted + 1):
            e, tokens = decoder.encode(drafted[i], cache)
            h = decoder.loops(decoder.first_state(e), e, tokens, 0, self.draft.loops)
            seen.append((h, e, tokens))
            if i < n_drafted:
                guesses.append(self.sampling.probabilities(decoder.decode(h, tokens)))
                drafted.append(self.sampling.choose(guesses[i][:, 0], self.generator).unsqueeze(1))
        states, inputs, parts = zip(*seen, strict=True)
        tokens = together(parts)
        h = decoder.loops(torch.cat(states, 1), torch.cat(inputs, 1), tokens, self.draft.loops, self.n_loops)
        p = self.sampling.probabilities(decoder.decode(h, tokens))
        q, y = torch.cat([p[:, :0], *guesses], 1), torch.cat(drafted, 1)
        after_eos = torch.cat([done, self._is_eos(y[:, 1:])], 1).cumsum(1).bool()[:, :n_drafted]
        new = accept(p, q, y[:, 1:], after_eos, self.generator)
        cache.truncate(past + new.shape[1])
        return new

    def _is_eos(self, tokens: Tensor) -> Tensor:
        return torch.zeros_like(tokens, dtype=torch.bool) if self.eos_token_id is None else tokens == self.eos_token_id


def accept(p: Tensor, q: Tensor, y: Tensor, free: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The tokens that a round of speculation ends with: drawn from ``p``, whatever ``q`` was.

    A drafted token is kept with probability ``min(1, p / q)``; the first that is not is drawn anew from what ``p`` has
    more than ``q``, and behind K kept tokens another is drawn from ``p``. All rows of a batch end where its first ends,
    with a token that was kept or drawn anew. Rows that could have gone on are no less drawn from ``p``: where a row is
    cut depends on other rows and on its own tokens up to there, never on those that it loses, and what comes in their
    place is drawn given the same past.

    Args:
        p: (B, K + 1, vocab_size) probabilities to draw from.
        q: (B, K, vocab_size) probabilities that the draft was drawn from.
        y: (B, K) drafted tokens.
        free: (B, K) bool, where any token will do.
        generator: random state to draw from.

    Returns:
        (B, 1 to K + 1).
    """
    K = y.shape[1]
    p_y, q_y = (x[:, :K].gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (p, q))
    # As p_y / q_y > u, without dividing; u is below 1, so that where p is q everything is kept.
    kept = free | (torch.rand(y.shape, generator=generator, device=y.device) * q_y < p_y)
    n = int(kept.cumprod(1).sum(1).min())
    if n == K:
        return torch.cat([y, choose(p[:, K], generator).unsqueeze(1)], 1)
    left = (p[:, n] - q[:, n]).clamp(min=0)
    # Nothing is left only where p is q up to rounding.
    drawn = choose(torch.where(left.sum(-1, keepdim=True) > 0, left, p[:, n]), generator)
    return torch.cat([y[:, :n], torch.where(kept[:, n], y[:, n], drawn).unsqueeze(1)], 1)
