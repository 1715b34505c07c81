"""Mazes: which cells of a grid are reachable from the start?"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.tasks.base import UNSCORED, Batch, Task

WALL, OPEN, START, NEWLINE, MARK, REACHED, UNREACHED = range(1, 8)
MIN_WALL_SHARE, MAX_WALL_SHARE = 0.3, 0.5


class Maze(Task):
    """A square grid of walls and open cells row by row, then a mark per cell: is it reachable from the start?

    Moves are up, down, left and right between open cells. The target at a mark is ``reached``, ``unreached`` or, for a
    wall, ``#``. Both halves have an unscored newline after each row, so that the offset from cell to mark is constant.
    The share of walls of each problem is uniform between .3 and .5, around the percolation threshold (.41), so that
    both answers are common and paths are long. The start is any cell. Difficulty is the side of the grid.
    """

    name = "maze"
    unit = "cells a side"
    least = 3
    vocab = ("<pad>", "#", ".", "S", "/", "?", "reached", "unreached")
    chance = 0.4  # always answering wall

    def length(self, difficulty: int) -> int:
        return 2 * difficulty * (difficulty + 1)

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        side, cells = difficulty, difficulty**2
        density = MIN_WALL_SHARE + (MAX_WALL_SHARE - MIN_WALL_SHARE) * torch.rand(n, 1, generator=generator)
        open_ = torch.rand(n, cells, generator=generator) >= density
        start = F.one_hot(torch.randint(0, cells, (n,), generator=generator), cells).bool()
        open_ |= start
        reached = _flood_fill(open_.view(n, side, side), start.view(n, side, side)).flatten(1)

        grid = torch.where(start, START, torch.where(open_, OPEN, WALL))
        answers = torch.where(reached, REACHED, torch.where(open_, UNREACHED, WALL))
        ids = torch.cat([_end_rows(grid, side, NEWLINE), _end_rows(torch.full_like(grid, MARK), side, NEWLINE)], 1)
        answers = _end_rows(answers, side, UNSCORED)
        return Batch(ids, torch.cat([torch.full_like(answers, UNSCORED), answers], 1))

    def render(self, ids: Sequence[int]) -> str:
        return super().render(ids).replace(" / ", "\n").replace(" /", "\n")


def _flood_fill(open_: Tensor, start: Tensor) -> Tensor:
    """Which open cells are reachable from ``start``, all (n, side, side) bool."""
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


def _end_rows(cells: Tensor, side: int, end: int) -> Tensor:
    """(n, side²) cells with ``end`` after every row, (n, side² + side)."""
    return F.pad(cells.view(len(cells), side, side), (0, 1), value=end).flatten(1)
