"""RetrievalTester: how well the nearest neighbours of each item are of its class."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import check_at_least_one, check_choice, check_finite, require
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.neighbours import Index, nearest_neighbours
from pml_fewshot.parts import build

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
RECALL = re.compile(r"recall_at_([1-9][0-9]*)")


class RetrievalResult(Mapping[str, float]):
    """Retrieval figures by name, each a mean over the queries and a fraction of 1.

    Args:
        per_query: name -> (N,) value of each judged query.
        num_queries: queries that were judged.
        num_left_out: queries without any other item of their class among the references, for which no neighbour
            could be right; they are left out of every mean.
        k: neighbours that were searched.
        protocol: "leave-one-out": each query searched the other queries; "gallery": a set of references.
        ranking: the index and the distance that the neighbours were found by.
    """

    def __init__(
        self,
        per_query: dict[str, Tensor],
        num_left_out: int,
        k: int,
        protocol: Literal["leave-one-out", "gallery"] = "leave-one-out",
        ranking: str = "",
    ) -> None:
        self.per_query = per_query
        self.num_queries = len(next(iter(per_query.values())))
        self.num_left_out = num_left_out
        self.k = k
        self.protocol = protocol
        self.ranking = ranking

    def __getitem__(self, metric: str) -> float:
        return self.per_query[metric].mean().item()

    def __iter__(self) -> Iterator[str]:
        return iter(self.per_query)

    def __len__(self) -> int:
        return len(self.per_query)

    def __repr__(self) -> str:
        return f"RetrievalResult({dict(self)}, {self.num_queries} queries, k={self.k})"

    def ci95(self, metric: str) -> float:
        """Half the 95 % interval of a figure over the queries: 1.96 standard errors of the mean."""
        values = self.per_query[metric]
        return 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")


class RetrievalTester:
    """Searches each query's nearest references and measures how many are of its class.

    Args:
        metrics: "precision_at_1": the nearest is of the query's class. "r_precision": share of its class among the R
            nearest, R being the number of references of its class. "mean_average_precision_at_r": the mean over the R
            nearest of the precision at each rank that holds its class, else 0 (Musgrave et al. 2020, section 3.2).
            "recall_at_<k>": any of the k nearest is of its class.
        k: neighbours to search; "max_bin_count" is the size of the largest class, which all metrics but a larger
            recall_at_<k> need and none goes beyond. PML's default (the whole gallery) has quadratic memory.
        index: "flat" is exact, "ivf" and "hnsw" are approximate.
        distance: PML distance (or factory) that ranks; Euclid when None.

    Raises:
        ValueError: an unknown metric, or a k below 1.
    """

    def __init__(
        self,
        metrics: Sequence[str] = METRICS,
        k: int | str = "max_bin_count",
        index: Index = "flat",
        distance: BaseDistance | None = None,
    ) -> None:
        metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        require(len(metrics) > 0, "at least one metric", "none", f"choose of {METRICS} and recall_at_<k>")
        for metric in metrics:
            if not RECALL.fullmatch(metric):
                check_choice("metric", metric, (*METRICS, "recall_at_1", "recall_at_<k>"))
        check_choice("index", index, ("flat", "ivf", "hnsw"))
        if k != "max_bin_count":
            require(isinstance(k, int), "k as an integer or 'max_bin_count'", repr(k), "give one of them")
            check_at_least_one("k", k)  # type: ignore[arg-type]
        self.metrics = metrics
        self.k = k
        self.index: Index = index
        self.distance = build(distance)

    def test(
        self,
        embedder: Embedder | EmbeddingBank,
        dataset: FewShotDataset | EmbeddingBank | None = None,
        reference: FewShotDataset | EmbeddingBank | None = None,
    ) -> RetrievalResult:
        """Judges an embedder on a data set, or a bank of embeddings on its own.

        Args:
            embedder: an Embedder, with `dataset`; or a bank of queries, `test(bank)` or `test(bank, reference)`.
            dataset: images to embed and to use as queries.
            reference: gallery to search, as images or as a bank; when None the queries search among themselves, each
                without itself (told by its index, so that duplicates of it count).

        Raises:
            ValueError: a k above the gallery's size or below what a metric needs, banks of different widths, NaN
                embeddings, or no query with a right answer among the references.
        """
        if isinstance(embedder, EmbeddingBank):
            require(dataset is None or reference is None, "a bank and at most one reference", "two", "leave one out")
            query, reference = embedder, dataset if reference is None else reference
        else:
            query = _as_bank(embedder, dataset)
        gallery = query if reference is None else _as_bank(embedder, reference)
        width, gallery_width = query.embeddings.shape[1], gallery.embeddings.shape[1]
        require(width == gallery_width, f"references of {width} dimensions", str(gallery_width), "use one embedder")
        check_finite(query.embeddings, "query embeddings")
        check_finite(gallery.embeddings, "reference embeddings")
        same = reference is None
        relevant = _relevant(query.labels.cpu(), gallery.labels.cpu(), same)  # R of each query
        judged = relevant > 0
        require(bool(judged.any()), "a query whose class is among the references", "none", "check the labels")
        k = self._neighbours(int(relevant.max()), len(gallery) - same)
        nearest = nearest_neighbours(query.embeddings, gallery.embeddings, k + same, self.distance, self.index)
        if same:
            nearest = _without_self(nearest)
        match = gallery.labels.cpu()[nearest] == query.labels.cpu().unsqueeze(1)
        match &= nearest >= 0  # -1: an approximate index found fewer
        match, relevant = match[judged], relevant[judged]
        per_query = {metric: _measure(metric, match, relevant) for metric in self.metrics}
        ranking = f"{self.index}, {_describe(self.distance)}"
        return RetrievalResult(per_query, int((~judged).sum()), k, "leave-one-out" if same else "gallery", ranking)

    def _neighbours(self, largest_class: int, gallery_size: int) -> int:
        recalls = [int(found[1]) for metric in self.metrics if (found := RECALL.fullmatch(metric))]
        needs_class = any(metric in METRICS[1:] for metric in self.metrics)
        needed = max([1, *recalls, largest_class if needs_class else 1])
        k = max(largest_class, needed) if self.k == "max_bin_count" else int(self.k)
        require(k >= needed, f"k of at least {needed} for {self.metrics}", str(k), "raise k or use 'max_bin_count'")
        require(
            k <= gallery_size, f"k of at most {gallery_size}, the gallery's size", str(k), "lower k or recall_at_<k>"
        )
        return k


def _describe(distance: BaseDistance | None) -> str:
    if distance is None:
        return "Euclid"
    normalized = ", normalized" if distance.normalize_embeddings else ""
    return f"{type(distance).__name__}(p={distance.p}, power={distance.power}{normalized})"


def _as_bank(embedder: Embedder | EmbeddingBank, source: object) -> EmbeddingBank:
    if isinstance(source, EmbeddingBank):
        return source
    if isinstance(embedder, Embedder) and isinstance(source, FewShotDataset):
        return embedder.encode(source)
    raise TypeError(
        f"expected an Embedder with a data set, or an EmbeddingBank alone, got {type(embedder).__name__} with "
        f"{type(source).__name__}; make a bank by EmbeddingBank(embeddings, labels)"
    )


def _relevant(query_labels: Tensor, gallery_labels: Tensor, same: bool) -> Tensor:
    """(N,) number of references of each query's class, itself not counted."""
    classes, counts = torch.unique(gallery_labels, return_counts=True)
    place = torch.searchsorted(classes, query_labels).clamp_(max=len(classes) - 1)
    return torch.where(classes[place] == query_labels, counts[place], 0) - int(same)


def _without_self(nearest: Tensor) -> Tensor:
    """Takes each row's own index out of (N, k + 1); its last entry where duplicates have crowded it out."""
    own = nearest == torch.arange(len(nearest)).unsqueeze(1)
    own[:, -1] |= ~own.any(dim=1)
    return nearest[~own].reshape(len(nearest), -1)


def _measure(metric: str, match: Tensor, relevant: Tensor) -> Tensor:
    """(N,) float64 value of one metric from match (N, k) bool and R (N,)."""
    if metric == "precision_at_1":
        return match[:, 0].double()
    if recall := RECALL.fullmatch(metric):
        return match[:, : int(recall[1])].any(dim=1).double()
    rank = torch.arange(1, match.shape[1] + 1)
    hit = (match & (rank <= relevant.unsqueeze(1))).double()  # only the first R ranks count
    if metric == "r_precision":
        return hit.sum(dim=1) / relevant
    return (hit * hit.cumsum(dim=1) / rank).sum(dim=1) / relevant
