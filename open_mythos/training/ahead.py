"""Prefetching of batches: each is made while the step before runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from open_mythos.tasks import Batch
from open_mythos.tasks.text import Text
from open_mythos.training.config import TrainConfig


class Ahead:
    """Call ``make`` for the next step in a thread, while the present step runs.

    ``make`` depends on the number of the step alone; a step that was not prefetched is made when it is called for.
    """

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        found = self._next[1].result() if self._next is not None and self._next[0] == step else self._make(step)
        self._next = step + 1, self._thread.submit(self._make, step + 1)
        return found


def rows_ahead(task: Text, cfg: TrainConfig, device: torch.device, mine: slice) -> Ahead | None:
    """Prefetch the rows ``mine`` of each step's batch, those of this process; in pinned memory for a GPU.

    None for text whose rows are drawn at random instead of read in order.
    """
    if not task.separate:
        return None
    n, length = cfg.batch_size, cfg.task.max_difficulty

    def make(step: int) -> Batch:
        batch = task.rows(range(step * n, (step + 1) * n), length, cfg.seed, mine)
        if device.type != "cuda":
            return batch
        with torch.cuda.device(device):  # a new thread's current device is the first GPU
            return batch.map(lambda part: part.pin_memory())

    return Ahead(make)
