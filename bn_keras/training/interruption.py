"""Lets a loop see SIGINT and SIGTERM, so that it can save and stop."""

import signal
import threading
from types import TracebackType
from typing import Self


class Interruption:
    """Notes the first SIGINT or SIGTERM in a `with` block. A second signal, and any after the block, act as before.

    It only works in the main thread, the only one in which Python handles signals; in others nothing is noted.

    Attributes:
      signal: the signal that came, or None.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def take_over(self) -> None:
        """Starts to note signals, until the first one comes."""
        main = threading.current_thread() is threading.main_thread()
        if main and not self._before and self.signal is None:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        self.signal = signal.Signals(number)
        self.__exit__(None, None, None)
