"""What a file may ask of memory, and the checksums that are kept beside data."""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from pml_fewshot.checks import require

BLOCK = 2**24  # bytes of a checksum taken at a time: a memory map larger than memory is read through, never held


def check_fits_memory(needed: int, path: str | Path) -> None:
    """Raises a ValueError when what a file says it holds is more than the machine has; call it before allocating."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require(
        needed <= memory,
        f"{path} to fit into memory",
        f"one that would take {needed / 1e9:,.1f} GB where {memory / 1e9:,.1f} GB are there",
        "check where the file comes from, or use a larger machine",
    )


def checksum(parts: Iterable[bytes | memoryview]) -> str:
    """CRC-32 and count of the bytes of some buffers, one after the other, as "crc32:0123abcd:4096".

    It sees damage, at 6 GB/s; a digest that also withstands a forger who cannot change it would take five times as
    long, and whoever can write the data can write the checksum beside it.
    """
    crc = count = 0
    for part in parts:
        view = memoryview(part)
        if not view.nbytes:
            continue
        view = view.cast("B")
        for start in range(0, len(view), BLOCK):
            crc = zlib.crc32(view[start : start + BLOCK], crc)
        count += len(view)
    return f"crc32:{crc:08x}:{count}"
