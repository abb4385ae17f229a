"""RetrievalTester against the metrics' definitions in explicit loops, and against PML where PML is right."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn

from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.retrieval import METRICS, RetrievalResult, RetrievalTester

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
    query: EmbeddingBank, gallery: EmbeddingBank | None, metric: str, far: Far = euclid
) -> tuple[list[float], int]:
    """(value of each judged query, queries left out): each metric from its definition, one query at a time."""
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


def assert_equal_to_definition(
    result: RetrievalResult, query: EmbeddingBank, gallery: EmbeddingBank | None, far: Far = euclid
) -> None:
    for metric in result:
        values, left_out = by_definition(query, gallery, metric, far)
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
    result = RetrievalTester((*METRICS, "recall_at_1")).test(query, reference=gallery)
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


@pytest.mark.parametrize("ranking", ["Euclid", "cosine", "dot", "p=1"])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_easy_inputs_equal_pml(ranking: str, with_gallery: bool):
    from pytorch_metric_learning.utils.inference import CustomKNN

    distance = RANKINGS[ranking][0]()
    query = bank({c: 6 for c in range(8)}, spread=0.8)
    gallery = bank({c: 7 for c in range(8)}, seed=9, spread=0.8) if with_gallery else None
    calculator = AccuracyCalculator(include=METRICS, k="max_bin_count", knn_func=CustomKNN(distance, batch_size=16))
    expected = (
        calculator.get_accuracy(query.embeddings, query.labels, gallery.embeddings, gallery.labels)
        if gallery is not None
        else calculator.get_accuracy(query.embeddings, query.labels)
    )
    result = RetrievalTester(distance=distance).test(query, reference=gallery)
    assert dict(result) == pytest.approx(expected, abs=1e-6)


def clustered(count: int, seed: int) -> EmbeddingBank:
    generator = torch.Generator().manual_seed(seed)
    centres = 1.8 * torch.randn(60, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(60, (count,), generator=generator)
    return EmbeddingBank(centres[labels] + torch.randn(count, 16, generator=generator), labels)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("ranking", ["default", "cosine"])
def test_approximate_indices_give_nearly_the_exact_figures(index: str, with_gallery: bool, ranking: str):
    query = clustered(1500, 0)
    gallery = clustered(2500, 1) if with_gallery else None
    exact, near = (
        RetrievalTester(index=kind, distance=RANKINGS[ranking][0]()).test(query, reference=gallery)  # type: ignore[arg-type]
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


def test_an_embedder_is_judged_on_its_embeddings():
    images = torch.randint(0, 256, (12, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = FewShotDataset(images, torch.arange(12) % 3, list("abc"))
    other = FewShotDataset(images.flip(0), torch.arange(12) % 3, list("abc"))
    embedder = Embedder(nn.Flatten())
    tester = RetrievalTester()
    query, gallery = embedder.encode(dataset), embedder.encode(other)
    assert dict(tester.test(embedder, dataset)) == dict(tester.test(query))
    for reference in (other, gallery):
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
        ("NMI", "choose one of them"),
    ],
)
def test_an_unknown_metric_is_refused_with_the_nearest_name(metric: str, hint: str):
    with pytest.raises(ValueError, match=f"expected metric as one of .*, got .*; .*{hint}"):
        RetrievalTester((metric,))


def test_other_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one metric, got none"):
        RetrievalTester(())
    with pytest.raises(ValueError, match="expected index as one of 'flat', 'ivf', 'hnsw', got 'pq'"):
        RetrievalTester(index="pq")  # type: ignore[arg-type]
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


def test_embeddings_that_became_nan_are_refused():
    query = bank(UNEVEN)
    query.embeddings[4] = float("nan")  # after the bank was made
    with pytest.raises(ValueError, match="expected finite query embeddings, got NaN or infinity in 1 of 22 rows"):
        RetrievalTester().test(query)
    with pytest.raises(ValueError, match="expected finite reference embeddings"):
        RetrievalTester().test(bank(UNEVEN), reference=query)


def test_a_result_is_a_mapping_that_reads_with_its_count():
    result = RetrievalResult({"precision_at_1": torch.tensor([1.0, 0.0]).double()}, num_left_out=3, k=4)
    assert len(result) == 1
    assert dict(result) == {"precision_at_1": 0.5}
    assert repr(result) == "RetrievalResult({'precision_at_1': 0.5}, 2 queries, k=4)"
    with pytest.raises(KeyError):
        result["r_precision"]
    assert math.isnan(RetrievalResult({"precision_at_1": torch.ones(1)}, 0, 1).ci95("precision_at_1"))


def test_a_distance_may_be_a_factory():
    query = bank(UNEVEN)
    factory = partial(LpDistance, p=1, normalize_embeddings=False)
    assert dict(RetrievalTester(distance=factory).test(query)) == dict(RetrievalTester(distance=factory()).test(query))


def test_the_order_of_the_items_changes_nothing():
    query = bank(UNEVEN)
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))
    mixed = EmbeddingBank(query.embeddings[order], query.labels[order])
    for metric, value in RetrievalTester(ALL).test(mixed).items():
        assert value == pytest.approx(RetrievalTester(ALL).test(query)[metric], abs=1e-12)
