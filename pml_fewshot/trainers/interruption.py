"""Stopping a training from outside, by Ctrl-C or SIGTERM, at the end of a step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the training; where it has a checkpoint, that holds its last step."""


class StopRequest:
    """Within its `with` block Ctrl-C and SIGTERM are noted in `received` and end nothing.

    The first one gives the signals back to whom they belonged, so a second one ends the program at once. Signals that
    the program ignores stay ignored, and outside of the main thread, where Python handles none, nothing is noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # None: a handler that Python cannot give back
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._give_back()

    def _give_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
