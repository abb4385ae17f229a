"""The loaders' cache: images decoded once, then read back through a memory map in well under a second.

An entry is a folder `<name>-<source>-<state>` with images.npy, labels.npy and about.json. `<source>` stands for where
the images come from and how they are prepared, `<state>` for the source files' names, sizes and times, so a changed
source has another entry, is built anew, and the old entry is removed. An entry is written under another name and
renamed when it is whole: a reader never sees half of one.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

LAYOUT = 1  # part of every key: raise it when what an entry holds changes


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
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    prefix = f"{name}-{_short_hash((LAYOUT, *source))}-"
    entry = folder / f"{prefix}{_short_hash((state,))}"
    if not entry.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
        try:
            _write(read(), unfinished, name)
            unfinished.chmod(0o755)  # a shared cache is for all to read
            _publish(unfinished, entry)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # only there when something failed or another was first
        for old in folder.glob(f"{prefix}*"):
            if old != entry:
                shutil.rmtree(old)
    return _load(entry)


def _publish(unfinished: Path, entry: Path) -> None:
    try:
        unfinished.rename(entry)
    except OSError:
        if not entry.exists():  # else another process has built the same entry meanwhile: use that one
            raise


def _write(source: Source, folder: Path, name: str) -> None:
    labels: list[int] = []
    images = open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=(source.count, *source.item_shape))
    # delay: a set that is read within two seconds needs no bar
    for image, label in tqdm(
        source.items, total=source.count, desc=f"reading {name}", unit="image", delay=2, mininterval=1
    ):
        images[len(labels)] = image
        labels.append(label)
    images.flush()
    del images
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int64))
    (folder / "about.json").write_text(json.dumps(source.about(), ensure_ascii=False), encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())  # a rename is only as lasting as the data behind it


def _load(entry: Path) -> CachedImages:
    try:
        # mode "c": torch wants writable memory; writes would stay in this process and never reach the file
        images = torch.from_numpy(np.load(entry / "images.npy", mmap_mode="c", allow_pickle=False))
        labels = torch.from_numpy(np.load(entry / "labels.npy", allow_pickle=False))
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"expected a whole cache entry in {entry}, got one that cannot be read ({error}); delete that folder and "
            "run again"
        ) from error
    return CachedImages(images[: len(labels)], labels, about)


def _short_hash(parts: Iterable[object]) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()
