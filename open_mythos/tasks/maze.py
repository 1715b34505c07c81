"""Mazes: which cells of a grid can be reached from its start?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.tasks.base import UNSCORED, Batch, Task

WALL, OPEN, START, NEWLINE, MARK, REACHED, UNREACHED = range(1, 8)
FEWEST_WALLS, MOST_WALLS = 0.3, 0.5


class Maze(Task):
    """A square grid of walls and open cells row by row, then a mark per cell: is it reached from the start?

    Steps go up, down, left and right between open cells. The answer at a mark is ``reached``, ``unreached`` or, of a
    wall, ``#`` again. Both halves have a newline after each row, so that every mark stands the same distance after its
    cell. The share of walls is drawn for each problem between .3 and .5, around the density (.41) at which large grids
    fall apart, so that both answers are common and paths are long. The start is any cell.

    Difficulty is the side of the grid. The newlines are not scored.
    """

    name = "maze"
    unit = "cells a side"
    least = 3
    vocab = ("<pad>", "#", ".", "S", "/", "?", "reached", "unreached")
    chance = 0.4  # answering that all is wall

    def length(self, difficulty: int) -> int:
        return 2 * difficulty * (difficulty + 1)

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        self.check(difficulty)
        side, cells = difficulty, difficulty**2
        density = FEWEST_WALLS + (MOST_WALLS - FEWEST_WALLS) * torch.rand(n, 1, generator=generator)
        open_ = torch.rand(n, cells, generator=generator) >= density
        start = F.one_hot(torch.randint(0, cells, (n,), generator=generator), cells).bool()
        open_ |= start
        reached = _flood(open_.view(n, side, side), start.view(n, side, side)).flatten(1)

        grid = torch.where(start, START, torch.where(open_, OPEN, WALL))
        answers = torch.where(reached, REACHED, torch.where(open_, UNREACHED, WALL))
        ids = torch.cat([_rows(grid, side, NEWLINE), _rows(torch.full_like(grid, MARK), side, NEWLINE)], 1)
        answers = _rows(answers, side, UNSCORED)
        return Batch(ids, torch.cat([torch.full_like(answers, UNSCORED), answers], 1))

    def render(self, ids: Sequence[int]) -> str:
        return super().render(ids).replace(" / ", "\n").replace(" /", "\n")


def _flood(open_: Tensor, start: Tensor) -> Tensor:
    """Which open cells are reached from ``start``, (n, side, side) bool both: it grows until it does not."""
    reached = start
    while True:
        grown = reached.clone()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= open_
        if torch.equal(grown, reached):
            return reached
        reached = grown


def _rows(cells: Tensor, side: int, end: int) -> Tensor:
    """(n, side²) cells with ``end`` after every row, (n, side² + side)."""
    return F.pad(cells.view(len(cells), side, side), (0, 1), value=end).flatten(1)
