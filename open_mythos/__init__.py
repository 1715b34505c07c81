"""OpenMythos: recurrent-depth transformers whose loop count is chosen at every call."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from open_mythos.config import MythosConfig as MythosConfig
from open_mythos.variants import VARIANTS as VARIANTS
from open_mythos.variants import mythos_1b as mythos_1b
from open_mythos.variants import mythos_1t as mythos_1t
from open_mythos.variants import mythos_3b as mythos_3b
from open_mythos.variants import mythos_10b as mythos_10b
from open_mythos.variants import mythos_50b as mythos_50b
from open_mythos.variants import mythos_100b as mythos_100b
from open_mythos.variants import mythos_100m as mythos_100m
from open_mythos.variants import mythos_500b as mythos_500b
from open_mythos.variants import mythos_800k as mythos_800k
from open_mythos.variants import mythos_micro as mythos_micro
from open_mythos.variants import mythos_nano as mythos_nano

if TYPE_CHECKING:
    from open_mythos.cache import KVCache as KVCache
    from open_mythos.checkpoint import CheckpointError as CheckpointError
    from open_mythos.diagnostics.trace import trace as trace
    from open_mythos.model import OpenMythos as OpenMythos
    from open_mythos.seq2seq import Seq2Seq as Seq2Seq

__version__ = "0.1.0"

# What needs torch is imported at first use (PEP 562), so that `mythos --help` does not wait for it.
_LAZY = {"CheckpointError": "checkpoint", "KVCache": "cache", "OpenMythos": "model", "Seq2Seq": "seq2seq"}
_LAZY |= {"trace": "diagnostics"}

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "KVCache",
    "MythosConfig",
    "OpenMythos",
    "Seq2Seq",
    "mythos_1b",
    "mythos_1t",
    "mythos_3b",
    "mythos_10b",
    "mythos_50b",
    "mythos_100b",
    "mythos_100m",
    "mythos_500b",
    "mythos_800k",
    "mythos_micro",
    "mythos_nano",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
