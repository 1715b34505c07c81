"""Reading what tasks in words say, without their generators."""

import re
from collections.abc import Callable, Sequence


def sentences(task, ids) -> list[str]:
    return [sentence.strip() for sentence in re.findall(r"[^.?]+[.?]", task.render(ids.tolist()))]


def reader(kinds: Sequence) -> Callable:
    """A function of a sentence: its kind, its pattern, and the words that {0}, {1}, ... stand for, or None.

    It fails unless there is just one way to read the sentence.
    """
    ways = [
        (kind, pattern, re.compile(re.sub(r"\\{(\d)\\}", r"(?P<w\1>\\w+)", re.escape(pattern))))
        for kind in kinds
        for pattern in kind.patterns
    ]

    def read(sentence: str):
        found = [(*way, match.groupdict()) for *way, regex in ways if (match := regex.fullmatch(sentence))]
        assert len(found) == 1, (sentence, found)
        kind, pattern, words = found[0]
        return kind, pattern, [words.get(f"w{i}") for i in range(4)]

    return read
