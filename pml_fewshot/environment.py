"""Process setup, for speed and for imports that would fail: malloc, threads, faiss's BLAS, torchvision's operators.

None of these packages is imported here: hooks wait until PML or a user's own file imports them.
"""

import ctypes
import importlib
import importlib.util
import logging
import math
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch

if not hasattr(torch.serialization, "safe_globals"):  # needed to read files that hold more than tensors
    raise ImportError(f"pml_fewshot needs torch 2.5 or newer, got {torch.__version__}; pip install -U torch")

# Settings for glibc: name, number in malloc.h, value. All threads share one arena, because a thread's own has heaps of
# 64 MiB: a block that does not fit is mapped and unmapped each time, whatever MMAP_MAX says. MAML's second-order steps
# in two threads, 80 images of 84 x 84 per task (72 MB for a layer's output): 17 million faults and 80 s with glibc's
# defaults, 16 million and 58 s with an arena for each, 1.2 million and 28 s with one. With 20 images 0.38 and 0.34
# million, and 1.73 and 1.56 GB resident. Evaluating heads in two threads takes the same time either way.
TOP_PAD = 256 * 2**20  # bytes requested from the system at a time
MALLOPT = (("mmap_max", -4, 0), ("trim_threshold", -1, 2**31 - 1), ("top_pad", -2, TOP_PAD), ("arena_max", -8, 1))

# OpenBLAS's name for the kernels of each instruction set that torch reports
OPENBLAS_CORES = {"AVX2": "Haswell", "AVX512": "SkylakeX"}

# torchvision's compiled operators nms and qnms, which are for detection and never called here
TORCHVISION_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def keep_memory(device: torch.device) -> None:
    """Tells glibc, once per process, to keep freed memory; called before training, embedding or evaluating on a CPU.

    Otherwise each layer's output is requested from the system again, with a fault for each page: EfficientNet-Lite0
    embeds 26 images of 224 x 224 per second instead of 56, ResNet12 12 of 84 x 84 instead of 34. The process keeps its
    peak size, and the peak can be two to three times as high, because glibc does not reuse every aligned block. The
    log says so once. `PML_FEWSHOT_KEEP_MEMORY=0` switches it off.
    """
    if device.type == "cpu" and os.environ.get("PML_FEWSHOT_KEEP_MEMORY") != "0":
        _keep_memory()


@cache
def _keep_memory() -> None:
    if keep_freed_memory():
        switch = "PML_FEWSHOT_KEEP_MEMORY=0 switches it off"
        logging.getLogger("pml_fewshot").info("glibc keeps freed memory for reuse (mallopt); %s", switch)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks for reuse; returns whether anything was set (False: not on glibc).

    A training step allocates and frees the same large tensors repeatedly, and each new page costs a fault: a 60-way
    1-shot 5-query step on Omniglot takes 0.18 to 0.21 s with glibc's defaults and 0.10 s with this. User settings in
    MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_, MALLOC_ARENA_MAX or GLIBC_TUNABLES are kept.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, tunables = ctypes.CDLL(None).mallopt, os.environ.get("GLIBC_TUNABLES", "")
    variables = {name.removeprefix("MALLOC_").rstrip("_").lower() for name in os.environ if name.startswith("MALLOC_")}
    settings = [each for each in MALLOPT if each[0] not in variables and f"glibc.malloc.{each[0]}=" not in tunables]
    return bool(settings) and all([mallopt(number, value) == 1 for _, number, value in settings])


def cpu_quota(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many cores' worth of time this process's container may use, rounded up; None if no limit is found.

    This is the lowest limit of its control group and the groups around it, for either version: 2 has `cpu.max`, 1 has
    `cpu.cfs_quota_us`. A container often sees its own group as the root, although `own`, with lines of
    `number:controllers:path`, contains the host's path to it.
    """
    cores: list[float] = []
    try:
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            # (version 1 may name a folder "cpu,cpuacct" and the group "cpuacct,cpu"; "cpu" leads there too)
            top = mounted / controllers if (mounted / controllers).is_dir() else mounted / "cpu"
            group = PurePosixPath(path.lstrip("/"))
            for folder in (top / each for each in (group, *group.parents) if ".." not in each.parts):
                if (limit := folder / "cpu.max").exists():
                    quota, period = limit.read_text().split()
                elif (limit := folder / "cpu.cfs_quota_us").exists():
                    quota, period = limit.read_text(), (folder / "cpu.cfs_period_us").read_text()
                else:
                    continue
                cores += [int(quota) / int(period)] if quota != "max" and int(quota) > 0 else []  # -1: none
    except (OSError, ValueError):  # not Linux, not readable, or in an unknown format
        pass
    return max(1, math.ceil(min(cores))) if cores else None


def limit_threads(quota: int | None) -> bool:
    """Limits torch and faiss to as many threads as the quota, unless the user chose a number; returns whether it did.

    They start a thread for each core of the machine. With a quota of 2 cores, 64 threads use up their share within a
    few milliseconds of a period of 100, and then all of them stall.
    """
    global _faiss_threads
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    by_user = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys() or threads not in (cores, cores // 2)
    if quota is None or threads <= quota or by_user:  # (half of the cores where each counts as two)
        return False
    torch.set_num_threads(quota)
    _faiss_threads = quota
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(quota)
    return True


_faiss_threads: int | None = None  # applied when faiss is imported; None for its own choice

_lock = threading.Lock()
_own_threads: list[int] = []  # for each `one_thread_each` block in progress, the threads of an operation before it


@contextmanager
def one_thread_each(threads_each: int = 1) -> Iterator[None]:
    """Limits operations of this thread, and of threads started meanwhile, to `threads_each` threads each.

    An operation on two threads waits for both at its end, and if other processes use the cores, one is often not
    running: 10,000 episodes from a 64-d bank take 5 s instead of 0.3. Threads with separate chunks wait for no other.
    """
    with _lock:  # a thread that starts while another is inside would read 1
        threads = _own_threads[0] if _own_threads else torch.get_num_threads()
        _own_threads.append(threads)
        torch.set_num_threads(threads_each)
    try:
        yield
    finally:
        with _lock:
            _own_threads.pop()
            torch.set_num_threads(threads)


Execute = Callable[[Callable[[ModuleType], None], ModuleType], None]


class ImportHook(MetaPathFinder):
    """Makes the import of a module call `execute(exec_module, module)` in place of `exec_module(module)`."""

    def __init__(self, name: str, execute: Execute) -> None:
        self.name = name
        self.execute = execute
        self._searching = False

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self._searching:
            return None
        self._searching = True  # the search below calls this method again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self.execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def execute_faiss(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Loads faiss with the fastest kernels that the processor supports.

    The OpenBLAS in faiss-cpu mistakes recent Xeons for a Prescott (SSE3), so that matrix products, and with them
    k-means and index training, take four times as long. OPENBLAS_CORETYPE overrides this and is set here unless the
    user has set it; it is read once, when the library is loaded, so it is unset afterwards.
    """
    core = OPENBLAS_CORES.get(torch.backends.cpu.get_cpu_capability())
    chosen = core is not None and "OPENBLAS_CORETYPE" not in os.environ
    if chosen:
        os.environ["OPENBLAS_CORETYPE"] = str(core)
    try:
        exec_module(module)
    finally:
        if chosen:
            del os.environ["OPENBLAS_CORETYPE"]
    if _faiss_threads is not None:
        module.omp_set_num_threads(_faiss_threads)


def execute_torchvision(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Loads torchvision, declaring its operators if the import fails without them.

    A CPU build of torch with a CUDA build of torchvision cannot load torchvision's operators: the import fails with
    "operator torchvision::nms does not exist". With their schemas declared, transforms, models and downloads work.
    """
    try:
        exec_module(module)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]  # half-imported by the failed attempt
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", TORCHVISION_SCHEMA)
        exec_module(module)


def execute_pml(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Loads PML's common functions without scipy.stats, which takes half as long as torch and is for one function only.

    That function still finds it, because scipy imports its subpackages on first attribute access. Code in another
    thread that uses it meanwhile gets the real one.
    """
    if "scipy.stats" in sys.modules:
        return exec_module(module)
    waiting = sys.modules["scipy.stats"] = ModuleType("scipy.stats")

    def away() -> None:
        if sys.modules.get("scipy.stats") is waiting:
            del sys.modules["scipy.stats"]

    def real(name: str) -> Any:
        away()
        return getattr(importlib.import_module("scipy.stats"), name)

    vars(waiting)["__getattr__"] = real
    try:
        exec_module(module)
    finally:
        away()


HOOKS: dict[str, Execute] = {
    "faiss": execute_faiss,
    "torchvision": execute_torchvision,
    "pytorch_metric_learning.utils.common_functions": execute_pml,
}


def prepare_imports() -> None:
    """Installs the hooks, once per process; a module that is already imported is left as it is."""
    if not any(isinstance(finder, ImportHook) for finder in sys.meta_path):
        sys.meta_path[:0] = [ImportHook(name, execute) for name, execute in HOOKS.items()]
