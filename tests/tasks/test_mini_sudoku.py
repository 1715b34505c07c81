"""Mini sudoku, checked by a solver that tries every digit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.tasks import UNSCORED
from open_mythos.tasks.mini_sudoku import BLANK, MiniSudoku, all_grids


def solutions(cells: list[int]) -> list[list[int]]:
    if BLANK not in cells:
        return [cells]
    at = cells.index(BLANK)

    def together(i: int) -> bool:
        same_box = (i // 8, i % 4 // 2) == (at // 8, at % 4 // 2)
        return i // 4 == at // 4 or i % 4 == at % 4 or same_box

    taken = {cells[i] for i in range(16) if together(i)}
    return [
        found
        for digit in (1, 2, 3, 4)
        if digit not in taken
        for found in solutions([*cells[:at], digit, *cells[at + 1 :]])
    ]


@given(blanks=st.integers(1, 12), seed=st.integers(0, 999))
def test_each_puzzle_has_one_solution_which_is_the_target(blanks: int, seed: int) -> None:
    ids, targets, _ = MiniSudoku().batch(4, blanks, torch.Generator().manual_seed(seed))
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        cells, marks = row[:16], row[16:]
        assert cells.count(BLANK) == blanks and marks == [6] * 16
        assert wanted[:16] == [UNSCORED] * 16
        assert solutions(cells) == [wanted[16:]]


def test_all_grids_are_the_solutions_of_an_empty_grid() -> None:
    assert sorted(all_grids().tolist()) == solutions([BLANK] * 16)
