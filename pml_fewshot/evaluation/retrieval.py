"""RetrievalTester: how well the nearest neighbours of each item are of its class."""

import re
from collections.abc import Sequence
from numbers import Integral

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import check_at_least_one, check_choice, check_finite, require
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.clustering import clustering_scores
from pml_fewshot.evaluation.exact_search import exact_search
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.index_recall import IndexRecall
from pml_fewshot.evaluation.ranking import Ranking
from pml_fewshot.evaluation.retrieval_metrics import (
    CLUSTERING,
    METRICS,
    WHOLE_RANKING,
    check_metric,
    count_relevant,
    measure,
    neighbours_needed,
)
from pml_fewshot.evaluation.retrieval_result import RetrievalResult
from pml_fewshot.parts import build

NEIGHBOURS = 2**24  # held at a time where the whole ranking of each query is wanted: 128 MiB of indices
SAMPLE = 1000  # queries that an approximate index is compared with exact search on


class RetrievalTester:
    """Searches each query's nearest references and measures how many are of its class.

    Args:
        metrics: "precision_at_1": the nearest is of the query's class. "r_precision": share of its class among the R
            nearest, R being the number of references of its class. "mean_average_precision_at_r": the mean over the R
            nearest of the precision at each rank that holds its class, else 0 (Musgrave et al. 2020, section 3.2).
            "recall_at_<k>": any of the k nearest is of its class. "mean_average_precision": the mean over all
            references of its class of the precision at their rank. "mean_reciprocal_rank": 1 / rank of the first of
            its class. "NMI", "AMI": agreement of k-means clusters of the queries, as many as classes, with the classes.
        k: neighbours to search; "max_bin_count" is as many as the metrics look at, at least the size of the largest
            class (PML's default, the whole gallery, has quadratic memory), the whole ranking for
            mean_average_precision and mean_reciprocal_rank, a block of queries at a time. With a number those two are
            cut off at it.
        index: "flat" is exact. "ivf", "ivfpq" and "hnsw" are approximate, pay from about a million references on, and
            report their recall against exact search; or any description of faiss's index factory, as in `Gallery`.
        distance: PML distance (or factory) that ranks; Euclid when None.
        parameters: of an approximate index, as in `Gallery`; chosen by the gallery's size where not given.

    Raises:
        ValueError: an unknown metric or index, or a k below 1.
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
        require(len(metrics) > 0, "at least one metric", "none", f"choose of {METRICS} and recall_at_<k>")
        for metric in metrics:
            check_metric(metric)
        if not re.search(r"\d", index):  # no description of faiss's
            check_choice("index", index, ("flat", "ivf", "ivfpq", "hnsw"))
        if k != "max_bin_count":
            require(isinstance(k, Integral), "k as an integer or 'max_bin_count'", repr(k), "give one of them")
            check_at_least_one("k", k)  # type: ignore[arg-type]
        self.metrics = metrics
        self.k = k
        self.index = index
        self.distance = build(distance)
        self.parameters = parameters

    def test(
        self,
        embedder: Embedder | EmbeddingBank,
        dataset: FewShotDataset | EmbeddingBank | Gallery | None = None,
        reference: FewShotDataset | EmbeddingBank | Gallery | None = None,
    ) -> RetrievalResult:
        """Judges an embedder on a data set, or a bank of embeddings on its own.

        Args:
            embedder: an Embedder, with `dataset`; or a bank of queries, `test(bank)` or `test(bank, reference)`.
            dataset: images to embed and to use as queries.
            reference: gallery to search: images, a bank, or a Gallery whose index is built; when None the queries
                search among themselves, each without itself (told by its index, so that duplicates of it count).
                A reference is searched whole: where it holds the queries too, each finds itself.

        Raises:
            ValueError: a k above the gallery's size or below what a metric needs, banks of different widths, NaN
                embeddings, or no query with a right answer among the references.
        """
        if isinstance(embedder, EmbeddingBank):
            require(dataset is None or reference is None, "a bank and at most one reference", "two", "leave one out")
            query, reference = embedder, dataset if reference is None else reference
        else:
            query = _as_bank(embedder, dataset)
        check_finite(query.embeddings, "query embeddings")
        if isinstance(reference, Gallery):
            return self._judge(query, reference.labels, None, reference, same=False)
        gallery = query if reference is None else _as_bank(embedder, reference)
        width, gallery_width = query.embeddings.shape[1], gallery.embeddings.shape[1]
        require(width == gallery_width, f"references of {width} dimensions", str(gallery_width), "use one embedder")
        if gallery is not query:
            check_finite(gallery.embeddings, "reference embeddings")
        index = None if self.index == "flat" else Gallery(gallery, self.index, self.parameters, self.distance)
        return self._judge(query, gallery.labels.cpu(), gallery.embeddings, index, same=reference is None)

    def _judge(
        self, query: EmbeddingBank, labels: Tensor, embeddings: Tensor | None, index: Gallery | None, same: bool
    ) -> RetrievalResult:
        """Judges by references with `labels`, of which the embeddings, an index, or both are at hand."""
        ranking = self._ranking(index)
        measured: dict[str, list[Tensor]] = {metric: [] for metric in self.metrics if metric not in CLUSTERING}
        require(len(labels) > 0, "at least one reference", "none", "give a gallery with items")
        relevant = count_relevant(query.labels.cpu(), labels, same)  # R of each query
        judged = relevant > 0
        found = bool(judged.any()) or not measured
        require(found, "a query whose class is among the references", "none", "check the labels")
        k = self._neighbours(int(relevant.max()), len(labels) - same)
        # all at once where that fits, for a set that is searched for its own neighbours needs each pair only once
        rows = len(query) if len(query) * k <= NEIGHBOURS else max(1, NEIGHBOURS // k)
        for own in torch.arange(len(query)).split(rows) if measured else ():
            block = query.embeddings if rows == len(query) else query.embeddings[own]
            if index is not None:
                nearest = index.search(block, k + same)
            else:
                assert embeddings is not None
                nearest = exact_search(block, embeddings, k + same, ranking).cpu()
            nearest = without_self(nearest, own) if same else nearest
            match = (labels[nearest] == query.labels[own].cpu().unsqueeze(1)) & (nearest >= 0)  # -1: fewer found
            for metric, values in measured.items():
                values.append(measure(metric, match[judged[own]], relevant[own][judged[own]]))
        recall = None
        if index is not None and embeddings is not None:
            recall = _recall(query.embeddings, embeddings, index, k, same)
        asked = tuple(metric for metric in self.metrics if metric in CLUSTERING)
        return RetrievalResult(
            {metric: torch.cat(values) for metric, values in measured.items()},
            query.labels.cpu()[judged],
            int((~judged).sum()),
            k,
            "leave-one-out" if same else "gallery",
            ", ".join(str(part) for part in (index or "exact", ranking, recall) if part),
            recall,
            clustering_scores(query, asked, ranking) if asked else None,
        )

    def _ranking(self, index: Gallery | None) -> Ranking:
        if index is None:
            return Ranking.of(self.distance)
        mine, theirs = Ranking.of(self.distance), index.ranking
        same = (mine.kind, mine.normalize) == (theirs.kind, theirs.normalize)
        require(
            self.distance is None or same, f"a gallery ranked by {mine}", str(theirs), "build it with that distance"
        )
        return index.ranking

    def _neighbours(self, largest_class: int, gallery_size: int) -> int:
        needs = {m: neighbours_needed(m, largest_class, gallery_size) for m in self.metrics if m not in CLUSTERING}
        if self.k == "max_bin_count":
            k = max([largest_class, *needs.values()])
        else:
            k = int(self.k)
            needed = max([1, *(need for metric, need in needs.items() if metric not in WHOLE_RANKING)])
            require(k >= needed, f"k of at least {needed} for {self.metrics}", str(k), "raise k or use 'max_bin_count'")
        require(
            k <= gallery_size, f"k of at most {gallery_size}, the gallery's size", str(k), "lower k or recall_at_<k>"
        )
        return k


def _recall(query: Tensor, embeddings: Tensor, index: Gallery, k: int, same: bool) -> IndexRecall:
    """Compares an index with exact search on a sample of the queries."""
    own = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))[:SAMPLE].sort().values
    sample = query[own]
    found, exact = index.search(sample, k + same), exact_search(sample, embeddings, k + same, index.ranking).cpu()
    return IndexRecall.of(*(without_self(nearest, own) if same else nearest for nearest in (found, exact)))


def without_self(nearest: Tensor, own: Tensor) -> Tensor:
    """Takes each row's own index (N,) out of (N, k + 1); the last entry where duplicates have crowded it out."""
    is_own = nearest == own.unsqueeze(1)
    is_own[:, -1] |= ~is_own.any(dim=1)
    return nearest[~is_own].reshape(len(nearest), -1)


def _as_bank(embedder: Embedder | EmbeddingBank, source: object) -> EmbeddingBank:
    if isinstance(source, EmbeddingBank):
        return source
    if isinstance(embedder, Embedder) and isinstance(source, FewShotDataset):
        return embedder.encode(source)
    raise TypeError(
        f"expected an Embedder with a data set, or an EmbeddingBank alone, got {type(embedder).__name__} with "
        f"{type(source).__name__}; make a bank by EmbeddingBank(embeddings, labels)"
    )
