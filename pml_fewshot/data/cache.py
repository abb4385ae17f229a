"""The loaders' cache: images decoded once, then read back through a memory map in well under a second.

An entry is a folder `<name>-<source>-<state>` with images.npy, labels.npy and about.json. `<source>` stands for where
the images come from and how they are prepared, `<state>` for the source files' names, sizes and times, so a changed
source has another entry, is built anew, and the old entry is removed. An entry is written under another name and
renamed when it is whole: a reader never sees half of one. Only one process builds an entry, the others wait for it.

about.json holds checksums of all three, which are verified each time an entry is read.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from torch import Tensor
from tqdm import tqdm

from pml_fewshot.atomic import REFUSALS, to_disk, writing
from pml_fewshot.checks import require
from pml_fewshot.npy_file import map_npy
from pml_fewshot.sizes import checksum

LAYOUT = 2  # part of every key: raise it when what an entry holds changes
ABOUT = 2**28  # bytes of about.json: a million names of classes take 50 MB


@dataclass(frozen=True)
class CachedImages:
    """What an entry holds: images (M, C, H, W) uint8, memory-mapped; labels (M,) int64; the source's own facts."""

    images: Tensor
    labels: Tensor
    about: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What a loader gives to fill an entry.

    Args:
        items: (image (C, H, W) uint8, label) pairs, decoded one by one as they are asked for.
        count: how many items at most (fewer when broken images are skipped).
        item_shape: (C, H, W).
        about: returns the facts to keep beside the images (class names, notes), asked after the last item.
    """

    items: Iterator[tuple[np.ndarray, int]]
    count: int
    item_shape: tuple[int, ...]
    about: Callable[[], dict[str, Any]]


def default_cache_dir() -> Path:
    """`$PML_FEWSHOT_CACHE`, else `$XDG_CACHE_HOME/pml_fewshot`, else `~/.cache/pml_fewshot`."""
    if "PML_FEWSHOT_CACHE" in os.environ:
        return Path(os.environ["PML_FEWSHOT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pml_fewshot"


def files_state(files: Iterable[Path]) -> str:
    """Returns a text that changes when one of the files is added, removed, resized or written again."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def cached_images(
    name: str, source: Sequence[object], state: str, read: Callable[[], Source], cache_dir: str | Path | None = None
) -> CachedImages:
    """Returns the images of a source, from the cache when it holds them as they are now, else read and stored.

    Args:
        name: the data set's name, the entry's first word.
        source: where the images come from and how they are prepared; another value is another entry.
        state: the source's present state, see `files_state`; another value replaces the entry.
        read: gives the source's images; called only when the cache does not hold them.
        cache_dir: folder of all entries, `default_cache_dir()` when None.

    The checksums are verified by reading the whole entry once, 0.2 seconds a GB where the system holds it in its own
    cache, else the disk's time. It is read through in blocks, so a set may be larger than memory.

    Raises:
        ValueError: the entry is damaged. It is not built anew unasked: that a disk loses data is to be known.
        CannotWriteError: the disk is full or the folder read-only; an older entry is as it was.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    prefix = f"{name}-{_short_hash((LAYOUT, *source))}-"
    entry = folder / f"{prefix}{_short_hash((state,))}"
    if not entry.exists():
        unfinished = folder / f".unfinished-{prefix}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f".{prefix}lock", mode=0o666)  # given back by the system when a process is killed
            lock.acquire()
        try:
            if not entry.exists():  # else another process has built it while this one waited
                _build(entry, unfinished, read, name)
            outdated = [f"{name}-{_short_hash((layout, *source))}-" for layout in range(1, LAYOUT)]
            for old in (path for start in (prefix, *outdated) for path in folder.glob(f"{start}*")):
                if old != entry:
                    with writing(folder):
                        old.rename(unfinished)  # killed half way, it is not to look like a damaged entry
                        shutil.rmtree(unfinished)
        finally:
            lock.release()
    return _load(entry)


def _build(entry: Path, unfinished: Path, read: Callable[[], Source], name: str) -> None:
    with writing(entry):
        if unfinished.exists():  # of a process that was killed
            shutil.rmtree(unfinished)
        unfinished.mkdir()
    try:
        _write(read(), unfinished, entry, name)
        with writing(entry):
            unfinished.rename(entry)
            to_disk(entry.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # the first error is the one to be told
        raise


def _write(source: Source, folder: Path, entry: Path, name: str) -> None:
    """Writes the three files of `entry` to `folder`. What the source's own reading raises passes as it is."""
    labels: list[int] = []
    with ExitStack() as opened:
        with writing(entry):
            file = opened.enter_context((folder / "images.npy").open("wb"))
            _make_room(file, (source.count, *source.item_shape))
        # delay: a set that is read within two seconds needs no bar
        for image, label in tqdm(
            source.items, total=source.count, desc=f"reading {name}", unit="image", delay=2, mininterval=1
        ):
            right = image.dtype == np.uint8 and image.shape == source.item_shape and len(labels) < source.count
            require(
                right,
                f"{source.count} images {source.item_shape} of bytes",
                f"{image.dtype} {image.shape}",
                "give these",
            )
            with writing(entry):
                file.write(image.tobytes())
            labels.append(label)
        with writing(entry):
            file.close()
    facts = source.about()
    with writing(entry):
        labels_array = np.asarray(labels, dtype=np.int64)
        np.save(folder / "labels.npy", labels_array)
        checksums = _checksums(map_npy(folder / "images.npy"), labels_array, facts)
        about = json.dumps({"facts": facts, "checksums": checksums}, ensure_ascii=False)
        (folder / "about.json").write_text(about, encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            to_disk(path)  # a rename is only as lasting as the data behind it


def _make_room(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Writes the head of a .npy of bytes and lengthens the file to hold all of them.

    The space is asked for at once: that the disk is too small is known before hours of decoding and not after them.
    Written through the file and never through a memory map: where the disk is full, that would end the interpreter.
    """
    write_array_header_1_0(file, {"descr": dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape})
    size = file.tell() + math.prod(shape)
    file.truncate(size)
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # not every system and file system can
        if getattr(error, "errno", None) in REFUSALS:
            raise


def _checksums(images: np.ndarray, labels: np.ndarray, facts: object) -> dict[str, str]:
    words = json.dumps(facts, ensure_ascii=True, sort_keys=True).encode()
    shape = f"{images.dtype} {images.shape}".encode()
    return {
        "images": checksum([shape, images.data]),
        "labels": checksum([labels.data]),
        "facts": checksum([words]),
    }


def _load(entry: Path) -> CachedImages:
    try:
        # mode "c": torch wants writable memory; writes would stay in this process and never reach the file
        images, labels = map_npy(entry / "images.npy", mode="c"), map_npy(entry / "labels.npy", mode="c")
        size = (entry / "about.json").stat().st_size
        require(size <= ABOUT, f"an about.json of at most {ABOUT:,} bytes", f"{size:,}", "build it anew")
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        facts = about["facts"]
        found = _checksums(images, labels, facts)
        require(about["checksums"] == found, "the checksums as written", "others", "it is damaged")
        require(isinstance(facts, dict), "facts by their names", type(facts).__name__, "it is damaged")
        _check_form(images, labels)
    except (OSError, ValueError, EOFError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"expected a whole cache entry in {entry}, got one that cannot be read ({error}); delete that folder and "
            "run again"
        ) from error
    return CachedImages(torch.from_numpy(images)[: len(labels)], torch.from_numpy(labels), facts)


def _check_form(images: np.ndarray, labels: np.ndarray) -> None:
    right = images.dtype == np.uint8 and images.ndim == 4 and images.flags.c_contiguous
    require(right, "images (M, C, H, W) of bytes", f"{images.dtype} {images.shape}", "it is damaged")
    right = labels.dtype == np.int64 and labels.ndim == 1 and len(labels) <= len(images)
    require(right, f"at most {len(images)} int64 labels", f"{labels.dtype} {labels.shape}", "it is damaged")


def _short_hash(parts: Iterable[object]) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()
