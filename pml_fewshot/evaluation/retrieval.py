"""RetrievalTester: how well the nearest neighbors of each item are of its class."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import UsageError, UsageTypeError, check_at_least_one, check_choice, check_finite
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.gallery import Gallery, IndexRecall, check_index
from pml_fewshot.evaluation.retrieval_metrics import (
    CLUSTERING,
    METRICS,
    WHOLE_RANKING,
    check_metric,
    clustering_scores,
    count_relevant,
    measure,
    neighbors_needed,
)
from pml_fewshot.evaluation.search import Ranking, exact_search

References = EmbeddingBank | Gallery

MAX_NEIGHBORS = 2**24  # held at a time where the whole ranking of each query is wanted: 128 MiB of indices
RECALL_SAMPLE = 1000  # queries that an approximate index is compared with exact search on


@dataclass(frozen=True, eq=False, repr=False)
class RetrievalResult(Mapping[str, float]):
    """Retrieval figures by name, each a mean over the queries (NMI and AMI: of all) and a fraction of 1.

    Args:
        per_query: name -> (N,) value of each query that counts.
        labels: (N,) class of each of them.
        num_excluded: queries without any other item of their class among the references, for which no neighbor could be
            right; they are left out of every mean.
        k: neighbors that were searched.
        protocol: "leave-one-out": each query searched the other queries; "gallery": a set of references.
        ranking: the index and the distance that the neighbors were found by, and its recall where it is approximate.
        index_recall: of an approximate index against exact search; None where the search was exact, or where a Gallery
            was searched, which holds no embeddings to compare with.
        clustering: NMI and AMI where asked for.
    """

    per_query: dict[str, Tensor]
    labels: Tensor
    num_excluded: int
    k: int
    protocol: Literal["leave-one-out", "gallery"] = "leave-one-out"
    ranking: str = ""
    index_recall: IndexRecall | None = None
    clustering: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_queries(self) -> int:
        return len(self.labels)

    def __getitem__(self, metric: str) -> float:
        return self.clustering[metric] if metric in self.clustering else self.per_query[metric].mean().item()

    def __iter__(self) -> Iterator[str]:
        yield from self.per_query
        yield from self.clustering

    def __len__(self) -> int:
        return len(self.per_query) + len(self.clustering)

    def __repr__(self) -> str:
        return f"RetrievalResult({dict(self)}, {self.num_queries} queries, k={self.k})"

    def ci95(self, metric: str) -> float:
        """Half the 95 % interval of a figure over the queries, 1.96 standard errors of the mean; NaN for NMI, AMI."""
        if metric in self.clustering:
            return float("nan")
        values = self.per_query[metric]
        return 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")

    def per_class(self, metric: str) -> tuple[Tensor, Tensor]:
        """Labels (C,) of the queries' classes, ascending, and the mean (C,) of a figure over each one's queries."""
        classes, position, counts = torch.unique(self.labels, return_inverse=True, return_counts=True)
        values = self.per_query[metric]
        return classes, torch.zeros(len(classes), dtype=values.dtype).index_add_(0, position, values) / counts


class RetrievalTester:
    """Searches each query's nearest references and measures how many are of its class.

    Args:
        metrics: "precision_at_1": the nearest is of the query's class. "r_precision": share of its class among the R
            nearest, R being the number of references of its class. "mean_average_precision_at_r": the mean over the R
            nearest of the precision at each rank that holds its class, else 0 (Musgrave et al. 2020, section 3.2).
            "recall_at_<k>": any of the k nearest is of its class. "mean_average_precision": the mean over all
            references of its class of the precision at their rank. "mean_reciprocal_rank": 1 / rank of the first of
            its class. "NMI", "AMI": agreement of k-means clusters of the queries, as many as classes, with the classes.
        k: neighbors to search; "max_bin_count" is as many as the metrics need, at least the size of the largest class
            (PML's default, all references, has quadratic memory), the whole ranking for mean_average_precision and
            mean_reciprocal_rank, a block of queries at a time. A number cuts these two off there.
        index: "flat" is exact. "ivf", "ivfpq" and "hnsw" are approximate, pay from about a million references on, and
            report their recall against exact search; or any description of faiss's index factory, as in `Gallery`.
        distance: PML distance that ranks; Euclid when None.
        parameters: of an approximate index, as in `Gallery`, where the size of the bank decides what is not given.

    Raises:
        UsageError: an unknown metric or index, or a k below 1.
    """

    def __init__(
        self,
        metrics: Sequence[str] = METRICS,
        k: int | str = "max_bin_count",
        index: str = "flat",
        distance: BaseDistance | None = None,
        parameters: str = "",
    ) -> None:
        metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        if not metrics:
            raise UsageError(f"expected at least one metric, got none; choose of {METRICS} and recall_at_<k>")
        for metric in metrics:
            check_metric(metric)
        check_index(index)
        if isinstance(k, str):
            check_choice("k", k, ("max_bin_count",))
        else:
            check_at_least_one("k", k)
        self.metrics = metrics
        self.k = k
        self.index = index
        self.distance = distance
        self.parameters = parameters

    def test(
        self,
        embedder: Embedder | EmbeddingBank,
        dataset: FewShotDataset | EmbeddingBank | Gallery | None = None,
        reference: FewShotDataset | EmbeddingBank | Gallery | None = None,
    ) -> RetrievalResult:
        """Evaluates an embedder on a data set, or a bank of embeddings.

        Args:
            embedder: an Embedder, with `dataset`; or a bank of queries, `test(bank)` or `test(bank, reference)`.
            dataset: images to embed and to use as queries.
            reference: what to search: images, a bank, or a Gallery whose index is built; when None the queries search
                among themselves, each without itself (known by its index, so that duplicates of it count). A reference
                is searched whole: where it holds the queries too, each finds itself.

        Raises:
            UsageError: a k above the number of references or below what a metric needs, banks of different widths,
                NaN embeddings, or no query with a right answer among the references.
        """
        if not isinstance(embedder, EmbeddingBank):
            query = _as_bank(embedder, dataset)
        elif dataset is None or reference is None:
            query, reference = embedder, dataset if reference is None else reference
        else:
            raise UsageError("expected a bank and at most one reference, got two; leave one out")
        check_finite(query.embeddings, "query embeddings")
        if isinstance(reference, Gallery):
            return self._measure(query, reference, None, leave_one_out=False)
        bank = query if reference is None else _as_bank(embedder, reference)
        if bank is not query:
            width, other = query.embeddings.shape[1], bank.embeddings.shape[1]
            if width != other:
                raise UsageError(f"expected references of {width} dimensions, got {other}; use one embedder for both")
            check_finite(bank.embeddings, "reference embeddings")
        exact = self.index in ("flat", "Flat")
        searched = bank if exact else Gallery(bank, self.index, self.parameters, self.distance)
        return self._measure(query, searched, None if exact else bank, leave_one_out=reference is None)

    def _measure(
        self, query: EmbeddingBank, references: References, indexed: EmbeddingBank | None, leave_one_out: bool
    ) -> RetrievalResult:
        """Searches the references; where they are a Gallery of a bank `indexed`, also measures its recall."""
        if len(references) == 0:
            raise UsageError("expected at least one reference, got none; give a bank with items")
        ranking = self._ranking(references)
        labels, query_labels = references.labels.cpu(), query.labels.cpu()
        relevant = count_relevant(query_labels, labels, leave_one_out)  # R of each query
        counts = relevant > 0
        figures: dict[str, list[Tensor]] = {metric: [] for metric in self.metrics if metric not in CLUSTERING}
        if figures and not counts.any():
            raise UsageError("expected a query whose class is among the references, got none; check the labels")
        k = self._choose_k(int(relevant.max()), len(labels) - leave_one_out)
        # all at once where that fits, for queries among themselves need each pair only once
        for own in torch.arange(len(query)).split(max(1, MAX_NEIGHBORS // k)) if figures else ():
            nearest = _search(query, own, references, k, ranking, leave_one_out)
            match = (labels[nearest] == query_labels[own].unsqueeze(1)) & (nearest >= 0)  # -1: fewer were found
            kept = counts[own]
            for metric, values in figures.items():
                values.append(measure(metric, match[kept], relevant[own][kept]))
        recall = None
        if indexed is not None:
            own = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))[:RECALL_SAMPLE].sort().values
            found, exact = (_search(query, own, r, k, ranking, leave_one_out) for r in (references, indexed))
            recall = IndexRecall.of(found, exact)
        index = references if isinstance(references, Gallery) else "exact"
        clustering = tuple(metric for metric in self.metrics if metric in CLUSTERING)
        return RetrievalResult(
            {metric: torch.cat(values) for metric, values in figures.items()},
            query_labels[counts],
            int((~counts).sum()),
            k,
            "leave-one-out" if leave_one_out else "gallery",
            ", ".join(str(part) for part in (index, ranking, recall) if part is not None),
            recall,
            clustering_scores(query, clustering, ranking) if clustering else {},
        )

    def _ranking(self, references: References) -> Ranking:
        ranking = Ranking.of(self.distance)
        if not isinstance(references, Gallery):
            return ranking
        other = references.ranking
        if self.distance is not None and (ranking.kind, ranking.normalize) != (other.kind, other.normalize):
            raise UsageError(f"expected a gallery ranked by {ranking}, got {other}; build it with that distance")
        return other

    def _choose_k(self, largest_class: int, num_references: int) -> int:
        needs = {m: neighbors_needed(m, largest_class, num_references) for m in self.metrics if m not in CLUSTERING}
        if self.k == "max_bin_count":
            k = max([largest_class, *needs.values()])
        else:
            k = int(self.k)
            needed = max([1, *(need for metric, need in needs.items() if metric not in WHOLE_RANKING)])
            if k < needed:
                raise UsageError(
                    f"expected k of at least {needed} for {self.metrics}, got {k}; raise k or use 'max_bin_count'"
                )
        if k > num_references:
            raise UsageError(
                f"expected k of at most {num_references}, the gallery's size, got {k}; lower k or recall_at_<k>"
            )
        return k


def _search(
    query: EmbeddingBank, own: Tensor, references: References, k: int, ranking: Ranking, leave_one_out: bool
) -> Tensor:
    """(n, k) nearest references of the queries `own` (n,), ascending; with leave_one_out less each query itself."""
    every = len(own) == len(query)
    rows = query.embeddings if every else query.embeddings[own]
    if isinstance(references, Gallery):
        nearest = references.search(rows, k + leave_one_out)
    else:
        among = None if every and leave_one_out else references.embeddings
        nearest = exact_search(rows, among, k + leave_one_out, ranking).cpu()
    return drop_self_match(nearest, own) if leave_one_out else nearest


def drop_self_match(nearest: Tensor, own: Tensor) -> Tensor:
    """Drops each row's own index (N,) from (N, k + 1); the last entry where duplicates have crowded it out."""
    is_own = nearest == own.unsqueeze(1)
    is_own[:, -1] |= ~is_own.any(dim=1)
    return nearest[~is_own].reshape(len(nearest), -1)


def _as_bank(embedder: Embedder | EmbeddingBank, source: object) -> EmbeddingBank:
    if isinstance(source, EmbeddingBank):
        return source
    if isinstance(embedder, Embedder) and isinstance(source, FewShotDataset):
        return embedder.encode(source)
    raise UsageTypeError(
        f"expected an Embedder with a data set, or an EmbeddingBank alone, got {type(embedder).__name__} with "
        f"{type(source).__name__}; make a bank by EmbeddingBank(embeddings, labels)"
    )
