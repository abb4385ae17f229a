"""How training ends before its last step: by a signal (Ctrl-C, SIGTERM) or a NaN."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingDiverged(ArithmeticError):
    """The loss or a weight became NaN or infinite; the message names the step and what to try."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the training (`event`); its checkpoint, if it has one, holds the last step."""

    def __init__(self, event: str, resume_hint: str = "") -> None:
        super().__init__("; ".join(text for text in (event, resume_hint) if text))
        self.event = event


class StopOnSignal:
    """Within its `with` block, Ctrl-C and SIGTERM are only noted in `received`, so that a step can finish first.

    The first signal restores the previous handlers, so a second one ends the program immediately. Signals that the
    program ignores stay ignored. Outside the main thread, where Python handles no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # None: a handler that Python cannot restore
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if os.getpid() != self._process:  # a forked child, such as a pool worker, ends as it would without us
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        # (print could interrupt the progress bar in the middle of its own write)
        os.write(2, b"\nstopping after this step; press again to stop at once\n")

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
