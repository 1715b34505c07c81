"""An adaptive curriculum: loops and problems grow a step whenever those of the present size are mastered."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from open_mythos.nn.block import Dropout
from open_mythos.tasks import Task
from open_mythos.tasks.base import Share
from open_mythos.training.config import LoopConfig, TaskConfig

_STRIDE = 0.04  # share of the way from the smallest to the full size that one growth step takes
_FEWEST_LOOPS = 2
_SPARE = 2  # maximum of loops.spare before full size: to hold an answer over more loops can be learned afterwards
_MEMORY = 0.95  # decay of the running mean of accuracy
_LEAST = 15  # minimum number of training steps at one size
_REHEARSAL = 3  # every third step trains on all tasks, the others only on those that are not mastered yet
_STILL = 0.95  # hysteresis: a task of full size is mastered down to this share of the accuracy that makes it grow


@dataclass
class Growth:
    """How far the problems and loops of a task have grown, and the model's accuracy at the present size.

    What one loop has to compute can be learned with two loops on small problems, at a fraction of the cost. Supervised
    only with answers that are many steps away, a model learns to guess them from what the problem mentions, and may
    never learn a single step.

    Attributes:
        size: 0 for the smallest problems and fewest loops, 1 for those of full size.
        right: running mean of accuracy.
        steps: training steps made at this size.
    """

    size: float = 0.0
    right: float = 0.0
    steps: int = 0

    @property
    def is_full(self) -> bool:
        """Whether problems are of full size."""
        return self.size == 1

    def of(self, task: Task, cfg: TaskConfig) -> tuple[Task, int]:
        """The task at this size, and its greatest difficulty within that of ``cfg``."""
        task = task.sized(self.size)
        return task, cfg.max_difficulty if task.most is None else min(cfg.max_difficulty, task.most)

    def loops(self, cfg: LoopConfig) -> LoopConfig:
        """``cfg`` with maximum, minimum and spare loops lowered to what this size allows."""
        spare = cfg.spare if self.is_full else min(cfg.spare, _SPARE)
        more = max(0, cfg.maximum - (cfg.spare - spare) - _FEWEST_LOOPS)  # loops that growth adds in all
        maximum = min(cfg.maximum, _FEWEST_LOOPS + int(more * min(1.0, self.size / cfg.grown)))
        return replace(cfg, minimum=min(cfg.minimum, maximum), maximum=maximum, spare=spare)

    def is_mastered(self, enough: float) -> bool:
        """Whether problems are of full size, and mean accuracy is still close to ``enough`` or above."""
        return self.is_full and self.right >= _STILL * enough

    def add(self, accuracy: float, enough: float) -> None:
        """Add the accuracy of a step to the running mean, and grow if that has reached ``enough``."""
        self.right, self.steps = _MEMORY * self.right + (1 - _MEMORY) * accuracy, self.steps + 1
        if not self.is_full and self.right >= enough and self.steps >= _LEAST:
            self.size, self.steps = min(1.0, self.size + _STRIDE), 0


def due(shares: list[Share], growths: Mapping[str, Growth], enough: float, step: int) -> list[Share]:
    """The tasks of a step: every third step all, otherwise those that are not mastered yet, or all if there are none.

    Args:
        shares: all tasks.
        growths: of each task, by name.
        enough: accuracy at which tasks grow.
        step: number of the training step.
    """
    left = [share for share in shares if not growths[share.name].is_mastered(enough)]
    return left if left and step % _REHEARSAL else shares


def wait_with_dropout(model: nn.Module, growths: Mapping[str, Growth], p: float) -> None:
    """Set dropout to ``p`` once all tasks are of full size, and to 0 before, where it would only slow growth down."""
    p = p if all(growth.is_full for growth in growths.values()) else 0.0
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = p
