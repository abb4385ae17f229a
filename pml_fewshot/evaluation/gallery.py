"""Gallery: references in a faiss index, for approximate search and for saving to a folder."""

import json
import operator
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import (
    ExistingFileError,
    MissingFileError,
    UsageError,
    UsageTypeError,
    check_at_least_one,
    check_choice,
    check_finite,
)
from pml_fewshot.embedders.bank import EmbeddingBank, align, check_bank
from pml_fewshot.evaluation.mapped_index import compares_floats, map_floats, map_lists
from pml_fewshot.evaluation.neighbors import Neighbors
from pml_fewshot.evaluation.search import Ranking, exact_neighbors, exact_search
from pml_fewshot.io.atomic import fsync, translate_write_errors
from pml_fewshot.io.tensors import checksum, read_tensors, write_tensors

EXACT = ("flat", "Flat")
INDEXES = ("flat", "ivf", "ivfpq", "hnsw")
MIN_FOR_CODES = 16 * 39  # references to train the 16 centers of a 4-bit code on
INDEX, LABELS = "index.faiss", "labels.safetensors"  # the files in a gallery's folder; one built in shards also has:
LISTS, FLOATS = "lists.bin", "floats.npy"
ADD_ROWS = 2**16  # at a time: 32 MiB at 128 dimensions
READ_BYTES = 2**24  # at a time
# kinds of faiss index that references can be removed from: vectors or codes in one list, or in inverted lists
REMOVABLE = (
    *("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexScalarQuantizer", "IndexPQ", "IndexPQFastScan"),
    *("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ", "IndexIVFPQFastScan"),
)
WRAPPERS = ("IndexRefine", "IndexRefineFlat", "IndexPreTransform")


@dataclass(frozen=True)
class IndexRecall:
    """How often an approximate index's nearest neighbor is the true one, and its share of the true k nearest.

    Measured on `sample` queries, comparing indices: another copy of a true neighbor does not count.
    """

    at_1: float
    at_k: float
    k: int
    sample: int

    @staticmethod
    def of(found: Tensor, exact: Tensor) -> "IndexRecall":
        """Compares the indices (N, k) that an index found with those of exact search."""
        ordered = found.sort(dim=1).values
        position = torch.searchsorted(ordered, exact.contiguous()).clamp_(max=ordered.shape[1] - 1)
        there = exact >= 0  # fewer than k where the rest are left out
        hit = (ordered.gather(1, position) == exact) & there
        at_1 = (found[:, 0] == exact[:, 0])[there[:, 0]].double().mean().item()
        return IndexRecall(at_1, hit.sum().item() / int(there.sum()), exact.shape[1], len(exact))

    def __str__(self) -> str:
        return f"recall@1 {self.at_1:.3f}, @{self.k} {self.at_k:.3f} of exact search on {self.sample:,} queries"


class Gallery:
    """References to search, with their labels and class names, in a faiss index.

    Args:
        bank: the references, read a block at a time (a memory map may be larger than memory). "flat", "ivf", "ivfpq"
            and "hnsw" hold all floats in memory; "IVF4096,SQ8" a quarter, "IVF4096,PQ32" 32 bytes each.
        index: "flat": exact, with ties in the order of their index. "ivf": inverted lists. "ivfpq": inverted lists of
            4-bit product codes, the best of which are compared again by their floats; several times faster than "ivf".
            "hnsw": a graph, fast to search and slow to build. Or any description for faiss's index factory
            ("IVF4096,SQ8", "OPQ32,IVF1024,PQ32").
        parameters: in faiss's own form: "nprobe=64", "efConstruction=100,efSearch=64", "nprobe=256,k_factor_rf=20".
            `recipe` chooses those not given, by the gallery's size.
        distance: PML distance to rank by, Euclidean if None: any for "flat", else Euclidean, cosine or dot product, the
            only ones that faiss knows.
        seed: for the sample that the index is trained on.

    Raises:
        UsageError: a description or parameter that faiss does not know, or a distance that it cannot rank by.
    """

    folder: Path | None = None  # where the lists are mapped from; None if all is in memory

    def __init__(
        self,
        bank: EmbeddingBank,
        index: str = "ivfpq",
        parameters: str = "",
        distance: BaseDistance | None = None,
        seed: int = 0,
    ) -> None:
        self._make(bank, index, parameters, distance)
        train(self, bank, seed)
        self.add(bank)

    @classmethod
    def check(cls, bank: EmbeddingBank, index: str, parameters: str = "", distance: BaseDistance | None = None) -> None:
        """Raises the errors of making a gallery, without filling it: a graph of 60,000 references takes a minute."""
        train(untrained(bank, index, parameters, distance), bank, seed=0)

    def _make(self, bank: EmbeddingBank, index: str, parameters: str, distance: BaseDistance | None) -> None:
        """Makes the index, still untrained and empty."""
        import faiss

        check_bank(bank)
        check_index(index)
        self.ranking = Ranking.of(distance)
        if self.ranking.kind == "distance" and index not in EXACT:
            wanted = f"Euclidean distance, cosine or dot product for index {index!r}"
            raise UsageError(f"expected {wanted}, got {distance}; index='flat' ranks by any PML distance")
        if len(bank) == 0:
            raise UsageError("expected at least one reference, got none; give a bank with items")
        count, dims = bank.embeddings.shape
        self.description, chosen = recipe(index, count, dims)
        settings = dict(text.partition("=")[::2] for text in f"{chosen},{parameters}".split(",") if text)
        self.parameters = ",".join(f"{name}={value}" for name, value in settings.items())  # the caller's override ours
        self.labels, self.class_names = bank.labels.new_empty(0).cpu(), bank.class_names
        metric = faiss.METRIC_L2 if self.ranking.kind == "euclidean" else faiss.METRIC_INNER_PRODUCT
        self._asked = f"{index!r} with {parameters!r} for {count} references of {dims} dimensions"
        with self.buildable():
            self.faiss_index = faiss.index_factory(dims, self.description, metric)
            space: Any = faiss.ParameterSpace()  # its stubs know only the form with a number
            space.set_index_parameters(self.faiss_index, self.parameters)

    @contextmanager
    def buildable(self) -> Iterator[None]:
        """Names the requested index in the error if faiss cannot build it."""
        try:
            yield
        except RuntimeError as error:
            reason = re.split(r"\.cpp:\d+: ", str(error).splitlines()[0])[-1]  # without the place in faiss's source
            raise UsageError(
                f"expected an index and parameters that faiss can build, got {self._asked} ({reason}); use one of "
                f"{', '.join(INDEXES)}, or see faiss's wiki"
            ) from error

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return f"{self.description} {self.parameters}".strip()

    def add(self, bank: EmbeddingBank) -> None:
        """Adds references, a block at a time; their indices, and any new class names, follow the existing ones.

        A bank with class names cannot join a gallery without them, or vice versa.
        """
        self._check_own("add to", "build it again with all references")
        check_bank(bank)
        self._check_width(bank.embeddings, "references")
        labels, names = align(bank, self)
        for block in bank.embeddings.split(ADD_ROWS):
            self.faiss_index.add(self.rows(block))
        self.labels, self.class_names = torch.cat([self.labels, labels.cpu()]), names

    def remove(self, ids: int | Sequence[int] | np.ndarray | Tensor) -> None:
        """Removes the references at these indices; later ones move up, so that indices stay 0 to len - 1.

        Class names stay, even those of classes without references.

        Raises:
            UsageError: an index that is not in the gallery or is given twice, or a kind of index that faiss cannot
                remove from, such as a graph ("hnsw"); the gallery is unchanged.
        """
        self._check_own("remove from", "build it again without them")
        given = np.atleast_1d(ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids))
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            got = f"{type(ids).__name__} of {given.dtype} and shape {given.shape}"
            raise UsageTypeError(f"expected ids as integers of one axis, got {got}; give indices of references")
        removed, counts = np.unique(given, return_counts=True)
        for wrong, says in (((removed < 0) | (removed >= len(self)), "unknown"), (counts > 1, "repeated")):
            if wrong.any():
                wanted = f"different indices from 0 to {len(self) - 1}"
                first = removed[wrong][:3].tolist()
                raise UsageError(f"expected {wanted}, got {wrong.sum()} {says}, {first} first; leave them out")
        removed = removed.astype(np.int64)
        parts = list(_parts(self.faiss_index))
        if not_one := [name for part in parts if (name := type(part).__name__) not in (*REMOVABLE, *WRAPPERS)]:
            wanted = "an index that references can be removed from"
            raise UsageError(f"expected {wanted}, got {self} ({not_one[0]}); build it again without them")
        for part in parts:
            _remove(part, removed, len(self) - len(removed))
        self.labels = self.labels[torch.from_numpy(np.delete(np.arange(len(self)), removed))]

    def search(self, query: Any, k: int) -> Neighbors:
        """Finds the k references nearest to each query, with their distances, labels and class names.

        Distances of "flat" are exact; those of "ivf", "ivfpq" and "hnsw" are of the floats, as faiss computes them;
        those of other indexes without floats ("IVF4096,SQ8") are of their codes.

        Args:
            query: (N, D) embeddings, a tensor, numpy array or list of rows.
            k: number of neighbors, at most the gallery's size.
        """
        rows = self._queries(query, k)
        if (floats := self._floats()) is not None:
            indices, distances = exact_neighbors(rows, floats, k, self.ranking)
        else:
            found, indices = map(torch.from_numpy, self.faiss_index.search(rows.numpy(), k))
            if self.ranking.kind == "euclidean":  # faiss returns squares, which rounding may leave below 0
                found = found.clamp_(min=0) ** (self.ranking.power / 2)
            distances = found.masked_fill_(indices < 0, torch.nan)
        labels = self.labels[indices.clamp(min=0)].masked_fill_(indices < 0, 0)
        return Neighbors(indices, distances, labels, self.class_names)

    def rank(self, query: Any, k: int) -> Tensor:
        """Returns only the indices (N, k) of `search`, without the time that distances take."""
        rows = self._queries(query, k)
        if (floats := self._floats()) is not None:
            return exact_search(rows, floats, k, replace(self.ranking, prepared=True))
        return torch.from_numpy(self.faiss_index.search(rows.numpy(), k)[1])

    def save(self, folder: str | Path) -> None:
        """Writes index.faiss and labels.safetensors to a new folder: both or neither.

        Raises:
            UsageError: ranked by a distance other than Euclidean, cosine or dot product, which cannot be stored.
            ExistingFileError: the folder exists.
            CannotWriteError: the disk is full or the folder read-only.
        """
        self._check_own("save", "copy that folder")
        if self.ranking.kind == "distance":
            wanted = "a gallery ranked by Euclidean distance, cosine or dot product to save"
            do = "a distance cannot be stored: save the bank (save_bank) and build the gallery again"
            raise UsageError(f"expected {wanted}, got {self.ranking}; {do}")
        folder = Path(folder)
        if folder.exists():
            raise ExistingFileError(f"expected a new folder for the gallery, got {folder}, which exists; name another")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        index = temporary / INDEX
        try:
            with translate_write_errors(folder):
                shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same id
                temporary.mkdir(parents=True)
                write_index(index, self.faiss_index)
                fsync(index)
                write_labels(self, temporary)
                temporary.rename(folder)
                fsync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # the first error is the one to show
            raise

    @classmethod
    def load(cls, folder: str | Path) -> "Gallery":
        """Reads a gallery from `save`, or maps one from `build_gallery`, checking only the sizes of its large files.

        Raises:
            MissingFileError: no gallery there, or an unfinished one.
            UsageError: the files are damaged, or index and labels do not belong together.
        """
        import faiss

        index, labels = Path(folder) / INDEX, Path(folder) / LABELS
        for path in (index, labels):
            if not path.is_file():
                raise MissingFileError(f"expected {path.name} in {folder}, got none; make it by Gallery(bank).save(..)")
        tensors, texts = read_tensors(labels)
        about = json.loads(texts.get("gallery", "{}"))
        written, found = about.get("index"), _file_checksum(index)
        if written != found:
            got = f"an index with checksum {found}, not {written} as its labels say"
            raise UsageError(f"expected a gallery in {folder}, got {got}: damage, or of two galleries; build it again")
        gallery = cls.__new__(cls)
        gallery.labels, gallery.faiss_index = tensors["labels"], faiss.read_index(str(index))
        kind: Literal["euclidean", "inner product"] = "inner product"
        if gallery.faiss_index.metric_type == faiss.METRIC_L2:
            kind = "euclidean"
        gallery.ranking = Ranking(kind, about["normalize"], power=about.get("power", 1))  # version 0.6 stored none
        gallery.description, gallery.parameters = about["description"], about["parameters"]
        gallery.class_names = tuple(about["class_names"])
        if (sizes := tensors.get("list_sizes")) is not None:
            gallery.folder = Path(folder).absolute()
            map_lists(gallery.faiss_index, gallery.folder / LISTS, sizes.numpy())
            if compares_floats(gallery.faiss_index):
                map_floats(gallery.faiss_index, gallery.folder / FLOATS)
        return gallery

    def recall(self, query: Any, bank: EmbeddingBank, k: int = 10) -> IndexRecall:
        """Measures this gallery's recall against exact search on the queries (N, D), a thousand or so.

        Args:
            bank: the references that the gallery was made from, in the same order; read once, a block at a time.

        Raises:
            UsageError: a bank of another size, or anything `search` rejects.
        """
        found = self.rank(query, k)
        if len(bank) != len(self):
            got = f"{len(bank)} references for a gallery of {len(self)}"
            raise UsageError(f"expected the bank that the gallery was made of, got {got}; give that one")
        return IndexRecall.of(found, exact_search(self._queries(query, k), bank.embeddings, k, self.ranking).cpu())

    def _check_own(self, what: str, do: str) -> None:
        """Raises if the lists are mapped from a file, which others may have mapped too."""
        if self.folder is not None:
            wanted, got = f"a gallery in memory to {what}", f"one whose lists are mapped from {self.folder}"
            raise UsageError(f"expected {wanted}, got {got}; {do}")

    def _check_width(self, embeddings: Tensor, what: str) -> None:
        width, shape = self.faiss_index.d, tuple(embeddings.shape)
        if len(shape) != 2 or shape[1] != width:
            do = f"add an axis: {what}[None]" if shape == (width,) else "use one embedder for both"
            raise UsageError(f"expected {what} of shape (N, {width}), got {shape}; {do}")

    def _queries(self, query: Any, k: int) -> Tensor:
        """Checks queries (N, D) and prepares them for the ranking, on the CPU."""
        check_at_least_one("k", k)
        k = int(k)  # faiss rejects numpy's integers
        if not isinstance(query, Tensor):
            try:
                query = torch.from_numpy(np.array(query, dtype=np.float32))
            except (TypeError, ValueError) as error:
                got = f"{type(query).__name__} ({error})"
                raise UsageTypeError(
                    f"expected queries as rows of numbers, got {got}; give embeddings (N, D)"
                ) from error
        self._check_width(query, "queries")
        check_finite(query, "queries")
        if k > len(self):
            raise UsageError(f"expected k of at most {len(self)}, the gallery's size, got {k}; lower k")
        return self.ranking.prepare(query).cpu().contiguous()

    def _floats(self) -> Tensor | None:
        """Returns the prepared references (M, D) of a flat index, without a copy, else None."""
        import faiss

        if self.description != "Flat":
            return None
        index: Any = faiss.downcast_index(self.faiss_index)
        return torch.from_numpy(faiss.rev_swig_ptr(index.get_xb(), len(self) * index.d)).reshape(len(self), -1)

    def rows(self, embeddings: Tensor) -> np.ndarray:
        """Prepares embeddings (N, D) for the index: float32 on the CPU, normalized if the ranking requires it."""
        return self.ranking.prepare(embeddings).cpu().contiguous().numpy()


def untrained(bank: EmbeddingBank, index: str, parameters: str, distance: BaseDistance | None) -> Gallery:
    """Returns an empty gallery with an untrained index, for references like those of a bank."""
    gallery = Gallery.__new__(Gallery)
    gallery._make(bank, index, parameters, distance)
    return gallery


def train(gallery: Gallery, bank: EmbeddingBank, seed: int) -> None:
    """Trains the index on a sample of the bank, if its kind needs training."""
    generator = torch.Generator().manual_seed(operator.index(seed))
    sample = training_sample(len(bank), gallery.description, generator)
    if not gallery.faiss_index.is_trained:
        with gallery.buildable():
            gallery.faiss_index.train(gallery.rows(bank.embeddings[sample]))


def write_index(path: Path, index: Any) -> None:
    """Writes through a Python file: faiss's own writer only prints that its last bytes could not be written."""
    import faiss

    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]


def write_labels(gallery: Gallery, folder: Path, **more: Tensor) -> None:
    """Writes everything but the index, which must already be in the folder; this completes the gallery."""
    about = {
        "index": _file_checksum(folder / INDEX),
        "description": gallery.description,
        "parameters": gallery.parameters,
        "normalize": gallery.ranking.normalize,
        "power": gallery.ranking.power,
        "class_names": gallery.class_names,
    }
    write_tensors(folder / LABELS, {"labels": gallery.labels, **more}, {"gallery": json.dumps(about)})


def check_index(index: str) -> None:
    """Raises a UsageError unless the index is one of ours or a faiss description, which starts with a capital."""
    if not index[:1].isupper():
        check_choice("index", index, INDEXES)


def recipe(index: str, count: int, dims: int) -> tuple[str, str]:
    """Returns faiss's description and parameters of an index for `count` references of `dims` dimensions.

    About 4 sqrt(count) lists, following faiss's guidelines, each with at least the 39 training points that faiss needs.
    "ivf" searches a sixteenth of them; "ivfpq", several times faster, an eighth. Its codes have 4 bits for every two
    dimensions (8 for each if there are too few references to train on); ten times k are compared again by floats.
    """
    lists = max(1, min(int(4 * count**0.5), count // 39))
    codes = max(m for m in range(1, max(1, dims // 2) + 1) if dims % m == 0)
    kind = "SQ8" if count < MIN_FOR_CODES else f"PQ{codes}x4fsr"
    ours = {
        "flat": ("Flat", ""),
        "ivf": (f"IVF{lists},Flat", f"nprobe={min(lists, max(8, lists // 16))}"),
        "ivfpq": (f"IVF{lists},{kind},RFlat", f"nprobe={min(lists, max(8, lists // 8))},k_factor_rf=10"),
        "hnsw": ("HNSW32", "efConstruction=100,efSearch=128"),
    }
    return ours.get(index, (index, ""))


def training_sample(count: int, description: str, generator: torch.Generator) -> Tensor:
    """Indices of the references to train on: 64 for each inverted list, at least 20,000, and no more than there are."""
    lists = re.search(r"IVF(\d+)", description)
    wanted = max(20_000, 64 * int(lists[1]) if lists else 0)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def _parts(index: Any) -> Iterator[Any]:
    """Yields a faiss index and those that it contains, each as its own class, the inner ones first."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):  # IndexRefineFlat too
        yield from (*_parts(index.base_index), *_parts(index.refine_index))
    elif isinstance(index, faiss.IndexPreTransform):
        yield from _parts(index.index)
    yield index


def _remove(index: Any, ids: np.ndarray, left: int) -> None:
    """Removes ascending ids from a part of an index, so that `left` references remain, numbered from 0."""
    import faiss

    if type(index).__name__ not in WRAPPERS:
        index.remove_ids(ids)
    index.ntotal = left  # wrappers are not told, and faiss 1.10 forgets it for 4-bit codes
    if isinstance(index, faiss.IndexPQFastScan):
        _clear_tail(index, index.codes.get(), left)
    if isinstance(index, faiss.IndexIVF):
        lists: Any = index.invlists
        for number in range(index.nlist):
            if size := lists.list_size(number):
                own = faiss.rev_swig_ptr(lists.get_ids(number), size)  # no copy
                own -= np.searchsorted(ids, own)  # faiss does not renumber inverted lists
                if isinstance(index, faiss.IndexIVFPQFastScan):
                    _clear_tail(index, lists.get_codes(number), size)


def _clear_tail(index: Any, codes: Any, size: int) -> None:
    """Zeros the rest of the block after the last of `size` codes, as faiss's next `add` expects."""
    import faiss

    packer = index.get_CodePacker()
    whole, rest = divmod(size, packer.nvec)
    if rest:
        blocks = faiss.rev_swig_ptr(codes, (whole + 1) * packer.block_size).reshape(whole + 1, -1)  # no copy
        for place in range(rest, packer.nvec):
            packer.pack_1(np.zeros(packer.code_size, dtype=np.uint8), place, blocks[whole:])


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return checksum(iter(lambda: file.read(READ_BYTES), b""))
