"""What everything below :mod:`open_mythos.model` needs to know of a model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.context import Context


class Model(nn.Module):
    """The parts of an :class:`~open_mythos.OpenMythos`, and its three stages: encode, the loops, decode."""

    LAYERS: tuple[str, ...] = ("prelude_layers", "core_layers", "coda_layers")
    """Config fields that say how many blocks a model has."""

    cfg: MythosConfig
    embed: nn.Embedding
    prelude: nn.ModuleList
    input_norm: nn.Module
    recurrent: Any
    coda: nn.ModuleList
    norm: Any
    head: nn.Linear

    states: Callable[..., tuple[Tensor, Context]]
    hidden: Callable[..., Tensor]
    encode: Callable[..., tuple[Tensor, Context]]
    encode_at: Callable[..., tuple[Tensor, Context]]
    first_state: Callable[[Tensor, Context], Tensor]
    decode: Callable[..., Tensor]
    readout: Callable[[Context], Callable[[Tensor, int], Tensor]]
