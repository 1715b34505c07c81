"""Programs in words: targets follow from executing the lines, of which none is both in training and held out."""

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
    """Execute a line; the register whose value is the target at the end of the line."""
    to, other, limit, new = words
    operand = holds.get(other, int(other) if other and other.isdigit() else None)
    needs = [other] if kind is SET else [to, other]
    after = 1 + max((depth[register] for register in needs if register in holds), default=-1)
    if kind is IF:  # the condition is known first
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
def test_targets_and_steps_follow_from_executing_the_lines(difficulty, options):
    task, batch = problems(12, difficulty, **options)
    assert batch.steps.shape == (*batch.ids.shape, task.n_steps(difficulty))
    assert batch.ids.shape[1] <= task.length(difficulty)
    for ids, targets, steps in zip(batch.ids, batch.targets, batch.steps, strict=True):
        holds, depth, start = {}, {}, 0
        expected = torch.full_like(steps, UNSCORED)

        def expect(place, register, holds, loops, expected=expected):
            """The register's name, and from loop ``loops`` on its value."""
            expected[place] = encode(register)[0]
            expected[place, loops:] = encode(str(holds[register]))[0]

        ends = [place for place, word in enumerate(ids.tolist()) if word in encode(". ?")]
        for line, end in enumerate(ends):
            line_words = [task.vocab[word] for word in ids[start : end + 1]]
            kind, _, words = read(" ".join(line_words))
            if kind is IF:
                _, other, limit, _ = words
                place = start + line_words.index("than") + 1
                expected[place] = encode(other)[0]
                expected[place, depth[other] + 2 :] = encode("so" if holds[other] > int(limit) else "not")[0]
            for place, word in enumerate(line_words, start):
                if word in holds:
                    expect(place, word, holds, depth[word] + 2)
            if kind is ASKS:
                expect(end, words[0], holds, depth[words[0]] + 2)
                assert targets[end] == encode(str(holds[words[0]]))[0]
            else:
                assert line >= task.registers or (kind is SET and words[1].isdigit())
                to = executed(kind, words, holds, depth, task.modulus)
                expect(end, to, holds, depth[to] + 1)
                if kind is SWAP:
                    expect(start + line_words.index("swap"), words[1], holds, depth[to] + 1)
            start = end + 1
        assert set(holds) <= set(REGISTERS[: task.letters]) and len(holds) == task.registers
        assert len(ends) == task.registers + difficulty + 1
        assert torch.equal(steps, expected) and (targets != UNSCORED).sum() == 1


def test_held_out_programs_share_nothing_with_training():
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
def test_answers_cannot_be_guessed_from_the_numbers_in_a_program(split, difficulty):
    """Guesses: the most frequent number, the last, a constant, the number that the register asked for was first set to,
    and the last in a line about it. Chance is .143."""
    right, asked_for, n = Counter(), Counter(), 0
    for seed in range(2):
        task, batch = problems(200, difficulty, seed, split=split)
        for ids, targets in zip(batch.ids, batch.targets, strict=True):
            answer, lines = task.vocab[targets.max()], sentences(task, ids)
            numbers = [word for word in task.render(ids.tolist()).split() if word.isdigit()]
            asked = read(lines[-1])[2][0]
            about_it = [words for _, _, words in map(read, lines[:-1]) if words[0] == asked]
            guesses = {
                "most": Counter(numbers).most_common(1)[0][0], "last": numbers[-1], "constant": "0",
                "start": about_it[0][1], "with": [w for words in about_it for w in words if w and w.isdigit()][-1],
            }  # fmt: skip
            n += 1
            asked_for[asked] += 1
            right.update(guess for guess, number in guesses.items() if number == answer)
    assert max(right.values()) < 0.25 * n, right
    assert max(asked_for.values()) < 0.3 * n


def test_programs_get_harder_with_their_size():
    """At first no number changes, then few numbers do and no line uses a computed value, at full size all lines may;
    values are copied between registers at every size."""
    task = tasks.load("registers", lines=24)
    assert [task.sized(size).most for size in (0, 0.5, 1)] == [12, 18, 24]
    kinds, numbers, computed_used, copied = {}, {}, {}, {}
    for size in (0.0, 0.16, 0.28, 1.0):
        batch = task.sized(size).batch(32, 6, torch.Generator().manual_seed(0))
        programs = [[read(sentence) for sentence in sentences(task, ids)] for ids in batch.ids]
        kinds[size] = {kind for program in programs for kind, *_ in program}
        numbers[size] = {word for word in task.render(batch.ids.flatten().tolist()).split() if word.isdigit()}
        computed_used[size] = copied[size] = False
        for program in programs:
            holds, depth, calculated = {}, {}, {}
            for kind, _, words in program[:-1]:
                to, other, *_ = words
                reads = [word for word in ([other] if kind is SET else [to, other]) if word in holds]
                read_any = any(calculated[word] for word in reads)
                before = {word: depth[word] for word in reads}
                executed(kind, words, holds, depth, task.modulus)
                if kind in (SET, SWAP):
                    copied[size] |= any(before[word] > 0 for word in reads)
                else:
                    computed_used[size] |= read_any
                if kind is SWAP:
                    calculated[to], calculated[other] = calculated[other], calculated[to]
                else:
                    calculated[to] = kind is not SET or read_any
    assert kinds[0.0] == {SET, SWAP, ASKS} and all(len(kinds[size]) == 6 for size in (0.16, 0.28, 1.0))
    assert list(computed_used.values()) == [False, False, False, True] and all(copied.values())
    assert numbers[0.16] == {"0", "1", "2"} and numbers[0.0] == numbers[1.0] == set("0123456")


@pytest.mark.parametrize(("options", "message"), [
    ({"registers": 3}, "registers=3 is too small; use an int of at least 4 and at most 8"),
    ({"registers": 9}, "registers=9 is too large"),
    ({"registers": 6, "letters": 5}, "registers=6 is above letters=5; use fewer registers or more letters"),
    ({"modulus": 24}, "modulus=24 is too large"),
    ({"lines": 0}, "lines=0 is too small"),
    ({"split": "test"}, "split='test'"),
])  # fmt: skip
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load("registers", **options)


@pytest.mark.parametrize("difficulty", [0, 33])
def test_an_invalid_number_of_lines_is_refused(difficulty):
    with pytest.raises(
        ValueError, match=rf"difficulty={difficulty}; the difficulty of registers is its number of lines, from 1 to 32"
    ):
        problems(2, difficulty)
