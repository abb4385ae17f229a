"""Gallery: references in a faiss index, for approximate search, and to be kept in a folder."""

import json
import operator
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import (
    ExistingFileError,
    MissingFileError,
    UsageError,
    check_at_least_one,
    check_choice,
    check_finite,
)
from pml_fewshot.embedders.bank import ClassName, EmbeddingBank, align, names_of
from pml_fewshot.evaluation.search import Ranking
from pml_fewshot.io.atomic import fsync, translate_write_errors
from pml_fewshot.io.tensors import checksum, read_tensors, write_tensors

EXACT = ("flat", "Flat")
INDEXES = ("flat", "ivf", "ivfpq", "hnsw")
MIN_FOR_CODES = 16 * 39  # references to train the 16 centers of a 4-bit code on
ADD_ROWS = 2**16  # at a time: 32 MiB at 128 dimensions
READ_BYTES = 2**24  # at a time


@dataclass(frozen=True)
class Neighbors:
    """The k references nearest to each of N queries, nearest first.

    Args:
        indices: (N, k) their places in the gallery; -1, which is none, where the lists that were searched hold fewer.
        labels: (N, k) their labels, 0 where there is none.
        class_names: that the labels are indices into, where the gallery has names.
    """

    indices: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    @property
    def names(self) -> list[list[ClassName | None]]:
        """Their classes' names, or labels where there are no names; None where there is no reference."""
        names = iter(names_of(self.labels.flatten(), self.class_names))
        return [
            [name if i >= 0 else None for i, name in zip(row, names, strict=False)] for row in self.indices.tolist()
        ]


class Gallery:
    """References to be searched, with their labels and class names, in a faiss index.

    Args:
        bank: the references, read a block at a time (a memory map may be larger than memory). "flat", "ivf", "ivfpq"
            and "hnsw" hold all floats in memory; "IVF4096,SQ8" a quarter, "IVF4096,PQ32" 32 bytes each.
        index: "flat": exact. "ivf": inverted lists. "ivfpq": inverted lists of 4-bit product codes, the best of which
            are compared again by their floats; several times faster than "ivf". "hnsw": a graph, fast to search and
            slow to build. Or any description of faiss's index factory ("IVF4096,SQ8", "OPQ32,IVF1024,PQ32").
        parameters: in faiss's own form: "nprobe=64", "efConstruction=100,efSearch=64", "nprobe=256,k_factor_rf=20".
            `recipe` chooses what is not given by the gallery's size.
        distance: PML distance that ranks: Euclid (when None), cosine or dot product, which is all that faiss knows.
        seed: of the sample that the index is trained on.

    Raises:
        UsageError: a description or parameter that faiss does not know, or a distance that it cannot rank by.
    """

    def __init__(
        self,
        bank: EmbeddingBank,
        index: str = "ivfpq",
        parameters: str = "",
        distance: BaseDistance | None = None,
        seed: int = 0,
    ) -> None:
        self._train(bank, index, parameters, distance, seed)
        self.add(bank)

    @classmethod
    def check(cls, bank: EmbeddingBank, index: str, parameters: str = "", distance: BaseDistance | None = None) -> None:
        """Raises what making a gallery would, without filling it: a graph of 60,000 references takes a minute."""
        cls.__new__(cls)._train(bank, index, parameters, distance, seed=0)

    def _train(
        self, bank: EmbeddingBank, index: str, parameters: str, distance: BaseDistance | None, seed: int
    ) -> None:
        """Makes the index, without references yet."""
        import faiss

        check_index(index)
        self.ranking = Ranking.of(distance)
        if self.ranking.kind == "distance":
            raise UsageError(
                f"expected Euclid, cosine or dot product for index {index!r}, got {distance}; RetrievalTester searches "
                "by any PML distance with index='flat'"
            )
        if len(bank) == 0:
            raise UsageError("expected at least one reference, got none; give a bank with items")
        count, dims = bank.embeddings.shape
        self.description, chosen = recipe(index, count, dims)
        settings = dict(text.partition("=")[::2] for text in f"{chosen},{parameters}".split(",") if text)
        self.parameters = ",".join(f"{name}={value}" for name, value in settings.items())  # the caller's override ours
        self.labels, self.class_names = bank.labels.new_empty(0).cpu(), bank.class_names
        sample = training_sample(count, self.description, torch.Generator().manual_seed(operator.index(seed)))
        metric = faiss.METRIC_L2 if self.ranking.kind == "euclidean" else faiss.METRIC_INNER_PRODUCT
        try:
            self.faiss_index = faiss.index_factory(dims, self.description, metric)
            space: Any = faiss.ParameterSpace()  # its stubs know only the form with a number
            space.set_index_parameters(self.faiss_index, self.parameters)
            if not self.faiss_index.is_trained:
                self.faiss_index.train(self._rows(bank.embeddings[sample]))
        except RuntimeError as error:
            reason = re.split(r"\.cpp:\d+: ", str(error).splitlines()[0])[-1]  # without the place in faiss's source
            raise UsageError(
                f"expected an index and parameters that faiss can build, got {index!r} with {parameters!r} for {count} "
                f"references of {dims} dimensions ({reason}); use one of {', '.join(INDEXES)}, or see faiss's wiki"
            ) from error

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return f"{self.description} {self.parameters}".strip()

    def add(self, bank: EmbeddingBank) -> None:
        """Adds references, a block at a time; their indices continue those already there, new class names the names.

        A bank with class names cannot join a gallery without, nor the other way round.
        """
        self._check_width(bank.embeddings, "references")
        labels, names = align(bank, self)
        for block in bank.embeddings.split(ADD_ROWS):
            self.faiss_index.add(self._rows(block))
        self.labels, self.class_names = torch.cat([self.labels, labels.cpu()]), names

    def search(self, query: Tensor, k: int) -> Neighbors:
        """The k references nearest to each of the queries (N, D): their indices, labels and class names."""
        check_at_least_one("k", k)
        self._check_width(query, "queries")
        check_finite(query, "queries")
        if k > len(self):
            raise UsageError(f"expected k of at most {len(self)}, the gallery's size, got {k}; lower k")
        indices = torch.from_numpy(self.faiss_index.search(self._rows(query), k)[1])
        labels = self.labels[indices.clamp(min=0)].masked_fill_(indices < 0, 0)
        return Neighbors(indices, labels, self.class_names)

    def save(self, folder: str | Path) -> None:
        """Writes index.faiss and labels.safetensors to a new folder: both or nothing.

        Raises:
            ExistingFileError: the folder exists.
            CannotWriteError: the disk is full or the folder read-only.
        """
        import faiss

        folder = Path(folder)
        if folder.exists():
            raise ExistingFileError(f"expected a new folder for the gallery, got {folder}, which exists; name another")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        index = temporary / "index.faiss"
        try:
            with translate_write_errors(folder):
                shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same number
                temporary.mkdir(parents=True)
                # through Python's file: faiss's own only prints that its last bytes could not be written
                with index.open("wb") as file:
                    faiss.write_index(self.faiss_index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
                fsync(index)
                about = {
                    "index": _file_checksum(index),
                    "description": self.description,
                    "parameters": self.parameters,
                    "normalize": self.ranking.normalize,
                    "class_names": self.class_names,
                }
                texts = {"gallery": json.dumps(about)}
                write_tensors(temporary / "labels.safetensors", {"labels": self.labels}, texts)
                temporary.rename(folder)
                fsync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # the first error is the one to show
            raise

    @classmethod
    def load(cls, folder: str | Path) -> "Gallery":
        """Reads what `save` wrote.

        Raises:
            MissingFileError: no gallery there.
            UsageError: the files are damaged, or index and labels do not belong together.
        """
        import faiss

        index, labels = (Path(folder) / name for name in ("index.faiss", "labels.safetensors"))
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
        euclidean = gallery.faiss_index.metric_type == faiss.METRIC_L2
        gallery.ranking = Ranking("euclidean" if euclidean else "inner product", about["normalize"])
        gallery.description, gallery.parameters = about["description"], about["parameters"]
        gallery.class_names = tuple(about["class_names"])
        return gallery

    def _check_width(self, embeddings: Tensor, what: str) -> None:
        width, shape = self.faiss_index.d, tuple(embeddings.shape)
        if len(shape) != 2 or shape[1] != width:
            raise UsageError(f"expected {what} of shape (N, {width}), got {shape}; use one embedder for both")

    def _rows(self, embeddings: Tensor) -> np.ndarray:
        return self.ranking.prepare(embeddings).cpu().contiguous().numpy()


@dataclass(frozen=True)
class IndexRecall:
    """How often an approximate index's nearest neighbor is the true one, and its share of the true k nearest.

    Over `sample` queries. Compared by index: another copy of a true neighbor does not count.
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
        at_k = (ordered.gather(1, position) == exact).double().mean().item()
        return IndexRecall((found[:, 0] == exact[:, 0]).double().mean().item(), at_k, exact.shape[1], len(exact))

    def __str__(self) -> str:
        return f"recall@1 {self.at_1:.3f}, @{self.k} {self.at_k:.3f} of exact search on {self.sample:,} queries"


def check_index(index: str) -> None:
    """Raises a UsageError unless the index is one of ours or a description of faiss's, which starts with a capital."""
    if not index[:1].isupper():
        check_choice("index", index, INDEXES)


def recipe(index: str, count: int, dims: int) -> tuple[str, str]:
    """faiss's description and parameters of an index for `count` references of `dims` dimensions.

    About 4 sqrt(count) lists, following faiss's guidelines, each with at least the 39 training points that faiss wants.
    "ivf" searches a sixteenth of them, "ivfpq", several times faster, an eighth. Its codes have 4 bits for every two
    dimensions (8 for each where there are too few references to train on); ten times k are compared again by floats.
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


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return checksum(iter(lambda: file.read(READ_BYTES), b""))
