"""What everything below :mod:`open_mythos.model` needs to know of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from open_mythos.cache import Cache
from open_mythos.config import MythosConfig
from open_mythos.context import AttentionMask, Context


class Model(Protocol):
    """An :class:`~open_mythos.OpenMythos`: its parts, and its three stages."""

    cfg: MythosConfig
    training: bool
    embed: nn.Embedding
    prelude: nn.ModuleList
    input_norm: nn.Module
    recurrent: Any
    coda: nn.ModuleList
    norm: Any
    head: nn.Linear

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def states(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Context]: ...
    def hidden(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    def encode(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Context]: ...
    def encode_at(
        self, input_ids: Tensor, positions: Tensor, mask: AttentionMask, cache: Cache | None = None
    ) -> tuple[Tensor, Context]: ...
    def first_state(self, e: Tensor, ctx: Context) -> Tensor: ...
    def decode(self, h: Tensor, ctx: Context, loop: int | None = None, last: int | None = None) -> Tensor: ...
    def readout(self, ctx: Context) -> Callable[[Tensor, int], Tensor]: ...
