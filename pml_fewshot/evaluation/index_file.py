"""Writing a faiss index to a file, and reading it from one that may be broken or hostile.

faiss checks much of what it reads, but neither the numbers of references in inverted lists, which a refined search
looks up without asking, nor that the sizes of one part fit the next. So only indexes of known parts are read, each of
which is held against the others before the first search.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pml_fewshot.atomic import to_disk
from pml_fewshot.checks import require
from pml_fewshot.sizes import check_fits_memory, checksum

BLOCK = 2**24
MOST_WORK = 2**12  # of efSearch, nprobe and the like, or the size of the gallery where that is more

SIMPLE = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexPQ, faiss.IndexPQFastScan, faiss.IndexLSH)
LISTS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan)
GRAPHS = (faiss.IndexHNSWFlat, faiss.IndexHNSWSQ, faiss.IndexHNSWPQ)


def index_checksum(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return checksum(iter(lambda: file.read(BLOCK), b""))


def write_index(index: faiss.Index, path: Path) -> None:
    """Writes an index, which is on the disk afterwards.

    Through Python's file: faiss's own only prints that its last bytes could not be written.
    """
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
    to_disk(path)


def read_index(path: Path, dims: int | None, count: int) -> faiss.Index:
    """Reads an index of `count` references of `dims` dimensions (None: not known).

    faiss's limits on what it reads, which hold for the whole process, are lowered meanwhile to what the file can hold.

    Raises:
        ValueError: an index of other sizes, of parts that are not known, or one that a search would read beyond.
        RuntimeError: faiss cannot read it.
    """
    size = path.stat().st_size
    check_fits_memory(size, path)
    with _limits(size):
        index = faiss.read_index(str(path))
    _check(index, index.d if dims is None else dims, count, index.metric_type)
    return index


def check_known(index: faiss.Index) -> None:
    """Raises a ValueError for an index that `read_index` would not read."""
    _check(index, index.d, index.ntotal, index.metric_type)


def check_work(parameters: str, count: int) -> None:
    """Raises a ValueError for parameters by which a search would take any amount of memory."""
    most = max(MOST_WORK, count)
    for text in parameters.split(","):
        right = not text or 0 < float(text.partition("=")[2]) <= most
        require(right, f"parameters of at most {most} for {count} references", text, "build the gallery with less")


@contextmanager
def _limits(size: int) -> Iterator[None]:
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(size)
    faiss.set_deserialization_loop_limit(size)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])


def _check(index: Any, dims: int, count: int, metric: int) -> None:
    """Holds an index against its sizes, and the indexes in it against its own."""
    index = faiss.downcast_index(index)
    kind = type(index)
    got = index.d, index.ntotal, bool(index.is_trained)
    _require(got == (dims, count, True), f"(dimensions, references, trained) {(dims, count, True)}", got)
    known = metric in (faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT)
    _require(known and index.metric_type == metric, "one metric, Euclid or inner product", index.metric_type)
    most = max(MOST_WORK, count)
    if isinstance(index, faiss.IndexRefine):
        _require(1 <= index.k_factor <= 1000, "k_factor from 1 to 1000", index.k_factor)  # faiss reads no others
        _check(index.base_index, dims, count, metric)
        _check(index.refine_index, dims, count, metric)
    elif kind is faiss.IndexPreTransform:
        width = dims
        for place in range(index.chain.size()):
            step = faiss.downcast_VectorTransform(index.chain.at(place))
            _require(step.d_in == width and bool(step.is_trained), f"a step from {width} dimensions", step.d_in)
            width = step.d_out
            if isinstance(step, faiss.LinearTransform):
                _require(step.A.size() == step.d_in * step.d_out, "a whole matrix", step.A.size())
                _require(step.b.size() in ((step.d_out,) if step.have_bias else (0, step.d_out)), "a whole bias", "not")
            else:
                _require(type(step) is faiss.NormalizationTransform, "known steps", type(step).__name__)
        _check(index.index, width, count, metric)
    elif kind in LISTS:
        _check(index.quantizer, dims, index.nlist, metric)
        _check_lists(index, count)
    elif kind in GRAPHS:
        _check_graph(index.hnsw, count, most)
        _check(index.storage, dims, count, metric)
    else:
        _require(isinstance(index, SIMPLE), "an index of parts that are known", kind.__name__)
        held = index.codes.size()
        if kind is not faiss.IndexPQFastScan:
            _require(held == count * index.code_size, f"{count * index.code_size} bytes of codes", held)
    _check_quantizer(index, dims)


def _check_quantizer(index: Any, dims: int) -> None:
    """The centres of product codes, or the ranges of scalar ones."""
    product, scalar = getattr(index, "pq", None), getattr(index, "sq", None)
    if product is not None:
        _require(product.d == dims and product.M * product.dsub == dims, f"codes of {dims} dimensions", product.d)
        _require(1 <= product.nbits <= 16 and product.ksub == 2**product.nbits, "codes of up to 16 bits", product.nbits)
        held = product.centroids.size()
        _require(held == dims * product.ksub, f"{dims * product.ksub} numbers in the centres of codes", held)
    if scalar is not None:
        _require(scalar.d == dims, f"codes of {dims} dimensions", scalar.d)


def _check_lists(index: Any, count: int) -> None:
    """Each reference in one list, by its number."""
    lists = index.invlists
    _require(lists is not None and lists.nlist == index.nlist, f"{index.nlist} lists", "another number")
    _require(lists.code_size in (index.code_size, 2**64 - 1), f"codes of {index.code_size} bytes", lists.code_size)
    sizes = [lists.list_size(place) for place in range(index.nlist)]
    _require(sum(sizes) == count, f"{count} references in the lists", sum(sizes))
    seen = np.zeros(count, dtype=bool)
    for place, size in enumerate(sizes):
        if size:
            numbers = faiss.rev_swig_ptr(lists.get_ids(place), size)
            _require(
                numbers.min() >= 0 and numbers.max() < count,
                f"references from 0 to {count - 1} in the lists",
                f"{numbers.min()} to {numbers.max()}",
            )
            seen[numbers] = True
    _require(bool(seen.all()), "every reference in a list", f"{count - seen.sum()} in none")


def _check_graph(graph: Any, count: int, most: int) -> None:
    """faiss validates neighbours and levels when it reads them; this is what its searches rely on besides."""
    _require(1 <= graph.efSearch <= most, f"efSearch from 1 to {most}", graph.efSearch)
    neighbours = faiss.vector_to_array(graph.neighbors)
    right = neighbours.min(initial=-1) >= -1 and neighbours.max(initial=-1) < count
    _require(bool(right), f"neighbours from -1 to {count - 1}", "others")
    _require(0 <= graph.entry_point < count or count == 0, f"an entry from 0 to {count - 1}", graph.entry_point)


def _require(condition: bool, expected: str, got: object) -> None:
    require(condition, f"{expected} in the index", got, "build the gallery anew")
