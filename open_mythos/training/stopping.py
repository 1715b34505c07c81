"""Being asked to stop, by a terminal, a scheduler or a notebook."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

from open_mythos.training import distributed

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """Inside, the first signal to stop waits for what :meth:`held` holds, and finally raises.

    That is KeyboardInterrupt for SIGINT, as ever, and for others SystemExit with 128 and their number. A second signal
    does what it did before: it ends the process at once. Signals that are ignored, as by nohup, stay so. Only the main
    thread gets signals; in another, nothing changes. Processes of torchrun, which repeats signals and has the last word
    itself, take the first one only.

    Attributes:
        asked: number of the signal, or 0.
        agreed: of several processes, what one of them was asked, once all :meth:`hear` of it.
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
        """What each process was asked, which all hear at once, so that all leave after the same step, with one code."""
        self.agreed = self.agreed or next((int(number) for number in asked if number), 0)
        self.asked = self.agreed or self.asked

    def is_asked(self) -> bool:
        """Whether it is time to stop: of several processes, the same for all."""
        return (self.asked if distributed.world_size() == 1 else self.agreed) > 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is inside is not interrupted, and looks itself whether it :meth:`is_asked` to end."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
        if distributed.world_size() > 1:  # nobody goes on alone to what all are needed for
            self.hear(distributed.gathered(self.asked))
        if self.is_asked():
            self.leave()

    @contextlib.contextmanager
    def telling(self, log: Callable[[str], None], left: Callable[[], str]) -> Iterator[None]:
        """If what is inside is stopped, ``log`` by what, and what is ``left`` and how to go on."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            log(f"stopped by {signal.Signals(self.asked or signal.SIGINT).name}; {left()}")
            raise

    def leave(self) -> NoReturn:
        """Raise what was asked for."""
        raise KeyboardInterrupt if self.asked == signal.SIGINT else SystemExit(128 + self.asked)
