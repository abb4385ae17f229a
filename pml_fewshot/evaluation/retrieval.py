"""RetrievalTester: measures how often the nearest neighbors of each item are of its class."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError, as_labels, check_at_least_one, check_choice, check_finite
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.distances.episodic_distance import EpisodicDistance
from pml_fewshot.distributed import alone, gathered, together, world
from pml_fewshot.embedders.bank import ClassName, EmbeddingBank, align, names_of
from pml_fewshot.embedders.embedder import encode, is_embedder
from pml_fewshot.embedders.modes import eval_mode
from pml_fewshot.environment import keep_memory
from pml_fewshot.evaluation import retrieval_metrics as known
from pml_fewshot.evaluation.gallery import EXACT, Gallery, IndexRecall, check_index
from pml_fewshot.evaluation.heads import Similarities
from pml_fewshot.evaluation.search import Ranking, exact_search

References = EmbeddingBank | Gallery
Source = FewShotDataset | EmbeddingBank | Gallery
Marks = Sequence[int] | Sequence[str] | np.ndarray | Tensor  # one per item

MAX_NEIGHBORS = 2**24  # held at a time if the whole ranking of each query is needed: 128 MiB of indices
RERANKED = 2**23  # floats of neighbors gathered at a time for reordering: 32 MiB
RECALL_SAMPLE = 1000  # queries on which an approximate index is compared with exact search


@dataclass(frozen=True, eq=False, repr=False)
class RetrievalResult(Mapping[str, float]):
    """Retrieval figures by name, as fractions of 1, each a mean over the queries (NMI and AMI: computed over all).

    `per_query` holds the values (N,) of the queries that count and `labels` (N,) their classes, of `class_names` if the
    queries have names; `num_excluded` have no item of their class among the references that count for them.
    "leave-one-out": each query searched the others; "gallery": a set of references, to `k` neighbors; "fixed support":
    see `evaluate_fixed`. `ranking` names the index, distance, what ids or groups left out, and recall; `index_recall`
    compares an approximate index with exact search, but not a Gallery, which holds no embeddings. `clustering` holds
    NMI and AMI. Results with equal `queries_hash` have the same queries and the same references left out.
    """

    per_query: dict[str, Tensor]
    labels: Tensor
    num_excluded: int
    k: int
    protocol: Literal["leave-one-out", "gallery", "fixed support"] = "leave-one-out"
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
    """Finds each query's nearest references and measures how many are of its class.

    Args:
        metrics: "precision_at_1": the nearest is of the query's class. "r_precision": share of its class among the R
            nearest, R being the number of references of its class. "mean_average_precision_at_r": the mean over the R
            nearest of the precision at each rank that holds its class, else 0 (Musgrave et al. 2020, section 3.2).
            "precision_at_<k>": share of its class among the k nearest. "recall_at_<k>", "cmc_at_<k>" (cumulative match
            characteristic): any of the k nearest is of its class. "mean_average_precision": the mean over all
            references of its class of the precision at their rank. "mean_reciprocal_rank": 1 / rank of the first of its
            class. "ndcg_at_<k>": the sum of 1 / log2(1 + rank) over those of its class among the k nearest, divided by
            its largest possible value, with the min(R, k) nearest all of its class (Jarvelin and Kekalainen 2002);
            "ndcg": for the whole ranking. "NMI", "AMI": agreement between the classes and equally many k-means clusters
            of the queries.
        k: number of neighbors to search; "max_bin_count" is the size of the largest class, or more if a metric needs it
            (PML's default, all references, takes quadratic memory); mean_average_precision, mean_reciprocal_rank and
            ndcg need the whole ranking, computed for a block of queries at a time and cut off by a number given here.
            References left out by ids or groups are not counted.
        index: "flat" is exact. Others, as in `Gallery`, are approximate, pay off from about a million references on,
            and report their recall against exact search.
        distance: PML distance to rank by; Euclidean if None.
        parameters: for an approximate index, as in `Gallery`.
        num_queries: measure a random sample of this many queries, drawn with seed 0; all if None. Each still searches
            the whole set.
        rerank: PML distance that re-ranks the first k neighbors found by `distance`. A distance that would take too
            long for all pairs (EarthMoversDistance), given as `distance` or a trainer's own, re-ranks the neighbors
            found by Euclidean distance. Metrics of the whole ranking still make it compare all pairs.

    Raises:
        UsageError: an unknown metric or index, or a k or num_queries below 1.
    """

    metrics: Sequence[str] = known.METRICS
    k: int | str = "max_bin_count"
    index: str = "flat"
    distance: BaseDistance | None = None
    parameters: str = ""
    num_queries: int | None = None
    rerank: BaseDistance | None = None

    def __post_init__(self) -> None:
        self.metrics = (self.metrics,) if isinstance(self.metrics, str) else tuple(self.metrics)
        if not self.metrics:
            raise UsageError(f"expected at least one metric, got none; choose of {known.NAMES}")
        for metric in self.metrics:
            if not known.AT_K.fullmatch(metric):
                check_choice("metric", metric, known.NAMES)
        check_index(self.index)
        for name, given in (("distance", self.distance), ("rerank", self.rerank)):
            if not isinstance(given, BaseDistance | None):
                raise UsageTypeError(f"expected {name} as a PML distance or None, got {given!r}; make one")
        check_at_least_one("num_queries", 1 if self.num_queries is None else self.num_queries)
        if isinstance(self.k, str):
            check_choice("k", self.k, ("max_bin_count",))
        else:
            check_at_least_one("k", self.k)

    def test(
        self,
        embedder: nn.Module | EmbeddingBank,
        dataset: Source | None = None,
        reference: Source | None = None,
        *,
        query_ids: Marks | None = None,
        reference_ids: Marks | None = None,
        query_groups: Marks | None = None,
        reference_groups: Marks | None = None,
    ) -> RetrievalResult:
        """Evaluates an embedder on a dataset, or a bank; the classes of both sides are matched by name.

        Args:
            embedder: an Embedder (or any module that embeds), with `dataset`; or a bank of queries, `test(bank)` or
                `test(bank, reference)`.
            dataset: images to embed and use as queries.
            reference: what to search: images, a bank, or a Gallery, in full: a query in it finds itself. If None, the
                queries search among themselves, each excluding itself (by index: its duplicates count).
            query_ids, reference_ids: one per item, integers or strings: references with the query's own id (another
                crop or a copy of its photo) are left out before anything is measured, as if they were not there. When
                queries search among themselves, `query_ids` apply to both sides.
            query_groups, reference_groups: the same for items of the query's own group, whatever their class (one
                camera, one video). With ids and groups, items that share either are left out; to leave out items that
                share two things at once, as in person re-identification, make groups of both: "person 7, camera 2".

        Raises:
            UsageError: a k above the number of references or below what a metric needs, banks of different widths,
                class names, ids or groups on one side only, NaN embeddings, or no query with a right answer among the
                references.
        """
        if not isinstance(embedder, EmbeddingBank):
            query = _as_bank(embedder, dataset)
        elif dataset is None or reference is None:
            query, reference = embedder, dataset if reference is None else reference
        else:
            raise UsageError("expected a bank and at most one reference, got two; leave one out")
        keep_memory(query.embeddings.device)
        check_finite(query.embeddings, "query embeddings")
        references: References
        if isinstance(reference, Gallery):
            references = reference
        else:
            references = query if reference is None else _as_bank(embedder, reference)
            width, other = query.embeddings.shape[1], references.embeddings.shape[1]
            if width != other:
                raise UsageError(f"expected references of {width} dimensions, got {other}; use one embedder for both")
            if references is not query:
                check_finite(references.embeddings, "reference embeddings")
        if len(references) == 0:
            raise UsageError("expected at least one reference, got none; give a bank with items")
        sizes = len(query), None if reference is None else len(references)
        marks = {"ids": (query_ids, reference_ids), "groups": (query_groups, reference_groups)}
        with eval_mode(*(part for part in (self.distance, self.rerank) if part is not None)):
            return self._measure(query, references, _LeftOut.of(marks, *sizes), reference is None)

    def _measure(
        self, query: EmbeddingBank, references: References, left_out: "_LeftOut", leave_one_out: bool
    ) -> RetrievalResult:
        """Searches the references, through an index if requested, whose recall is then measured too."""
        distance, rerank = self.distance, self.rerank
        if isinstance(distance, EpisodicDistance) and not distance.ranks_all:
            distance, rerank = None, distance if rerank is None else rerank
        ranking, searched = Ranking.of(distance), references
        if isinstance(references, Gallery):
            if rerank is not None:
                got = f"a Gallery, which holds no embeddings, and {Ranking.of(rerank)} to reorder by"
                raise UsageError(f"expected references as a bank, got {got}; give the bank, or another distance")
            own, ranking = ranking, references.ranking
            same = (own.kind, own.normalize) == (ranking.kind, ranking.normalize)
            if distance is not None and not (same and (own.kind != "distance" or str(own) == str(ranking))):
                raise UsageError(f"expected a gallery ranked by {own}, got {ranking}; build it with that distance")
        elif self.index not in EXACT:
            searched = Gallery(references, self.index, self.parameters, distance)
        labels, query_labels = align(references, query)[0].cpu(), query.labels.cpu()
        away = left_out.count()
        relevant = known.count_equal([(query_labels, labels)]) - left_out.count((query_labels, labels))  # R
        counts = relevant > 0
        clustering = tuple(metric for metric in self.metrics if metric in known.CLUSTERING)
        figures: dict[str, list[Tensor]] = {metric: [] for metric in self.metrics if metric not in clustering}
        chosen = _sample(len(query), self.num_queries)
        if figures and not counts.any():
            wanted = "a query whose class is among the references"
            raise UsageError(f"expected {wanted}, got none; check the labels, and what ids or groups leave out")
        if not counts[chosen].any() and counts.any():  # if none of the sample counts, sample those that do
            able = counts.nonzero().flatten()
            chosen = able[_sample(len(able), self.num_queries)]
        k = self._choose_k(tuple(figures), int(relevant.max()), len(labels) - int(away.min()))
        more = int(away.max())
        # all at once if that fits, as queries among themselves need each pair only once
        for part in chosen.split(max(1, MAX_NEIGHBORS // (k + more))) if figures else ():
            own = part[world().share(len(part))]
            with together(), alone():
                nearest = _search(query, own, searched, k, ranking, left_out, more)
                if rerank is not None and isinstance(references, EmbeddingBank):
                    nearest = _reordered(query.embeddings[own], references.embeddings, nearest, rerank)
            nearest = gathered(nearest, len(part))
            match = (labels[nearest] == query_labels[part].unsqueeze(1)) & (nearest >= 0)  # -1: fewer were found
            kept = counts[part]
            for metric, values in figures.items():
                values.append(known.measure(metric, match[kept], relevant[part][kept]))
        recall = None
        if searched is not references:
            part = _sample(len(query), RECALL_SAMPLE)
            found, exact = (_search(query, part, each, k, ranking, left_out, more) for each in (searched, references))
            recall = IndexRecall.of(found, exact)
        index = searched if isinstance(searched, Gallery) else "exact"
        reordered = f"the first {k} re-ranked by {Ranking.of(rerank)}" if rerank is not None and figures else ""
        about = f"{query.fingerprint()} {self.num_queries}{left_out.digest}"
        return RetrievalResult(
            {metric: torch.cat(values) for metric, values in figures.items()},
            query_labels[chosen][counts[chosen]],
            int((~counts[chosen]).sum()),
            k,
            "leave-one-out" if leave_one_out else "gallery",
            ", ".join(str(each) for each in (index, ranking, reordered, left_out.text, recall) if each),
            recall,
            known.clustering_scores(query, clustering, ranking) if clustering else {},
            query.class_names,
            hashlib.blake2b(about.encode(), digest_size=8).hexdigest(),
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
    """Returns the ascending indices (n,) of `size` random items out of `count`; of all if None."""
    if size is None or size >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size].sort().values


@dataclass(frozen=True)
class _LeftOut:
    """References that do not count for a query: those equal to it in any of the columns, (of queries, of references).

    In leave-one-out, always the query itself.
    """

    columns: Sequence[tuple[Tensor, Tensor]]
    text: str = ""
    digest: str = ""

    @staticmethod
    def of(marks: Mapping[str, tuple[Any, Any]], num_queries: int, num_references: int | None) -> "_LeftOut":
        """Built from "ids" and "groups" of both sides; `num_references` is None for queries among themselves."""
        given = {name: pair for name, pair in marks.items() if any(each is not None for each in pair)}
        columns = [_numbered(name, *pair, num_queries, num_references) for name, pair in given.items()]
        if columns:
            digest = hashlib.blake2b(b"".join(each.numpy().tobytes() for pair in columns for each in pair))
            return _LeftOut(columns, f"own {' and '.join(given)} left out", f" {digest.hexdigest()}")
        own = torch.arange(num_queries)
        return _LeftOut([(own, own)] if num_references is None else [])

    def count(self, *also: tuple[Tensor, Tensor]) -> Tensor:
        """Counts (N,) those left out for each query, or those of them that also equal it in the `also` columns."""
        counts = torch.zeros(1, dtype=torch.int64)
        for size in range(1, len(self.columns) + 1):  # those in both columns would count twice
            for columns in combinations(self.columns, size):
                counts = counts - (-1) ** size * known.count_equal([*columns, *also])
        return counts

    def among(self, queries: Tensor, nearest: np.ndarray) -> np.ndarray:
        """Returns (n, k) which of the `nearest` (n, k) of the queries (n,) are left out."""
        out = nearest < -1
        for own, references in self.columns:
            out |= references.numpy()[nearest] == own[queries].unsqueeze(1).numpy()
        return out & (nearest >= 0)


def _numbered(
    name: str, query: Any, reference: Any, num_queries: int, num_references: int | None
) -> tuple[Tensor, Tensor]:
    """Converts the ids or groups of queries and references to integers with a common numbering."""
    own, others = f"query_{name}", f"reference_{name}"
    if num_references is None:
        if reference is not None:
            got = f"{others}, but the queries search among themselves"
            raise UsageError(f"expected {own} alone, got {got}; leave {others} out")
        reference, num_references, others = query, num_queries, own
    elif query is None or reference is None:
        raise UsageError(f"expected {own} and {others}, got {others if query is None else own} alone; give both")
    numbers, names = as_labels(query, num_queries, own)
    other_numbers, other_names = as_labels(reference, num_references, others)
    if bool(names) != bool(other_names):
        texts = own if names else others
        raise UsageError(
            f"expected {own} and {others} both as integers or both as texts, got texts as {texts} alone; convert one"
        )
    if names:
        place = torch.from_numpy(np.unique([*names, *other_names], return_inverse=True)[1])
        numbers, other_numbers = place[numbers], place[other_numbers + len(names)]
    both = torch.cat([numbers.cpu(), other_numbers.cpu()]).unique(return_inverse=True)[1]
    return both[:num_queries], both[num_queries:]


def _search(
    query: EmbeddingBank, own: Tensor, references: References, k: int, ranking: Ranking, left_out: _LeftOut, more: int
) -> Tensor:
    """Returns the nearest references (n, k) that count for the ascending queries `own` (n,); -1 if there are no more.

    `more` is the largest number left out for any query.
    """
    every = len(own) == len(query)
    rows = query.embeddings if every else query.embeddings[own]
    wide = min(k + more, len(references))
    if isinstance(references, Gallery):
        nearest = references.rank(rows, wide)
    else:
        nearest = exact_search(rows, None if every and references is query else references.embeddings, wide, ranking)
        nearest = nearest.cpu()
    if more == 0:
        return nearest
    # each row now has k that count; numpy gathers twice as fast as torch, and masks seven times as fast
    padded = F.pad(nearest, (0, k + more - wide), value=-1).numpy()
    count = ~left_out.among(own, padded)
    return torch.from_numpy(padded[count & (count.cumsum(axis=1, dtype=np.int32) <= k)]).reshape(-1, k)


@torch.no_grad()
def _reordered(rows: Tensor, references: Tensor, nearest: Tensor, distance: BaseDistance) -> Tensor:
    """Reorders the neighbors (n, k) of queries (n, D) by a distance; -1, where there are no more, stays last."""
    size = max(1, RERANKED // (nearest.shape[1] * rows.shape[1]))
    ordered = []
    for query, places in zip(rows.unsqueeze(1).split(size), nearest.split(size), strict=True):
        found = references[places.clamp(min=0).to(references.device)]  # (n, k, D)
        values = Similarities(found, distance)(query.to(references.device)).squeeze(1).cpu()
        check_finite(values, f"similarities by {Ranking.of(distance)}")
        values = values.masked_fill(places < 0, -torch.inf)
        ordered.append(places.gather(1, values.argsort(dim=1, descending=True, stable=True)))
    return torch.cat(ordered)


def _as_bank(embedder: Any, source: object) -> EmbeddingBank:
    if isinstance(source, EmbeddingBank):
        return source
    if is_embedder(embedder) and isinstance(source, FewShotDataset):
        return encode(embedder, source)
    got = f"{type(embedder).__name__} with {type(source).__name__}"
    raise UsageTypeError(f"expected an Embedder with a data set, or an EmbeddingBank alone, got {got}; give either")
