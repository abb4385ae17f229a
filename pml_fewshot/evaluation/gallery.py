"""Gallery: references in a faiss index, for approximate search, and to be kept in a file."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.atomic import to_disk, writing
from pml_fewshot.checks import check_at_least_one, check_finite, check_labels, require
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.blas import warn_of_slow_blas
from pml_fewshot.evaluation.index_file import check_known, check_work, index_checksum, read_index, write_index
from pml_fewshot.evaluation.ranking import FAISS_METRICS, Ranking
from pml_fewshot.parts import build
from pml_fewshot.tensor_file import read_tensors, write_tensors

LEAST_FOR_CODES = 16 * 39  # references to train the 16 centres of a 4-bit code on
BLOCK = 2**16  # rows added at a time: 32 MiB at 128 dimensions


class Gallery:
    """References to be searched, with their labels, in a faiss index.

    Args:
        bank: the references; its embeddings may be a memory-mapped file, of which a block at a time is read. "ivf",
            "ivfpq" and "hnsw" hold all floats in memory; "IVF4096,SQ8" holds a quarter, "IVF4096,PQ32" 32 bytes each.
        index: "ivf": inverted lists, "ivfpq": inverted lists of 4-bit product codes, the best of which are compared
            again by the floats: several times faster than "ivf", "hnsw": a graph, fast to search and slow to build. Or
            any description of faiss's index factory ("IVF4096,SQ8", "OPQ32,IVF1024,PQ32").
        parameters: of the index, in faiss's own form: "nprobe=64", "efConstruction=100,efSearch=64",
            "nprobe=256,k_factor_rf=20". What is not given is chosen by the gallery's size, by `recipe`.
        distance: PML distance (or factory) that ranks: Euclid (when None), cosine or dot product, all that faiss knows.
        seed: of the sample that the index is trained on.

    Raises:
        ValueError: a description or parameter that faiss does not know, or a distance that it cannot rank by.
    """

    def __init__(
        self,
        bank: EmbeddingBank,
        index: str = "ivfpq",
        parameters: str = "",
        distance: BaseDistance | None = None,
        seed: int = 0,
    ) -> None:
        ranking = Ranking.of(build(distance))
        require(
            ranking.kind != "distance",
            f"Euclid, cosine or dot product for index {index!r}",
            str(distance),
            "use index='flat', which takes any PML distance",
        )
        require(len(bank) > 0, "at least one reference", "none", "give a bank with items")
        warn_of_slow_blas()
        count, dims = bank.embeddings.shape
        self.ranking = ranking
        self.description, chosen = recipe(index, count, dims)
        given = dict(text.partition("=")[::2] for text in f"{chosen},{parameters}".split(",") if text)
        self.parameters = ",".join(f"{name}={value}" for name, value in given.items())  # the caller's before our own
        self.labels = bank.labels.new_empty(0).cpu()
        sample = training_sample(count, self.description, torch.Generator().manual_seed(seed))
        try:
            self.faiss_index = faiss.index_factory(dims, self.description, FAISS_METRICS[ranking.kind])
            _set_parameters(self.faiss_index, self.parameters)
            if not self.faiss_index.is_trained:
                self.faiss_index.train(self._rows(bank.embeddings, sample))
        except RuntimeError as error:
            reason = re.split(r"\.cpp:\d+: ", str(error).splitlines()[0])[-1]  # without faiss's place in its source
            raise ValueError(
                f"expected an index and parameters that faiss can build, got {index!r} with {parameters!r} for {count} "
                f"references of {dims} dimensions ({reason}); choose 'ivf', 'ivfpq' or 'hnsw', or see faiss's wiki on "
                "the index factory"
            ) from error
        self.add(bank)

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return " ".join(text for text in (self.description, self.parameters) if text)

    def add(self, bank: EmbeddingBank) -> None:
        """Adds references, a block at a time; their indices follow on those that are there."""
        self._check_width(bank.embeddings, "references")
        for start in range(0, len(bank), BLOCK):
            self.faiss_index.add(self._rows(bank.embeddings, slice(start, start + BLOCK)))
        self.labels = torch.cat([self.labels, bank.labels.cpu()])

    def search(self, query: Tensor, k: int) -> Tensor:
        """Finds the k nearest references of queries (N, D), nearest first.

        Returns:
            (N, k) int64 indices in the order of adding (`gallery.labels[index]` are their labels); -1, which is no
            index, where the lists that were looked into hold fewer.
        """
        check_at_least_one("k", k)
        self._check_width(query, "queries")
        check_finite(query, "queries")
        require(k <= len(self), f"k of at most {len(self)}, the gallery's size", str(k), "lower k")
        return torch.from_numpy(self.faiss_index.search(self._rows(query, slice(None)), k)[1])

    def save(self, folder: str | Path) -> None:
        """Writes the gallery to a new folder: index.faiss and labels.safetensors; all of it or nothing.

        Raises:
            FileExistsError: the folder exists.
            ValueError: an index of parts that `load` does not read, or with parameters that it refuses.
            CannotWriteError: the disk is full or the folder read-only.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"expected a new folder for the gallery, got {folder}, which exists; name another")
        check_known(self.faiss_index)
        check_work(self.parameters, len(self))
        unfinished = folder.with_name(f".unfinished-{folder.name}-{os.getpid()}")
        try:
            with writing(folder):
                shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process that had the same number
                unfinished.mkdir(parents=True)
                write_index(self.faiss_index, unfinished / "index.faiss")
                about = {
                    "index": index_checksum(unfinished / "index.faiss"),
                    "dims": self.faiss_index.d,
                    "description": self.description,
                    "parameters": self.parameters,
                    "kind": self.ranking.kind,
                    "normalize": self.ranking.normalize,
                }
                texts = {"gallery": json.dumps(about)}
                write_tensors(unfinished / "labels.safetensors", {"labels": self.labels}, texts)
                unfinished.rename(folder)
                to_disk(folder.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # the first error is the one to be told
            raise

    @classmethod
    def load(cls, folder: str | Path) -> "Gallery":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no gallery there.
            ValueError: the files are broken, index and labels do not belong together, or a search would read beyond.
        """
        folder = Path(folder)
        for name in ("index.faiss", "labels.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"expected {name} in {folder}, got none; make one by Gallery(bank).save(folder)"
                )
        gallery = cls.__new__(cls)
        try:
            tensors, texts = read_tensors(folder / "labels.safetensors")
            about = json.loads(texts["gallery"])
            gallery.labels = tensors["labels"]
            check_labels(gallery.labels, len(gallery.labels), "the gallery's")
            written, found = about.get("index"), index_checksum(folder / "index.faiss")
            if written is not None:  # None: of a version that recorded neither this nor dims
                require(written == found, f"an index with checksum {written}", found, "build the gallery anew")
            gallery.description, gallery.parameters = str(about["description"]), str(about["parameters"])
            check_work(gallery.parameters, len(gallery.labels))
            gallery.ranking = Ranking(about["kind"], about["normalize"] is True)
            gallery.faiss_index = read_index(folder / "index.faiss", about.get("dims"), len(gallery.labels))
            metric = gallery.faiss_index.metric_type
            require(metric == FAISS_METRICS[about["kind"]], f"an index for {about['kind']}", metric, "build it anew")
            _set_parameters(gallery.faiss_index, gallery.parameters)
        except (RuntimeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"expected a gallery in {folder}, got files that are broken or of something else "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); build it anew"
            ) from error
        return gallery

    def _check_width(self, embeddings: Tensor, what: str) -> None:
        width = self.faiss_index.d
        require(
            embeddings.ndim == 2 and embeddings.shape[1] == width,
            f"{what} of shape (N, {width})",
            f"{tuple(embeddings.shape)}",
            "use one embedder for both",
        )

    def _rows(self, embeddings: Tensor, chosen: slice | Tensor) -> np.ndarray:
        return self.ranking.prepare(embeddings[chosen]).cpu().contiguous().numpy()


def _set_parameters(index: faiss.Index, parameters: str) -> None:
    space: Any = faiss.ParameterSpace()  # its stubs know only the form with a number
    space.set_index_parameters(index, parameters)


def recipe(index: str, count: int, dims: int) -> tuple[str, str]:
    """faiss's description and parameters of an index for `count` references of `dims` dimensions.

    About 4 sqrt(count) lists, as faiss's guidelines have it, each with at least the 39 training points that faiss
    wants. A sixteenth of the lists is looked into by "ivf", an eighth by "ivfpq", which scans them several times
    faster. Product codes have 4 bits for every two dimensions, and ten times k of the best are compared again by their
    floats; where there are too few references to train them on, codes of 8 bits a dimension stand in their place.
    """
    lists = max(1, min(int(4 * count**0.5), count // 39))
    if index == "ivf":
        return f"IVF{lists},Flat", f"nprobe={min(lists, max(8, lists // 16))}"
    if index == "hnsw":
        return "HNSW32", "efConstruction=100,efSearch=128"
    if index == "ivfpq":
        if count < LEAST_FOR_CODES:
            return f"IVF{lists},SQ8,RFlat", f"nprobe={min(lists, max(8, lists // 8))},k_factor_rf=10"
        codes = max(m for m in range(1, dims // 2 + 1) if dims % m == 0) if dims > 1 else 1
        return f"IVF{lists},PQ{codes}x4fsr,RFlat", f"nprobe={min(lists, max(8, lists // 8))},k_factor_rf=10"
    return index, ""


def training_sample(count: int, description: str, generator: torch.Generator) -> Tensor:
    """Indices of the references to train on: 64 for each inverted list, at least 20,000, and no more than there are."""
    lists = re.search(r"IVF(\d+)", description)
    wanted = max(20_000, 64 * int(lists[1]) if lists else 0)
    return torch.randperm(count, generator=generator)[:wanted].sort().values
