"""benchmark: the same figures as evaluator and tester give on their own, for every kind of method."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import Tensor, nn

from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.benchmark import SPECS, benchmark
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.heads import nearest_neighbour, nearest_prototype
from pml_fewshot.evaluation.result_row import ResultRow
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.trainers.protonet import ProtoNetTrainer

QUICK = (EpisodeSpec(3, 1, 4), EpisodeSpec(4, 3, 4))
EPISODES = 25
RETRIEVAL = ["precision_at_1", "r_precision", "mean_average_precision_at_r"]


def image_set(prefix: str, classes: int = 6, seed: int = 0, note: str = "made up") -> FewShotDataset:
    """Noisy copies of one pattern a class, hard enough for figures between chance and 1."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(60, 196, (classes, 1, 1, 4, 4), generator=generator)
    noise = torch.randint(-110, 111, (classes, 9, 1, 4, 4), generator=generator)
    images = (pattern + noise).clamp(0, 255).byte().flatten(0, 1)
    labels = torch.arange(classes).repeat_interleave(9)
    return FewShotDataset(images, labels, [f"{prefix}{c}" for c in range(classes)], note)


DATA = image_set("test")


def embedder(seed: int = 0) -> Embedder:
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)))
        layer.bias.fill_(0.5)
    return Embedder(nn.Sequential(nn.Flatten(), layer))


def cosine_trainer(seed: int = 0) -> ProtoNetTrainer:
    return ProtoNetTrainer(embedder(seed), PrototypicalLoss(distance=CosineSimilarity()))


class Adapting:
    """Like MAML: its bank is of images, and each query is classified by pixels."""

    def bank(self, dataset: FewShotDataset) -> Tensor:
        return dataset.images.float() / 255

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        return nearest_prototype(support.flatten(3), query.flatten(2))


class Transductive(Adapting):
    transductive = True


judge = partial(benchmark, specs=QUICK, num_episodes=EPISODES, seed=3)


def values(table: ResultTable) -> dict[str, tuple[float, float]]:
    """Figure -> value and interval, of a table with one method."""
    assert len({row.method for row in table.rows}) == 1
    names = [f"{row.ways}-way" if row.ways else row.figure for row in table.rows]
    assert len(set(names)) == len(names)
    return {name: (row.value, row.ci95) for name, row in zip(names, table.rows, strict=True)}


def directly(
    trainer: Any, bank: EmbeddingBank | None, tester: RetrievalTester, data: FewShotDataset | EmbeddingBank | None
) -> dict[str, tuple[float, float]]:
    """The same by evaluator and tester themselves."""
    found = {}
    for spec in QUICK:
        result = EpisodicEvaluator(spec, EPISODES, seed=3).evaluate(trainer, data)
        found[f"{spec.ways}-way"] = (result.mean, result.ci95)
    if bank is not None:
        retrieved = tester.test(bank)
        found |= {metric: (retrieved[metric], retrieved.ci95(metric)) for metric in retrieved}
    return found


def same(a: dict[str, tuple[float, float]], b: dict[str, tuple[float, float]]) -> bool:
    assert list(a) == list(b)
    return all(math.isclose(x, y, abs_tol=1e-12) for name in a for x, y in zip(a[name], b[name], strict=True))


# --- what is judged ---------------------------------------------------------------------------------------------------


def test_a_bank_has_the_figures_of_evaluator_and_tester():
    bank = embedder().encode(DATA)
    table = judge(bank)
    assert same(values(table), directly(bank, bank, RetrievalTester(), None))
    assert [row.figure for row in table.rows] == ["accuracy", "accuracy", *RETRIEVAL]
    assert 0.4 < table.rows[0].value < 0.99  # neither chance nor all right, which anything would agree on


def test_an_embedder_has_the_figures_of_its_bank():
    table = judge(embedder(), DATA)
    assert same(values(table), values(judge(embedder().encode(DATA))))
    assert table.rows[0].method == "Embedder"
    assert [row.method for row in judge(embedder().encode(DATA)).rows] == ["EmbeddingBank"] * 5


def test_a_trainer_has_the_figures_of_evaluator_and_tester():
    trainer = cosine_trainer()
    tester = RetrievalTester(distance=CosineSimilarity())
    found = values(judge(trainer, DATA))
    assert same(found, directly(trainer, trainer.embedder.encode(DATA), tester, DATA))
    assert not same(found, values(judge(embedder(), DATA)))  # which are by Euclid


def test_several_methods_have_their_lines_in_the_order_given():
    methods = {"b": cosine_trainer(), "a": embedder(), "bank": embedder(1).encode(DATA)}
    table = judge(methods, DATA)
    assert [row.method for row in table.rows] == ["b"] * 5 + ["a"] * 5 + ["bank"] * 5
    for name, method in methods.items():
        alone = judge(method, DATA)
        mine = ResultTable(row for row in table.rows if row.method == name)
        assert same(values(mine), values(alone))
    # the same episodes for all
    assert len({row.episodes_hash for row in table.rows if row.ways == 3}) == 1


def test_trainings_of_one_method_are_averaged():
    trainings = [embedder(seed) for seed in range(3)]
    table = judge({"three": trainings, "tuple": tuple(trainings)}, DATA)
    single = [values(judge(training, DATA)) for training in trainings]
    for name in ("three", "tuple"):
        mine = ResultTable(row for row in table.rows if row.method == name)
        assert {row.trained for row in mine.rows} == {3}
        for figure, (value, ci95) in values(mine).items():
            assert value == pytest.approx(sum(each[figure][0] for each in single) / 3, abs=1e-12)
            assert ci95 > 0
    assert len({each["3-way"] for each in single}) == 3
    assert "means of 3 trainings" in table.markdown()


def test_a_method_that_adapts_to_images_has_no_retrieval():
    data = image_set("c")
    table = judge({"adapting": Adapting(), "bank": embedder()}, data)
    adapting = ResultTable(row for row in table.rows if row.method == "adapting")
    assert same(values(adapting), directly(Adapting(), None, RetrievalTester(), data))
    assert [row.protocol for row in adapting.rows] == ["inductive"] * 2
    assert len(table.rows) == 2 + 5


def test_a_transductive_method_is_named_so():
    table = judge({"plain": Adapting(), "joint": Transductive()}, DATA)
    assert [row.protocol for row in table.rows] == ["inductive"] * 2 + ["transductive"] * 2
    assert "| joint (transductive) |" in table.markdown()


def test_splits_are_judged_on_their_test_classes():
    splits = Splits(image_set("train", seed=1), image_set("val", 5, seed=2), DATA)
    table = judge(embedder(), splits)
    assert same(values(table), values(judge(embedder(), DATA)))
    assert {(row.split, row.classes) for row in table.rows} == {("test", 6)}


def test_classes_are_counted_by_their_labels():
    bank = EmbeddingBank(embedder().encode(DATA).embeddings, DATA.labels * 1000 + 2**60)
    assert {row.classes for row in judge(bank).rows} == {6}


# --- how --------------------------------------------------------------------------------------------------------------


def test_retrieval_ranks_by_the_loss_unless_the_tester_has_a_distance():
    own = LpDistance(normalize_embeddings=False, p=1)
    for tester, ranking in (
        (RetrievalTester(), "exact, CosineSimilarity(p=2, power=1, normalized)"),
        (RetrievalTester(distance=own), "exact, LpDistance(p=1, power=1)"),
        (RetrievalTester, "exact, CosineSimilarity(p=2, power=1, normalized)"),
    ):
        before = tester.distance if isinstance(tester, RetrievalTester) else None
        table = judge({"cosine": cosine_trainer(), "Euclid": embedder()}, DATA, retrieval=tester)
        rankings = {row.method: row.ranking for row in table.rows if row.ranking}
        assert rankings["cosine"] == ranking
        # the loss of the first is not carried over to the second
        assert rankings["Euclid"] == ("exact, Euclid" if before is None else ranking)
        if isinstance(tester, RetrievalTester):
            assert tester.distance is before


def test_a_head_replaces_every_method_s_own():
    table = judge({"trainer": cosine_trainer(), "bank": embedder().encode(DATA)}, DATA, head=nearest_neighbour)
    bank = embedder().encode(DATA)
    for spec in QUICK:
        expected = EpisodicEvaluator(spec, EPISODES, 3, head=nearest_neighbour).evaluate(bank).mean
        found = [row.value for row in table.rows if row.ways == spec.ways]
        assert found == pytest.approx([expected] * 2, abs=1e-12)


def test_retrieval_can_be_left_out():
    assert [row.figure for row in judge(embedder(), DATA, retrieval=None).rows] == ["accuracy"] * 2


def test_retrieval_over_a_reference_is_called_gallery():
    bank, reference = embedder().encode(DATA), embedder().encode(image_set("other", seed=5))
    exact = RetrievalTester().test(bank, reference)
    for gallery in (reference, Gallery(reference, "hnsw")):
        rows = [row for row in judge(bank, reference=gallery).rows if row.ways is None]
        assert {row.protocol for row in rows} == {"gallery"}
        assert [row.value for row in rows] == pytest.approx([exact[row.figure] for row in rows], abs=1e-12)
    assert {row.protocol for row in judge(bank).rows if row.ways is None} == {"leave-one-out"}


def test_episodes_are_told_apart_by_seed_and_by_set():
    def hashes(method: Any, data: FewShotDataset | None = None, seed: int = 3) -> list[str]:
        rows = benchmark(method, data, QUICK, None, EPISODES, seed).rows
        return [row.episodes_hash for row in rows]

    encoded = embedder().encode(DATA)
    assert hashes(embedder(), DATA) == hashes(encoded) == hashes(cosine_trainer(), DATA)
    assert hashes(encoded, seed=4) != hashes(encoded)
    assert hashes(encoded) == [
        EpisodicEvaluator(spec, EPISODES, 3).evaluate(cosine_trainer(), DATA).episodes_hash for spec in QUICK
    ]
    assert hashes(EmbeddingBank(encoded.embeddings, encoded.labels.flip(0))) != hashes(encoded)


def test_notes_of_the_set_and_of_the_caller_reach_the_table():
    def notes(table: ResultTable) -> set[str]:
        return {row.note for row in table.rows}

    assert notes(judge(embedder(), DATA)) == {"made up"}
    assert notes(judge(embedder(), DATA, note="half trained")) == {"made up; half trained"}
    assert notes(judge(embedder(), image_set("x", note=""), note="half trained")) == {"half trained"}
    assert notes(judge(embedder().encode(DATA))) == {""}
    assert "made up; half trained" in judge(embedder(), DATA, note="half trained").markdown()


def test_tables_that_are_not_timed_are_the_same_byte_by_byte():
    first, second = (judge({"a": embedder(), "b": Adapting()}, DATA, timed=False) for _ in range(2))
    for text in ("markdown", "csv", "latex", "figures_csv"):
        assert getattr(first, text)() == getattr(second, text)()
    assert {row.seconds for row in first.rows} == {None}


def test_seconds_hold_all_that_a_method_took():
    class Slow(Adapting):
        def bank(self, dataset: FewShotDataset) -> Tensor:
            torch.randn(400, 400, generator=torch.Generator().manual_seed(0)).svd()
            return super().bank(dataset)

    table = judge({"slow": Slow(), "quick": Adapting()}, DATA)
    seconds = {row.method: row.seconds for row in table.rows}
    assert all(isinstance(value, float) and value > 0 for value in seconds.values())
    assert len({(row.method, row.seconds) for row in table.rows}) == 2  # a figure of the method, not of the row
    assert table.markdown().splitlines()[0].endswith("| seconds |")


def test_specs_are_those_of_papers_when_not_given():
    table = benchmark(embedder().encode(image_set("x", 5, seed=1)), specs=(EpisodeSpec(5, 1, 8),), retrieval=None)
    assert table.rows[0].count == 10_000
    assert [(spec.ways, spec.shots, spec.queries) for spec in SPECS] == [(5, 1, 15), (5, 5, 15)]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [embedder(), cosine_trainer(), Adapting()], ids=lambda m: type(m).__name__)
def test_images_are_needed_but_for_banks(method: Any):
    with pytest.raises(TypeError, match=f"expected data to judge a {type(method).__name__} on, got none; give splits"):
        judge({"x": method})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: judge({}), "expected at least one method, got none"),
        (lambda: judge({"x": []}), "expected at least one training of 'x', got none"),
        (lambda: judge(embedder(), DATA, specs=(EpisodeSpec(7, 1, 1),)), "expected at least 7 classes"),
        (lambda: judge(embedder(), DATA, specs=(EpisodeSpec(2, 5, 5),)), "expected at least 10 items"),
        (lambda: judge(embedder(), DATA, num_episodes=1), "expected num_episodes above 1"),
        (lambda: judge(embedder(), DATA, retrieval=RetrievalTester(k=54, metrics=["precision_at_1"])), "at most 53"),
    ],
)
def test_what_cannot_be_judged_raises(wrong: Callable[[], ResultTable], message: str):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_trainings_on_different_episodes_raise():
    bank = embedder().encode(DATA)
    other = EmbeddingBank(bank.embeddings, DATA.labels.flip(0))  # as many items in other classes
    with pytest.raises(ValueError, match=r"expected .*same episodes"):
        judge({"x": [bank, other]}, retrieval=None)
    with pytest.raises(ValueError, match=r"expected .*same"):  # a set of another size: fewer queries
        judge({"x": [bank, embedder().encode(image_set("five", 5))]})


def test_nan_raises():
    broken = embedder()
    with torch.no_grad():
        broken.trunk[1].weight[0, 0] = torch.nan
    for method in (broken, ProtoNetTrainer(broken)):
        with pytest.raises(ValueError, match="NaN"):
            judge({"x": method}, DATA)


def test_rows_are_result_rows():
    for row in judge(embedder(), DATA).rows:
        assert isinstance(row, ResultRow)
        assert (row.trained, row.count) == (1, EPISODES if row.ways else len(DATA))
        assert row.seed == (3 if row.ways else None)
