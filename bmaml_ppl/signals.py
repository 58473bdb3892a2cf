"""Signals that end a process, held back until what it computes is whole."""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["HeldSignals"]

_ENDING = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """A context that holds SIGINT and SIGTERM back until `deliver`, which lets them do what they would have done.

    So Ctrl-C still raises KeyboardInterrupt, and SIGTERM still ends the process by that signal (or calls the handler
    that was there), as process managers expect: only later. The second signal acts at once. Nothing is held where the
    signal is ignored, where its handler is not Python's, or outside of the main thread.

    Args:
        active: Whether to hold anything.

    Attributes:
        pending: The signal held back, or None.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.pending: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "HeldSignals":
        if self.active and threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.deliver()

    def deliver(self) -> None:
        """Lets a pending signal act; returns where its handler lets the program go on."""
        if self.pending is None:
            return
        number, self.pending = self.pending, None
        handler = self._previous.get(number, signal.getsignal(number))
        if callable(handler):
            handler(number, None)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.pending is not None
        self.pending = number
        if again:
            self.deliver()
