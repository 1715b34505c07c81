"""Dotted overrides of a config, as typed on a command line: ``optim.lr=3e-4 evaluation.loops=1,2,4``."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from open_mythos.fields import Checked, nearest

Config = TypeVar("Config", bound=Checked)


def override(cfg: Config, assignments: Iterable[str]) -> Config:
    """A copy of ``cfg`` with fields set, and checked together once all are set.

    Args:
        cfg: stays as it is.
        assignments: ``key=value``, dots between the names of a part and its field. The value is read as the field's
            type: whole or decimal numbers, true or false, lists with commas between. One key further into a
            dictionary sets that key alone (``task.options.modulus=5``); its value is a Python literal or else text.

    Raises:
        ValueError: for anything but ``key=value``, for an unknown key (with the nearest there is), and for a value
            that its field refuses; all by the dotted key.
    """
    changed = copy.deepcopy(cfg)
    keys = dotted(changed)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not an override; write key=value, as in {next(iter(keys))}=...")
        _assign(keys, key.strip(), text.strip())
    _validate(changed)
    return changed


def dotted(cfg: Checked, prefix: str = "") -> dict[str, tuple[Checked, str, Any]]:
    """Every field that is not itself a part: ``{"optim.lr": (cfg.optim, "lr", kind), ...}``."""
    found: dict[str, tuple[Checked, str, Any]] = {}
    for spec in dataclasses.fields(cfg):
        value = getattr(cfg, spec.name)
        if isinstance(value, Checked):
            found |= dotted(value, f"{prefix}{spec.name}.")
        else:
            found[prefix + spec.name] = (cfg, spec.name, spec.metadata["kind"])
    return found


def differences(old: Checked, new: Checked) -> dict[str, tuple[Any, Any]]:
    """``{dotted key: (old value, new value)}`` where two configs of one class differ."""
    before, after = ({key: getattr(part, name) for key, (part, name, _) in dotted(cfg).items()} for cfg in (old, new))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _assign(keys: dict[str, tuple[Checked, str, Any]], key: str, text: str) -> None:
    if key in keys:
        part, name, kind = keys[key]
        setattr(part, name, _read(text, kind))
        return
    owner, _, option = key.rpartition(".")
    if owner in keys and keys[owner][2] is dict:
        part, name, _ = keys[owner]
        getattr(part, name)[option] = _literal(text)
        return
    namesakes = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f"did you mean {' or '.join(map(repr, namesakes))}?" if namesakes else nearest(key, keys)
    raise ValueError(f"unknown key {key!r}; {hint}")


def _read(text: str, kind: type) -> Any:
    """``text`` as a ``kind``; left as text where it is none, for the field to refuse."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is list:
        return [_read(item.strip(), int) for item in text.strip("[]()").split(",") if item.strip()]
    if kind is dict:
        return _literal(text)
    try:
        return kind(text)
    except ValueError:
        return text


def _literal(text: str) -> Any:
    """A Python literal, true and false in lower case too; other text is itself."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _validate(cfg: Checked) -> None:
    """Check the parts before the whole, so that an error can name the part it is in."""
    for path, part in _parts(cfg):
        try:
            part.validate()
        except ValueError as error:
            raise ValueError(f"{path}{error}") from error
    cfg.validate()


def _parts(cfg: Checked, prefix: str = "") -> Iterator[tuple[str, Checked]]:
    for spec in dataclasses.fields(cfg):
        value = getattr(cfg, spec.name)
        if isinstance(value, Checked):
            yield from _parts(value, f"{prefix}{spec.name}.")
            yield f"{prefix}{spec.name}.", value
