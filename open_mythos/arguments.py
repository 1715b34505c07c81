"""Type checks of users' arguments against the annotations, once a call, at public functions.

Values, shapes and dtypes are checked by :mod:`open_mythos.inputs`, and by the code that uses them.
"""

import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AnySequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from open_mythos.ops.dispatch import is_traced

F = TypeVar("F", bound=Callable[..., Any])
_UNFIT = object()
_INT64 = 1 << 63
_ROWS = (AnySequence, list, tuple)
_WORDS: dict[Any, str] = {
    int: "an integer", float: "a finite number", bool: "True or False", str: "a string", type(None): "None",
    torch.Tensor: "a torch.Tensor",
}  # fmt: skip


def checked(what: F) -> F:
    """Decorate a public function, or a class's constructor, to reject arguments that do not fit their annotations.

    NumPy's numbers are passed on as Python's. Under ``torch.compile`` and ``torch.export`` nothing is checked.

    Raises:
        ValueError: at a call, naming the argument, what came and what was expected.
    """
    if isinstance(what, type):
        what.__init__ = checked(what.__init__)  # type: ignore[misc]
        return what
    signature = inspect.signature(what)

    @functools.cache
    def kinds() -> dict[str, Any]:  # at the first call, as annotations may name what is defined later
        starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        hints = get_type_hints(what)
        return {
            name: hints[name] for name, p in signature.parameters.items() if name in hints and p.kind not in starred
        }

    @functools.wraps(what)
    def call(*args: Any, **named: Any) -> Any:
        if is_traced():
            return what(*args, **named)
        try:
            bound = signature.bind(*args, **named)
        except TypeError:
            return what(*args, **named)  # Python says what is missing or unknown
        for name in bound.arguments.keys() & kinds().keys():
            bound.arguments[name] = fitted(name, bound.arguments[name], kinds()[name])
        return what(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def fitted(name: str, value: Any, kind: Any) -> Any:
    """``value``, converted to what the annotation ``kind`` says; ValueError if it does not fit."""
    found = _fit(value, kind)
    if found is _UNFIT:
        raise ValueError(f"{name}{_shown(value, kind)}; use {_words(kind)}")
    return found


def _fit(value: Any, kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return next((found for part in parts if (found := _fit(value, part)) is not _UNFIT), _UNFIT)
    if origin is Literal:
        return value if value in parts else _UNFIT
    if origin is not None:
        return _fit_generic(value, origin, parts)
    if kind is int:
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return int(value) if is_whole and -_INT64 <= int(value) < _INT64 else _UNFIT
    if kind is float:
        if isinstance(value, int):
            return _fit(value, int)
        return float(value) if isinstance(value, numbers.Real) and math.isfinite(float(value)) else _UNFIT
    if kind is bool:
        return bool(value) if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool") else _UNFIT
    if isinstance(kind, type) and issubclass(kind, torch.nn.Module) and not isinstance(value, type):
        # A model may be wrapped, as by PEFT, or be another class with the same parts.
        return value if isinstance(value, kind) or (hasattr(value, "cfg") and hasattr(value, "recurrent")) else _UNFIT
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        return value if isinstance(value, kind) else _UNFIT
    return value  # Any, type variables, protocols


def _fit_generic(value: Any, origin: Any, parts: tuple[Any, ...]) -> Any:
    """As :func:`_fit`, for generics. Items of sequences are checked too; a tensor or array is a sequence of rows."""
    if origin in _ROWS:
        is_row = origin is AnySequence and hasattr(value, "__len__") and getattr(value, "ndim", 0) > 0
        if isinstance(value, str | bytes) or not (is_row or isinstance(value, origin)):
            return _UNFIT
        if len(parts) != 1 and parts[1:] != (...,):
            return value
        found = [_fit(part, parts[0]) for part in value]
        if any(part is _UNFIT for part in found):
            return _UNFIT
        return value if all(map(lambda a, b: a is b, found, value)) else type(found)(found)
    if origin is Iterable:  # a string is one item, not an iterable of characters
        is_one = isinstance(value, str | bytes | dict | set) or getattr(value, "ndim", 1) == 0
        return value if isinstance(value, Iterable) and not is_one else _UNFIT
    if origin is Callable or origin.__name__ == "Callable":
        return value if callable(value) else _UNFIT
    if origin is type:
        fits = isinstance(value, type) and issubclass(value, tuple(p for p in parts if isinstance(p, type)) or object)
        return value if fits else _UNFIT
    return value if isinstance(value, origin) else _UNFIT


def _shown(value: Any, kind: Any) -> str:
    """What the message says after the argument's name: the value that came if it can be printed, else its type."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if isinstance(value, str | bytes | numbers.Number | list | tuple | dict | set | torch.Tensor | None):
        of = [part for kind in parts for part in (get_args(kind) if get_origin(kind) in _ROWS else [kind])]
        if torch.Tensor not in of and any(part in _WORDS for part in of if part is not type(None)):
            shown = repr(value)
            return f"={shown if len(shown) <= 80 else shown[:77] + '...'}"
    return f" is {value.__name__ if isinstance(value, type) else type(value).__name__}"


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is type:
        return "a class"
    name = getattr(origin or kind, "__name__", str(kind))
    name = {"Callable": "function"}.get(name, name.lower() if origin in _ROWS else name)
    of = f" in which each item is {_words(parts[0])}" if origin in _ROWS and parts else ""
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}{of}"
