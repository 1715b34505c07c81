"""Properties of every task: how it is made, what it draws, how it is scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from open_mythos import tasks
from open_mythos.tasks import UNSCORED, Batch, Task

# The first problem of seed 0 and its targets. A change here needs a higher `version` in the task.
GOLDEN: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("parity", {}, 8, "0 1 1 0 1 1 1 1", "0 1 0 0 1 0 1 0"),
    ("prefix_sums", {"modulus": 3}, 8, "2 0 2 0 1 0 1 1", "2 2 1 1 2 2 0 1"),
    ("chain_sum", {}, 5, "START 4 3 0 2 1 =", "· · · · · · 3"),
    (
        "p_hop",
        {"symbols": 5, "questions": 2},
        3,
        "a> b d> e b> c c> d e> a e ? ? ? a ? ? ?",
        "· · · · · · · · · · · a b c · b c d",
    ),
    ("addition", {}, 6, "4 7 9 0 3 6 0 9 3 6 9 0 =", "· 1 · 0 · 0 · 0 · 0 · 0 1"),
    (
        "permutations",
        {"generators": "transpositions"},
        4,
        "14325 52341 13245 12354",
        "14325 54321 54231 45231",
    ),
    (
        "maze",
        {},
        3,
        ". # # / # . . / . . S / ? ? ? / ? ? ? / ? ? ? /",
        "· · · · · · · · · · · · unreached # # · # reached reached · reached reached reached ·",
    ),
    (
        "mini_sudoku",
        {},
        8,
        "1 _ _ _ 4 2 1 _ 3 _ 2 _ _ _ 3 1 ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ?",
        "· · · · · · · · · · · · · · · · 1 3 4 2 4 2 1 3 3 1 2 4 2 4 3 1",
    ),
]
SYNTHETIC = [name for name, *_ in GOLDEN]
# The same for tasks in words, whose problems differ in length; only the targets that are scored.
IN_WORDS: list[tuple[str, dict[str, Any], int, str, str]] = [
    (
        "assignments",
        {"sentences": 6},
        2,
        "what Ruth has , Walt has . what Bruno has , Paul has . Emil has what Igor has . Ruth holds the drum . "
        "Bruno has a book . the ring is with Igor . what is with Bruno ? Paul has what ? what has Emil ? "
        "what is with Igor ? Ruth has what ? what does Walt have ?",
        "book book ring ring drum drum",
    ),
    (
        "word_problems",
        {"people": 7},
        3,
        "Bruno holds 4 coins . Liam holds 3 coins . Rita has as many coins as Bruno and Liam together . "
        "Emil holds 5 more than Liam . Edna has as many coins as Emil less 4 . Oscar holds as many as both Emil and "
        "Edna . Ben has as many coins as Edna and 4 more . Edna has how many coins ?",
        "4",
    ),
    (
        "relations",
        {"sentences": 12, "questions": 1},
        2,
        "the rival of Mark is Bert . Bert 's rival is Gail . Mark 's guide is Gail . Nina 's doctor is Gail . Nina is "
        "the doctor of Bert . the rival of Nina is Gail . the guide Gail has is Nina . the doctor of Mark is Bert . "
        "the doctor of Gail is Mark . the rival Gail has is Bert . Bert 's guide is Mark . the guide of Nina is Bert . "
        "and who is Nina 's doctor 's rival ?",
        "Bert",
    ),
    (
        "registers",
        {"registers": 4},
        3,
        "write 6 to H . set C to 4 . set A to 5 . put 4 in D . H and C swap values . take 5 from D . add C to A . "
        "A is what ?",
        "4",
    ),
]
WORDS = [name for name, *_ in IN_WORDS]
EVERY = [*SYNTHETIC, *WORDS, "words"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spelt(task: Task, row: torch.Tensor) -> str:
    return " ".join("·" if i == UNSCORED else task.vocab[i] for i in row.tolist())


@pytest.mark.parametrize(("name", "options", "difficulty", "problem", "answers"), GOLDEN, ids=SYNTHETIC)
def test_the_first_problem_of_seed_0_is_unchanged(
    name: str, options: dict[str, Any], difficulty: int, problem: str, answers: str
) -> None:
    task = tasks.load(name, **options)
    batch = task.batch(1, difficulty, seeded())
    assert (spelt(task, batch.ids[0]), spelt(task, batch.targets[0])) == (problem, answers)
    assert task.version == 1


@pytest.mark.parametrize(("name", "options", "difficulty", "problem", "answers"), IN_WORDS, ids=WORDS)
def test_the_first_problem_of_seed_0_in_words_is_unchanged(
    name: str, options: dict[str, Any], difficulty: int, problem: str, answers: str
) -> None:
    task = tasks.load(name, **options)
    batch = task.batch(1, difficulty, seeded())
    assert task.render(batch.ids[0].tolist()) == problem
    assert task.render(batch.targets[batch.targets != UNSCORED].tolist()) == answers
    assert task.version == {"assignments": 2, "relations": 2, "registers": 4}.get(name, 1)


@pytest.mark.parametrize("name", WORDS)
def test_problems_in_words_of_mixed_difficulties_share_a_batch(name: str) -> None:
    task = tasks.load(name)
    batch = task.mixed([3, 1, 2], seeded())
    assert batch.steps is not None and batch.steps.shape == (*batch.ids.shape, task.n_steps(3))
    assert batch.ids.shape[1] <= task.length(3) and task.has_steps and 0 < task.chance < 1
    answered = batch.targets != UNSCORED
    assert answered.any(1).all() and torch.equal(batch.steps[..., -1][answered], batch.targets[answered])
    assert batch.valid is not None and torch.equal(batch.valid, batch.ids != 0)


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_reproduces_a_batch_and_another_differs(name: str) -> None:
    task = tasks.load(name)
    first, again, other = (task.batch(8, task.least + 3, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("name", EVERY)
def test_without_a_generator_the_global_one_is_used(name: str) -> None:
    task = tasks.load(name)
    torch.manual_seed(3)
    first = task.batch(4, task.least)
    torch.manual_seed(3)
    assert torch.equal(first.ids, task.batch(4, task.least).ids)


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("more", [0, 1, 7])
def test_batches_have_the_right_shapes_lengths_and_tokens(name: str, more: int) -> None:
    task = tasks.load(name)
    assert task.name == name and len(set(task.vocab)) == task.vocab_size and 0 < task.chance < 1
    ids, targets, valid = task.batch(5, task.least + more, seeded())
    assert ids.shape == targets.shape == (5, task.length(task.least + more)) and valid is None
    assert ids.dtype == targets.dtype == torch.int64
    scored = targets[targets != UNSCORED]
    assert len(scored) and ids.min() > 0 and scored.min() > 0
    assert max(ids.max(), scored.max()) < task.vocab_size


@pytest.mark.parametrize("name", SYNTHETIC)
def test_chance_is_the_accuracy_of_the_best_constant_answer(name: str) -> None:
    task = tasks.load(name)
    _, targets, _ = task.batch(1000, 12, seeded())
    best = targets[targets != UNSCORED].bincount().max() / (targets != UNSCORED).sum()
    assert task.chance == pytest.approx(best.item(), abs=0.02, rel=0.1)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_mixed_difficulties_are_padded_on_the_right(name: str) -> None:
    task = tasks.load(name)
    difficulties = [task.least + 4, task.least, task.least + 2]
    ids, targets, valid = task.mixed(difficulties, seeded())
    lengths = torch.tensor([task.length(difficulty) for difficulty in difficulties])
    assert ids.shape == (3, lengths.max())
    inside = torch.arange(ids.shape[1]) < lengths[:, None]
    assert valid is None if inside.all() else torch.equal(valid, inside)
    assert torch.equal(ids != 0, inside) and (targets[~inside] == UNSCORED).all()
    generator = seeded()
    for row, difficulty in enumerate(difficulties):
        alone = task.batch(1, difficulty, generator)
        assert torch.equal(ids[row, : lengths[row]], alone.ids[0])
        assert torch.equal(targets[row, : lengths[row]], alone.targets[0])


@pytest.mark.parametrize("name", EVERY)
def test_invalid_difficulties_are_refused(name: str) -> None:
    task = tasks.load(name)
    wrong: list[Any] = [task.least - 1, 2.5, True, *([] if task.most is None else [task.most + 1])]
    for difficulty in wrong:
        with pytest.raises(
            ValueError,
            match=f"difficulty={difficulty}; the difficulty of {name} is its number of {task.unit}, from {task.least}",
        ):
            task.batch(1, difficulty)


def test_a_task_returns_its_options() -> None:
    task = tasks.load("permutations", size=4)
    assert task.to_dict() == {"generators": "all", "size": 4}
    assert tasks.load(task.name, **task.to_dict()) == task


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("p-hop", {}, "unknown task 'p-hop'; did you mean 'p_hop'?"),
        ("chain_sum", {"mod": 5}, "chain_sum has no option 'mod' (task.options.mod); it has modulus"),
        ("parity", {"modulus": 5}, "parity has no option 'modulus' (task.options.modulus); it has none"),
        ("chain_sum", {"modulus": 1}, "modulus=1 is too small; use an int of at least 2"),
        ("permutations", {"generators": "swaps"}, "generators='swaps' is unknown; use one of 'all', 'transpositions'"),
        ("permutations", {"size": 6}, "size=6 is too large; use 3 to 5"),
        ("p_hop", {"symbols": "16"}, "symbols='16' is not a whole number"),
    ],
)
def test_unknown_tasks_and_invalid_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        tasks.load(name, **options)
    assert message in str(error.value)


def test_score_counts_scored_positions_only() -> None:
    targets = torch.tensor([[1, UNSCORED, 2, 2], [UNSCORED, 1, UNSCORED, UNSCORED], [1, 1, 1, 1]])
    answers = torch.tensor([[1, 9, 2, 1], [7, 1, 7, 7], [2, 2, 2, 2]])
    score = tasks.load("parity").score(answers, targets)
    assert score.tokens.tolist() == pytest.approx([2 / 3, 1, 0])
    assert score.exact.tolist() == [False, True, False]


def test_pad_keeps_earlier_padding() -> None:
    short = Batch(torch.tensor([[1, 0]]), torch.tensor([[2, UNSCORED]]), torch.tensor([[True, False]]))
    ids, targets, valid = tasks.pad([short, Batch(torch.tensor([[1, 2, 1]]), torch.tensor([[1, 1, 1]]))])
    assert ids.tolist() == [[1, 0, 0], [1, 2, 1]]
    assert targets.tolist() == [[2, UNSCORED, UNSCORED], [1, 1, 1]]
    assert valid is not None and valid.tolist() == [[True, False, False], [True, True, True]]


def test_render_leaves_padding_out() -> None:
    assert tasks.load("chain_sum").render([1, 5, 2, 0, 0]) == "START 2 ="
    assert tasks.load("maze").render([1, 2, 4, 3, 2, 4]) == "# .\nS .\n"
