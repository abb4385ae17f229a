"""build_gallery: a Gallery larger than memory, built by any number of worker processes that share a folder."""

import json
import operator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from pytorch_metric_learning.distances import BaseDistance

from pml_fewshot.checks import ExistingFileError, UsageError, check_at_least_one
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.gallery import (
    ADD_ROWS,
    FLOATS,
    INDEX,
    LABELS,
    LISTS,
    Gallery,
    train,
    untrained,
    write_index,
    write_labels,
)
from pml_fewshot.evaluation.mapped_index import compares_floats, encoded, inverted_lists, record_type, write_lists
from pml_fewshot.io.atomic import atomic_write, translate_write_errors, write_text
from pml_fewshot.io.tensors import checksum

PLAN = "build.json"


def build_gallery(
    bank: EmbeddingBank,
    folder: str | Path,
    index: str = "ivf",
    parameters: str = "",
    distance: BaseDistance | None = None,
    seed: int = 0,
    shards: int = 8,
) -> Gallery:
    """Builds a Gallery of inverted lists in a folder, together with all other processes that make the same call.

    Start any number of workers, on one machine or on several with a shared disk whose locks work: each makes the same
    call and returns the same finished gallery. The first trains the index; each then takes shards, slices of the bank's
    rows, that nobody has taken yet; one of them merges all shards. A lock is held on a file, and the system frees it
    when its process dies, however it dies: another worker then takes over. Finished work is not repeated: after a crash
    the same call resumes, and with a finished folder it opens the gallery.

    The index is the same, bit for bit, as that of `Gallery(bank, index, parameters, distance, seed)` on the same
    processor with as many threads, whatever the number of shards and workers. Its lists and floats stay on the disk and
    are mapped into memory. `Gallery.load` opens the folder, even after it is moved. Nothing can be added or removed.

    Args:
        bank: the references; `load_bank` of a .npy maps a file larger than memory. Each worker reads all of it once for
            its checksum (making a bank is another such pass, to check for NaN), and then the rows of its shards.
        folder: new, or begun by the same call.
        index, parameters, distance, seed: as in Gallery, but with inverted lists: "ivf", "ivfpq", or a description such
            as "IVF4096,SQ8", "OPQ32,IVF4096,PQ32" or "IVF4096,PQ16x4fsr,RFlat".
        shards: number of parts the rows are divided into, of at least 65,536 rows each: 8 are enough for up to 8
            workers. While making one, a worker holds the codes of its rows and 20 bytes a row in memory, so more shards
            take less. On the disk, all shards and the finished lists exist together until the shards are removed.

    Raises:
        UsageError: a different bank, index, parameter, distance, seed or number of shards than the folder was begun
            with; an index without inverted lists; anything Gallery rejects.
        ExistingFileError: a folder with a gallery that Gallery.save wrote.
        CannotWriteError: the disk is full or the folder read-only. Free space, and call again.
    """
    import faiss

    check_at_least_one("shards", shards)
    folder, seed = Path(folder), operator.index(seed)
    if (folder / LABELS).exists() and not (folder / PLAN).exists():
        got = f"{folder} with a gallery that was saved there"
        raise ExistingFileError(f"expected a new folder or one that build_gallery began, got {got}; name another")
    gallery = untrained(bank, index, parameters, distance)
    inverted_lists(gallery.faiss_index, index)  # or it raises
    plan = {
        "bank": _bank_checksum(bank),
        "index": index,
        "parameters": parameters,
        "distance": str(gallery.ranking),
        "seed": seed,
        "shards": int(shards),
    }
    _check_plan(folder, plan)
    if not (folder / LABELS).exists() or _shard_files(folder):
        with translate_write_errors(folder):
            (folder / "shards").mkdir(parents=True, exist_ok=True)
        with _lock(folder, "train"):
            _check_plan(folder, plan)  # another worker may have been first
            if not (folder / PLAN).exists():
                train(gallery, bank, seed)
                with atomic_write(folder / INDEX) as temporary:
                    write_index(temporary, gallery.faiss_index)
                write_text(folder / PLAN, json.dumps(plan, indent=2))
        gallery.faiss_index = faiss.read_index(str(folder / INDEX))
        _make_shards(folder, bank, gallery, int(shards))
        with _lock(folder, "merge"):
            if not (folder / LABELS).exists():
                _merge(folder, bank, gallery)
            for path in _shard_files(folder):  # also those left by a killed merge; their locks stay, for others
                path.unlink()
    return Gallery.load(folder)


def _make_shards(folder: Path, bank: EmbeddingBank, gallery: Gallery, shards: int) -> None:
    """Makes the shards that no other worker is making, then waits for the others' shards or makes those they left."""
    blocks = -(-len(bank) // ADD_ROWS)  # the same as in one process, as products of other sizes are rounded differently
    shards = min(shards, blocks)
    for timeout in (0, -1):  # seconds, -1: until it is free
        for number in range(shards):
            with suppress(Timeout), _lock(folder, f"{number}", timeout):
                path = folder / "shards" / f"{number}.npy"
                if not (path.exists() or (folder / LABELS).exists()):
                    first, last = (place * blocks // shards * ADD_ROWS for place in (number, number + 1))
                    _make_shard(path, bank, gallery, range(len(bank))[first:last])


def _make_shard(path: Path, bank: EmbeddingBank, gallery: Gallery, own: range) -> None:
    """Writes the records of the references `own`, in the order of their lists."""
    records = np.empty(len(own), record_type(gallery.faiss_index))
    records["id"] = own
    for start in range(0, len(own), ADD_ROWS):
        part = records[start : start + ADD_ROWS]
        rows = gallery.rows(bank.embeddings[own.start + start : own.start + start + len(part)])
        part["list"], part["code"] = encoded(gallery.faiss_index, rows)
    order = np.argsort(records["list"], kind="stable")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        about = {"descr": np.lib.format.dtype_to_descr(records.dtype), "fortran_order": False, "shape": records.shape}
        np.lib.format.write_array_header_1_0(file, about)
        for start in range(0, len(own), ADD_ROWS):  # a sorted copy would double the memory
            file.write(records[order[start : start + ADD_ROWS]].tobytes())


def _merge(folder: Path, bank: EmbeddingBank, gallery: Gallery) -> None:
    """Writes the lists of all shards to one file, and then the labels, which complete the gallery."""
    shards = [np.load(path, mmap_mode="r") for path in _shard_files(folder)]
    sizes = write_lists(folder / LISTS, gallery.faiss_index, shards)
    if compares_floats(gallery.faiss_index):
        with atomic_write(folder / FLOATS) as temporary, temporary.open("wb") as file:
            about = {"descr": "<f4", "fortran_order": False, "shape": tuple(bank.embeddings.shape)}
            np.lib.format.write_array_header_1_0(file, about)
            for block in bank.embeddings.split(ADD_ROWS):
                file.write(gallery.rows(block).data)
    gallery.labels = bank.labels.cpu()
    write_labels(gallery, folder, list_sizes=torch.from_numpy(sizes))


def _shard_files(folder: Path) -> list[Path]:
    """The finished shards in the order of their rows."""
    return sorted((folder / "shards").glob("[0-9]*.npy"), key=lambda path: int(path.stem))


def _lock(folder: Path, name: str, timeout: float = -1) -> FileLock:
    return FileLock(folder / "shards" / f"{name}.lock", timeout=timeout)


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Raises if a different gallery was begun in the folder."""
    if not (folder / PLAN).exists():
        return
    begun = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if differ := [name for name in plan if begun.get(name) != plan[name]]:
        wanted, got = (", ".join(f"{name} {each.get(name)!r}" for name in differ) for each in (begun, plan))
        do = "give the same as before, or name another folder"
        raise UsageError(f"expected {wanted}, with which the gallery in {folder} was begun, got {got}; {do}")


def _bank_checksum(bank: EmbeddingBank) -> str:
    """Returns the checksum of embeddings, labels and class names, read a block at a time."""
    shape = " x ".join(map(str, bank.embeddings.shape))
    about = json.dumps([str(bank.embeddings.dtype), bank.class_names]).encode()
    blocks = (*bank.embeddings.split(ADD_ROWS), bank.labels)
    content = (block.cpu().contiguous().view(torch.uint8).numpy().data for block in blocks)
    return f"{shape} {checksum(chain([about], content))}"
