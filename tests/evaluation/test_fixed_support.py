"""evaluate_fixed against a plain loop, and benchmark's tables of sets that share their classes."""

from functools import partial

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.fixed_support import evaluate_fixed
from pml_fewshot.evaluation.heads import nearest_prototype
from pml_fewshot.evaluation.transductive_heads import pt_map
from tests.tiny_experiments import EMBEDDER


def bank(names: str, each: int, seed: int) -> EmbeddingBank:
    """Rows around a point of each class, the class's own in every bank."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.tensor([[ord(name) % 5, ord(name) % 3, ord(name) % 7] for name in names]).float()
    rows = points.repeat_interleave(each, 0) + 1.5 * torch.randn(len(names) * each, 3, generator=generator)
    return EmbeddingBank(rows, torch.arange(len(names)).repeat_interleave(each), class_names=tuple(names))


@pytest.mark.parametrize("shots", [None, 2])
def test_every_query_is_classified_by_the_nearest_mean_of_the_support(shots: int | None):
    support, query = bank("dabc", 5, 0), bank("abcd", 90, 1)  # more than are classified at a time
    result = evaluate_fixed(support, support, query, shots=shots)
    names = [support.class_names[label] for label in support.labels]
    correct = []
    for row, label in zip(query.embeddings, query.labels, strict=True):
        means = {name: support.embeddings[[n == name for n in names]][:shots].double().mean(0) for name in "abcd"}
        nearest = min(means, key=lambda name: float(((row - means[name]) ** 2).sum()))
        correct.append(nearest == query.class_names[label])
    assert 0.3 < np.mean(correct) < 0.95
    assert result.per_query["accuracy"].tolist() == correct
    assert result["accuracy"] == pytest.approx(np.mean(correct))
    assert result.ci95("accuracy") == pytest.approx(1.96 * np.std(correct, ddof=1) / 360**0.5)
    assert result.per_class("accuracy")["b"] == pytest.approx(np.mean(correct[90:180]))
    assert f"4 classes of {shots or 5} support items, nearest_prototype" in result.ranking


def test_a_head_is_used_in_place_of_the_methods_own():
    support, query = bank("abcd", 3, 0), bank("abcd", 20, 1)
    head = partial(nearest_prototype, distance=CosineSimilarity())
    result = evaluate_fixed(support, support, query, head)
    logits = head(support.embeddings.view(1, 4, 3, 3), query.embeddings[None])[0]
    assert result.per_query["accuracy"].tolist() == (logits.argmax(1) == query.labels).tolist()
    assert "CosineSimilarity" in result.ranking


def images(names: str, each: int, seed: int) -> FewShotDataset:
    pixels = torch.randint(256, (len(names) * each, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
    return FewShotDataset(pixels.to(torch.uint8), torch.arange(len(names)).repeat_interleave(each), list(names))


def test_a_table_has_retrieval_and_fixed_figures_of_classes_that_were_seen():
    embedder: Embedder = EMBEDDER()
    splits = Splits(images("abcdef", 4, 0), None, images("fedcba", 20, 1), shared_classes=True)
    table = benchmark(embedder, splits, (), num_episodes=20, reference=splits.train, support=splits.train)
    rows = {row.figure: row for row in table.rows}
    assert {row.protocol for row in table.rows} == {"gallery", "fixed support"}
    assert {row.note for row in table.rows} == {"classes seen in training"}
    expected = evaluate_fixed(embedder, splits.train, splits.test)
    assert (rows["accuracy"].value, rows["accuracy"].count) == (expected["accuracy"], 120)
    train, test = embedder.encode(splits.train), embedder.encode(splits.test)
    nearest = torch.cdist(test.embeddings, train.embeddings).argmin(dim=1)
    right = [
        train.class_names[train.labels[n]] == test.class_names[q] for n, q in zip(nearest, test.labels, strict=True)
    ]
    assert rows["precision_at_1"].value == pytest.approx(np.mean(right))
    assert "120 queries, fixed support, 6 classes of 4 support items" in str(table)


def test_where_there_is_no_test_set_the_table_says_val():
    splits = Splits.of({"train": images("abc", 8, 0), "val": images("defghi", 20, 1)})
    table = benchmark(EMBEDDER(), splits, retrieval=None, num_episodes=20)
    assert {(row.split, row.classes) for row in table.rows} == {("val", 6)}


def test_supports_that_do_not_fit_are_errors():
    query = bank("abcd", 4, 1)
    uneven = EmbeddingBank(torch.rand(5, 3), [0, 0, 1, 1, 1], class_names=("a", "b"))
    for support, shots, message in (
        (uneven, None, r"the same number of support items of each class, got 2 to 3; give shots=2 to take the first"),
        (uneven, 3, "expected 3 support items of each class, got 2 to 3"),
        (uneven, 2, r"support of each query's class, got none of class 'c' \(8 queries have no class there\); add it"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate_fixed(support, support, query, shots=shots)


def test_a_set_is_not_evaluated_by_itself():
    data = images("abcd", 6, 0)
    for given, message in (
        ({"reference": data}, "other references than"),
        ({"support": data}, "other items as support"),
    ):
        with pytest.raises(UsageError, match=f"{message} .*, got the same"):
            benchmark(EMBEDDER(), data, (), **given)
    with pytest.raises(UsageError, match="shots to be an integer of at least 1, got 0"):
        evaluate_fixed(EMBEDDER(), data, images("abcd", 6, 1), shots=0)


def test_a_transductive_head_sees_all_queries_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    centers, labels = torch.randn(4, 6, generator=generator), torch.arange(600) // 150
    items = centers[labels] + torch.randn(600, 6, generator=generator)
    support = EmbeddingBank(centers + 0.5 * torch.randn(4, 6, generator=generator), torch.arange(4))
    order = torch.randperm(600, generator=generator)
    results = [
        evaluate_fixed(support, support, EmbeddingBank(items[o], labels[o]), head=pt_map) for o in (order, range(600))
    ]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=0.01)
    assert results[0].ranking.endswith("pt_map, transductive")
