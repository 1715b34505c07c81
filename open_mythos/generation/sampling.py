"""From logits to a token: temperature, top-k, top-p, min-p as pure functions of (B, vocab) logits."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.arguments import checked

_COLDEST = 1e-30  # below this temperature the most likely token is taken, as quotients would overflow


@checked
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; validated at construction.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from this many most likely tokens; None for all.
        top_p: draw from the fewest tokens whose total probability reaches this, in (0, 1]; None for all.
        min_p: drop tokens less probable than this fraction of the most likely one, in [0, 1]; None for all.

    Raises:
        ValueError: naming what is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}; use 0 for greedy or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}; use at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; use a number in (0, 1], or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}; use a number in [0, 1], or None")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., vocab) logits to float32 probabilities; filters apply in the order temperature, top-k, top-p, min-p."""
        logits = logits.float()
        if self.temperature < _COLDEST:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return logits.softmax(-1)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token for each row: (B, vocab) -> (B,) int64."""
        return self.choose(logits if self.temperature == 0 else self.probabilities(logits), generator)

    def choose(self, weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token for each row of (B, vocab) probabilities, or if greedy of anything in their order: (B,)."""
        return weights.argmax(-1) if self.temperature == 0 else choose(weights, generator)


def choose(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token for each row of (B, vocab) probabilities, which need not add up to 1: (B,) int64."""
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def random_state(generator: torch.Generator | None, device: torch.device) -> Callable[[], None]:
    """A function that restores the current state of ``generator``, or of the device's default one if None."""
    if generator is None:
        generator = (
            torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        )
    state = generator.get_state()

    def put_back() -> None:
        generator.set_state(state)

    return put_back


class Undrawn(Generator[Tensor, None, None]):
    """Yields the tokens of ``tokens``; if it raises, the random state from before the failed token is restored.

    Args:
        tokens: an iterator of them.
        generator, device: as :func:`random_state`.
    """

    def __init__(self, tokens: Iterator[Tensor], generator: torch.Generator | None, device: torch.device) -> None:
        self._tokens: Any = tokens
        self._state = generator, device

    def send(self, value: None) -> Tensor:
        put_back = random_state(*self._state)
        try:
            return next(self._tokens)
        except StopIteration:
            raise
        except BaseException:
            put_back()
            raise

    def throw(self, *error: Any) -> Tensor:
        return self._tokens.throw(*error)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the ``k`` largest logits (ties with the k-th stay)."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of most likely tokens that has probability ``p`` (Holtzman 2019, 1904.09751)."""
    if p >= 1:  # sums of many probabilities are rounded up to 1
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    drop = (before >= p).scatter(-1, order, before >= p)
    drop = drop & (logits < logits.amax(-1, keepdim=True))
    return logits.masked_fill(drop, float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf where a token is less probable than ``p`` times the most likely one (Nguyen 2024, 2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))
