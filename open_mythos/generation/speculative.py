"""Self-speculative decoding: few loops draft, the other loops verify (Leviathan et al. 2023, arXiv:2211.17192).

A looped model contains its own draft model: the same weights run for fewer loops. The draft's computation is the start
of the full pass: a token's state, keys and values after the draft's loops are the same. So nothing but the coda is
computed twice. Tokens are drafted one by one, and then the remaining loops run once for all of them together, which
costs little more than for one token where that does not use the hardware fully.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.arguments import checked
from open_mythos.cache import ROLLBACK
from open_mythos.fields import must
from open_mythos.generation.engine import Engine
from open_mythos.generation.sampling import Sampling, choose
from open_mythos.interface import Model
from open_mythos.nn.modes import evaluating


@checked
@dataclass(frozen=True)
class Draft:
    """How tokens are drafted; validated at construction.

    Args:
        loops: run for a drafted token; few enough to be cheap, enough that most drafts are accepted.
        tokens: drafted at a time, 1 to 63: a cache can be truncated by no more.

    Raises:
        ValueError: naming what is out of range.
    """

    loops: int
    tokens: int = 4

    def __post_init__(self) -> None:
        for name, value in (("draft_loops", self.loops), ("draft_tokens", self.tokens)):
            must(value >= 1, f"{name}={value!r}; use a whole number of at least 1")
        must(self.tokens < ROLLBACK, f"draft_tokens={self.tokens}; use at most {ROLLBACK - 1}")


def drafted(
    model: Model, engine: Engine, logits: Tensor, draft: Draft, sampling: Sampling, ends: tuple[int, ...],
    generator: torch.Generator | None, max_new_tokens: int,
) -> Iterator[Tensor]:  # fmt: skip
    """New tokens as they are accepted, ``max_new_tokens`` in all: (B, 1 to draft.tokens + 1) at a time.

    ``engine`` has read the prompt, and ``logits`` (B, vocab_size) are for the token after it. After one of ``ends``, a
    row's tokens are arbitrary.
    """

    def is_end(tokens: Tensor) -> Tensor:
        return torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))

    new = sampling.draw(logits, generator).unsqueeze(1)
    done, left = torch.zeros_like(new, dtype=torch.bool), max_new_tokens
    while True:
        yield new
        done, left = done | is_end(new).any(1, keepdim=True), left - new.shape[1]
        if not left:
            return
        n_drafted = min(draft.tokens, left - 1)
        tokens, guesses, past = [new[:, -1:]], [], engine.cache.length
        with torch.no_grad():
            for i in range(n_drafted + 1):
                guess = evaluating(model, engine.draft, tokens[i], draft.loops)
                if i < n_drafted:
                    guesses.append(sampling.probabilities(guess.unsqueeze(1)))
                    tokens.append(sampling.choose(guesses[i][:, 0], generator).unsqueeze(1))
            p = sampling.probabilities(evaluating(model, engine.verify))
        q, y = torch.cat([p[:, :0], *guesses], 1), torch.cat(tokens, 1)
        after_end = torch.cat([done, is_end(y[:, 1:])], 1).cumsum(1).bool()[:, :n_drafted]
        new = accept(p, q, y[:, 1:], after_end, generator)
        engine.truncate(past + new.shape[1])


def accept(p: Tensor, q: Tensor, y: Tensor, free: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The tokens that a round of speculation accepts: distributed as ``p``, whatever ``q`` was.

    A drafted token is kept with probability ``min(1, p / q)``; the first one rejected is redrawn from the positive part
    of ``p - q``, and after K kept tokens another is drawn from ``p``. All rows of a batch are cut where the first row
    rejects a token, and end in a token that was kept or redrawn. Rows that kept more are still distributed as ``p``:
    where a row is cut depends on other rows and on its own tokens up to there, never on the dropped ones, and those are
    drawn anew given the same past.

    Args:
        p: (B, K + 1, vocab_size) probabilities to draw from.
        q: (B, K, vocab_size) probabilities that the draft was drawn from.
        y: (B, K) drafted tokens.
        free: (B, K) bool, True where any token is accepted.
        generator: random state to draw from.

    Returns:
        (B, 1 to K + 1).
    """
    K = y.shape[1]
    p_y, q_y = (x[:, :K].gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (p, q))
    # p_y / q_y > u, without a division; u < 1, so that everything is kept where p equals q.
    kept = free | (torch.rand(y.shape, generator=generator, device=y.device) * q_y < p_y)
    n = int(kept.cumprod(1).sum(1).min())
    if n == K:
        return torch.cat([y, choose(p[:, K], generator).unsqueeze(1)], 1)
    left = (p[:, n] - q[:, n]).clamp(min=0)
    # ``left`` is all zero only if p equals q up to rounding.
    drawn = choose(torch.where(left.sum(-1, keepdim=True) > 0, left, p[:, n]), generator)
    return torch.cat([y[:, :n], torch.where(kept[:, n], y[:, n], drawn).unsqueeze(1)], 1)
