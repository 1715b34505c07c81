"""Dotted overrides of a config on the command line: ``optim.lr=3e-4 evaluation.loops=1,2,4``."""

import ast
import copy
import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from open_mythos.fields import Checked, nearest

Config = TypeVar("Config", bound=Checked)


def override(cfg: Config, assignments: Iterable[str]) -> Config:
    """A copy of ``cfg`` with fields set, validated once all are set.

    Args:
        cfg: is not modified.
        assignments: ``key=value`` with dotted keys. The value is parsed by the field's type: int, float, true or
            false, comma-separated list. A key inside a dictionary (``task.options.modulus=5``) takes a Python literal,
            or else a string.

    Raises:
        ValueError: for a malformed assignment, an unknown key (with the nearest known one) or an invalid value.
    """
    changed = copy.deepcopy(cfg)
    keys = dotted(changed)
    words = list(assignments)
    for assignment, following in zip(words, [*words[1:], "..."], strict=False):
        key, equals, text = assignment.partition("=")
        if not equals:
            example = f"{assignment}={following}" if assignment in keys else "steps=500"
            raise ValueError(f"{assignment!r} is not an override; write key=value, as in {example}")
        key, text = key.strip(), text.strip()
        owner, _, option = key.rpartition(".")
        if key in keys:
            part, name, kind = keys[key]
            setattr(part, name, _parse(text, kind))
        elif owner in keys and keys[owner][2] is dict:
            part, name, _ = keys[owner]
            getattr(part, name)[option] = _literal(text)
        else:
            same_name = [known for known in keys if known.rpartition(".")[2] == option]
            hint = f"did you mean {' or '.join(map(repr, same_name))}?" if same_name else nearest(key, keys)
            raise ValueError(f"unknown key {key!r}; {hint}")
    changed.validate()
    return changed


def dotted(cfg: Checked, prefix: str = "") -> dict[str, tuple[Checked, str, Any]]:
    """Every leaf field: ``{"optim.lr": (cfg.optim, "lr", kind), ...}``."""
    leaves: dict[str, tuple[Checked, str, Any]] = {}
    for spec in dataclasses.fields(cfg):
        value = getattr(cfg, spec.name)
        if isinstance(value, Checked):
            leaves |= dotted(value, f"{prefix}{spec.name}.")
        else:
            leaves[prefix + spec.name] = (cfg, spec.name, spec.metadata["kind"])
    return leaves


def differences(old: Checked, new: Checked) -> dict[str, tuple[Any, Any]]:
    """``{dotted key: (old value, new value)}`` where two configs of one class differ."""
    before, after = ({key: getattr(part, name) for key, (part, name, _) in dotted(cfg).items()} for cfg in (old, new))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _parse(text: str, kind: type) -> Any:
    """``text`` as a ``kind``, or unchanged if it is none, which then fails the field's validation."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is list:
        return [_parse(item.strip(), int) for item in text.strip("[]()").split(",") if item.strip()]
    if kind is dict:
        return _literal(text)
    try:
        return kind(text)
    except ValueError:
        return text


def _literal(text: str) -> Any:
    """A Python literal, or ``true`` or ``false``; else ``text`` itself."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two for very long or nested text
        return text
