"""Engines, which compute new tokens. All give the same logits up to rounding, behind one protocol.

========  ===========================================================================================================
modules   the model's own layers: for every model, also with hooks, adapters, offload or quantised weights
fused     the same, with the projections of one input merged into one matrix (:mod:`open_mythos.generation.fused`)
graph     on CUDA: fused, over a cache of fixed size, as a captured CUDA graph (:mod:`open_mythos.generation.graph`)
native    on a CPU in float32: a whole token in one call of C code, compiled on this machine
========  ===========================================================================================================
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from open_mythos.fields import must, nearest
from open_mythos.generation import graph
from open_mythos.generation.engine import Depth, Engine, ModuleEngine
from open_mythos.generation.fused import fuse, why_not_fused
from open_mythos.interface import Model

NAMES = ("auto", "modules", "fused", "graph", "native")
_reported: set[str] = set()


@dataclass
class _Choice:
    """An engine by name: why it cannot serve, or how to make it."""

    why_not: Callable[[Model, Depth, bool], str | None]
    make: Callable[[Model, Depth, int], Engine]


def _native(model: Model, depth: Depth, drafts: bool) -> str | None:
    """Why the native engine cannot serve; its folder may be missing, as in an export with remote code."""
    try:
        return import_module(_NATIVE).why_not(model, depth, drafts)
    except ModuleNotFoundError as error:
        return f"it is not part of this installation ({error})"


_NATIVE = "open_mythos.generation.native.engine"
_ENGINES: dict[str, _Choice] = {
    "native": _Choice(_native, lambda *settings: import_module(_NATIVE).NativeEngine(*settings)),
    "graph": _Choice(graph.why_not, graph.GraphEngine),
    "fused": _Choice(
        lambda model, depth, drafts: why_not_fused(model),
        lambda model, depth, room: ModuleEngine(model, depth, room, fuse(model)),
    ),
    "modules": _Choice(lambda model, depth, drafts: None, ModuleEngine),
}
"""Engines by name, the fastest first."""


def check_engine(name: str, model: Model, depth: Depth, drafts: bool = False) -> None:
    """ValueError, saying what to change, unless there is an engine of this name that can serve the model."""
    must(name in NAMES, f"there is no engine {name!r}; {nearest(name, NAMES)}")
    if name != "auto" and (why := _ENGINES[name].why_not(model, depth, drafts)) is not None:
        raise ValueError(f"engine={name!r} is not available: {why}; use engine='auto', or resolve this")


def make_engine(name: str, model: Model, depth: Depth, room: int = 0, drafts: bool = False) -> Engine:
    """Make the engine of this name; for "auto" the fastest that can serve. A missing C compiler is logged once.

    Args:
        name: one of :data:`NAMES`.
        model: in eval mode while the engine is used.
        depth: how many loops each token runs.
        room: tokens to allocate in the cache.
        drafts: whether tokens will be drafted.
    """
    if name != "auto":
        return _ENGINES[name].make(model, depth, room)
    for choice in _ENGINES.values():
        why = choice.why_not(model, depth, drafts)
        if why is None:
            return choice.make(model, depth, room)
        if why.startswith("no C ") and why not in _reported:  # LACKS of native.build
            _reported.add(why)
            logging.getLogger("open_mythos").warning(
                "decoding without the native engine, which is several times faster: %s", why
            )
    raise AssertionError("modules serve every model")
