"""Programs in words: what their lines say is what the targets are, and the test never saw any of them."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from sentences import reader, sentences

from open_mythos import tasks
from open_mythos.tasks import UNSCORED
from open_mythos.tasks.english import REGISTERS, encode
from open_mythos.tasks.registers import ADD, ASKS, IF, SET, SUBTRACT, SWAP

read = reader((SET, ADD, SUBTRACT, SWAP, IF, ASKS))


def problems(n=16, difficulty=3, seed=0, **options):
    task = tasks.load("registers", **options)
    return task, task.batch(n, difficulty, torch.Generator().manual_seed(seed))


def executed(kind, words, holds, depth, modulus) -> str:
    """Run a line; the register that its end tells of."""
    to, other, limit, new = words
    operand = holds.get(other, int(other) if other and other.isdigit() else None)
    needs = [other] if kind is SET else [to, other]
    after = 1 + max((depth[register] for register in needs if register in holds), default=-1)
    if kind is IF:  # first whether it is so
        after = max(after, depth[other] + 2)
    if kind is SWAP:
        holds[to], holds[other] = holds[other], holds[to]
        depth[other] = after
    elif kind is IF:
        holds[to] = (holds[to] + int(new) * (operand > int(limit))) % modulus
    else:
        holds[to] = {SET: operand, ADD: holds.get(to, 0) + operand, SUBTRACT: holds.get(to, 0) - operand}[kind]
        holds[to] %= modulus
    depth[to] = after
    return to


@pytest.mark.parametrize(
    ("difficulty", "options"),
    [
        (1, {}), (6, {"registers": 8}), (12, {"split": "held_out", "modulus": 23}), (24, {}),
        (6, {"letters": 5}), (32, {"split": "held_out", "registers": 4}),
    ],
)  # fmt: skip
def test_targets_and_steps_are_what_the_lines_do(difficulty, options):
    task, batch = problems(12, difficulty, **options)
    assert batch.steps.shape == (*batch.ids.shape, task.n_steps(difficulty))
    assert batch.ids.shape[1] <= task.length(difficulty)
    for ids, targets, steps in zip(batch.ids, batch.targets, batch.steps, strict=True):
        holds, depth, start = {}, {}, 0
        expected = torch.full_like(steps, UNSCORED)

        def tell(place, register, holds, loops, expected=expected):
            """Which register it is, and after so many loops what it holds."""
            expected[place] = encode(register)[0]
            expected[place, loops:] = encode(str(holds[register]))[0]

        ends = [place for place, word in enumerate(ids.tolist()) if word in encode(". ?")]
        for line, end in enumerate(ends):
            told = [task.vocab[word] for word in ids[start : end + 1]]
            kind, _, words = read(" ".join(told))
            if kind is IF:
                _, other, limit, _ = words
                place = start + told.index("than") + 1
                expected[place] = encode(other)[0]
                expected[place, depth[other] + 2 :] = encode("so" if holds[other] > int(limit) else "not")[0]
            for place, word in enumerate(told, start):
                if word in holds:
                    tell(place, word, holds, depth[word] + 2)
            if kind is ASKS:
                tell(end, words[0], holds, depth[words[0]] + 2)
                assert targets[end] == encode(str(holds[words[0]]))[0]
            else:
                assert line >= task.registers or (kind is SET and words[1].isdigit())
                to = executed(kind, words, holds, depth, task.modulus)
                tell(end, to, holds, depth[to] + 1)
                if kind is SWAP:
                    tell(start + told.index("swap"), words[1], holds, depth[to] + 1)
            start = end + 1
        assert set(holds) <= set(REGISTERS[: task.letters]) and len(holds) == task.registers
        assert len(ends) == task.registers + difficulty + 1
        assert torch.equal(steps, expected) and (targets != UNSCORED).sum() == 1


def test_nothing_of_the_test_was_in_training():
    seen = {"train": (set(), set(), set()), "held_out": (set(), set(), set())}
    for split, (pairs, uses, texts) in seen.items():
        for seed in range(4):
            task, batch = problems(64, 24, seed, split=split, registers=8)
            for ids in batch.ids:
                for sentence in sentences(task, ids):
                    _, pattern, (to, other, *_) = read(sentence)
                    uses.add((pattern, to))
                    texts.add(sentence)
                    if other and other in REGISTERS:
                        pairs.add(frozenset((to, other)))
    (pairs, uses, texts), (test_pairs, test_uses, test_texts) = seen.values()
    assert not pairs & test_pairs and not uses & test_uses and not texts & test_texts
    assert len(pairs) == 16 and len(test_pairs) == 12 and len(uses) == 3 * len(test_uses) == 3 * 8 * 6


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("difficulty", [6, 12])
def test_no_number_can_be_guessed_from_the_words(split, difficulty):
    """The most frequent number, the last, one for all, and what the register that is asked for was set to at first or
    last named with: chance is .143."""
    right, asked_for, n = Counter(), Counter(), 0
    for seed in range(2):
        task, batch = problems(200, difficulty, seed, split=split)
        for ids, targets in zip(batch.ids, batch.targets, strict=True):
            answer, told = task.vocab[targets.max()], sentences(task, ids)
            numbers = [word for word in task.render(ids.tolist()).split() if word.isdigit()]
            asked = read(told[-1])[2][0]
            with_it = [words for _, _, words in map(read, told[:-1]) if words[0] == asked]
            guesses = {
                "most": Counter(numbers).most_common(1)[0][0], "last": numbers[-1], "constant": "0",
                "start": with_it[0][1], "with": [w for words in with_it for w in words if w and w.isdigit()][-1],
            }  # fmt: skip
            n += 1
            asked_for[asked] += 1
            right.update(guess for guess, number in guesses.items() if number == answer)
    assert max(right.values()) < 0.25 * n, right
    assert max(asked_for.values()) < 0.3 * n


def test_programs_grow_with_their_size():
    """At first no number changes, then few numbers do and no line calculates with what another calculated, then all
    do; what was written is handed on from the start."""
    task = tasks.load("registers", lines=24)
    assert [task.sized(size).most for size in (0, 0.5, 1)] == [12, 18, 24]
    kinds, said, used, handed_on = {}, {}, {}, {}
    for size in (0.0, 0.16, 0.28, 1.0):
        batch = task.sized(size).batch(32, 6, torch.Generator().manual_seed(0))
        programs = [[read(sentence) for sentence in sentences(task, ids)] for ids in batch.ids]
        kinds[size] = {kind for program in programs for kind, *_ in program}
        said[size] = {word for word in task.render(batch.ids.flatten().tolist()).split() if word.isdigit()}
        used[size] = handed_on[size] = False
        for program in programs:
            holds, depth, calculated = {}, {}, {}
            for kind, _, words in program[:-1]:
                to, other, *_ = words
                reads = [word for word in ([other] if kind is SET else [to, other]) if word in holds]
                read_any = any(calculated[word] for word in reads)
                before = {word: depth[word] for word in reads}
                executed(kind, words, holds, depth, task.modulus)
                if kind in (SET, SWAP):
                    handed_on[size] |= any(before[word] > 0 for word in reads)
                else:
                    used[size] |= read_any
                if kind is SWAP:
                    calculated[to], calculated[other] = calculated[other], calculated[to]
                else:
                    calculated[to] = kind is not SET or read_any
    assert kinds[0.0] == {SET, SWAP, ASKS} and all(len(kinds[size]) == 6 for size in (0.16, 0.28, 1.0))
    assert list(used.values()) == [False, False, False, True] and all(handed_on.values())
    assert said[0.16] == {"0", "1", "2"} and said[0.0] == said[1.0] == set("0123456")


@pytest.mark.parametrize(("options", "message"), [
    ({"registers": 3}, "registers=3 is too small; use an int of at least 4 and at most 8"),
    ({"registers": 9}, "registers=9 is too large"),
    ({"registers": 6, "letters": 5}, "registers=6 is above letters=5; use fewer registers or more letters"),
    ({"modulus": 24}, "modulus=24 is too large"),
    ({"lines": 0}, "lines=0 is too small"),
    ({"split": "test"}, "split='test'"),
])  # fmt: skip
def test_options_that_cannot_be_say_what_can(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load("registers", **options)


@pytest.mark.parametrize("difficulty", [0, 33])
def test_lines_that_cannot_be_are_refused(difficulty):
    with pytest.raises(
        ValueError, match=rf"difficulty={difficulty}; the difficulty of registers is its number of lines, from 1 to 32"
    ):
        problems(2, difficulty)
