"""Dataclasses with validated fields, the base of all configs. Imports no torch."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from open_mythos import files

MAX_SEED = 2**53  # times 1000, as training seeds its generators, it still fits into int64


def size(default: int, minimum: int = 1, maximum: int | None = None) -> Any:
    """An integer of at least ``minimum``, and at most ``maximum`` if there is one."""
    return field(default=default, metadata={"kind": int, "min": minimum, "max": maximum})


def real(default: float, low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = False) -> Any:
    """A finite number between ``low`` and ``high``, inclusive unless ``low_open`` or ``high_open``."""
    meta = {"kind": float, "low": low, "high": high, "low_open": low_open, "high_open": high_open or high == math.inf}
    return field(default=default, metadata=meta)


def choice(default: str, *options: str) -> Any:
    """One of the strings ``options``."""
    return field(default=default, metadata={"kind": str, "options": options})


def flag(default: bool) -> Any:
    """True or False."""
    return field(default=default, metadata={"kind": bool})


def text(default: str) -> Any:
    """Any string."""
    return field(default=default, metadata={"kind": str})


def sizes(*default: int, minimum: int = 1) -> Any:
    """A list of integers, each at least ``minimum``."""
    return field(default_factory=lambda: list(default), metadata={"kind": list, "min": minimum})


def options() -> Any:
    """A dictionary, not validated."""
    return field(default_factory=dict, metadata={"kind": dict})


@dataclass
class Checked:
    """Base of dataclasses made of the fields above: validated when created, and on :meth:`validate`.

    Raises:
        ValueError: naming the field, its value, and the values accepted.
    """

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """ValueError for the first invalid field. Subclasses add combinations. Call it after assigning to a field."""
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, _checked(spec.name, getattr(self, spec.name), spec.metadata))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from plain values; missing fields take their defaults.

        Raises:
            ValueError: for an unknown key (with the nearest known name) or a bad value.
        """
        kinds = {spec.name: spec.metadata["kind"] for spec in dataclasses.fields(cls)}
        values = {}
        for key, value in data.items():
            if key not in kinds:
                raise ValueError(f"unknown config field {key!r}; {nearest(key, kinds)}")
            is_part = issubclass(kinds[key], Checked) and isinstance(value, dict)
            values[key] = kinds[key].from_dict(value) if is_part else value
        return cls(**values)

    def to_json(self) -> str:
        """The config as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build from JSON text, the inverse of :meth:`to_json`.

        Raises:
            ValueError: if the text is not a JSON object, or as :meth:`from_dict`.
        """
        return cls.from_dict(files.parse_json(text, "the config"))

    def save(self, path: str | Path) -> None:
        """Write the config as JSON to ``path``, whole or not at all."""
        files.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a config that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if its content is not a config.
        """
        try:
            return cls.from_json(files.read_text(Path(path)))
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def part(kind: type[Checked]) -> Any:
    """A nested :class:`Checked` dataclass."""
    return field(default_factory=kind, metadata={"kind": kind})


def must(holds: bool, message: str) -> None:
    """Raise ValueError(message) unless ``holds``."""
    if not holds:
        raise ValueError(message)


def nearest(name: object, known: Iterable[str]) -> str:
    """ "did you mean 'x'?", or all known names if none is similar."""
    names = list(known)
    similar = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"did you mean {similar[0]!r}?" if similar else f"choose from {', '.join(names)}"


_TYPES = {list: "a list; use integers, as in [1, 2]", bool: "a bool; use True or False", str: "a string"}


def _checked(name: str, value: Any, meta: Any) -> Any:
    """``value`` converted to the field's type, or a ValueError."""
    kind, is_bool = meta["kind"], isinstance(value, bool)
    if kind is int:
        most = meta.get("max")
        hint = f"use an int of at least {meta['min']}" + (f" and at most {most:,}" if most else "")
        must(isinstance(value, int) and not is_bool, f"{name}={value!r} is not a whole number; {hint}")
        must(value >= meta["min"], f"{name}={value} is too small; {hint}")
        must(value <= (most or (1 << 63) - 1), f"{name}={value} is too large; {hint}")
    elif kind is float:
        low, high, low_open, high_open = (meta[key] for key in ("low", "high", "low_open", "high_open"))
        hint = f"use a number in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        must(isinstance(value, int | float) and not is_bool, f"{name}={value!r} is not a number; {hint}")
        value = min(float(1 << 1023), value) if isinstance(value, int) else value  # float() fails for larger ones
        value = float(value)
        within = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
        must(within, f"{name}={value:g} is out of range; {hint}")
    elif meta.get("options") is not None:
        options = ", ".join(map(repr, meta["options"]))
        must(value in meta["options"], f"{name}={value!r} is unknown; use one of {options}")
    else:
        accepted = list | tuple if kind is list else kind
        must(isinstance(value, accepted), f"{name}={value!r} is not {_TYPES.get(kind, f'a {kind.__name__}')}")
        if isinstance(value, Checked):
            try:
                value.validate()
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        elif kind is list:
            value = [_checked(name, item, {"kind": int, "min": meta["min"]}) for item in value]
    return value
