"""A curriculum that follows what is learned: loops and problems grow once the present ones are mastered."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from open_mythos.nn.block import Dropout
from open_mythos.tasks import Task
from open_mythos.tasks.base import Share
from open_mythos.training.config import LoopConfig, TaskConfig

_STRIDE = 0.04  # of the way from the smallest to the full size
_FEWEST_LOOPS = 2
_SPARE = 2  # loops to spare, until problems are of full size: what is to stay can be learned once it is there
_MEMORY = 0.95  # of the mean over the last steps
_LEAST = 15  # steps at one size
_REHEARSAL = 3  # of so many steps one has a batch of every task; the others of those that are not mastered yet
_STILL = 0.95  # share of what is enough to grow at which a task of full size is mastered, or steps would go to and fro


@dataclass
class Growth:
    """How far problems and loops have grown, and how well those of the present size go.

    What a loop has to learn is learned at two of them, on small problems, at a fraction of the cost. Asked for answers
    that are many steps away, a model learns to guess them from what the problem mentions, and may never learn a step.

    Attributes:
        size: 0 for the smallest problems and fewest loops, 1 for those of full size.
        right: share of answers that were right, a running mean.
        steps: made at this size.
    """

    size: float = 0.0
    right: float = 0.0
    steps: int = 0

    def of(self, task: Task, cfg: TaskConfig) -> tuple[Task, int]:
        """The task at this size, and the hardest of its problems that are in ``cfg``."""
        task = task.sized(self.size)
        return task, cfg.max_difficulty if task.most is None else min(cfg.max_difficulty, task.most)

    def loops(self, cfg: LoopConfig) -> LoopConfig:
        """How many loops a step runs at this size: at most as many as it has grown to, and few of them to spare."""
        spare = cfg.spare if self.size == 1 else min(cfg.spare, _SPARE)
        more = max(0, cfg.maximum - (cfg.spare - spare) - _FEWEST_LOOPS)  # than the fewest, once they have grown
        maximum = min(cfg.maximum, _FEWEST_LOOPS + int(more * min(1.0, self.size / cfg.grown)))
        return replace(cfg, minimum=min(cfg.minimum, maximum), maximum=maximum, spare=spare)

    def is_mastered(self, enough: float) -> bool:
        """Whether problems are of full size, and the share of answers that were right is still about ``enough``."""
        return self.size == 1 and self.right >= _STILL * enough

    def add(self, accuracy: float, enough: float) -> None:
        """Note the share of answers that were right in a step, and grow if it has been ``enough``."""
        self.right, self.steps = _MEMORY * self.right + (1 - _MEMORY) * accuracy, self.steps + 1
        if self.size < 1 and self.right >= enough and self.steps >= _LEAST:
            self.size, self.steps = min(1.0, self.size + _STRIDE), 0


def due(shares: list[Share], growths: Mapping[str, Growth], enough: float, step: int) -> list[Share]:
    """The tasks of a step: all, but in two steps of three only what is not mastered yet, if there is such.

    Args:
        shares: all tasks.
        growths: of each, by name.
        enough: the share of right answers at which they do.
        step: its number.
    """
    left = [share for share in shares if not growths[share.name].is_mastered(enough)]
    return left if left and step % _REHEARSAL else shares


def wait_with_dropout(model: nn.Module, growths: Mapping[str, Growth], p: float) -> None:
    """Dropout of ``p`` once all problems are of full size, and none before: until then it only slows growth down."""
    p = p if all(growth.size == 1 for growth in growths.values()) else 0.0
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = p
