"""Bits per byte of text by kind of token: names seen earlier, new names, numbers, syntax, comments and strings."""

import keyword
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.evaluation.depth import chunks, device_of, measuring, readings
from open_mythos.evaluation.grid import check_fit
from open_mythos.model import OpenMythos
from open_mythos.tasks.base import UNSCORED, Batch
from open_mythos.tasks.text import Text

KINDS = ("copied name", "new name", "number", "syntax", "comment or string")
_NAME, _NUMBER = rb"(?P<name>[A-Za-z_\x80-\xff][\w\x80-\xff]*)", rb"(?P<number>\d\w*(?:\.\d\w*)*)"
_SAID = (
    rb"(?P<said>#[^\n]*|[rRbBuUfF]{0,2}(?:(?P<quote>\"\"\"|''')(?:\\.|[^\\])*?(?:(?P=quote)|\Z)"
    rb"|\"(?:\\.|[^\"\\\n])*\"?|'(?:\\.|[^'\\\n])*'?))"
)
_WORDS = re.compile(_NAME + b"|" + _NUMBER)
_PYTHON = re.compile(_SAID + b"|" + _WORDS.pattern, re.DOTALL)
_KEYWORDS = {word.encode() for word in keyword.kwlist}


def kinds_of(text: bytes, is_python: bool) -> bytes:
    """For each byte of a window of text, the index of its kind in ``KINDS``.

    A name is *copied* if it occurred earlier in the window as a name, not only in a comment or a string. Syntax is
    everything else: keywords, operators, punctuation, white space. In text that is not Python every word counts as a
    name, and there are no keywords, comments or strings.
    """
    return _copied(text, _lexed(text, is_python))


def bytes_by_kind(task: Text, batch: Batch) -> Tensor:
    """Count the bytes of each kind that every target stands for, (B, T, K) float32; K kinds, 0 where none is scored.

    ``batch`` has windows of the task in the order of the text, which tells whether a window begins inside a string.
    """
    pieces, is_python = task._tokenizer.pieces, task.source == "stdlib" or task.source.endswith(".py")
    text = b"".join(map(pieces.__getitem__, task.tokens))
    lexed, known, found, at = _lexed(text, is_python), torch.eye(len(KINDS)), [], 0
    for first, targets in zip(batch.ids[:, 0].tolist(), batch.targets.tolist(), strict=True):
        words = [pieces[first], *(b"" if token == UNSCORED else pieces[token] for token in targets)]
        window = b"".join(words)
        at = text.find(window, at)
        kinds = known[list(_copied(window, lexed[at : at + len(window)]))]
        found.append(torch.stack([part.sum(0) for part in kinds.split([len(word) for word in words])[1:]]))
    return torch.stack(found)


def _lexed(text: bytes, is_python: bool) -> bytearray:
    """As :func:`kinds_of`, but every name counts as new."""
    kinds = bytearray([KINDS.index("syntax")]) * len(text)
    for found in (_PYTHON if is_python else _WORDS).finditer(text):
        kind = {"name": "new name", "number": "number"}.get(found.lastgroup or "", "comment or string")
        if not is_python or found[0] not in _KEYWORDS:
            kinds[found.start() : found.end()] = bytes([KINDS.index(kind)]) * len(found[0])
    return kinds


def _copied(window: bytes, kinds: bytearray) -> bytes:
    """``kinds`` of a window with names that occurred earlier in it marked as copied."""
    seen, new = set[bytes](), KINDS.index("new name")
    for found in _WORDS.finditer(window):
        if found.lastgroup == "name" and kinds[found.start()] == new:
            if found[0] in seen:
                kinds[found.start() : found.end()] = bytes([KINDS.index("copied name")]) * len(found[0])
            seen.add(found[0])
    return bytes(kinds)


def bits_by_kind(
    model: OpenMythos, task: Text, loops: int, length: int, windows: int = 256
) -> dict[str, tuple[float, float]]:
    """For each kind in ``KINDS`` that the text has: its bits per byte at ``loops`` loops, and its share of the bytes.

    A token's bits are spread evenly over its bytes, so that tokenizers can be compared. The windows are those of
    :func:`~open_mythos.evaluation.text.text_scores`, whose bits are the mean of these, weighted by share.

    Raises:
        ValueError: as ``text_scores``.
    """
    check_fit(model, task, [length], windows)
    batch = task.windows(length, windows)
    counts = bytes_by_kind(task, batch)
    nats, total, done = torch.zeros(len(KINDS), dtype=torch.float64), counts.double().sum((0, 1)), 0
    with measuring(model, halting=False) as model:
        for part in chunks(batch, device_of(model)):
            (reading,) = readings(model, part.ids, [loops], part.valid)
            logits, targets = reading.logits.flatten(0, 1).float(), part.targets.flatten()
            lost = F.cross_entropy(logits, targets, ignore_index=UNSCORED, reduction="none").cpu()
            own = counts[done : done + len(part.ids)].flatten(0, 1)
            nats += (lost[:, None] * own / own.sum(-1, keepdim=True).clamp(min=1)).double().sum(0)
            done += len(part.ids)
    shares, bits = (total / total.sum()).tolist(), (nats / math.log(2) / total).tolist()
    return {kind: (bits[i], shares[i]) for i, kind in enumerate(KINDS) if shares[i]}
