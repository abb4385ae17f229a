"""The loaders' cache: images decoded once, then read through a memory map in well under a second.

An entry is a folder `<name>-<source>-<state>`: when a source changes, a new entry replaces the old one. It is written
under another name and renamed when it is complete; one process builds it while the others wait. It holds only pixels:
labels and splits are up to the loaders, so one entry serves them all.

    python -m pml_fewshot.data.cache            lists the entries
    python -m pml_fewshot.data.cache --verify   checks them for damage (or some: --verify NAME ...)
    python -m pml_fewshot.data.cache --empty    removes them (or some: --empty NAME ...)
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import digests_of
from pml_fewshot.io.atomic import CannotWriteError, fsync, translate_write_errors
from pml_fewshot.io.tensors import checksum, read_tensors, write_tensors

WRITE_BYTES = 2**20  # at a time: with single images the decoding threads would take turns with the disk
CHECKED_BYTES = 2**31  # of images in an entry that are compared with its checksum at each start: up to half a second
FORMAT_VERSION = 5  # raise it when the content of entries changes: older ones are then replaced


class Source(NamedTuple):
    """What a loader provides to fill an entry."""

    items: Iterable[np.ndarray]  # images (C, H, W), decoded on demand
    total: int  # number of items at most, for the progress bar
    item_shape: tuple[int, ...]  # (C, H, W)
    notes: dict[str, Any]  # anything else to keep; may be filled while the items are read
    dtype: Any = np.uint8


class Stored(NamedTuple):
    """The content of an entry."""

    images: Tensor  # (M, C, H, W), a memory map unless the cache cannot be written
    digests: Tensor  # (M,) int64, of each image
    notes: dict[str, Any]


def cached_images(
    name: str,
    source: Sequence[object],
    files: Iterable[Path],
    read: Callable[[], Source],
    cache_dir: str | Path | None = None,
    memory_map: bool = False,
) -> Stored:
    """Returns a source's images and notes, from the cache if it has them as they are now, else read and stored.

    If the cache cannot be written, a warning says so and the images are decoded into memory.

    Args:
        name: the dataset's name, the first word of the entry's.
        source: where the images come from and how they are prepared; a different value is a different entry.
        files: the files they are read from; a change of name, size, time or place on the disk replaces the entry.
        read: called only when the cache does not hold the source's content.
        cache_dir: by default `$PML_FEWSHOT_CACHE`, `$XDG_CACHE_HOME/pml_fewshot` or `~/.cache/pml_fewshot`.
        memory_map: the images do not fit in memory: only their number and shape are checked, and pixels are read on
            demand. Otherwise up to 2 GiB of images are compared with their checksum, at 0.25 seconds per GB, which is
            little compared with training on wrong images. A new entry is always compared, any other by `--verify`.

    Raises:
        UsageError: the entry is damaged. It is not rebuilt silently: a disk that loses data should be noticed.
        CannotWriteError: with memory_map, the disk is full or the folder read-only; an older entry is unchanged.
    """
    folder = cache_folder(cache_dir)
    prefix = f"{name}-{short_hash(source)}-"
    entry, temporary = folder / f"{prefix}{short_hash(_state(files))}", folder / f".tmp-{prefix}"
    if entry.exists():
        return _load(entry, 0 if memory_map else CHECKED_BYTES)
    try:
        with translate_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f".{prefix}lock", mode=0o666)  # the system releases it when a process is killed
            lock.acquire()
        try:
            if not entry.exists():  # otherwise another process built it while this one waited
                shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
                _write(read(), name, list(map(str, source)), temporary, entry)
            with translate_write_errors(folder):
                for outdated in set(folder.glob(f"{prefix}*")) - {entry}:
                    shutil.rmtree(outdated)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.release()
    except CannotWriteError as error:
        if memory_map:
            raise
        reason = str(error.__cause__ or error)
        do = "they are decoded into memory, now and next time; set PML_FEWSHOT_CACHE to a folder with room"
        warnings.warn(f"the cache in {folder} cannot keep the images of {name} ({reason}): {do}", stacklevel=2)
        return _in_memory(read(), name)
    return _load(entry, math.inf)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns the folder where decoded images are kept."""
    given = cache_dir or os.environ.get("PML_FEWSHOT_CACHE")
    try:
        return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pml_fewshot")).expanduser()
    except RuntimeError as error:
        if given:
            raise UsageError(f"expected a folder for the cache, got {given} ({error}); name a full path") from error
        return Path(os.devnull, "no home directory")  # as in containers: there is nothing to read or write


def _state(files: Iterable[Path]) -> list[object]:
    """Returns what changes with the files' content: besides size and time, the inode, which follows the files of a
    renamed folder, and the time of the last change of any kind, which no copying tool sets."""
    state: list[object] = [FORMAT_VERSION]
    for file in sorted(files):
        state.append(file)
        with suppress(FileNotFoundError):  # a dangling link
            each = file.stat()
            state += [each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino]
    return state


def short_hash(parts: Iterable[object]) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _progress(source: Source, name: str) -> Iterator[np.ndarray]:
    # delay: a set that is read within two seconds needs no progress bar
    yield from tqdm(source.items, f"reading {name}", source.total, unit="image", delay=2, mininterval=1)


def _in_memory(source: Source, name: str) -> Stored:
    images, count = np.empty((max(1, source.total), *source.item_shape), source.dtype), 0
    for image in _progress(source, name):
        if count == len(images):  # the source did not know its total
            images = np.concatenate([images, np.empty_like(images)])
        images[count], count = image, count + 1
    return Stored(torch.from_numpy(images[:count]), digests_of(images[:count]), source.notes)


def _write(source: Source, name: str, shown: list[str], folder: Path, entry: Path) -> None:
    """Writes the files of `entry` to `folder` and renames it. Errors from reading the source pass unchanged."""
    header = {"descr": np.dtype(source.dtype).newbyteorder("<").str, "fortran_order": False}
    digests: list[Tensor] = []

    def written() -> Iterator[memoryview]:
        for block in _blocks(_progress(source, name)):
            digests.append(digests_of(block))
            left = content = block.reshape(-1).view(np.uint8).data
            with translate_write_errors(entry):
                while left:  # a disk that fills up accepts a part, and reports the reason when asked again
                    left = left[file.write(left) :]
            yield content

    with translate_write_errors(entry):
        folder.mkdir()
        # no memory map, which crashes the interpreter on a full disk; no buffer, which fails again when it is closed
        file = (folder / "images.npy").open("wb", buffering=0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (0, *source.item_shape)})
    with file:
        total = checksum(written())
        shape = (sum(map(len, digests)), *source.item_shape)
        with translate_write_errors(entry):
            file.seek(0)  # the new header is just as long: numpy leaves room in it for any length of the first axis
            np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
    about = {"notes": source.notes, "shape": shape, "checksum": total, "source": shown}
    with translate_write_errors(entry):
        write_tensors(
            folder / "rest.safetensors",
            {"digests": torch.cat([torch.empty(0, dtype=torch.int64), *digests])},
            {"about": json.dumps(about)},
        )
        fsync(folder / "images.npy")
        folder.rename(entry)
        fsync(entry.parent)


def _blocks(images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the images (n, C, H, W), a MiB at a time."""
    waiting: list[np.ndarray] = []
    for image in images:
        waiting.append(image)
        if len(waiting) * image.nbytes > WRITE_BYTES:
            yield np.stack(waiting)
            waiting.clear()
    if waiting:
        yield np.stack(waiting)


def _load(entry: Path, checked: float) -> Stored:
    stored = _stored(entry, checked)
    with suppress(OSError):  # a read-only folder can still be read
        os.utime(entry)  # when it was last used, for the list
    return stored


def _stored(entry: Path, checked: float) -> Stored:
    """Reads an entry; images of up to `checked` bytes are compared with their checksum."""
    try:
        # "c", because torch needs writable memory: writes never reach the file; an error if it is truncated
        images = torch.from_numpy(np.load(entry / "images.npy", mmap_mode="c", allow_pickle=False))
        tensors, texts = read_tensors(entry / "rest.safetensors")  # which verifies its own checksum
        about = json.loads(texts["about"])
        if list(images.shape) != about["shape"]:
            raise ValueError(f"images of shape {list(images.shape)}, not {about['shape']} as written")
        if images.nbytes <= checked and checksum([images.numpy().data]) != about["checksum"]:
            raise ValueError("other images than were written")
    except MemoryError:
        raise
    except Exception as error:  # numpy raises all kinds of errors on broken files
        got = f"one that cannot be read ({error})"
        raise UsageError(
            f"expected a whole cache entry in {entry}, got {got}; delete that folder and run again"
        ) from error
    return Stored(images, tensors["digests"], about["notes"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: lists, verifies or removes the entries."""
    parser = argparse.ArgumentParser(description="Lists, verifies or removes the cached images.")
    parser.add_argument("--cache-dir", type=Path, help="default: PML_FEWSHOT_CACHE, else ~/.cache/pml_fewshot")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--empty", nargs="*", metavar="NAME", help="remove the entries with these names, or all")
    verifies = "compare the entries with these names, or all, with their checksums; exit code 1 if one is damaged"
    does.add_argument("--verify", nargs="*", metavar="NAME", help=verifies)
    given = parser.parse_args(arguments)
    folder = cache_folder(given.cache_dir)
    entries = sorted(path for path in folder.glob("[!.]*-*-*") if path.is_dir())
    names = given.empty or given.verify or ()
    for wanted in names:
        if not any(entry.name.startswith(wanted) for entry in entries):
            do = f"{folder} has {len(entries)} entries, which this command lists without a name"
            parser.exit(2, f"error: expected the beginning of an entry's name, got {wanted!r}; {do}\n")
    total = shown = damaged = 0
    for entry in entries:
        if names and not any(entry.name.startswith(wanted) for wanted in names):
            continue
        shown += 1
        size = sum(file.stat().st_size for file in entry.iterdir())
        used = time.strftime("%Y-%m-%d", time.localtime(entry.stat().st_mtime))
        source = ", ".join(_about(entry).get("source", ["of another version"]))
        done = ""
        if given.empty is not None:
            done = f"{_removed(entry)}  "
        elif given.verify is not None:
            damage = _damage(entry)
            damaged += bool(damage)
            done = f"{damage or 'whole'}  "
        print(f"{done}{entry.name}  {size / 2**20:,.0f} MiB  used {used}  {source}")
        total += size
    if given.empty == []:
        for left in folder.glob(".tmp-*"):  # by a process that was killed
            print(f"{_removed(left)}  {left.name}")
    print(f"{shown} entries, {total / 2**20:,.0f} MiB, in {folder}")
    if damaged:
        parser.exit(1, f"{damaged} damaged; remove them by --empty NAME, and they will be rebuilt\n")


def _about(entry: Path) -> dict[str, Any]:
    try:
        return json.loads(read_tensors(entry / "rest.safetensors")[1]["about"])
    except (UsageError, KeyError, json.JSONDecodeError):
        return {"source": ["damaged"]}


def _damage(entry: Path) -> str:
    try:
        _stored(entry, math.inf)
    except UsageError as error:
        return f"damaged ({error.__cause__})"
    return ""


def _removed(entry: Path) -> str:
    """Removes an entry, or what is left of one, unless a process is building it; returns what happened."""
    prefix = entry.name.removeprefix(".tmp-").rpartition("-")[0]
    try:
        with FileLock(entry.parent / f".{prefix}-lock", mode=0o666).acquire(timeout=0):
            shutil.rmtree(entry)
    except Timeout:
        return "in use"
    except PermissionError as error:
        return f"kept ({error})"
    return "removed"


if __name__ == "__main__":
    main()
