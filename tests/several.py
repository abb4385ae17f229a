"""Functions run in several processes, as torchrun starts them, without a minute of imports for each.

    python -m tests.several FILE

runs all of `tests.shared_work` in 1, 2 and 3 processes and writes what each process returned. The processes are forked
from one in which everything is imported and no thread has started.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by optimizers, at their first step: a second for each process

SECONDS = 100.0  # after which a process that hangs is killed, and the test fails


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun gives each process on one machine."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in own.items()}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def started(work: Callable[[], Any], size: int, folder: Path, more: Mapping[str, str] | None = None) -> list[int]:
    """The process ids of `size` children that run `work`; each ends with 0, or with 1 and its traceback in a file."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                if size > 1:
                    os.environ.update(environment(rank, size, port))
                os.environ.update(more or {})
                torch.save(work(), folder / f"returned{rank}")
                code = 0
            except BaseException:  # noqa: BLE001 (the parent shows it)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def collected(children: list[int]) -> list[int]:
    """The exit codes of all, minus the signal of one that was killed; those that hang are killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
            elif child not in codes and time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def returned(work: Callable[[], Any], size: int, folder: Path) -> list[Any]:
    """What each of `size` processes returned."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = collected(started(work, size, folder))
    errors = "\n".join(f"process {n}:\n{(folder / f'stderr{n}').read_text()[-3000:]}" for n in range(size))
    assert not any(codes), f"{codes}\n{errors}"
    return [torch.load(folder / f"returned{rank}", weights_only=False) for rank in range(size)]


if __name__ == "__main__":
    from tests import shared_work

    torch.set_num_threads(1)
    shared_work.glyphs()
    target = Path(sys.argv[1])
    results = {
        (name, size): returned(work, size, target.parent / f"{name}{size}")
        for name, work in shared_work.WORK.items()
        for size in (1, 2, 3)
    }
    torch.save(results, target)
