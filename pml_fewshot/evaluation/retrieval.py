"""RetrievalTester: how well the nearest neighbors of each item are of its class."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError, check_at_least_one, check_choice, check_finite
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.embedders.bank import ClassName, EmbeddingBank, align, names_of
from pml_fewshot.embedders.embedder import encode, is_embedder
from pml_fewshot.evaluation import retrieval_metrics as known
from pml_fewshot.evaluation.gallery import EXACT, Gallery, IndexRecall, check_index
from pml_fewshot.evaluation.search import Ranking, exact_search

References = EmbeddingBank | Gallery
Source = FewShotDataset | EmbeddingBank | Gallery

MAX_NEIGHBORS = 2**24  # held at a time where the whole ranking of each query is wanted: 128 MiB of indices
RECALL_SAMPLE = 1000  # queries that an approximate index is compared with exact search on


@dataclass(frozen=True, eq=False, repr=False)
class RetrievalResult(Mapping[str, float]):
    """Retrieval figures by name, each a mean over the queries (NMI and AMI: of all) and a fraction of 1.

    `per_query` has the values (N,) of the queries that count and `labels` (N,) their classes, of `class_names` where
    the queries have names; `num_excluded` have no
    (other) item of their class among the references. "leave-one-out": each query searched the others; "gallery": a set
    of references, to `k` neighbors. `ranking` names index, distance and recall; `index_recall` compares an approximate
    index with exact search, but not a Gallery, which holds no embeddings. `clustering` has NMI and AMI. Results with
    equal `queries_hash` are of the same queries.
    """

    per_query: dict[str, Tensor]
    labels: Tensor
    num_excluded: int
    k: int
    protocol: Literal["leave-one-out", "gallery"] = "leave-one-out"
    ranking: str = ""
    index_recall: IndexRecall | None = None
    clustering: Mapping[str, float] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    queries_hash: str = ""

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
        if metric in self.clustering or self.num_queries < 2:
            return float("nan")
        values = self.per_query[metric]
        return 1.96 * values.std().item() / len(values) ** 0.5

    def per_class(self, metric: str) -> dict[ClassName, float]:
        """The mean of a figure over each class's queries, by class name (by label where there are no names)."""
        classes, position, counts = torch.unique(self.labels, return_inverse=True, return_counts=True)
        values = self.per_query[metric]
        means = torch.zeros(len(classes), dtype=values.dtype).index_add_(0, position, values) / counts
        return dict(zip(names_of(classes, self.class_names), means.tolist(), strict=True))


@dataclass(eq=False)
class RetrievalTester:
    """Searches each query's nearest references and measures how many are of its class.

    Args:
        metrics: "precision_at_1": the nearest is of the query's class. "r_precision": share of its class among the R
            nearest, R being the number of references of its class. "mean_average_precision_at_r": the mean over the R
            nearest of the precision at each rank that holds its class, else 0 (Musgrave et al. 2020, section 3.2).
            "recall_at_<k>": any of the k nearest is of its class. "mean_average_precision": the mean over all
            references of its class of the precision at their rank. "mean_reciprocal_rank": 1 / rank of the first of
            its class. "NMI", "AMI": agreement of k-means clusters of the queries, as many as classes, with the classes.
        k: neighbors to search; "max_bin_count" is the size of the largest class, or more where a metric needs it (PML's
            default, all references, has quadratic memory); mean_average_precision and mean_reciprocal_rank need the
            whole ranking, made for a block of queries at a time, which a number cuts off there.
        index: "flat" is exact. Others, as in `Gallery`, are approximate, pay from about a million references on, and
            report their recall against exact search.
        distance: PML distance that ranks; Euclid when None.
        parameters: of an approximate index, as in `Gallery`.
        num_queries: measure a random sample of so many queries, drawn by a seed of 0; all when None. Each searches the
            whole set as ever.

    Raises:
        UsageError: an unknown metric or index, or a k or num_queries below 1.
    """

    metrics: Sequence[str] = known.METRICS
    k: int | str = "max_bin_count"
    index: str = "flat"
    distance: BaseDistance | None = None
    parameters: str = ""
    num_queries: int | None = None

    def __post_init__(self) -> None:
        self.metrics = (self.metrics,) if isinstance(self.metrics, str) else tuple(self.metrics)
        if not self.metrics:
            raise UsageError(f"expected at least one metric, got none; choose of {known.METRICS} and recall_at_<k>")
        for metric in self.metrics:
            if not known.RECALL.fullmatch(metric):
                check_choice("metric", metric, known.NAMES)
        check_index(self.index)
        check_at_least_one("num_queries", 1 if self.num_queries is None else self.num_queries)
        if isinstance(self.k, str):
            check_choice("k", self.k, ("max_bin_count",))
        else:
            check_at_least_one("k", self.k)

    def test(
        self, embedder: nn.Module | EmbeddingBank, dataset: Source | None = None, reference: Source | None = None
    ) -> RetrievalResult:
        """Evaluates an embedder on a data set, or a bank; the classes of both sides are aligned by their names.

        Args:
            embedder: an Embedder (or any module that embeds), with `dataset`; or a bank of queries, `test(bank)` or
                `test(bank, reference)`.
            dataset: images to embed and to use as queries.
            reference: what to search: images, a bank, or a Gallery, whole: a query in it finds itself. When None the
                queries search among themselves, each without itself (known by its index: duplicates of it count).

        Raises:
            UsageError: a k above the number of references or below what a metric needs, banks of different widths,
                class names on one side alone, NaN embeddings, or no query with a right answer among the references.
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
        exact = self.index in EXACT
        searched = bank if exact else Gallery(bank, self.index, self.parameters, self.distance)
        return self._measure(query, searched, None if exact else bank, leave_one_out=reference is None)

    def _measure(
        self, query: EmbeddingBank, references: References, indexed: EmbeddingBank | None, leave_one_out: bool
    ) -> RetrievalResult:
        """Searches the references; where they are a Gallery of a bank `indexed`, also measures its recall."""
        if len(references) == 0:
            raise UsageError("expected at least one reference, got none; give a bank with items")
        ranking = Ranking.of(self.distance)
        if isinstance(references, Gallery):
            own, ranking = ranking, references.ranking
            if self.distance is not None and (own.kind, own.normalize) != (ranking.kind, ranking.normalize):
                raise UsageError(f"expected a gallery ranked by {own}, got {ranking}; build it with that distance")
        labels, query_labels = align(references, query)[0].cpu(), query.labels.cpu()
        relevant = known.count_relevant(query_labels, labels, leave_one_out)  # R of each query
        counts = relevant > 0
        clustering = tuple(metric for metric in self.metrics if metric in known.CLUSTERING)
        figures: dict[str, list[Tensor]] = {metric: [] for metric in self.metrics if metric not in clustering}
        if figures and not counts.any():
            raise UsageError("expected a query whose class is among the references, got none; check the labels")
        k = self._choose_k(tuple(figures), int(relevant.max()), len(labels) - leave_one_out)
        chosen = _sample(len(query), self.num_queries)
        # all at once where that fits, for queries among themselves need each pair only once
        for part in chosen.split(max(1, MAX_NEIGHBORS // k)) if figures else ():
            nearest = _search(query, part, references, k, ranking, leave_one_out)
            match = (labels[nearest] == query_labels[part].unsqueeze(1)) & (nearest >= 0)  # -1: fewer were found
            kept = counts[part]
            for metric, values in figures.items():
                values.append(known.measure(metric, match[kept], relevant[part][kept]))
        recall = None
        if indexed is not None:
            part = _sample(len(query), RECALL_SAMPLE)
            found, exact = (_search(query, part, each, k, ranking, leave_one_out) for each in (references, indexed))
            recall = IndexRecall.of(found, exact)
        index = references if isinstance(references, Gallery) else "exact"
        return RetrievalResult(
            {metric: torch.cat(values) for metric, values in figures.items()},
            query_labels[chosen][counts[chosen]],
            int((~counts[chosen]).sum()),
            k,
            "leave-one-out" if leave_one_out else "gallery",
            ", ".join(str(each) for each in (index, ranking, recall) if each is not None),
            recall,
            known.clustering_scores(query, clustering, ranking) if clustering else {},
            query.class_names,
            hashlib.blake2b(f"{query.fingerprint()} {self.num_queries}".encode(), digest_size=8).hexdigest(),
        )

    def _choose_k(self, metrics: Sequence[str], largest_class: int, num_references: int) -> int:
        needs = {metric: known.neighbors_needed(metric, largest_class, num_references) for metric in metrics}
        k = max([largest_class, *needs.values()]) if self.k == "max_bin_count" else int(self.k)
        needed = max([1, *(need for metric, need in needs.items() if metric not in known.WHOLE_RANKING)])
        if k < needed:
            raise UsageError(f"expected k of at least {needed} for {self.metrics}, got {k}; use 'max_bin_count'")
        if k > num_references:
            wanted = f"k of at most {num_references}, as many as there are to find"
            raise UsageError(f"expected {wanted}, got {k} for {', '.join(self.metrics)}; lower it")
        return k


def _sample(count: int, size: int | None) -> Tensor:
    """Indices (n,), ascending, of so many random ones of `count` items; of all when None."""
    if size is None or size >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size].sort().values


def _search(
    query: EmbeddingBank, own: Tensor, references: References, k: int, ranking: Ranking, leave_one_out: bool
) -> Tensor:
    """(n, k) nearest references of the queries `own` (n,), ascending; with leave_one_out less each query itself."""
    every = len(own) == len(query)
    rows = query.embeddings if every else query.embeddings[own]
    if isinstance(references, Gallery):
        nearest = references.search(rows, k + leave_one_out).indices
    else:
        among = None if every and leave_one_out else references.embeddings
        nearest = exact_search(rows, among, k + leave_one_out, ranking).cpu()
    if not leave_one_out:
        return nearest
    is_own = nearest == own.unsqueeze(1)
    is_own[:, -1] |= ~is_own.any(dim=1)  # the last, where copies have crowded the query itself out
    return nearest[~is_own].reshape(-1, k)


def _as_bank(embedder: Any, source: object) -> EmbeddingBank:
    if isinstance(source, EmbeddingBank):
        return source
    if is_embedder(embedder) and isinstance(source, FewShotDataset):
        return encode(embedder, source)
    got = f"{type(embedder).__name__} with {type(source).__name__}"
    raise UsageTypeError(f"expected an Embedder with a data set, or an EmbeddingBank alone, got {got}; give either")
