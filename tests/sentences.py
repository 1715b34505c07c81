"""A parser for the sentences of word tasks, independent of the code that generates them."""

import functools
import re
from collections.abc import Callable, Sequence


def sentences(task, ids) -> list[str]:
    return [sentence.strip() for sentence in re.findall(r"[^.?]+[.?]", task.render(ids.tolist()))]


def reader(kinds: Sequence) -> Callable:
    """A function that parses a sentence into its kind, its pattern, and the words for {0}, {1}, ... (or None).

    It fails unless exactly one pattern matches.
    """
    ways = [(kind, pattern, _regex(pattern)) for kind in kinds for pattern in kind.patterns]

    @functools.cache
    def read(sentence: str):
        found = [(*way, match.groupdict()) for *way, regex in ways if (match := regex.fullmatch(sentence))]
        assert len(found) == 1, (sentence, found)
        kind, pattern, words = found[0]
        return kind, pattern, tuple(words.get(f"w{i}") for i in range(4))

    return read


def _regex(pattern: str) -> re.Pattern:
    escaped = re.escape(pattern)
    for i in range(4):  # a placeholder that occurs twice stands for the same word
        escaped = escaped.replace(rf"\{{{i}\}}", rf"(?P<w{i}>\w+)", 1).replace(rf"\{{{i}\}}", f"(?P=w{i})")
    return re.compile(escaped)
