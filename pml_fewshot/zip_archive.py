"""Reading a zip that may be broken or hostile: bounded, into memory only, with one clear error.

Nothing is ever unpacked to disk, so no name or link in an archive can reach outside of a folder.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

DIRECTORY = 2**25  # bytes of the list of members: 300,000 names; read at once, a few seconds at most
IMAGE = 2**26  # bytes of an image file, uncompressed; those of few-shot sets have some thousand
DEFLATE_RATIO = 1032  # deflate shrinks nothing further: a member that claims more is a lie

# What zipfile and its decompressors raise on broken content, by the place of the damage; RuntimeError: encrypted, and
# NotImplementedError, which is one.
ZIP_ERRORS = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, EOFError, RuntimeError),
    *(ValueError, LookupError, OverflowError, OSError, MemoryError),
)


def open_zip(place: Path) -> zipfile.ZipFile:
    """Opens a zip for reading, when its list of members is whole and sane.

    Raises:
        ValueError: the file is no whole zip, or its members overlap, stand there twice, have names that lead out of a
            folder, or claim sizes that cannot be.
        FileNotFoundError: there is no such file.
    """
    if not place.is_file():  # a named pipe would wait for ever
        raise FileNotFoundError(f"expected a zip file at {place}, got none; check the path")
    try:
        archive = _BoundedZip(place)
        try:
            _check_members(archive, place.stat().st_size)
        except BaseException:
            archive.close()
            raise
    except PermissionError:
        raise
    except ZIP_ERRORS as error:
        raise broken_zip(place, str(error)) from error
    return archive


def member_names(archive: zipfile.ZipFile, wanted: Callable[[str], bool]) -> list[str]:
    """The names of the wanted members. Those of the others are held against the members' own headers.

    A member that is read is held against its header then; one that is passed over because its name is damaged would
    be missing in silence.

    Raises:
        ValueError: a name in the list of members is not that of the member.
    """
    names = []
    for name in archive.namelist():
        if wanted(name):
            names.append(name)
        else:
            try:
                archive.open(name).close()
            except ZIP_ERRORS as error:
                raise broken_zip(archive.filename, str(error)) from error
    return names


def read_member(archive: zipfile.ZipFile, name: str, most: int = IMAGE) -> bytearray:
    """The bytes of a member, whose checksum zipfile verifies; `most` and the claimed size are held before allocating.

    Raises:
        ValueError: there is no such member, or it is broken, encrypted, or larger than `most` or than it claims.
    """
    place = archive.filename
    try:
        size = archive.getinfo(name).file_size
        if size > most:
            raise ValueError(f"{size:,} bytes, more than the {most:,} that are read")
        content = bytearray(size)
        with archive.open(name) as member:
            done = 0
            while got := member.read(min(2**20, size - done + 1)):  # one byte more, so that the end is seen
                if done + len(got) > size:
                    raise ValueError(f"more than the {size:,} bytes that it claims")
                content[done : done + len(got)] = got
                done += len(got)
        if done != size:
            raise EOFError(f"{done:,} of {size:,} bytes")
    except ZIP_ERRORS as error:
        raise broken_zip(place, f"{error or type(error).__name__} at {name}") from error
    return content


def broken_zip(place: object, what: str) -> ValueError:
    """The error to raise for a zip that turns out broken, also later than at its opening."""
    return ValueError(f"expected a whole zip file at {place}, got a broken one ({what}); delete it and fetch it again")


class _BoundedZip(zipfile.ZipFile):
    """A zip that is opened through a bounded file, and closes it."""

    def __init__(self, place: Path) -> None:
        self._bounded_file = _BoundedFile(place)
        try:
            super().__init__(self._bounded_file)
        except BaseException:
            self._bounded_file.close()
            raise

    def close(self) -> None:
        super().close()
        self._bounded_file.close()


class _BoundedFile(io.FileIO):
    """A file that refuses the one read that zipfile does not bound: that of the whole list of members."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > DIRECTORY:
            raise zipfile.BadZipFile(f"a list of members of more than {DIRECTORY:,} bytes")
        return super().read(-1 if size is None else size)


def _check_members(archive: zipfile.ZipFile, file_size: int) -> None:
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise ValueError("a name that stands in it twice")
    if sum(member.compress_size for member in members) > file_size:
        raise ValueError("members that overlap")
    for member in members:
        name = member.orig_filename
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise ValueError(f"the name {name!r}, which leads out of a folder")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} packed by method {member.compress_type}, not stored or deflated")
        ratio = 1 if member.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO
        if member.file_size > ratio * member.compress_size + DEFLATE_RATIO:
            raise ValueError(f"{member.file_size:,} bytes of {name} in {member.compress_size:,}, which cannot be")
