"""RetrievalTester against the metrics' definitions in explicit loops, and its clusterings against PML."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import ndcg_score
from torch import nn

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation import retrieval
from pml_fewshot.evaluation.gallery import Gallery, IndexRecall
from pml_fewshot.evaluation.retrieval import RetrievalResult, RetrievalTester
from pml_fewshot.evaluation.retrieval_metrics import METRICS, WHOLE_RANKING
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from tests.evaluation.formulas import DISTANCES, RawLp, all_distances
from tests.tiny_experiments import tiny_set

RANKINGS = ["none", "cosine", "normalized", "dot", "p=1"]


def by_definition(
    query: EmbeddingBank,
    gallery: EmbeddingBank | None,
    ranking: str = "none",
    cut: int = 10**9,
    left_out: Callable[[int, int], bool] = lambda i, j: False,
) -> tuple[list[dict[str, float]], int]:
    """(figures of each query that counts, queries excluded), one query at a time; `cut` ends whole rankings."""
    references = query if gallery is None else gallery
    figures, excluded = [], 0
    distances = all_distances(query.embeddings, references.embeddings, ranking)
    for i, label in enumerate(query.labels.tolist()):
        order = distances[i].argsort(kind="stable").tolist()
        order = [j for j in order if (gallery is not None or j != i) and not left_out(i, j)]
        right = [references.labels[j].item() == label for j in order]
        precision = [sum(right[:rank]) / rank for rank in range(1, len(right) + 1)]
        hits, total = [rank for rank, hit in enumerate(right) if hit], sum(right)
        if total == 0:
            excluded += 1
            continue
        before = [rank for rank in hits if rank < cut]
        values = {
            "precision_at_1": precision[0],
            "r_precision": precision[total - 1],
            "mean_average_precision_at_r": sum(precision[rank] for rank in hits if rank < total) / total,
            "mean_average_precision": sum(precision[rank] for rank in before) / total,
            "mean_reciprocal_rank": 1 / (before[0] + 1) if before else 0.0,
        }
        gain = {k: sum(1 / math.log2(2 + rank) for rank in hits if rank < k) for k in (3, 8, cut)}
        best = {k: sum(1 / math.log2(2 + rank) for rank in range(min(total, k))) for k in gain}
        values["ndcg"] = gain[cut] / best[cut]
        for k in (1, 3, 8):
            values[f"recall_at_{k}"] = values[f"cmc_at_{k}"] = float(any(right[:k]))
            values[f"precision_at_{k}"] = sum(right[:k]) / k
        values |= {f"ndcg_at_{k}": gain[k] / best[k] for k in (3, 8)}
        figures.append(values)
    return figures, excluded


def bank(sizes: dict[int, int], seed: int = 0, spread: float = 1.0, dims: int = 5) -> EmbeddingBank:
    """`sizes` items of each class about its own center, in mixed order, at different lengths."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([c for c, size in sizes.items() for _ in range(size)])
    label = label[torch.randperm(len(label), generator=generator)]
    centers = torch.randn(100, dims, generator=torch.Generator().manual_seed(77))
    rows = centers[label % 100] + spread * torch.randn(len(label), dims, generator=generator)
    return EmbeddingBank(rows * (0.5 + torch.rand(len(label), 1, generator=generator)), label)


UNEVEN = {3: 2, 8: 9, 0: 5, 51: 1, 20: 4, 77: 1}  # two of them alone in their class
OF_K = (
    "recall_at_1",
    "recall_at_3",
    "recall_at_8",
    "cmc_at_3",
    "precision_at_3",
    "precision_at_8",
    "ndcg_at_3",
    "ndcg_at_8",
)
ALL = (*METRICS, *OF_K)
EVERY = (*ALL, *WHOLE_RANKING)


def assert_defined(result: RetrievalResult, query: EmbeddingBank, gallery: EmbeddingBank | None, *how: Any) -> None:
    """`how` are the ranking and the cut of `by_definition`."""
    figures, excluded = by_definition(query, gallery, *how)
    assert (result.num_queries, result.num_excluded) == (len(figures), excluded)
    own = query.labels.tolist()
    references = set(gallery.labels.tolist()) if gallery else {c for c in own if own.count(c) > 1}
    assert result.labels.tolist() == [c for c in own if c in references]
    classes = sorted(set(result.labels.tolist()))
    for metric in result:
        values = [each[metric] for each in figures]
        assert result.per_query[metric].tolist() == pytest.approx(values, abs=1e-12), metric
        assert result[metric] == pytest.approx(sum(values) / len(values), abs=1e-12)
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert result.ci95(metric) == pytest.approx(1.96 * error, abs=1e-12)
        means = [np.mean([v for v, c in zip(values, result.labels, strict=True) if c == each]) for each in classes]
        assert result.per_class(metric) == pytest.approx(dict(zip(classes, means, strict=True)), abs=1e-12)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("with_gallery", [False, True])
def test_figures_equal_the_definitions(ranking: str, with_gallery: bool):
    distance = DISTANCES[ranking][0]
    query = bank(UNEVEN | {60: 3})  # class 60 and those of one item have no reference in the gallery
    gallery = bank({3: 2, 8: 9, 0: 5, 20: 4, 4: 12}, seed=5) if with_gallery else None
    result = RetrievalTester(ALL, distance=distance).test(query, gallery)
    assert tuple(result) == ALL
    assert (result.k, result.num_excluded) == ((9, 5) if with_gallery else (8, 2))
    assert result.protocol == ("gallery" if with_gallery else "leave-one-out")
    assert_defined(result, query, gallery, ranking)
    assert 0.1 < result["r_precision"] < 0.9
    assert dict(RetrievalTester(ALL, distance=distance).test(query, reference=gallery)) == dict(result)
    whole = RetrievalTester(EVERY, distance=distance).test(query, gallery)
    assert whole.k == (32 if with_gallery else 24)
    assert_defined(whole, query, gallery, ranking)
    for k in (1, 4):  # those of the whole ranking end there
        tester = RetrievalTester(WHOLE_RANKING, k=k, distance=distance)
        assert_defined(tester.test(query, gallery), query, gallery, ranking, k)


@pytest.mark.parametrize("room", [1, 50, 100, 300])
@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_blocks_of_queries_change_nothing(room: int, index: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retrieval, "MAX_NEIGHBORS", room)  # of 22 queries 1 to 14 at a time
    query = bank(UNEVEN)
    for gallery in (None, bank(UNEVEN | {4: 12}, seed=5)):
        # of so few items ivf has one list
        assert_defined(RetrievalTester(EVERY, index=index).test(query, gallery), query, gallery)


def test_labels_of_all_64_bits_are_distinct():
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.1], [20.0], [21.2]])  # the nearest is always of the other class
    for high in (2**24, 2**53, 2**62, -(2**62)):
        query = EmbeddingBank(rows, torch.tensor([high, high + 1] * 3))
        result = RetrievalTester(("precision_at_1", "r_precision")).test(query)
        assert result["precision_at_1"] == 0
        assert_defined(result, query, None)
        ones = EmbeddingBank(rows, torch.tensor([high] * 5 + [high + 1]))
        assert RetrievalTester("precision_at_1").test(ones).num_excluded == 1
        assert RetrievalTester("precision_at_1").test(ones, query)["precision_at_1"] == 4 / 6


@pytest.mark.parametrize("ranking", ["none", "cosine", "p=1"])
def test_duplicates_of_an_item_count_as_items(ranking: str):
    """An item is known by its index: a copy of another class is a wrong neighbor, one of its class a right one."""
    rows, distance = bank(UNEVEN).embeddings.repeat(2, 1), DISTANCES[ranking][0]
    tester = RetrievalTester(("precision_at_1", "mean_reciprocal_rank"), distance=distance)
    same, other = bank(UNEVEN).labels.repeat(2), torch.arange(2).repeat_interleave(22)
    assert dict(tester.test(EmbeddingBank(rows, same))) == {"precision_at_1": 1, "mean_reciprocal_rank": 1}
    assert tester.test(EmbeddingBank(rows, other))["precision_at_1"] == 0
    # many copies crowd an item out of its own neighbors
    one_class = EmbeddingBank(torch.ones(40, 3), torch.zeros(40, dtype=torch.int64))
    assert dict(RetrievalTester(distance=distance).test(one_class)) == dict.fromkeys(METRICS, 1)


@pytest.mark.parametrize("sizes", [{c: 2 + c for c in range(12)} | {50: 1}, {1: 300, 2: 280}])
def test_clusterings_equal_pml(sizes: dict[int, int]):
    query = bank(sizes, spread=0.7)
    result = RetrievalTester(("NMI", "AMI", "precision_at_1")).test(query)
    assert tuple(result) == ("precision_at_1", "NMI", "AMI")
    calculator = AccuracyCalculator(include=("NMI", "AMI"), k="max_bin_count", device=torch.device("cpu"))
    expected = calculator.get_accuracy(query.embeddings, query.labels)
    assert result.clustering == pytest.approx(expected, abs=1e-9)
    assert {metric: result[metric] for metric in expected} == result.clustering
    assert 0.01 < result["AMI"] < result["NMI"] < 0.99
    assert math.isnan(result.ci95("NMI"))


def test_clusters_are_of_the_queries_normalized_where_the_ranking_is():
    query, gallery = bank({c: 9 for c in range(8)}), bank({c: 3 for c in range(8)}, seed=1)
    normal, plain = (RetrievalTester(("NMI", "AMI")).test(each) for each in (query.normalized(), query))
    assert dict(RetrievalTester(("NMI", "AMI"), distance=CosineSimilarity()).test(query)) == dict(normal)
    assert dict(RetrievalTester(("NMI", "AMI")).test(query, gallery)) == dict(plain) != dict(normal)


def test_places_that_an_approximate_index_leaves_empty_are_misses():
    """The first item's only fellow is far off, at the place that an index of -1 would read."""
    rows, labels = bank({c: 5 for c in range(100)}).embeddings, torch.full((500,), 4)
    labels[0] = labels[-1] = 9
    rows[-1] = rows[0] + 1000
    tester = RetrievalTester(("recall_at_490",), k=498, index="ivf", parameters="nprobe=2")
    assert tester.test(EmbeddingBank(rows, labels)).per_query["recall_at_490"][0] == 0


@pytest.mark.parametrize("with_gallery", [False, True])
def test_the_recall_of_an_index_is_its_overlap_with_the_true_ones(with_gallery: bool, monkeypatch: pytest.MonkeyPatch):
    query = bank({c: 8 for c in range(50)}, dims=16)
    gallery = bank({c: 12 for c in range(50)}, 1, dims=16) if with_gallery else None
    built = Gallery(gallery or query, "IVF9,SQ4", "nprobe=3")
    found = built.search(query.embeddings, 11).indices.tolist()
    distances = ((query.embeddings.double()[:, None] - (gallery or query).embeddings.double()) ** 2).sum(dim=2)
    if not with_gallery:
        found = [[j for j in row if j != i] for i, row in enumerate(found)]
        distances.fill_diagonal_(torch.inf)
    pairs = [(f[:10], true) for f, true in zip(found, distances.argsort(dim=1)[:, :10].tolist(), strict=True)]
    tester = RetrievalTester(("recall_at_1",), k=10, index="IVF9,SQ4", parameters="nprobe=3")
    result = tester.test(query, gallery)
    at_1, at_k = np.mean([f[0] == t[0] for f, t in pairs]), np.mean([len({*f} & {*t}) / 10 for f, t in pairs])
    assert result.index_recall == IndexRecall(pytest.approx(at_1), pytest.approx(at_k), 10, 400)
    assert 0.1 < at_k < 0.99
    assert result.ranking == f"{built}, euclidean, {result.index_recall}"
    monkeypatch.setattr(retrieval, "RECALL_SAMPLE", 50)
    assert tester.test(query, gallery).index_recall == IndexRecall(*[pytest.approx(at_k, abs=0.2)] * 2, 10, 50)


def test_the_recall_counts_places_left_empty_as_misses():
    recall = IndexRecall.of(torch.tensor([[3, 1, -1], [-1, -1, -1]]), torch.tensor([[3, 2, 1], [0, 1, 2]]))
    assert recall == IndexRecall(0.5, pytest.approx(2 / 6), 3, 2)
    fewer = IndexRecall.of(torch.tensor([[3, -1], [0, 5], [-1, -1]]), torch.tensor([[3, -1], [2, 5], [-1, -1]]))
    assert fewer == IndexRecall(0.5, pytest.approx(2 / 3), 2, 3)  # where fewer are left, none of them is missed


@pytest.mark.parametrize(("index", "ranking"), [("flat", "none"), ("Flat", "normalized"), ("flat", "dot")])
def test_flat_is_exact_by_either_name_in_tester_and_gallery(index: str, ranking: str):
    distance = DISTANCES[ranking][0]
    query, reference = bank({3: 6, 8: 2, 0: 5, 60: 3}), bank({c: 3 + c % 5 for c in range(20)}, seed=5)
    exact = RetrievalTester(EVERY, index=index, distance=distance).test(query, reference)
    assert exact.index_recall is None
    assert exact.ranking.startswith("exact, ")
    assert_defined(exact, query, reference, ranking)
    gallery = Gallery(reference, index, distance=distance)
    for own in (distance, None):  # without one, by the gallery's
        result = RetrievalTester(EVERY, distance=own).test(query, gallery)
        assert result.ranking.startswith("Flat, ")
        assert (result.index_recall, result.protocol, result.num_excluded) == (None, "gallery", 3)
        assert_defined(result, query, reference, ranking)


def test_a_flat_gallery_ranks_by_any_distance():
    query, reference = bank({3: 6, 8: 2, 0: 5}), bank({c: 3 + c % 5 for c in range(20)}, seed=5)
    gallery = Gallery(reference, "flat", distance=RawLp(p=1))
    for own in (None, RawLp(p=1)):
        assert_defined(RetrievalTester(EVERY, distance=own).test(query, gallery), query, reference, "p=1")
    with pytest.raises(UsageError, match=r"^expected a gallery ranked by LpDistance\(p=3, .*, got LpDistance\(p=1, "):
        RetrievalTester(distance=RawLp(p=3)).test(query, gallery)


def test_a_gallery_of_another_ranking_is_refused():
    query = bank(UNEVEN)
    plain = Gallery(query, "flat", distance=RawLp())
    for distance in (LpDistance(), CosineSimilarity(), RawLp(p=1)):
        with pytest.raises(UsageError, match=r"^expected a gallery ranked by .*, got LpDistance\(p=2, power=1\);"):
            RetrievalTester(distance=distance).test(query, plain)


def test_the_same_bank_as_reference_is_a_gallery_in_which_each_finds_itself():
    query = bank(UNEVEN)
    for reference in (query, bank(UNEVEN), Gallery(query, "flat")):
        result = RetrievalTester((*METRICS, "mean_reciprocal_rank")).test(query, reference)
        assert (result["precision_at_1"], result["mean_reciprocal_rank"]) == (1, 1)
        assert (result.num_queries, result.num_excluded) == (22, 0)
        assert_defined(result, query, query)
    assert RetrievalTester().test(query)["precision_at_1"] < 1


def test_an_embedder_is_evaluated_on_its_embeddings():
    dataset, other = tiny_set("a", 3, seed=0), tiny_set("a", 3, seed=1)
    embedder, tester = Embedder(nn.Flatten()), RetrievalTester()
    query, gallery = embedder.encode(dataset), embedder.encode(other)
    assert dict(tester.test(embedder, dataset)) == dict(tester.test(query))
    for reference in (other, gallery, Gallery(gallery, "flat")):
        assert dict(tester.test(embedder, dataset, reference)) == dict(tester.test(query, gallery))


def test_k_is_the_largest_class_unless_a_recall_needs_more():
    query = bank(UNEVEN)
    assert RetrievalTester(("precision_at_1",)).test(query).k == 8
    assert RetrievalTester(("recall_at_15",)).test(query).k == 15
    for metric in ("precision_at_15", "cmc_at_15", "ndcg_at_15"):
        assert RetrievalTester(metric).test(query).k == 15
    assert RetrievalTester(("precision_at_1", "recall_at_4"), k=4).test(query).k == 4
    assert RetrievalTester(k=20).test(query)["r_precision"] == RetrievalTester().test(query)["r_precision"]
    assert RetrievalTester(("recall_at_21",)).test(query)["recall_at_21"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"metrics": ()}, "at least one metric, got none"),
        ({"metrics": "r_precison"}, "metric as one of .*, got 'r_precison'; did you mean 'r_precision'"),
        ({"metrics": "recall_at_0"}, "metric as one of .*, got 'recall_at_0'; did you mean 'recall_at_1'"),
        ({"metrics": ("recall_at_1\n",)}, "metric as one of "),
        ({"metrics": "precison_at_5"}, "metric as one of .*, got 'precison_at_5'; did you mean 'precision_at_"),
        ({"metrics": "ndgc_at_10"}, "metric as one of .*, got 'ndgc_at_10'; did you mean 'ndcg_at_1"),
        ({"metrics": "recall_at_22"}, "k of at most 21, as many as there are to find, got 22 for recall_at_22"),
        ({"k": 22}, "k of at most 21, as many as there are to find, got 22 for precision_at_1"),
        ({"k": 7}, "k of at least 8 for .*, got 7; use 'max_bin_count'"),
        ({"k": 0}, "k to be an integer of at least 1, got 0"),
        ({"k": "max_bin"}, "k as one of 'max_bin_count', got 'max_bin'; did you mean"),
        ({"index": "hnws"}, "index as one of .*, got 'hnws'; did you mean 'hnsw'"),
        ({"index": "IVF4,Nonsense"}, "an index and parameters that faiss can build, got 'IVF4,Nonsense'"),
        (
            {"index": "ivf", "distance": LpDistance(p=1)},
            "Euclidean distance, cosine or dot product for index 'ivf', got LpDist",
        ),
    ],
)
def test_wrong_arguments_of_the_tester_are_refused(arguments: dict[str, Any], says: str):
    with pytest.raises(UsageError, match=f"^expected {says}"):
        RetrievalTester(**arguments).test(bank(UNEVEN))  # 22 items, 21 others


def test_ndcg_equals_scikit_learn():
    query, gallery = bank(UNEVEN), bank({3: 2, 8: 9, 0: 5, 20: 4, 4: 12, 51: 1, 77: 1}, seed=5)
    result = RetrievalTester(("ndcg", "ndcg_at_5", "ndcg_at_20")).test(query, gallery)
    right = (query.labels[:, None] == gallery.labels).numpy()
    nearness = -all_distances(query.embeddings, gallery.embeddings)
    for metric, k in (("ndcg", None), ("ndcg_at_5", 5), ("ndcg_at_20", 20)):
        expected = [ndcg_score([row], [near], k=k) for row, near in zip(right, nearness, strict=True)]
        assert result.per_query[metric].tolist() == pytest.approx(expected, abs=1e-12)


def marks(count: int, kinds: int, seed: int) -> torch.Tensor:
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed))


@given(
    ids=st.sampled_from([0, 1, 4, 40]),  # how many different ones; 0: none are given
    groups=st.sampled_from([0, 2, 5]),
    within=st.booleans(),
    references=st.sampled_from(["bank", "gallery", "ivf"]),
    cut=st.booleans(),
    num_queries=st.sampled_from([None, 13]),
    room=st.sampled_from([80, 10**6]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_figures_without_own_ids_and_groups_equal_a_loop(
    ids: int, groups: int, within: bool, references: str, cut: bool, num_queries: int | None, room: int, seed: int
):
    query = bank({3: 2, 8: 9, 0: 5, 51: 1, 20: 4}, seed)
    gallery = None if within else bank({8: 6, 0: 9, 20: 3, 3: 5, 4: 12}, seed + 1)
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, kinds in (("ids", ids), ("groups", groups)):
        if kinds:
            own = marks(len(query), kinds, seed)
            pairs[name] = (own, own if gallery is None else marks(len(gallery), kinds, seed + 1))
    sides = ("query",) if within else ("query", "reference")
    given_marks = {f"{side}_{name}": pairs[name][at] for name in pairs for at, side in enumerate(sides)}

    def left_out(i: int, j: int) -> bool:
        return any(own[i] == other[j] for own, other in pairs.values())

    everything = gallery or query
    count = torch.tensor(
        [[not left_out(i, j) and not (within and i == j) for j in range(len(everything))] for i in range(len(query))]
    )
    right = count & (query.labels[:, None] == everything.labels)
    findable, k = int(count.sum(dim=1).max()), max(8, int(right.sum(dim=1).max()))
    # of so few items ivf has one list
    index = "ivf" if references == "ivf" else "flat"
    tester = RetrievalTester(EVERY, k if cut else "max_bin_count", index, num_queries=num_queries)
    target = Gallery(gallery, "flat") if gallery is not None and references == "gallery" else gallery
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "MAX_NEIGHBORS", room)
        if not right.any() or k > findable:
            says = f"k of at most {findable}, " if right.any() else "a query whose class is among the references"
            with pytest.raises(UsageError, match=f"^expected {says}"):
                tester.test(query, target, **given_marks)
            return
        result = tester.test(query, target, **given_marks)
    chosen = torch.arange(len(query))
    if num_queries:
        chosen = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))[:num_queries].sort().values
    part = EmbeddingBank(query.embeddings[chosen], query.labels[chosen])
    rules = "none", k if cut else 10**9, lambda i, j: not count[chosen[i], j]
    figures, excluded = by_definition(part, everything, *rules)
    assert (result.num_queries, result.num_excluded, result.k) == (len(figures), excluded, k if cut else findable)
    for metric in EVERY:
        assert result.per_query[metric].tolist() == pytest.approx([each[metric] for each in figures], abs=1e-12)
    assert (" left out" in result.ranking) == bool(pairs)


@pytest.mark.parametrize("a_gallery", [False, True])
def test_ids_and_groups_may_be_texts_of_any_container(a_gallery: bool):
    query, reference = bank(UNEVEN), bank({3: 4, 8: 6, 0: 5, 20: 4}, seed=3)
    own, other = marks(len(query), 6, 0), marks(len(reference), 6, 1) + 2
    searched = Gallery(reference, "flat") if a_gallery else reference
    tester = RetrievalTester(("mean_average_precision", "cmc_at_3"))
    expected = tester.test(query, searched, query_ids=own, reference_ids=other)
    assert expected.ranking.endswith("euclidean, own ids left out")
    assert expected["mean_average_precision"] != tester.test(query, searched)["mean_average_precision"]
    for convert in (
        lambda values: values.tolist(),
        lambda values: values.numpy().astype(np.uint8),
        lambda values: [f"photo {value}" for value in values.tolist()],
        lambda values: np.array([str(value) for value in values.tolist()], dtype=object),
    ):
        result = tester.test(query, searched, query_ids=convert(own), reference_ids=convert(other))
        assert (dict(result), result.num_excluded) == (dict(expected), expected.num_excluded)
    assert dict(tester.test(query, searched, query_groups=own, reference_groups=other)) == dict(expected)


def test_results_without_other_items_are_of_other_queries():
    query, tester = bank(UNEVEN), RetrievalTester("r_precision")
    own, other = marks(len(query), 6, 0), marks(len(query), 6, 1)
    given_marks = ({}, {"query_ids": own}, {"query_groups": other}, {"query_ids": own, "query_groups": other})
    results = [tester.test(query, **each) for each in given_marks]
    assert len({result.queries_hash for result in results}) == 4
    again = tester.test(query, query_ids=own.tolist())
    assert again.queries_hash == results[1].queries_hash
    for result, what in zip(results[1:], ("ids", "groups", "ids and groups"), strict=True):
        assert result.ranking == f"exact, euclidean, own {what} left out"


def test_leaving_out_every_item_by_itself_is_leave_one_out():
    query = bank(UNEVEN)
    plain, by_id = (RetrievalTester(EVERY).test(query, **each) for each in ({}, {"query_ids": range(len(query))}))
    assert (dict(plain), plain.k, plain.num_excluded) == (dict(by_id), by_id.k, by_id.num_excluded)
    against = RetrievalTester(EVERY).test(query, query, query_ids=range(22), reference_ids=range(22))
    assert (dict(plain), plain.k) == (dict(against), against.k)


def test_ids_and_groups_that_fit_no_side_are_refused():
    query, reference = bank(UNEVEN), bank({3: 4, 8: 6})
    for banks, given_marks, says in (
        ((query, reference), {"query_ids": range(22)}, "query_ids and reference_ids, got query_ids alone; give both"),
        ((query, reference), {"reference_groups": range(10)}, "query_groups and .*, got reference_groups alone"),
        ((query,), {"query_ids": range(22), "reference_ids": range(22)}, "query_ids alone, got reference_ids, but the"),
        ((query,), {"query_groups": range(21)}, r"query_groups labels of shape \(22,\), got shape \(21,\)"),
        ((query, reference), {"query_ids": range(22), "reference_ids": range(9)}, r"reference_ids .* got shape \(9,\)"),
        ((query,), {"query_ids": [0.5] * 22}, "query_ids labels as integers or texts, got list of float64"),
        (
            (query, reference),
            {"query_ids": ["a"] * 22, "reference_ids": range(10)},
            "query_ids and reference_ids both as integers or both as texts, got texts as query_ids alone",
        ),
        (
            (query,),
            {"query_ids": [1] * 22},
            "a query whose class is among the references, got none; check the labels, ",
        ),
    ):
        with pytest.raises(UsageError, match=f"^expected {says}"):
            RetrievalTester().test(*banks, **given_marks)


@pytest.mark.parametrize("gallery", [False, True])
def test_a_sample_of_the_queries_has_the_values_that_they_have_among_all(gallery: bool):
    query, reference = bank(UNEVEN), (bank({3: 4, 8: 6, 0: 5}),) * gallery
    whole, part = (RetrievalTester(num_queries=count).test(query, *reference) for count in (None, 13))
    chosen = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))[:13].sort().values
    counted = torch.isin(query.labels, whole.labels)
    place = (counted.cumsum(0) - 1)[chosen[counted[chosen]]]
    assert (part.num_queries, part.num_excluded) == (len(place), 13 - len(place))
    assert part.num_excluded > 0
    assert torch.equal(part.labels, whole.labels[place])
    for metric in whole:
        assert torch.equal(part.per_query[metric], whole.per_query[metric][place])
    assert part.queries_hash != whole.queries_hash
    assert RetrievalTester(num_queries=10**6).test(query, *reference).per_query.keys() == whole.per_query.keys()
    with pytest.raises(UsageError, match="num_queries to be an integer of at least 1, got 0"):
        RetrievalTester(num_queries=0)


def test_sets_that_cannot_be_searched_are_refused():
    query, tester = bank(UNEVEN), RetrievalTester()
    for banks, says in (
        ((query, bank(UNEVEN, dims=3)), "expected references of 5 dimensions, got 3"),
        ((query, bank({1: 30})), "expected a query whose class is among the references, got none"),
        ((bank({1: 1, 2: 1}),), "expected a query whose class is among the references, got none"),
        ((query, query, query), "expected a bank and at most one reference, got two"),
    ):
        with pytest.raises(UsageError, match=says):
            tester.test(*banks)
    dataset = tiny_set("a", 3, seed=0)
    for embedder, source in (
        (Embedder(nn.Flatten()), None),
        (query, dataset),
        (ProtoNetTrainer(nn.Flatten()), dataset),
    ):
        with pytest.raises(UsageTypeError, match="expected an Embedder with a data set, or an EmbeddingBank alone"):
            tester.test(embedder, source)
    query.embeddings[4, 1] = query.embeddings[9, 0] = torch.nan
    says = "got NaN or infinity in 2 of 22 rows, first in row 4"
    for reference in (None, bank(UNEVEN), Gallery(bank(UNEVEN), "flat")):
        with pytest.raises(UsageError, match=rf"^expected finite query embeddings, {says}"):
            RetrievalTester().test(query, reference)
    with pytest.raises(UsageError, match=rf"^expected finite reference embeddings, {says}"):
        RetrievalTester().test(bank(UNEVEN), query)


def test_a_sample_of_which_no_query_counts_is_taken_of_those_that_do():
    bank = EmbeddingBank(torch.rand(202, 4, generator=torch.Generator().manual_seed(0)), [*range(200), 200, 200])
    result = RetrievalTester("precision_at_1", num_queries=5).test(bank)
    whole = RetrievalTester("precision_at_1").test(bank)
    assert (result.num_queries, dict(result)) == (2, dict(whole))
