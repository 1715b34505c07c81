"""Mazes, checked by a search from the start."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks import UNSCORED
from open_mythos.tasks.maze import Maze


def walk(grid: list[str]) -> set[tuple[int, int]]:
    """The cells that can be reached from the start."""
    todo = [(y, x) for y, row in enumerate(grid) for x, cell in enumerate(row) if cell == "S"]
    assert len(todo) == 1
    seen = set(todo)
    while todo:
        y, x = todo.pop()
        for step in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = all(0 <= place < len(grid) for place in step)
            if inside and grid[step[0]][step[1]] != "#" and step not in seen:
                seen.add(step)
                todo.append(step)
    return seen


@given(side=st.integers(3, 12), seed=st.integers(0, 999))
def test_targets_are_the_reachable_cells(side: int, seed: int) -> None:
    task = Maze()
    ids, targets, _ = task.batch(3, side, torch.Generator().manual_seed(seed))
    half = side * (side + 1)
    assert (targets[:, :half] == UNSCORED).all()
    for row, answers in zip(ids.tolist(), targets.tolist(), strict=True):
        grid = "".join(task.vocab[i] for i in row[:half]).split("/")[:-1]
        assert "".join(task.vocab[i] for i in row[half:]) == ("?" * side + "/") * side
        reached = walk(grid)
        for y in range(side):
            for x in range(side):
                wanted = "#" if grid[y][x] == "#" else "reached" if (y, x) in reached else "unreached"
                assert task.vocab[answers[half + y * (side + 1) + x]] == wanted
            assert answers[half + y * (side + 1) + side] == UNSCORED


def test_reached_and_unreached_cells_are_both_common() -> None:
    task = Maze()
    _, targets, _ = task.batch(500, 10, torch.Generator().manual_seed(0))
    counts = targets[targets != UNSCORED].bincount(minlength=task.vocab_size).float()
    share = dict(zip(task.vocab, (counts / counts.sum()).tolist(), strict=True))
    assert min(share["reached"], share["unreached"]) > 0.2
