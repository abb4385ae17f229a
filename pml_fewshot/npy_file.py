"""Arrays in numpy's .npy form, of plain numbers or texts only, whose size is that of the file to the byte."""

import io
import math
from pathlib import Path

import numpy as np

from pml_fewshot.checks import require

HEADER = 2**16  # bytes that a header can take at most: numpy itself refuses to read one of more than 10,000


def parse_npy(content: bytearray | bytes, name: str | Path) -> np.ndarray:
    """The array in the bytes of a .npy, which it shares.

    Raises:
        ValueError: a broken header, objects or records instead of plain values, or bytes missing or left over.
    """
    dtype, shape, fortran, start = _header(bytes(content[:HEADER]), len(content), name)
    return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape, order="F" if fortran else "C")


def map_npy(path: Path, mode: str = "r") -> np.ndarray:
    """Memory-maps a .npy: "r" read-only, "c" writable in this process alone.

    Raises:
        ValueError: as for parse_npy.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        dtype, shape, fortran, start = _header(file.read(HEADER), size, path)
    if start == size:  # no system maps nothing
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode, start, shape, "F" if fortran else "C")  # type: ignore[call-overload]


def _header(head: bytes, size: int, name: str | Path) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """dtype, shape, whether in Fortran's order, and where the values start."""
    file = io.BytesIO(head)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)[0]
        if version not in read:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = read[version](file)
    except Exception as error:  # numpy parses the header as Python text: whatever that comes upon
        raise ValueError(
            f"expected an array in numpy's .npy form at {name}, got a broken header "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); write it again"
        ) from error
    require(
        dtype.kind in "biufcSUmM" and dtype.itemsize > 0,
        f"plain numbers or texts in {name}",
        f"{dtype}, more than data or none",
        "write it without objects",
    )
    require(min(shape, default=0) >= 0, f"a shape in {name}", f"{shape}", "write it again")
    needed = file.tell() + math.prod(shape) * dtype.itemsize
    require(
        needed == size,
        f"{needed:,} bytes for {dtype} of shape {shape} in {name}",
        f"{size:,}, a broken file",
        "write it again",
    )
    return dtype, shape, fortran, file.tell()
