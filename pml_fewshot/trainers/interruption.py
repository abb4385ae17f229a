"""Stopping a training from outside, by Ctrl-C or SIGTERM, at the end of a step."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the training; where it has a checkpoint, that holds its last step.

    Args:
        what: what happened, and where it was saved.
        go_on: how to go on, where that is known.
    """

    def __init__(self, what: str, go_on: str = "") -> None:
        super().__init__("; ".join(text for text in (what, go_on) if text))
        self.what = what


class StopRequest:
    """Within its `with` block Ctrl-C and SIGTERM are noted in `received` and end nothing.

    The first one gives the signals back to whom they belonged, so a second one ends the program at once. Signals that
    the program ignores stay ignored, and outside of the main thread, where Python handles none, nothing is noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._process = os.getpid()
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
        self._give_back()
        if os.getpid() != self._process:  # a forked child, as of a pool, is to end as it would without us
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        # (print could meet the progress bar in the middle of its own writing)
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def _give_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
