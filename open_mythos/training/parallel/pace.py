"""Detection of a process that keeps the others waiting."""

from statistics import median_low

WINDOW = 50  # steps over which times are summed
_MUCH = 1.5  # a slow process takes more than so many times the median of all processes
_FELT = 0.1  # and exceeds it by more than this share of the steps' time


class Pace:
    """Time that each process works in a step without waiting for others, summed over windows of steps."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.own = 0, 0.0, list[float]()

    def add(self, own: list[float], seconds: float) -> str:
        """Add a step: the seconds that each process worked without waiting, and that the whole step took.

        Returns:
            A warning that names the slowest process, if a window has ended in which it was much slower; or "".
        """
        self.own = [a + b for a, b in zip(self.own or [0.0] * len(own), own, strict=True)]
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        if self.steps < WINDOW:
            return ""
        slowest, usual, whole = max(self.own), median_low(self.own), self.seconds
        said = (
            f"process {self.own.index(slowest)} is slow: the last {WINDOW} steps took {whole:.3g} s, of which its own "
            f"work was {slowest:.3g} s; the median of all {len(own)} processes is {usual:.3g} s; check its machine"
        )
        self.steps, self.seconds, self.own = 0, 0.0, []
        return said if slowest > _MUCH * usual and slowest - usual > _FELT * whole else ""
