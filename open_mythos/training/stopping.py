"""Signals to stop, from a terminal, a scheduler or a notebook."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

from open_mythos.training import distributed

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """Context manager that delays the first stop signal until the end of a :meth:`held` block, and then raises.

    It raises KeyboardInterrupt for SIGINT, as usual, and SystemExit(128 + number) for other signals. A second signal
    has its usual effect: it ends the process at once. Signals that are ignored, as under nohup, stay so. Only the main
    thread gets signals; in another, nothing changes. Processes of torchrun react to the first signal only, since
    torchrun repeats signals and kills processes itself.

    Attributes:
        asked: number of the signal, or 0.
        agreed: with several processes, the signal that one of them got, once all know it by :meth:`hear`; or 0.
    """

    def __init__(self) -> None:
        self.asked, self.agreed, self._holds, self._before = 0, 0, False, dict[int, Any]()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._answer)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _answer(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if distributed.world_size() == 1:
            self.__exit__()
        if not self._holds:
            self.leave()

    def hear(self, asked: Iterable[float]) -> None:
        """Take in the signals of all processes, known to all at once: all leave after the same step, with one code."""
        self.agreed = self.agreed or next((int(number) for number in asked if number), 0)
        self.asked = self.agreed or self.asked

    def is_asked(self) -> bool:
        """Whether it is time to stop; with several processes, the same answer in all."""
        return (self.asked if distributed.world_size() == 1 else self.agreed) > 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay signals until the end of the block, which polls :meth:`is_asked` to end early."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
        if distributed.world_size() > 1:  # none may go on alone to a collective that needs all
            self.hear(distributed.gathered(self.asked))
        if self.is_asked():
            self.leave()

    @contextlib.contextmanager
    def telling(self, log: Callable[[str], None], left: Callable[[], str]) -> Iterator[None]:
        """If a signal stops the block, ``log`` which one, and the message of ``left``: what is saved, how to resume."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            log(f"stopped by {signal.Signals(self.asked or signal.SIGINT).name}; {left()}")
            raise

    def leave(self) -> NoReturn:
        """Raise the exception of the signal."""
        raise KeyboardInterrupt if self.asked == signal.SIGINT else SystemExit(128 + self.asked)
