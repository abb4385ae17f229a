"""RetrievalTester against the metrics' definitions in explicit loops, and against PML where PML is right."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, FaissKNN
from torch import Tensor, nn

from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation import retrieval
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.index_recall import IndexRecall
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.retrieval_metrics import METRICS, WHOLE_RANKING
from pml_fewshot.evaluation.retrieval_result import RetrievalResult

pytestmark = pytest.mark.filterwarnings("ignore:faiss's OpenBLAS")  # of the machine, not of the tester

Far = Callable[[np.ndarray, np.ndarray], float]


def euclid(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(((a - b) ** 2).sum())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return -float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


RANKINGS: dict[str, tuple[Callable[[], BaseDistance | None], Far]] = {
    "default": (lambda: None, euclid),
    "Euclid": (lambda: LpDistance(normalize_embeddings=False, power=2), euclid),
    "cosine": (CosineSimilarity, cosine),
    "normalised": (LpDistance, cosine),
    "dot": (lambda: DotProductSimilarity(normalize_embeddings=False), lambda a, b: -float(a @ b)),
    "p=1": (lambda: LpDistance(p=1, normalize_embeddings=False), lambda a, b: float(np.abs(a - b).sum())),
}


def by_definition(
    query: EmbeddingBank, gallery: EmbeddingBank | None, metric: str, far: Far = euclid, cut: int | None = None
) -> tuple[list[float], int]:
    """(value of each judged query, queries left out): each metric from its definition, one query at a time.

    `cut` ends the ranking for the metrics of the whole of it.
    """
    own = gallery is None
    gallery = query if gallery is None else gallery
    queries, references = query.embeddings.double().numpy(), gallery.embeddings.double().numpy()
    values, left_out = [], 0
    for i, label in enumerate(query.labels.tolist()):
        others = [j for j in range(len(gallery)) if not (own and j == i)]
        others.sort(key=lambda j: far(queries[i], references[j]))
        right = [gallery.labels[j].item() == label for j in others]
        total = sum(right)
        if total == 0:
            left_out += 1
        elif metric == "precision_at_1":
            values.append(float(right[0]))
        elif metric == "r_precision":
            values.append(sum(right[:total]) / total)
        elif metric == "mean_average_precision_at_r":
            precisions = [sum(right[: rank + 1]) / (rank + 1) if right[rank] else 0.0 for rank in range(total)]
            values.append(sum(precisions) / total)
        elif metric == "mean_average_precision":
            hits = [rank for rank, hit in enumerate(right[:cut], start=1) if hit]
            values.append(sum(place / rank for place, rank in enumerate(hits, start=1)) / total)
        elif metric == "mean_reciprocal_rank":
            values.append(max((1 / rank for rank, hit in enumerate(right[:cut], start=1) if hit), default=0.0))
        else:
            values.append(float(any(right[: int(metric.removeprefix("recall_at_"))])))
    return values, left_out


def bank(sizes: dict[int, int], seed: int = 0, spread: float = 1.0, dims: int = 5) -> EmbeddingBank:
    """`sizes` items of each class about its own centre, in mixed order, at different lengths."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([c for c, size in sizes.items() for _ in range(size)])
    label = label[torch.randperm(len(label), generator=generator)]
    centres = torch.randn(100, dims, generator=torch.Generator().manual_seed(77))
    rows = centres[label % 100] + spread * torch.randn(len(label), dims, generator=generator)
    return EmbeddingBank(rows * (0.5 + torch.rand(len(label), 1, generator=generator)), label)


UNEVEN = {3: 2, 8: 9, 0: 5, 51: 1, 20: 4, 77: 1}  # two of them alone in their class
ALL = (*METRICS, "recall_at_1", "recall_at_3", "recall_at_8")
EVERY = (*ALL, *WHOLE_RANKING)


def assert_equal_to_definition(
    result: RetrievalResult,
    query: EmbeddingBank,
    gallery: EmbeddingBank | None,
    far: Far = euclid,
    cut: int | None = None,
) -> None:
    for metric in result:
        values, left_out = by_definition(query, gallery, metric, far, cut)
        assert result.per_query[metric].tolist() == pytest.approx(values, abs=1e-12), metric
        assert result[metric] == pytest.approx(sum(values) / len(values), abs=1e-12)
        assert (result.num_queries, result.num_left_out) == (len(values), left_out)
        deviation = math.sqrt(sum((v - sum(values) / len(values)) ** 2 for v in values) / (len(values) - 1))
        assert result.ci95(metric) == pytest.approx(1.96 * deviation / math.sqrt(len(values)), abs=1e-12)
        assert result.ci95(metric) == pytest.approx(1.96 * scipy.stats.sem(values), abs=1e-12)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_self_retrieval_equals_the_definitions(ranking: str, seed: int):
    distance, far = RANKINGS[ranking]
    query = bank(UNEVEN, seed)
    result = RetrievalTester(ALL, distance=distance()).test(query)
    assert tuple(result) == ALL
    assert result.num_left_out == 2
    assert result.k == 8
    assert_equal_to_definition(result, query, None, far)
    assert 0.1 < result["r_precision"] < 0.9


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_reference_gallery_equals_the_definitions(ranking: str):
    distance, far = RANKINGS[ranking]
    query, gallery = bank({3: 6, 8: 2, 0: 5, 60: 3, 20: 1, 99: 2}), bank(UNEVEN | {4: 12}, seed=5)
    result = RetrievalTester(ALL, distance=distance()).test(query, reference=gallery)
    assert result.num_left_out == 5  # classes 60 and 99 have no reference, beyond the largest label too
    assert result.num_queries == 14
    assert_equal_to_definition(result, query, gallery, far)
    positional = RetrievalTester(ALL, distance=distance()).test(query, gallery)
    assert dict(positional) == dict(result)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("with_gallery", [False, True])
def test_metrics_of_the_whole_ranking_equal_the_definitions(ranking: str, with_gallery: bool):
    distance, far = RANKINGS[ranking]
    query, gallery = bank(UNEVEN | {60: 3}), bank(UNEVEN | {4: 12}, seed=5) if with_gallery else None
    result = RetrievalTester(EVERY, distance=distance()).test(query, gallery)
    assert tuple(result) == EVERY
    assert result.k == (34 if with_gallery else 24)
    assert result.protocol == ("gallery" if with_gallery else "leave-one-out")
    assert_equal_to_definition(result, query, gallery, far)
    assert 0.1 < result["mean_average_precision"] < result["mean_reciprocal_rank"] < 0.95


@pytest.mark.parametrize("k", [1, 4, 9, 21])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_metrics_of_the_whole_ranking_are_cut_at_a_given_k(k: int, with_gallery: bool):
    query, gallery = bank(UNEVEN), bank(UNEVEN | {4: 12}, seed=5) if with_gallery else None
    result = RetrievalTester(WHOLE_RANKING, k=k).test(query, gallery)
    assert result.k == k
    assert_equal_to_definition(result, query, gallery, cut=k)


@pytest.mark.parametrize("room", [1, 50, 100, 300])
@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_blocks_of_queries_change_nothing(room: int, with_gallery: bool, index: str, monkeypatch: pytest.MonkeyPatch):
    query, gallery = bank(UNEVEN), bank(UNEVEN | {4: 12}, seed=5) if with_gallery else None
    monkeypatch.setattr(retrieval, "NEIGHBOURS", room)  # of 22 queries: 1, 1 or 2, 2 or 4, 9 or 14 at a time
    result = RetrievalTester(EVERY, index=index).test(query, gallery)  # of so few items ivf has one list
    assert_equal_to_definition(result, query, gallery)


@given(
    sizes=st.dictionaries(st.integers(0, 99), st.integers(1, 6), min_size=2, max_size=6),
    gallery_sizes=st.one_of(st.none(), st.dictionaries(st.integers(0, 99), st.integers(1, 6), min_size=2, max_size=6)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_any_sizes_equal_the_definitions(sizes: dict[int, int], gallery_sizes: dict[int, int] | None, seed: int):
    query = bank(sizes, seed, dims=3)
    gallery = (
        None if gallery_sizes is None else bank(gallery_sizes | dict([next(iter(sizes.items()))]), seed + 1, dims=3)
    )
    if gallery is None and max(sizes.values()) == 1:
        return
    result = RetrievalTester((*METRICS, "recall_at_1", *WHOLE_RANKING)).test(query, reference=gallery)
    for metric in result:
        values, left_out = by_definition(query, gallery, metric)
        assert result.per_query[metric].tolist() == pytest.approx(values, abs=1e-12)
        assert result.num_left_out == left_out


def test_figures_by_hand():
    """On a line: a at 0 and 1, b at 1.4 and 9, a at 10. The nearest of each: a, b; a, a; b."""
    query = EmbeddingBank(torch.tensor([[0.0], [1.0], [1.4], [9.0], [10.0]]), torch.tensor([7, 7, 5, 5, 7]))
    result = RetrievalTester().test(query)
    # 0: a b | 1: b a | 1.4: a | 9: a | 10: b b
    assert result.per_query["precision_at_1"].tolist() == [1, 0, 0, 0, 0]
    assert result.per_query["r_precision"].tolist() == [0.5, 0.5, 0, 0, 0]
    assert result.per_query["mean_average_precision_at_r"].tolist() == [0.5, 0.25, 0, 0, 0]
    assert result["precision_at_1"] == pytest.approx(0.2)
    # whole rankings: 0: a b b a | 1: b a b a | 1.4: a a b a | 9: a b a a | 10: b b a a
    whole = RetrievalTester(WHOLE_RANKING).test(query)
    assert whole.per_query["mean_average_precision"].tolist() == [0.75, 0.5, 1 / 3, 0.5, (1 / 3 + 2 / 4) / 2]
    assert whole.per_query["mean_reciprocal_rank"].tolist() == [1, 0.5, 1 / 3, 0.5, 1 / 3]
    classes, means = result.per_class("r_precision")
    assert classes.tolist() == [5, 7]
    assert means.tolist() == pytest.approx([0, 1 / 3])


def test_labels_of_all_64_bits_are_told_apart():
    """Two classes whose labels differ in the last bit: float32 merges them above 2**24, float64 above 2**53."""
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.1], [20.0], [21.2]])  # the nearest is always of the other class
    for high in (2**24, 2**53, 2**62, -(2**62)):
        query = EmbeddingBank(rows, torch.tensor([high, high + 1] * 3))
        result = RetrievalTester(("precision_at_1", "r_precision")).test(query)
        assert result["precision_at_1"] == 0
        assert result.num_queries == 6
        assert_equal_to_definition(result, query, None)
        across = RetrievalTester(("precision_at_1",)).test(
            EmbeddingBank(rows, torch.full((6,), high)), EmbeddingBank(rows + 0.1, torch.tensor([high + 1, high] * 3))
        )
        assert across["precision_at_1"] == 0.5
        merged = AccuracyCalculator(include=("precision_at_1",), k="max_bin_count").get_accuracy(rows, query.labels)
        assert merged["precision_at_1"] == 1  # what PML 2.9 makes of it


def test_a_lone_label_next_to_an_existing_one_is_left_out():
    high = 2**53
    rows = torch.tensor([[0.0], [1.0], [2.0]])
    result = RetrievalTester(("precision_at_1",)).test(EmbeddingBank(rows, torch.tensor([high, high, high + 1])))
    assert (result.num_queries, result.num_left_out) == (2, 1)


def test_duplicates_of_an_item_count_as_items():
    """Itself is told by its index: a copy of another class is a wrong neighbour, one of its class a right one."""
    rows = torch.tensor([[0.0], [0.0], [5.0], [5.0], [9.0]])
    wrong = RetrievalTester(("precision_at_1",)).test(EmbeddingBank(rows, torch.tensor([0, 1, 0, 1, 0])))
    assert wrong.per_query["precision_at_1"].tolist()[:4] == [0, 0, 0, 0]
    right = RetrievalTester(("precision_at_1",)).test(EmbeddingBank(rows, torch.tensor([0, 0, 1, 1, 1])))
    assert right["precision_at_1"] == 1
    assert right.num_queries == 5


@pytest.mark.parametrize("ranking", ["default", "cosine", "p=1"])
def test_many_copies_of_one_item_crowd_it_out_without_harm(ranking: str):
    copies = EmbeddingBank(torch.ones(40, 3), torch.arange(40) % 2)
    result = RetrievalTester((*METRICS, "recall_at_19"), distance=RANKINGS[ranking][0]()).test(copies)
    assert result.k == 19
    assert result.num_queries == 40
    for metric in METRICS:
        assert 0 <= result[metric] <= 1
    same = EmbeddingBank(torch.ones(40, 3), torch.zeros(40, dtype=torch.int64))
    for metric, value in RetrievalTester(k=39).test(same).items():
        assert value == pytest.approx(1), metric


def by_pml(
    include: tuple[str, ...], k: int | str | None, query: EmbeddingBank, gallery: EmbeddingBank | None, **parts: object
) -> dict[str, float]:
    calculator = AccuracyCalculator(include=include, k=k, device=torch.device("cpu"), **parts)
    if gallery is None:
        return calculator.get_accuracy(query.embeddings, query.labels)
    return calculator.get_accuracy(query.embeddings, query.labels, gallery.embeddings, gallery.labels)


@pytest.mark.parametrize("ranking", ["Euclid", "cosine", "dot", "p=1"])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_easy_inputs_equal_pml(ranking: str, with_gallery: bool):
    distance = RANKINGS[ranking][0]()
    query = bank({c: 6 for c in range(8)}, spread=0.8)
    gallery = bank({c: 7 for c in range(8)}, seed=9, spread=0.8) if with_gallery else None
    expected = by_pml(METRICS, "max_bin_count", query, gallery, knn_func=CustomKNN(distance, batch_size=16))
    result = RetrievalTester(distance=distance).test(query, reference=gallery)
    assert dict(result) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_uneven_classes_with_lone_ones_equal_pml(seed: int, with_gallery: bool):
    generator = torch.Generator().manual_seed(seed)
    sizes = {c: int(n) for c, n in enumerate(torch.randint(1, 15, (40,), generator=generator))} | {50: 1, 51: 1}
    query = bank(sizes, seed, dims=8)
    gallery = bank({c: 1 + c % 9 for c in range(20, 60)}, seed + 10, dims=8) if with_gallery else None
    result = RetrievalTester().test(query, gallery)
    assert result.num_left_out >= 2
    assert dict(result) == pytest.approx(by_pml(METRICS, "max_bin_count", query, gallery), abs=1e-12)
    whole = RetrievalTester(WHOLE_RANKING).test(query, gallery)
    # asked for along with another: PML 2.9 crashes on mean_reciprocal_rank alone, and has its ranks in float32
    assert dict(whole) == pytest.approx(by_pml(WHOLE_RANKING, None, query, gallery), abs=1e-6)


@pytest.mark.parametrize("sizes", [{c: 2 + c for c in range(12)} | {50: 1}, {1: 300, 2: 280}])
def test_clusterings_equal_pml(sizes: dict[int, int]):
    query = bank(sizes, spread=0.7)
    result = RetrievalTester(("NMI", "AMI", "precision_at_1")).test(query)
    assert tuple(result) == ("precision_at_1", "NMI", "AMI")
    expected = by_pml(("NMI", "AMI"), "max_bin_count", query, None)
    assert {metric: result[metric] for metric in expected} == pytest.approx(expected, abs=1e-9)
    assert 0.01 < result["AMI"] < result["NMI"] < 0.99
    assert result.clustering == {metric: result[metric] for metric in ("NMI", "AMI")}


def test_clusters_are_of_the_queries_normalised_where_the_ranking_is():
    query, gallery = bank({c: 9 for c in range(8)}), bank({c: 3 for c in range(8)}, seed=1)
    normal = RetrievalTester(("NMI", "AMI")).test(query.normalized())
    assert dict(RetrievalTester(("NMI", "AMI"), distance=CosineSimilarity()).test(query)) == dict(normal)
    plain = RetrievalTester(("NMI", "AMI")).test(query)
    assert dict(plain) != dict(normal)
    assert dict(RetrievalTester(("NMI", "AMI")).test(query, gallery)) == dict(plain)


def test_clusters_far_apart_agree_wholly_with_the_classes():
    label = torch.arange(60) % 2  # of two, k-means finds the best clusters from any start
    generator = torch.Generator().manual_seed(0)
    rows = 100 * torch.eye(4)[label] + torch.randn(60, 4, generator=generator)
    result = RetrievalTester(("NMI", "AMI")).test(EmbeddingBank(rows, label + 2**53))
    assert len(result) == 2
    assert result["NMI"] == pytest.approx(1)
    assert result["AMI"] == pytest.approx(1)
    shuffled = label[torch.randperm(60, generator=generator)]
    assert RetrievalTester("AMI").test(EmbeddingBank(rows, shuffled))["AMI"] < 0.2
    assert math.isnan(result.ci95("NMI"))
    assert math.isnan(result.ci95("AMI"))


def test_what_goes_wrong_in_pml_goes_right_here():
    query = bank(UNEVEN)
    with pytest.raises((TypeError, KeyError)):
        by_pml(("mean_reciprocal_rank",), None, query, None)
    assert_equal_to_definition(RetrievalTester("mean_reciprocal_rank").test(query), query, None)
    lists = FaissKNN(index_init_fn=lambda dims: faiss.index_factory(dims, "IVF4,Flat"))
    with pytest.raises(RuntimeError, match="is_trained"):
        by_pml(METRICS, "max_bin_count", query, None, knn_func=lists)
    # trained here, and looking into all four lists it is exact
    found = RetrievalTester(ALL, index="IVF4,Flat", parameters="nprobe=4").test(query)
    assert_equal_to_definition(found, query, None)


@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("metric", [*ALL, *WHOLE_RANKING])
def test_figures_of_each_class_are_means_over_its_queries(metric: str, with_gallery: bool):
    query, gallery = bank(UNEVEN | {2**53 + 1: 3}), bank(UNEVEN | {4: 12}, seed=5) if with_gallery else None
    result = RetrievalTester(EVERY).test(query, gallery)
    classes, means = result.per_class(metric)
    others = None if gallery is None else set(gallery.labels.tolist())
    counts = {c: query.labels.tolist().count(c) for c in sorted(set(query.labels.tolist()))}
    judged = [c for c, n in counts.items() if (n > 1 if others is None else c in others)]
    assert classes.tolist() == judged
    kept = [label for label in query.labels.tolist() if label in judged]
    assert result.labels.tolist() == kept
    values = np.array(by_definition(query, gallery, metric)[0])
    expected = [values[np.array(kept) == c].mean() for c in judged]
    np.testing.assert_allclose(means.numpy(), expected, atol=1e-12)


def clustered(count: int, seed: int) -> EmbeddingBank:
    generator = torch.Generator().manual_seed(seed)
    centres = 1.8 * torch.randn(60, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(60, (count,), generator=generator)
    return EmbeddingBank(centres[labels] + torch.randn(count, 16, generator=generator), labels)


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "hnsw"])
@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("ranking", ["default", "cosine"])
def test_approximate_indices_give_nearly_the_exact_figures(index: str, with_gallery: bool, ranking: str):
    query = clustered(1500, 0)
    gallery = clustered(2500, 1) if with_gallery else None
    exact, near = (
        RetrievalTester(index=kind, distance=RANKINGS[ranking][0]()).test(query, reference=gallery)
        for kind in ("flat", index)
    )
    assert near.num_queries == exact.num_queries == 1500
    for metric in METRICS:
        assert 0.3 < exact[metric] < 0.995
        assert near[metric] == pytest.approx(exact[metric], abs=0.02), metric


def test_places_that_an_approximate_index_leaves_empty_are_misses():
    """The first item's only fellow is far off, at the place that an index of -1 would read."""
    rows, labels = clustered(2000, 0).embeddings, torch.full((2000,), 4)
    labels[0] = labels[-1] = 9
    rows[-1] = rows[0] + 1000
    tester = RetrievalTester(("recall_at_1990",), k=1998, index="ivf")
    assert tester.test(EmbeddingBank(rows, labels)).per_query["recall_at_1990"][0] == 0
    near = RetrievalTester(("r_precision",), k=1999, index="ivf").test(EmbeddingBank(rows, torch.full((2000,), 4)))
    assert 0.05 < near["r_precision"] < 0.9  # all would be right, and only those found count


def neighbours(query: Tensor, reference: Tensor, k: int, same: bool) -> list[list[int]]:
    """The true k nearest of each query by Euclid, without itself where both sets are the same."""
    distances = ((query.double().numpy()[:, None] - reference.double().numpy()) ** 2).sum(axis=2)
    if same:
        np.fill_diagonal(distances, np.inf)
    return distances.argsort(axis=1, kind="stable")[:, :k].tolist()


@pytest.mark.parametrize(
    ("index", "parameters"), [("ivf", "nprobe=1"), ("hnsw", "efSearch=1"), ("IVF9,SQ4", "nprobe=3")]
)
@pytest.mark.parametrize("with_gallery", [False, True])
def test_the_recall_of_an_index_is_its_overlap_with_the_true_neighbours(
    index: str, parameters: str, with_gallery: bool
):
    query = clustered(400, 0)
    gallery = clustered(600, 1) if with_gallery else query
    tester = RetrievalTester(("recall_at_1",), k=10, index=index, parameters=parameters)
    result = tester.test(query, gallery if with_gallery else None)
    built = Gallery(gallery, index, parameters)
    found = built.search(query.embeddings, 10 + (not with_gallery)).tolist()
    if not with_gallery:
        found = [([j for j in row if j != i] if i in row else row)[:10] for i, row in enumerate(found)]
    exact = neighbours(query.embeddings, gallery.embeddings, 10, same=not with_gallery)
    recall = result.index_recall
    assert isinstance(recall, IndexRecall)
    assert (recall.k, recall.sample) == (10, 400)
    at_1 = np.mean([row[0] == true[0] for row, true in zip(found, exact, strict=True)])
    at_k = np.mean([len(set(row) & set(true)) / 10 for row, true in zip(found, exact, strict=True)])
    # a graph is built by several threads, so that two of one set may differ
    tolerance = 0.03 if index == "hnsw" else 1e-12
    assert recall.at_1 == pytest.approx(at_1, abs=tolerance)
    assert recall.at_k == pytest.approx(at_k, abs=tolerance)
    assert 0.1 < recall.at_k < 0.99
    assert str(recall) in result.ranking
    assert result.ranking.startswith(f"{built}, Euclid, recall@1 {recall.at_1:.3f}, @10 {recall.at_k:.3f} of exact")


def test_the_recall_is_of_a_sample_of_many_queries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retrieval, "SAMPLE", 50)
    query = clustered(400, 0)
    result = RetrievalTester(("recall_at_1",), k=10, index="ivf", parameters="nprobe=1").test(query)
    assert result.index_recall is not None
    assert result.index_recall.sample == 50
    assert "on 50 queries" in result.ranking
    exhaustive = RetrievalTester(("recall_at_1",), k=10, index="ivf", parameters="nprobe=100").test(query)
    assert exhaustive.index_recall == IndexRecall(1.0, 1.0, 10, 50)


def test_the_recall_counts_places_left_empty_as_misses():
    found, exact = torch.tensor([[3, 1, -1], [-1, -1, -1]]), torch.tensor([[3, 2, 1], [0, 1, 2]])
    recall = IndexRecall.of(found, exact)
    assert (recall.at_1, recall.k, recall.sample) == (0.5, 3, 2)
    assert recall.at_k == pytest.approx(2 / 6)


def test_an_exact_search_has_no_recall_nor_has_a_gallery():
    query, gallery = clustered(200, 0), clustered(300, 1)
    exact = RetrievalTester().test(query, gallery)
    assert exact.index_recall is None
    assert exact.ranking == "exact, Euclid"
    built = RetrievalTester().test(query, Gallery(gallery, "ivf"))
    assert built.index_recall is None
    assert built.ranking == "IVF7,Flat nprobe=7, Euclid"
    assert built.protocol == "gallery"


@pytest.mark.parametrize("ranking", ["default", "Euclid", "cosine", "normalised", "dot"])
@pytest.mark.parametrize(("index", "parameters"), [("ivf", "nprobe=100"), ("Flat", "")])
def test_a_gallery_gives_the_figures_of_the_bank_that_it_was_made_from(
    ranking: str, index: str, parameters: str, tmp_path: Path
):
    distance, far = RANKINGS[ranking]
    query, reference = bank({3: 6, 8: 2, 0: 5, 60: 3}), bank({c: 3 + c % 5 for c in range(20)}, seed=5)
    gallery = Gallery(reference, index, parameters, distance())
    expected = RetrievalTester(EVERY, distance=distance()).test(query, reference)
    for tester in (RetrievalTester(EVERY, distance=distance()), RetrievalTester(EVERY)):  # without, as the gallery
        result = tester.test(query, gallery)
        assert dict(result) == pytest.approx(dict(expected), abs=1e-12)
        assert (result.k, result.num_left_out) == (expected.k, expected.num_left_out) == (len(reference), 3)
    assert_equal_to_definition(result, query, reference, far)
    gallery.save(tmp_path / "gallery")
    assert dict(RetrievalTester(EVERY, distance=distance()).test(query, Gallery.load(tmp_path / "gallery"))) == dict(
        result
    )


def test_a_gallery_of_another_ranking_or_width_is_refused():
    query = bank(UNEVEN)
    by_cosine = Gallery(query, "Flat", distance=CosineSimilarity())
    for distance in (LpDistance(normalize_embeddings=False), LpDistance(), LpDistance(p=1)):
        with pytest.raises(ValueError, match=r"^expected a gallery ranked by LpDistance\(.*, got CosineSimilarity\("):
            RetrievalTester(distance=distance).test(query, by_cosine)
    with pytest.raises(ValueError, match=r"^expected queries of shape \(N, 5\), got \(22, 3\); use one embedder"):
        RetrievalTester().test(bank(UNEVEN, dims=3), by_cosine)


def test_the_same_bank_as_reference_is_a_gallery_in_which_each_finds_itself():
    query = bank(UNEVEN)
    for reference in (query, bank(UNEVEN), Gallery(query, "Flat")):
        result = RetrievalTester((*METRICS, "mean_reciprocal_rank")).test(query, reference)
        assert result.protocol == "gallery"
        assert (result["precision_at_1"], result["mean_reciprocal_rank"]) == (1, 1)
        assert (result.num_queries, result.num_left_out) == (22, 0)
        assert_equal_to_definition(result, query, query)
    alone = RetrievalTester().test(query)
    assert alone.protocol == "leave-one-out"
    assert (alone.num_queries, alone.num_left_out) == (20, 2)
    assert alone["precision_at_1"] < 1


def test_an_embedder_is_judged_on_its_embeddings():
    images = torch.randint(0, 256, (12, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = FewShotDataset(images, torch.arange(12) % 3, list("abc"))
    other = FewShotDataset(images.flip(0), torch.arange(12) % 3, list("abc"))
    embedder = Embedder(nn.Flatten())
    tester = RetrievalTester()
    query, gallery = embedder.encode(dataset), embedder.encode(other)
    assert dict(tester.test(embedder, dataset)) == dict(tester.test(query))
    for reference in (other, gallery, Gallery(gallery, "Flat")):
        assert dict(tester.test(embedder, dataset, reference)) == dict(tester.test(query, gallery))


def test_k_is_the_largest_class_unless_a_recall_needs_more():
    query = bank(UNEVEN)
    assert RetrievalTester(("precision_at_1",)).test(query).k == 8
    assert RetrievalTester(("recall_at_15",)).test(query).k == 15
    assert RetrievalTester(("precision_at_1", "recall_at_4"), k=4).test(query).k == 4
    assert RetrievalTester(k=20).test(query)["r_precision"] == RetrievalTester().test(query)["r_precision"]
    small = RetrievalTester(("precision_at_1",), k=1).test(query)
    assert small["precision_at_1"] == RetrievalTester().test(query)["precision_at_1"]


def test_a_k_that_cannot_be_is_refused():
    query = bank(UNEVEN)  # 22 items, 21 others
    assert RetrievalTester(("recall_at_21",)).test(query)["recall_at_21"] == 1
    for tester in (RetrievalTester(k=22), RetrievalTester(("recall_at_22",))):
        with pytest.raises(ValueError, match="expected k of at most 21, the gallery's size, got 22"):
            tester.test(query)
    with pytest.raises(ValueError, match=r"k of at least 8 for .*, got 7; raise k or use 'max_bin_count'"):
        RetrievalTester(k=7).test(query)
    with pytest.raises(ValueError, match=r"k of at least 5 for .*, got 4"):
        RetrievalTester(("recall_at_5",), k=4).test(query)
    for wrong in (0, -3, True):
        with pytest.raises(ValueError, match="expected k to be an integer of at least 1"):
            RetrievalTester(k=wrong)
    for wrong_kind in ("max", 2.5, None):
        with pytest.raises(ValueError, match="expected k as an integer or 'max_bin_count'"):
            RetrievalTester(k=wrong_kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("precision_at_2", "did you mean 'precision_at_1'"),
        ("r_precison", "did you mean 'r_precision'"),
        ("recall_at_0", "did you mean 'recall_at_1'"),
        ("recall_at_05", ""),
        ("recall_at_1\n", ""),
        ("mean_average_precison", "did you mean 'mean_average_precision'"),
        ("mean_reciprocal", "did you mean 'mean_reciprocal_rank'"),
        ("NMI ", "did you mean 'NMI'"),
        ("accuracy", "choose one of them"),
    ],
)
def test_an_unknown_metric_is_refused_with_the_nearest_name(metric: str, hint: str):
    with pytest.raises(ValueError, match=f"expected metric as one of .*, got .*; .*{hint}"):
        RetrievalTester((metric,))


def test_other_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one metric, got none"):
        RetrievalTester(())
    with pytest.raises(ValueError, match="expected index as one of 'flat', 'ivf', 'ivfpq', 'hnsw', got 'pq'"):
        RetrievalTester(index="pq")
    with pytest.raises(ValueError, match="got 'hnws'; did you mean 'hnsw'"):
        RetrievalTester(index="hnws")
    with pytest.raises(ValueError, match="expected an index and parameters that faiss can build, got 'IVF4,Nonsense'"):
        RetrievalTester(index="IVF4,Nonsense").test(bank(UNEVEN))
    with pytest.raises(ValueError, match="expected Euclid, cosine or dot product for index 'ivf', got LpDistance"):
        RetrievalTester(index="ivf", distance=LpDistance(p=1)).test(bank(UNEVEN))
    query = bank(UNEVEN)
    with pytest.raises(ValueError, match="expected references of 5 dimensions, got 3"):
        RetrievalTester().test(query, reference=bank(UNEVEN, dims=3))
    with pytest.raises(ValueError, match="a query whose class is among the references, got none"):
        RetrievalTester().test(query, reference=bank({1: 30}))
    with pytest.raises(ValueError, match="a query whose class is among the references, got none"):
        RetrievalTester().test(bank({1: 1, 2: 1}))
    with pytest.raises(ValueError, match="a bank and at most one reference, got two"):
        RetrievalTester().test(query, query, query)
    dataset = FewShotDataset(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0]), ["a"])
    for embedder, source in ((Embedder(nn.Flatten()), None), (query, dataset), (nn.Flatten(), dataset)):
        with pytest.raises(TypeError, match="expected an Embedder with a data set, or an EmbeddingBank alone"):
            RetrievalTester().test(embedder, source)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_embeddings_that_are_not_finite_are_counted_and_the_first_is_named(bad: float):
    query = bank(UNEVEN)
    rows = query.embeddings.clone()
    rows[4, 1], rows[9, 0] = bad, bad
    says = "got NaN or infinity in 2 of 22 rows, first in row 4; look at what produced them"
    with pytest.raises(ValueError, match=rf"^expected finite embeddings, {says}"):
        EmbeddingBank(rows, query.labels)
    query.embeddings.copy_(rows)  # after the bank was made
    for reference in (None, bank(UNEVEN), Gallery(bank(UNEVEN), "Flat")):
        with pytest.raises(ValueError, match=rf"^expected finite query embeddings, {says}"):
            RetrievalTester().test(query, reference)
    for index in ("flat", "ivf"):
        with pytest.raises(ValueError, match=rf"^expected finite reference embeddings, {says}"):
            RetrievalTester(index=index).test(bank(UNEVEN), query)


def test_labels_of_another_length_or_type_are_refused():
    rows = bank(UNEVEN).embeddings
    with pytest.raises(ValueError, match=r"^expected the bank's labels of shape \(22,\), one for each item, got shape"):
        EmbeddingBank(rows, torch.zeros(21, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^expected the bank's labels of shape \(22,\), one for each item, got shape"):
        EmbeddingBank(rows, torch.zeros(22, 1, dtype=torch.int64))
    for labels in (torch.zeros(22), torch.zeros(22, dtype=torch.int32), [0] * 22):
        with pytest.raises(TypeError, match=r"^expected the bank's labels as an int64 tensor, got a "):
            EmbeddingBank(rows, labels)  # type: ignore[arg-type]


def test_a_result_is_a_mapping_that_reads_with_its_count():
    labels = torch.tensor([4, 2])
    result = RetrievalResult({"precision_at_1": torch.tensor([1.0, 0.0]).double()}, labels, num_left_out=3, k=4)
    assert len(result) == 1
    assert dict(result) == {"precision_at_1": 0.5}
    assert repr(result) == "RetrievalResult({'precision_at_1': 0.5}, 2 queries, k=4)"
    assert (result.num_queries, result.protocol, result.index_recall) == (2, "leave-one-out", None)
    with pytest.raises(KeyError):
        result["r_precision"]
    with pytest.raises(KeyError):
        result.per_class("r_precision")
    assert math.isnan(RetrievalResult({"precision_at_1": torch.ones(1)}, labels[:1], 0, 1).ci95("precision_at_1"))


def test_the_interval_of_a_figure_that_was_not_measured_is_refused():
    result = RetrievalTester(("r_precision", "NMI")).test(bank(UNEVEN))
    for metric in ("r_precison", "precision_at_1", "AMI"):
        with pytest.raises(KeyError):
            result.ci95(metric)


def test_a_result_has_its_clustering_among_its_figures():
    result = RetrievalResult({"r_precision": torch.ones(3)}, torch.arange(3), 0, 1, clustering={"NMI": 0.25})
    assert dict(result) == {"r_precision": 1.0, "NMI": 0.25}
    assert len(result) == 2
    assert math.isnan(result.ci95("NMI"))


def test_a_distance_may_be_a_factory():
    query = bank(UNEVEN)
    factory = partial(LpDistance, p=1, normalize_embeddings=False)
    assert dict(RetrievalTester(distance=factory).test(query)) == dict(RetrievalTester(distance=factory()).test(query))


SETS = st.tuples(st.dictionaries(st.integers(0, 99), st.integers(1, 7), min_size=2, max_size=6), st.integers(0, 1000))


def assert_same_figures(found: RetrievalResult, expected: RetrievalResult) -> None:
    assert (found.num_queries, found.num_left_out, found.k) == (
        expected.num_queries,
        expected.num_left_out,
        expected.k,
    )
    assert dict(found) == pytest.approx(dict(expected), abs=1e-12)


@given(SETS)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_the_order_of_the_items_and_the_names_of_the_classes_change_nothing(sizes_and_seed: tuple[dict[int, int], int]):
    sizes, seed = sizes_and_seed
    sizes[100], generator = 3, torch.Generator().manual_seed(seed)
    query, gallery = bank(sizes, seed), bank(sizes | {4: 5}, seed + 1)
    tester = RetrievalTester((*METRICS, "recall_at_2", *WHOLE_RANKING))

    def mixed(items: EmbeddingBank) -> EmbeddingBank:
        order = torch.randperm(len(items), generator=generator)
        return EmbeddingBank(items.embeddings[order], items.labels[order])

    names = torch.randint(-(2**62), 2**62, (101,), generator=generator)
    assert len(names.unique()) == 101

    def renamed(items: EmbeddingBank) -> EmbeddingBank:
        return EmbeddingBank(items.embeddings, names[items.labels])

    for change in (mixed, renamed):
        assert_same_figures(tester.test(change(query)), tester.test(query))
        assert_same_figures(tester.test(change(query), change(gallery)), tester.test(query, gallery))
    clusters = RetrievalTester(("NMI", "AMI"))
    assert dict(clusters.test(renamed(query))) == pytest.approx(dict(clusters.test(query)), abs=1e-9)


@given(SETS, st.sampled_from(["default", "cosine", "dot"]))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_rotation_of_all_embeddings_changes_nothing(sizes_and_seed: tuple[dict[int, int], int], ranking: str):
    sizes, seed = sizes_and_seed
    sizes[100] = 3
    query, gallery = bank(sizes, seed, dims=8), bank(sizes | {4: 5}, seed + 1, dims=8)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q

    def rotated(items: EmbeddingBank) -> EmbeddingBank:
        return EmbeddingBank((items.embeddings.double() @ rotation).float(), items.labels)

    tester = RetrievalTester((*METRICS, "recall_at_2", *WHOLE_RANKING), distance=RANKINGS[ranking][0]())
    assert_same_figures(tester.test(rotated(query)), tester.test(query))
    assert_same_figures(tester.test(rotated(query), rotated(gallery)), tester.test(query, gallery))


@given(SETS, st.sampled_from(["default", "normalised", "p=1"]))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_copy_of_each_item_is_its_nearest(sizes_and_seed: tuple[dict[int, int], int], ranking: str):
    query = bank(*sizes_and_seed)
    twice = EmbeddingBank(query.embeddings.repeat(2, 1), query.labels.repeat(2))
    tester = RetrievalTester(("precision_at_1", "mean_reciprocal_rank"), distance=RANKINGS[ranking][0]())
    result = tester.test(twice)
    assert dict(result) == {"precision_at_1": 1, "mean_reciprocal_rank": 1}
    assert (result.num_queries, result.num_left_out) == (len(twice), 0)
    # and a copy of another class the wrong one
    other = EmbeddingBank(twice.embeddings, torch.cat([query.labels, query.labels + 1000]))
    if max(sizes_and_seed[0].values()) > 1:
        result = tester.test(other)
        assert result["precision_at_1"] == 0
        assert result["mean_reciprocal_rank"] <= 0.5
