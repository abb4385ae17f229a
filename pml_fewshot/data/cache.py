"""The loaders' cache: images decoded once, then read through a memory map in well under a second.

An entry is a folder `<name>-<source>-<state>`: a changed source gets another entry in place of the old one. It is
written under another name and renamed when it is whole; one process builds it while the others wait.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.io.atomic import fsync, translate_write_errors
from pml_fewshot.io.tensors import checksum, read_tensors, write_tensors

FORMAT_VERSION = 4  # raise it when what an entry holds changes: older ones are then replaced


class Source(NamedTuple):
    """What a loader gives to fill an entry."""

    items: Iterator[tuple[np.ndarray, int]]  # (image (C, H, W) uint8, label), decoded as asked for, labels ascending
    total: int  # number of items at most, for the progress bar
    item_shape: tuple[int, ...]  # (C, H, W)
    sets: dict[str, list[str]]  # name -> class names of the data sets, whose labels count on from one to the next
    notes: dict[str, Any]  # what else to keep; may be filled while the items are read


def cached_sets(
    name: str,
    source: Sequence[object],
    files: Iterable[Path],
    read: Callable[[], Source],
    cache_dir: str | Path | None = None,
    memory_map: bool = False,
) -> tuple[dict[str, FewShotDataset], dict[str, Any]]:
    """Returns a source's data sets and notes, from the cache where it holds them as they are now, else read and stored.

    Args:
        name: the data set's, the entry's first word.
        source: where the images come from and how they are prepared; another value is another entry.
        files: what they are read from; another name, size or time replaces the entry.
        read: called only when the cache does not hold the source's content.
        cache_dir: by default `$PML_FEWSHOT_CACHE`, `$XDG_CACHE_HOME/pml_fewshot` or `~/.cache/pml_fewshot`.
        memory_map: leave the images in the file and check only their number and shape, for sets larger than memory.
            Otherwise they are copied and compared with their checksum, 0.3 seconds a GB.

    Raises:
        UsageError: the entry is damaged. It is not rebuilt silently: a disk that loses data should be known.
        CannotWriteError: the disk is full or the folder read-only; an older entry is as it was.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    folder = Path(cache_dir or os.environ.get("PML_FEWSHOT_CACHE") or Path(user_cache, "pml_fewshot"))
    state = [FORMAT_VERSION, *((file, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files))]
    prefix = f"{name}-{_short_hash(source)}-"
    entry, temporary = folder / f"{prefix}{_short_hash(state)}", folder / f".tmp-{prefix}"
    if entry.exists():
        return _load(entry, memory_map)
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{prefix}lock", mode=0o666)  # the system releases it when a process is killed
        lock.acquire()
    try:
        if not entry.exists():  # otherwise another process built it while this one waited
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
            _write(read(), name, temporary, entry)
        with translate_write_errors(folder):
            for outdated in set(folder.glob(f"{prefix}*")) - {entry}:
                shutil.rmtree(outdated)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.release()
    return _load(entry, memory_map)


def _short_hash(parts: Iterable[object]) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _write(source: Source, name: str, folder: Path, entry: Path) -> None:
    """Writes the files of `entry` to `folder` and renames it. What the source's reading raises passes unchanged."""
    labels: list[int] = []
    header = {"descr": "|u1", "fortran_order": False}
    with translate_write_errors(entry):
        folder.mkdir()
        # no memory map, which on a full disk ends the interpreter; no buffer, which fails once more when it is closed
        file = (folder / "images.npy").open("wb", buffering=0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (0, *source.item_shape)})
    with file:
        # delay: a set that is read within two seconds needs no bar
        for image, label in tqdm(source.items, f"reading {name}", source.total, unit="image", delay=2, mininterval=1):
            content = image.tobytes()
            with translate_write_errors(entry):
                while content:  # a disk that becomes full takes a part, and gives the reason when asked again
                    content = content[file.write(content) :]
            labels.append(label)
        shape = (len(labels), *source.item_shape)
        with translate_write_errors(entry):
            file.seek(0)  # the new header is as long: numpy leaves room in it for any length of the first axis
            np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
    images = _map_images(folder)
    sets = _slices(images, torch.tensor(labels), source.sets)
    recorded = [(part, each.class_names, each.checksum()) for part, each in sets.items()]
    about = json.dumps(
        {"sets": recorded, "notes": source.notes, "shape": shape, "checksum": checksum([images.numpy().data])}
    )
    with translate_write_errors(entry):
        write_tensors(folder / "rest.safetensors", {"labels": torch.tensor(labels)}, {"about": about})
        fsync(folder / "images.npy")
        folder.rename(entry)
        fsync(entry.parent)


def _load(entry: Path, memory_map: bool) -> tuple[dict[str, FewShotDataset], dict[str, Any]]:
    try:
        images = _map_images(entry)  # an error where the file is truncated
        tensors, texts = read_tensors(entry / "rest.safetensors")  # which verifies its own checksum
        about = json.loads(texts["about"])
        if list(images.shape) != about["shape"]:
            raise ValueError(f"images of shape {list(images.shape)}, not {about['shape']} as written")
        if not memory_map and checksum([images.numpy().data]) != about["checksum"]:
            raise ValueError("other images than were written")
        sets = _slices(images, tensors["labels"], {name: class_names for name, class_names, _ in about["sets"]})
        for name, _, recorded in about["sets"]:
            sets[name].recorded_checksum = recorded
            if not memory_map:  # each in memory of its own, which goes with it
                sets[name].images = sets[name].images.clone()
    except MemoryError:
        raise
    except Exception as error:  # on broken files numpy raises whatever its code happens to meet
        got = f"one that cannot be read ({error})"
        raise UsageError(
            f"expected a whole cache entry in {entry}, got {got}; delete that folder and run again"
        ) from error
    return sets, about["notes"]


def _map_images(entry: Path) -> Tensor:
    # "c", for torch wants writable memory: writes stay in this process and never reach the file
    return torch.from_numpy(np.load(entry / "images.npy", mmap_mode="c", allow_pickle=False))


def _slices(images: Tensor, labels: Tensor, sets: dict[str, list[str]]) -> dict[str, FewShotDataset]:
    parts, label = {}, 0
    for name, class_names in sets.items():
        start, end = torch.searchsorted(labels, torch.tensor([label, label + len(class_names)])).tolist()
        parts[name] = FewShotDataset(images[start:end], labels[start:end] - label, class_names)
        label += len(class_names)
    return parts
