"""benchmark: the same figures as evaluator and tester give on their own, for every kind of method."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.benchmark import SPECS, benchmark
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.heads import nearest_neighbour, nearest_prototype
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.search import Ranking
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from tests.tiny_experiments import tiny_set

QUICK = (EpisodeSpec(3, 1, 4), EpisodeSpec(4, 3, 4))
EPISODES = 25
RETRIEVAL = ["precision_at_1", "r_precision", "mean_average_precision_at_r"]


DATA = tiny_set("test", 6, seed=0)


def embedder(seed: int = 0) -> Embedder:
    layer = nn.Linear(16, 2, bias=False)
    layer.weight.data = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    return Embedder(nn.Sequential(nn.Flatten(), layer))


def cosine_trainer() -> ProtoNetTrainer:
    return ProtoNetTrainer(embedder(), PrototypicalLoss(distance=CosineSimilarity(), scale=10))


class Adapting:
    """Like MAML: its bank is of images, and each query is classified by pixels."""

    transductive = True

    def bank(self, dataset: FewShotDataset) -> Tensor:
        return dataset.images

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        return nearest_prototype(support.flatten(3), query.flatten(2))


quick = partial(benchmark, specs=QUICK, num_episodes=EPISODES, seed=3)


def values(table: ResultTable, method: str | None = None) -> dict[str, tuple[float, float]]:
    """Figure -> value and interval, of one method."""
    rows = [row for row in table.rows if method in (None, row.method)]
    return {f"{row.ways}-way" if row.ways else row.figure: (row.value, row.ci95) for row in rows}


def directly(method: Any, data: Any, bank: EmbeddingBank | None, tester: RetrievalTester) -> dict[str, Any]:
    """The same by evaluator and tester themselves."""
    results = [EpisodicEvaluator(spec, EPISODES, seed=3).evaluate(method, data) for spec in QUICK]
    found = {f"{result.spec.ways}-way": (result.mean, result.ci95) for result in results}
    if bank is not None:
        retrieved = tester.test(bank)
        found |= {metric: (retrieved[metric], retrieved.ci95(metric)) for metric in retrieved}
    return found


def same(a: dict[str, tuple[float, float]], b: dict[str, tuple[float, float]]) -> bool:
    assert list(a) == list(b)
    return all(math.isclose(x, y, abs_tol=1e-12) for name in a for x, y in zip(a[name], b[name], strict=True))


def test_every_kind_of_method_has_the_figures_of_evaluator_and_tester():
    bank, cosine = embedder().encode(DATA), RetrievalTester(distance=CosineSimilarity())
    methods: dict[str, Any] = {"b": cosine_trainer(), "a": embedder(), "bank": bank, "adapting": Adapting()}
    table = quick(methods, DATA)
    assert [row.method for row in table.rows] == ["b"] * 5 + ["a"] * 5 + ["bank"] * 5 + ["adapting"] * 2
    assert [row.figure for row in table.rows[:5]] == ["accuracy", "accuracy", *RETRIEVAL]
    assert same(values(table, "b"), directly(methods["b"], DATA, bank, cosine))
    assert same(values(table, "a"), directly(embedder(), DATA, bank, RetrievalTester()))
    assert same(values(table, "bank"), values(table, "a"))
    assert same(values(table, "adapting"), directly(Adapting(), DATA, None, cosine))  # images cannot be ranked
    assert not same(values(table, "b"), values(table, "a"))  # which are by Euclid
    assert 0.4 < table.rows[0].value < 0.99  # neither chance nor all right, which anything would agree on
    assert len({row.episodes_hash for row in table.rows if row.ways == 3}) == 1
    for row in table.rows:
        assert (row.count, row.seed) == ((EPISODES, 3) if row.ways else (len(DATA), None))
        assert (row.split, row.classes, row.trained) == ("", 6, 1)
        by = f"nearest_prototype by {Ranking.of(CosineSimilarity())}" if row.method == "b" else "nearest_prototype"
        assert row.classifier == ("Adapting" if row.method == "adapting" else by if row.ways else "")
        assert len(row.values) == row.count
        assert row.values.mean().item() == pytest.approx(row.value)
        assert row.note == "made up"
    assert {row.protocol for row in table.rows if row.method == "adapting"} == {"transductive"}
    assert "| adapting (transductive) |" in table.markdown()


def test_trainings_of_one_method_are_averaged():
    trainings = [embedder(seed) for seed in range(3)]
    table = quick({"three": trainings, "tuple": tuple(trainings)}, DATA)
    single = [values(quick(training, DATA)) for training in trainings]
    assert len({each["3-way"] for each in single}) == 3
    for name in ("three", "tuple"):
        for figure, (value, ci95) in values(table, name).items():
            assert value == pytest.approx(sum(each[figure][0] for each in single) / 3, abs=1e-12)
            assert ci95 > 0
    assert {row.trained for row in table.rows} == {3}


def test_splits_are_evaluated_on_their_test_classes_and_classes_counted_by_label():
    splits = Splits(tiny_set("train", 6, seed=1), tiny_set("val", 5, seed=2), DATA)
    assert same(values(quick(embedder(), splits)), values(quick(embedder(), DATA)))
    for name, part in vars(splits).items():
        table = quick(embedder(), splits, split=name)
        assert same(values(table), values(quick(embedder(), part)))
        assert {(row.split, row.classes) for row in table.rows} == {(name, len(part.class_names))}
    rows = quick({"bank": embedder().encode(splits.train), "embedder": embedder()}, splits).rows
    assert {(row.method, row.split) for row in rows} == {("bank", ""), ("embedder", "test")}  # a bank brings its own
    for data in (DATA, None):
        with pytest.raises(UsageTypeError, match="expected Splits to take val from, got a"):
            quick(embedder().encode(DATA), data, split="val")
    bank = EmbeddingBank(embedder().encode(DATA).embeddings, DATA.labels * 1000 + 2**60)
    assert {row.classes for row in quick(bank).rows} == {6}


def test_methods_are_evaluated_in_eval_mode():
    class Dropping(nn.Dropout):
        classify = staticmethod(nearest_prototype)

        def bank(self, dataset: FewShotDataset) -> Tensor:
            return self(dataset.images.flatten(1) / 255)

    method = Dropping(0.9)
    in_training = values(quick(method, DATA))
    assert method.training
    assert same(in_training, values(quick(method.eval(), DATA)))


def test_retrieval_ranks_by_the_loss_unless_the_tester_has_a_distance():
    bank, own = embedder().encode(DATA), LpDistance(normalize_embeddings=False, p=1)
    by_cosine, by_default, by_own = (
        RetrievalTester(distance=distance).test(bank).ranking for distance in (CosineSimilarity(), None, own)
    )
    assert len({by_cosine, by_default, by_own}) == 3
    default, mine = (by_cosine, by_default), (by_own, by_own)
    testers = ((RetrievalTester(), default), (RetrievalTester, default), (RetrievalTester(distance=own), mine))
    for tester, (cosine, euclidean) in testers:
        before = getattr(tester, "distance", None)
        table = quick({"cosine": cosine_trainer(), "euclidean": embedder()}, DATA, retrieval=tester)
        rankings = {row.method: row.ranking for row in table.rows if row.ranking}
        assert rankings == {"cosine": cosine, "euclidean": euclidean}  # the loss of the first is not carried over
        assert getattr(tester, "distance", None) is before


def test_a_head_replaces_every_methods_own_and_gets_its_distance():
    methods = {"trainer": cosine_trainer(), "bank": embedder().encode(DATA)}
    own, table = quick(methods, DATA), quick(methods, DATA, head=nearest_prototype)
    for name in methods:
        assert same(values(table, name), values(own, name))
    neighbours = quick(methods, DATA, head=lambda support, query: nearest_neighbour(support, query))
    evaluators = [EpisodicEvaluator(spec, EPISODES, 3, head=nearest_neighbour) for spec in QUICK]
    expected = [evaluator.evaluate(methods["bank"]).mean for evaluator in evaluators]
    for name in methods:  # by Euclid alike
        assert [row.value for row in neighbours.rows if row.method == name][:2] == expected


def test_retrieval_over_a_reference_is_called_gallery_and_can_be_left_out():
    bank, other = embedder().encode(DATA), embedder().encode(tiny_set("other", 6, seed=5))
    reference = replace(other, class_names=bank.class_names)
    exact = RetrievalTester().test(bank, reference)
    rows = [row for row in quick(bank, reference=reference).rows if row.ways is None]
    assert {row.protocol for row in rows} == {"gallery"}
    assert [row.value for row in rows] == pytest.approx([exact[row.figure] for row in rows], abs=1e-12)
    assert {row.protocol for row in quick(bank).rows if row.ways is None} == {"leave-one-out"}
    assert [row.figure for row in quick(embedder(), DATA, retrieval=None).rows] == ["accuracy"] * 2


def test_notes_of_the_set_and_of_the_caller_reach_the_table():
    assert {row.note for row in quick(embedder(), DATA, note="half trained").rows} == {"made up; half trained"}
    unnoted = FewShotDataset(DATA.images, DATA.labels, DATA.class_names)
    rows = quick(embedder(), unnoted, note="half trained").rows
    assert {(row.method, row.note) for row in rows} == {("Embedder", "half trained")}


def test_seconds_hold_all_that_a_method_took_and_untimed_tables_are_the_same():
    table = quick({"a": embedder(), "b": Adapting()}, DATA)
    taken = {(row.method, row.seconds) for row in table.rows}
    assert len(taken) == 2  # a figure of the method, not of the row
    assert all(seconds > 0 for _, seconds in taken)
    first, second = (quick({"a": embedder(), "b": Adapting()}, DATA, timed=False) for _ in range(2))
    assert {row.seconds for row in first.rows} == {None}
    for text in (ResultTable.markdown, ResultTable.csv, ResultTable.figures_csv):
        assert text(first) == text(second)


def test_specs_are_those_of_papers_when_not_given():
    table = benchmark(embedder().encode(tiny_set("x", 5, seed=0)), specs=(EpisodeSpec(5, 1, 8),), retrieval=None)
    assert table.rows[0].count == 10_000
    assert [(spec.ways, spec.shots, spec.queries) for spec in SPECS] == [(5, 1, 15), (5, 5, 15)]


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: quick({"x": embedder()}), UsageTypeError, "expected a data set to evaluate Embedder on, got none"),
        (lambda: quick([embedder()], DATA), UsageTypeError, "expected one method or a mapping of names to methods"),
        (lambda: quick({}), UsageError, "expected at least one method, got none"),
        (lambda: quick({"x": []}), UsageError, "expected at least one training of 'x', got none"),
    ],
)
def test_what_cannot_be_evaluated_raises(wrong: Callable[[], ResultTable], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        wrong()
