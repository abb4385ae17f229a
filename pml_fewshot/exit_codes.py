"""How a command ends: one line instead of a traceback, and an exit code that says whether it can be resumed."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pml_fewshot.trainers.divergence import TrainingDiverged
from pml_fewshot.trainers.interruption import TrainingInterrupted

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume goes on
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program after our own errors and interruptions, by a line on stderr and an exit code.

    SIGTERM is taken as Ctrl-C is: while training after the step under way, else at once.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python handles no signals elsewhere
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        yield
    except (ValueError, OSError, TrainingDiverged) as error:
        # Our own messages, "expected .., got ..; do ..", say all that is needed; others are worth their traceback.
        if not str(error).startswith("expected "):
            raise
        sys.exit(f"error: {error}")
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(RESUMABLE)
    except KeyboardInterrupt:
        print("interrupted before anything was to be resumed", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
