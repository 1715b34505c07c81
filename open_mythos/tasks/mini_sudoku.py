"""Sudoku on a 4 x 4 grid."""

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from open_mythos.tasks.base import UNSCORED, Batch, Task

CELLS, BLANK, MARK = 16, 5, 6


class MiniSudoku(Task):
    """Fill a grid so that each row, column and 2 x 2 box has every digit from 1 to 4.

    The input is the 16 cells, row by row, then 16 marks; the target at each mark is the digit of its cell in the
    unique solution, given or not. Difficulty is the number of blank cells, at most 12, as a unique solution takes at
    least four givens. Tokens 1 to 4 are the digits.
    """

    name = "mini_sudoku"
    unit = "blanks"
    most = 12
    vocab = ("<pad>", "1", "2", "3", "4", "_", "?")
    chance = 0.25

    def length(self, difficulty: int) -> int:
        return 2 * CELLS

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        solution = all_grids()[torch.randint(0, len(all_grids()), (n,), generator=generator)]
        given = torch.ones(n, CELLS, dtype=torch.bool)
        unsolved = torch.arange(n)
        while len(unsolved):  # every grid has an order that works; at 12 blanks about two in three orders do
            given[unsolved] = _blank_out(solution[unsolved], difficulty, generator)
            unsolved = unsolved[given[unsolved].sum(1) > CELLS - difficulty]
        ids = torch.cat([torch.where(given, solution, BLANK), torch.full((n, CELLS), MARK)], 1)
        return Batch(ids, torch.cat([torch.full((n, CELLS), UNSCORED), solution], 1))


@lru_cache(maxsize=1)
def all_grids() -> Tensor:
    """The 288 solved grids, (288, 16) int64 digits."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    bands = [a + b for a, b in itertools.product(rows, rows) if {*a[:2], *b[:2]} == {*a[2:], *b[2:]} == {1, 2, 3, 4}]
    grids = torch.tensor([upper + lower for upper, lower in itertools.product(bands, bands)])
    columns = grids.view(-1, 4, 4).sort(1).values
    return grids[(columns == torch.arange(1, 5)[:, None]).all(2).all(1)]


def _blank_out(solution: Tensor, blanks: int, generator: torch.Generator | None) -> Tensor:
    """Blank up to ``blanks`` cells of ``solution`` (n, 16) in random order while the solution stays unique.

    Returns which cells are given, (n, 16) bool; a row has more givens than requested if its order hit a dead end.
    """
    n = len(solution)
    differs = (all_grids() != solution[:, None]).transpose(1, 2).contiguous()  # (n, 16, 288)
    given = torch.ones(n, CELLS, dtype=torch.bool)
    conflicts = differs.sum(1)  # givens that each grid contradicts; 0 for the solution alone
    rows = torch.arange(n)
    for cell in torch.rand(n, CELLS, generator=generator).argsort(1).T:
        fewer = conflicts - differs[rows, cell].long()
        blanked = ((fewer == 0).sum(1) == 1) & (given.sum(1) > CELLS - blanks)
        conflicts = torch.where(blanked[:, None], fewer, conflicts)
        given[rows, cell] = ~blanked
    return given
