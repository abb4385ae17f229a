"""The checksums within a PNG, which Pillow verifies in part."""

import struct
import zlib

from pml_fewshot.checks import require


def check_png(content: bytes | bytearray) -> None:
    """Raises a ValueError for a PNG with a wrong checksum or cut off: Pillow does not verify those of the pixels.

    What is no PNG passes.
    """
    view = memoryview(content)
    if bytes(view[:8]) != b"\x89PNG\r\n\x1a\n":
        return
    start, kind = 8, b""
    while kind != b"IEND":
        require(len(view) >= start + 12, "a PNG up to its end", "one that is cut off", "fetch it again")
        length, kind = struct.unpack_from(">I4s", view, start)
        end = start + 8 + length
        require(len(view) >= end + 4, "a PNG up to its end", "one that is cut off", "fetch it again")
        right = zlib.crc32(view[start + 4 : end]) == struct.unpack_from(">I", view, end)[0]
        require(right, "a PNG with its checksums right", f"a wrong one of its part {kind!r}", "fetch it again")
        start = end + 4
