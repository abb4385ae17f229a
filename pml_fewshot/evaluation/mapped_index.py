"""Inverted lists of a faiss index in a memory-mapped file, so that an index may be larger than memory.

These are faiss's OnDiskInvertedLists, written one list after another by ordinary writes: when writing into a mapped
file, as faiss.contrib.ondisk.merge_ondisk does, a full disk would kill the process. 4-bit codes, which are stored in
blocks, are supported too. What faiss finds is the same, bit for bit, as with lists in memory.

Letters: M references, L lists, C bytes per code.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.io.atomic import atomic_write

# Kinds of lists; others (IndexIVFPQR, IndexIVFFlatDedup) keep additional data.
KINDS = ("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ", "IndexIVFPQFastScan")
ALIGNED = 8  # codes, so that the 8-byte indices after them begin at a multiple of 8
ID_BYTES = 8
BLOCK = 32  # 4-bit codes per block; for other sizes ("PQ4x4fs_64") faiss's packer writes other bytes than its add


def inverted_lists(index: Any, name: str = "") -> Any:
    """Returns the part of a faiss index that holds the inverted lists, as its own class.

    Raises:
        UsageError: there are none, or their kind cannot be mapped. `name` is the index that was asked for.
    """
    *_, lists = _wrapped(index)
    kind = type(lists).__name__
    if kind not in KINDS or getattr(lists, "bbs", BLOCK) != BLOCK:
        wanted = "an index of inverted lists, which can be built in shards"
        do = "take 'ivf', 'ivfpq', 'IVF4096,SQ8', 'IVF4096,PQ32' or the like, or make a Gallery in one process"
        raise UsageError(f"expected {wanted}, got {name!r} ({kind}); {do}")
    return lists


def record_type(index: Any) -> np.dtype[Any]:
    """Returns the type of a shard's records: a reference's list, its index in the gallery and its code (C,)."""
    code = ("code", np.uint8, (inverted_lists(index).code_size,))
    return np.dtype([("list", np.int32), ("id", np.int64), code])


def encoded(index: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lists (M,) and codes (M, C) that `index.add` would give prepared rows (M, D), without adding them."""
    import faiss

    lists = inverted_lists(index)
    for part in _wrapped(index):
        if isinstance(part, faiss.IndexPreTransform):
            chain: Any = part.chain
            for place in range(chain.size()):
                rows = chain.at(place).apply(rows)
    numbers = lists.quantizer.search(rows, 1)[1][:, 0]
    codes = np.empty((len(rows), lists.code_size), np.uint8)
    pointers = (faiss.swig_ptr(np.ascontiguousarray(array)) for array in (rows, numbers))
    lists.encode_vectors(len(rows), *pointers, faiss.swig_ptr(codes))
    return numbers, codes


def write_lists(path: Path, index: Any, shards: Sequence[np.ndarray]) -> np.ndarray:
    """Writes the lists of all shards, whose records are sorted by list, to one file; returns the list sizes (L,).

    Only one list at a time is in memory, however large the shards are, if they are memory maps.

    Raises:
        CannotWriteError: the disk is full or read-only.
    """
    lists = inverted_lists(index)
    packer, step = _packer(lists)
    bounds = [np.searchsorted(shard["list"], np.arange(lists.nlist + 1)) for shard in shards]
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for number in range(lists.nlist):
            own = [shard[ends[number] : ends[number + 1]] for shard, ends in zip(shards, bounds, strict=True)]
            records = np.concatenate(own)
            codes = np.zeros((_capacity(len(records), step), lists.code_size), np.uint8)
            ids = np.full(len(codes), -1, np.int64)
            codes[: len(records)], ids[: len(records)] = records["code"], records["id"]
            file.write(_packed(codes, packer).data)
            file.write(ids.data)
    return np.sum([np.diff(ends) for ends in bounds], axis=0)


def map_lists(index: Any, path: Path, sizes: np.ndarray) -> None:
    """Maps the lists of a file, of sizes (L,), read-only into a trained index that is still empty.

    Raises:
        MissingFileError, UsageError: the file is not there, or cut off.
    """
    import faiss

    lists = inverted_lists(index)
    _, step = _packer(lists)
    capacities = _capacity(sizes, step)
    ends = np.cumsum(capacities * (lists.code_size + ID_BYTES))
    _check_size(path, int(ends[-1]))
    mapped: Any = faiss.OnDiskInvertedLists(lists.nlist, lists.code_size, str(path))
    mapped.read_only, mapped.totsize = True, int(ends[-1])
    mapped.lists.clear()
    for size, capacity, offset in zip(sizes.tolist(), capacities.tolist(), [0, *ends[:-1].tolist()], strict=True):
        one = faiss.OnDiskOneList()
        one.size, one.capacity, one.offset = size, capacity, offset
        mapped.lists.push_back(one)
    mapped.do_mmap()
    lists.replace_invlists(mapped, True)
    mapped.this.disown()  # the index owns it now
    for part in _wrapped(index):
        part.ntotal = int(sizes.sum())


def map_floats(index: Any, path: Path) -> None:
    """Maps the floats of a .npy (M, D) into an index that compares again by floats ("RFlat").

    faiss older than 1.11 reads them all into memory.

    Raises:
        MissingFileError, UsageError: the file is not there, or cut off.
    """
    import faiss

    flat: Any = faiss.downcast_index(_wrapped(index)[0].refine_index)
    _check_there(path)
    try:
        rows = np.load(path, mmap_mode="r")
        _check_size(path, rows.offset + rows.nbytes)
    except (ValueError, EOFError) as error:
        raise UsageError(f"expected floats in {path}, got a broken file ({error}); build the gallery again") from error
    if not hasattr(flat.codes, "view_data"):
        flat.add(np.asarray(rows))
        return
    codes, address = flat.codes, faiss.swig_ptr(np.asarray(rows).view(np.uint8).reshape(-1))
    codes.is_owned, codes.view_data, codes.view_size = False, address, rows.nbytes
    codes.c_ptr, codes.c_size = address, rows.nbytes  # its view is read through these
    flat.ntotal = len(rows)
    index.referenced_objects = [rows]  # the map must live as long as the index


def compares_floats(index: Any) -> bool:
    """Whether the index compares the best by their codes again by their floats ("RFlat")."""
    import faiss

    return type(faiss.downcast_index(index)).__name__ == "IndexRefineFlat"


def _wrapped(index: Any) -> list[Any]:
    """Returns a faiss index and those on the way to its lists, which come last; each as its own class."""
    import faiss

    parts: list[Any] = [faiss.downcast_index(index)]
    if compares_floats(index):
        parts.append(faiss.downcast_index(parts[-1].base_index))
    if isinstance(parts[-1], faiss.IndexPreTransform):
        parts.append(faiss.downcast_index(parts[-1].index))
    return parts


def _packer(lists: Any) -> tuple[Any, int]:
    """Returns the packer of 4-bit codes and the number of codes per block; None and ALIGNED for other codes."""
    import faiss

    if not isinstance(lists, faiss.IndexIVFFastScan):
        return None, ALIGNED
    packer = lists.get_CodePacker()
    return packer, packer.nvec


def _packed(codes: np.ndarray, packer: Any) -> np.ndarray:
    """Returns codes (n, C) as lists store them: fast scan reads blocks of 32, packed here in 5 us each."""
    import faiss

    if packer is None:
        return codes
    packed = np.zeros(codes.size, np.uint8)
    blocks = codes.reshape(-1, packer.nvec, codes.shape[1]), packed.reshape(-1, packer.block_size)
    for block, out in zip(*blocks, strict=True):
        packer.pack_all(faiss.swig_ptr(block), faiss.swig_ptr(out))
    return packed


def _capacity(size: Any, step: int) -> Any:
    return -(-size // step) * step


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise MissingFileError(f"expected {path}, got no such file; build the gallery again, or copy its whole folder")


def _check_size(path: Path, size: int) -> None:
    _check_there(path)
    if (found := path.stat().st_size) != size:
        raise UsageError(f"expected {path} of {size:,} bytes, got {found:,}: it is damaged; build the gallery again")
