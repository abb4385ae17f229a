"""Which processor faiss's own OpenBLAS believes that it runs on: on virtual machines it can take it for an old one."""

import warnings
from functools import cache
from pathlib import Path

import faiss  # noqa: F401  # its libraries must be loaded to be asked
import threadpoolctl
import torch

# Cores without AVX2, whose kernels are several times slower on a processor that has it
OLD_CORES = {"Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Sandybridge", "Atom", "Bobcat", "Barcelona"}


def faiss_blas_core() -> str | None:
    """The core that faiss's OpenBLAS has kernels chosen for ("Haswell"); None where faiss uses another BLAS."""
    for library in threadpoolctl.threadpool_info():
        if library["internal_api"] == "openblas" and "faiss" in Path(library["filepath"]).parent.name:
            return library.get("architecture")
    return None


@cache
def warn_of_slow_blas() -> None:
    """Warns, once in a process, where faiss's OpenBLAS uses kernels without AVX2 on a processor that has it.

    Its matrix products, and so training an index and k-means, then take about four times as long.
    """
    core = faiss_blas_core()
    if core in OLD_CORES and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        warnings.warn(
            f"faiss's OpenBLAS takes this processor for a {core} and is several times slower than it could be: set "
            "OPENBLAS_CORETYPE=SkylakeX (AVX-512) or Haswell (AVX2) in the environment before Python starts",
            stacklevel=3,
        )
