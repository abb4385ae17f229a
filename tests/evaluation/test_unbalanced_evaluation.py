"""Unbalanced and variable episodes: accuracies against numpy's, one query at a time, and what rows say of them."""

import csv
import io
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult
from pml_fewshot.evaluation.heads import (
    k_nearest_neighbours,
    mean_similarity,
    nearest_neighbour,
    nearest_prototype,
    soft_nearest_neighbour,
    unwrapped,
)
from pml_fewshot.evaluation.linear_heads import cosine_classifier, logistic_regression, ridge_regression
from pml_fewshot.evaluation.statistics import compare
from pml_fewshot.evaluation.support import Support
from pml_fewshot.evaluation.table import ResultTable, RowContext
from pml_fewshot.evaluation.transductive_heads import bd_cspn, pt_map
from pml_fewshot.experiment.command_line import main
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.episodes import EpisodeSampler, EpisodeSpec
from pml_fewshot.sampling.variable_episodes import VariableEpisodes, VariableEpisodeSampler, VariableEpisodeSpec
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from tests.tiny_experiments import TINY_EXPERIMENTS

BALANCED = EpisodeSpec(4, 2, 4)
UNBALANCED = replace(BALANCED, query_balance=1.0)
VARIABLE = VariableEpisodeSpec(2, 6, max_queries=5, max_support=40, max_shots=12)
COUNT = 60


def labeled(sizes: tuple[int, ...] = (19, 24, 18, 33, 20, 27)) -> FewShotDataset:
    """Random images in classes of different sizes whose items do not stand together."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 256, (len(labels), 1, 2, 4), generator=generator, dtype=torch.uint8)
    return FewShotDataset(images, labels, [f"class {c}" for c in range(len(sizes))])


def clouds(dtype: torch.dtype = torch.float64) -> EmbeddingBank:
    """Overlapping clouds, one a class, so that accuracies lie between chance and 1."""
    dataset, generator = labeled(), torch.Generator().manual_seed(1)
    centers = torch.randn(len(dataset.class_names), 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(dataset), 8, generator=generator, dtype=torch.float64)
    embeddings = (centers[dataset.labels] + 1.2 * noise).to(dtype)
    return EmbeddingBank(embeddings, dataset.labels, class_names=dataset.class_names)


def variable_of(bank: EmbeddingBank, count: int = COUNT) -> VariableEpisodes:
    return VariableEpisodeSampler(bank.labels, VARIABLE, torch.Generator().manual_seed(0)).sample(count)


def scored(spec: Any, head: Any = None, method: Any = None, **options: Any) -> EpisodicResult:
    return EpisodicEvaluator(spec, COUNT, head=head).evaluate(clouds() if method is None else method, **options)


def protonet(head: Any = nearest_prototype, distance: Any = None) -> ProtoNetTrainer:
    torch.manual_seed(0)
    loss = PrototypicalLoss(distance, scale=10)
    return ProtoNetTrainer(Embedder(nn.Sequential(nn.Flatten(), nn.Linear(8, 6))), loss, head=head)


@dataclass
class Forbidden:
    """A method of which nothing may be asked."""

    def bank(self, dataset: FewShotDataset) -> Tensor:
        raise AssertionError("images were embedded")

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        raise AssertionError("episodes were classified")


def test_unbalanced_accuracies_and_confusion_are_those_of_one_query_at_a_time():
    bank = clouds()
    items, labels = bank.embeddings.numpy(), bank.labels.tolist()
    index = EpisodeSampler(bank.labels, UNBALANCED, torch.Generator().manual_seed(0)).sample(COUNT)
    expected, counts = np.empty(COUNT), np.zeros((6, 6), dtype=int)
    for episode in range(COUNT):
        support, right = index.support[episode].tolist(), 0
        means = [items[own].mean(axis=0) for own in support]
        classes = [labels[own[0]] for own in support]
        for query in index.query[episode].flatten().tolist():
            nearest = classes[int(np.argmin([((items[query] - mean) ** 2).sum() for mean in means]))]
            counts[labels[query], nearest] += 1
            right += nearest == labels[query]
        expected[episode] = right / 16
    for chunk in (None, 1, 7):
        result = EpisodicEvaluator(UNBALANCED, COUNT, chunk=chunk).evaluate(bank, confusion=True)
        assert np.allclose(result.per_episode.numpy(), expected, rtol=0, atol=1e-12)
        assert np.array_equal(result.confusion.numpy(), counts)
    assert counts.sum() == COUNT * 16
    assert result.classes == tuple(bank.class_names)
    assert result.episodes_hash == index.hash(bank.fingerprint())
    assert result.per_class() == pytest.approx(
        dict(zip(result.classes, counts.diagonal() / counts.sum(1), strict=True))
    )
    assert str(result).endswith("% (4-way 2-shot 4-query unbalanced (Dirichlet 1), 60 episodes)")


@pytest.mark.parametrize("head", [nearest_prototype, ridge_regression, bd_cspn])
def test_an_endless_alpha_gives_the_accuracies_of_balanced_episodes(head: Any):
    balanced, endless = scored(BALANCED, head), scored(replace(BALANCED, query_balance=1e9), head)
    assert torch.equal(endless.per_episode, balanced.per_episode)
    assert endless.episodes_hash != balanced.episodes_hash != scored(UNBALANCED, head).episodes_hash
    assert not torch.equal(scored(UNBALANCED, head).per_episode, balanced.per_episode)


def test_pt_map_gains_less_where_queries_are_unbalanced():
    bank, gains = clouds(), []
    positive = EmbeddingBank(bank.embeddings.exp(), bank.labels)
    for spec in (replace(BALANCED, queries=4), replace(BALANCED, queries=4, query_balance=0.3)):
        results = [EpisodicEvaluator(spec, 200, head=head).evaluate(positive) for head in (pt_map, nearest_prototype)]
        gains.append(compare(*results).difference)
    assert gains[0] > gains[1] + 0.05


def test_a_set_too_small_for_all_queries_of_one_class_is_refused_before_scoring():
    evaluator = EpisodicEvaluator(replace(UNBALANCED, queries=5), COUNT)
    for refused in (evaluator.check, evaluator.evaluate):
        with pytest.raises(UsageError, match=r"expected at least 22 items .*, got 19 in class 'class 0' \(3 of 6 "):
            refused(clouds())
    replace(evaluator, spec=replace(BALANCED, queries=5)).check(clouds())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_variable_accuracies_are_those_of_one_query_at_a_time(dtype: torch.dtype):
    bank = clouds(dtype)
    items, labels, expected = bank.embeddings.double().numpy(), bank.labels.numpy(), np.empty(COUNT)
    for number, episode in enumerate(variable_of(bank)):
        support, query = episode.support.numpy(), episode.query.numpy().flatten()
        classes = labels[episode.query.numpy()[:, 0]]
        means = np.stack([items[support[labels[support] == label]].mean(axis=0) for label in classes])
        nearest = ((items[query][:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
        expected[number] = (classes[nearest] == labels[query]).mean()
    result = scored(VARIABLE, method=bank)
    assert np.allclose(result.per_episode.numpy(), expected, rtol=0, atol=1e-12)
    assert result.mean == pytest.approx(expected.mean(), abs=1e-12)
    assert result.ci95 == pytest.approx(1.96 * expected.std(ddof=1) / COUNT**0.5, abs=1e-12)
    assert result.episodes_hash == variable_of(bank).hash(bank.fingerprint())
    assert not result.transductive
    assert str(result).endswith("% (2- to 6-way episodes of variable shots, 60 episodes)")
    assert EpisodicEvaluator(VARIABLE, COUNT, seed=1).evaluate(bank).episodes_hash != result.episodes_hash


@pytest.mark.parametrize(
    ("head", "options"),
    [
        (bd_cspn, {}),
        (partial(bd_cspn, scale=3.0, top=2), {"scale": 3.0, "top": 2}),
        (nearest_neighbour, {"distance": None}),
        (
            partial(partial(k_nearest_neighbours, k=5), distance=CosineSimilarity()),
            {"distance": CosineSimilarity(), "k": 5},
        ),
        (mean_similarity, {}),
        (partial(soft_nearest_neighbour, temperature=0.5), {"temperature": 0.5}),
        (cosine_classifier, {}),
        (partial(ridge_regression, penalty=3.0), {"penalty": 3.0}),
        (logistic_regression, {}),
    ],
)
def test_a_head_on_variable_episodes_is_its_fit_on_each(head: Any, options: dict[str, Any]):
    bank, expected = clouds(), []
    for episode in variable_of(bank, 15):
        scores = unwrapped(head)[0].fit(Support(bank.embeddings[episode.support][None], episode.sizes), **options)
        taken = scores(bank.embeddings[episode.query.flatten()][None]).argmax(dim=2).view(episode.query.shape)
        expected.append((taken == torch.arange(len(episode.sizes)).unsqueeze(1)).double().mean())
    result = EpisodicEvaluator(VARIABLE, 15, head=head).evaluate(bank)
    assert torch.allclose(result.per_episode, torch.stack(expected), rtol=0, atol=1e-12)
    assert result.transductive == (unwrapped(head)[0] is bd_cspn)
    assert result.classifier.startswith(unwrapped(head)[0].__name__)


def test_results_do_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(scored(VARIABLE).per_episode)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_trainer_is_scored_by_its_own_distance_with_a_head():
    data, by_cosine = labeled(), protonet(distance=CosineSimilarity())
    bank = EmbeddingBank(by_cosine.bank(data), data.labels)
    result = scored(VARIABLE, nearest_prototype, by_cosine, dataset=data)
    assert result.classifier.startswith("nearest_prototype by CosineSimilarity(")
    own = scored(VARIABLE, partial(nearest_prototype, distance=CosineSimilarity()), bank)
    assert torch.equal(result.per_episode, own.per_episode)
    assert not torch.equal(result.per_episode, scored(VARIABLE, nearest_prototype, bank).per_episode)
    kept = scored(VARIABLE, partial(nearest_prototype, distance=LpDistance(p=1)), by_cosine, dataset=data)
    assert kept.classifier.startswith("nearest_prototype(distance=LpDistance(")
    assert not torch.equal(kept.per_episode, result.per_episode)


def test_a_lazy_distance_gets_its_weights_once():
    torch.manual_seed(0)
    trainer = protonet(distance=WeightedL1Similarity())
    result = scored(VARIABLE, nearest_prototype, trainer, dataset=labeled())
    assert 0 < result.mean < 1
    assert all(parameter.requires_grad for parameter in trainer.distance.parameters())


def test_embedders_and_banks_need_no_head():
    data, embedder = labeled(), protonet().embedder
    alone = scored(VARIABLE, method=embedder, dataset=data)
    assert torch.equal(alone.per_episode, scored(VARIABLE, nearest_prototype, embedder, dataset=data).per_episode)


@pytest.mark.parametrize("spec", [UNBALANCED, VARIABLE])
def test_logits_that_are_not_finite_are_refused(spec: Any):
    bank = clouds(torch.float32)
    far = EmbeddingBank(bank.embeddings * 1e30, bank.labels)
    with pytest.raises(UsageError, match="logits of each episode"):
        scored(spec, method=far)


def by_hand(support: Tensor, query: Tensor) -> Tensor:
    raise AssertionError("it was called")


def test_what_cannot_take_classes_of_different_sizes_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch):
    data = labeled()
    own = r"^expected a head for classes of different sizes, got {}'s own way; give head=nearest_prototype$"
    with pytest.raises(UsageError, match=own.format("Forbidden")):
        scored(VARIABLE, method=Forbidden(), dataset=data)
    for name in ("maml", "matching", "protonet"):
        trainer = TINY_EXPERIMENTS[name].trainer()
        monkeypatch.setattr(type(trainer), "bank", Forbidden.bank)
        with pytest.raises(UsageError, match=own.format(type(trainer).__name__)):
            scored(VARIABLE, method=trainer, dataset=data)
    mere = r"^expected a head with a fit, for classes of different sizes, got by_hand, which takes classes of one size"
    for head in (by_hand, partial(by_hand)):
        with pytest.raises(UsageError, match=mere):
            scored(VARIABLE, head, Forbidden(), dataset=data)


def test_there_is_no_confusion_matrix_of_variable_episodes():
    message = "^expected episodes of one size for a confusion matrix, got 2- to 6-way .*; use an EpisodeSpec$"
    with pytest.raises(UsageError, match=message):
        scored(VARIABLE, nearest_prototype, Forbidden(), dataset=labeled(), confusion=True)
    with pytest.raises(UsageError, match="expected a result with its confusion matrix"):
        scored(VARIABLE).per_class()


def test_a_set_of_too_few_classes_or_items_is_refused():
    evaluator = EpisodicEvaluator(VariableEpisodeSpec(7, 9), COUNT)
    for refused in (evaluator.check, evaluator.evaluate):
        with pytest.raises(UsageError, match=r"expected at least 7 classes for 7- to 9-way .*, got 6 classes"):
            refused(clouds())
    single = EmbeddingBank(torch.eye(5), torch.tensor([0, 0, 1, 1, 2]))
    with pytest.raises(UsageError, match=r"expected at least 2 items .*, got 1 in class 2"):
        EpisodicEvaluator(VariableEpisodeSpec(2, 3), COUNT).evaluate(single)


def rows_of(methods: Any, specs: Any, data: Any = None, **options: Any) -> ResultTable:
    return benchmark(methods, data, specs=specs, num_episodes=COUNT, retrieval=None, timed=False, **options)


SPECS = (BALANCED, UNBALANCED, replace(BALANCED, query_balance=0.25), VARIABLE)


def test_rows_say_how_queries_divide_and_which_heads_are_transductive():
    table = rows_of({"bank": clouds()}, SPECS)
    table.rows += rows_of({"bank": clouds()}, SPECS, head=bd_cspn).rows
    assert [row.protocol for row in table.rows] == ["inductive"] * 4 + ["transductive"] * 4
    unbalanced = ["queries unbalanced (Dirichlet 1)", "queries unbalanced (Dirichlet 0.25)"]
    assert [row.balance for row in table.rows[:4]] == ["", *unbalanced, ""]
    equal = "as many queries of each class"
    assert [row.balance for row in table.rows[4:]] == [equal, *unbalanced, equal]
    for row in table.rows:
        assert ", ".join(filter(None, (row.protocol, row.balance))) + f", {row.classifier}, seed 0" in row.conditions
    assert [row.query_balance for row in table.rows[:4]] == [None, 1.0, 0.25, None]
    lines = table.markdown().splitlines()
    titles = ["method", "4-way 2-shot", "4-way 2-shot, Dirichlet 1", "4-way 2-shot, Dirichlet 0.25"]
    assert lines[0] == "| " + " | ".join([*titles, "variable ways and shots"]) + " |"
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| bank", "| bank (transductive)"]
    below = "\n".join(lines[4:])
    assert "of 4 queries a class on average, seed 0, inductive, queries unbalanced (Dirichlet 0.25)" in below
    assert "60 episodes of variable ways and shots, seed 0, inductive" in below
    assert "60 episodes of 4 queries a class, seed 0, transductive, as many queries of each class" in below


def test_a_trainer_with_a_transductive_head_is_transductive_and_one_with_another_is_not():
    trainers = {"rectified": protonet(head=partial(bd_cspn, scale=5.0)), "plain": protonet()}
    table = rows_of(trainers, (BALANCED, UNBALANCED), labeled())
    assert [row.protocol for row in table.rows] == ["transductive"] * 2 + ["inductive"] * 2
    assert [row.classifier for row in table.rows[:2]] == ["bd_cspn(scale=5.0)"] * 2
    together = rows_of(trainers["plain"], VARIABLE, labeled(), head=bd_cspn)
    assert [row.protocol for row in together.rows] == ["transductive"]
    assert scored(BALANCED, method=trainers["rectified"], dataset=labeled()).transductive
    assert not scored(BALANCED, nearest_prototype, trainers["rectified"], dataset=labeled()).transductive


def test_columns_of_balanced_unbalanced_and_variable_episodes_are_apart():
    table = rows_of({"bank": clouds()}, SPECS)
    columns = ["4way_2shot_4query", "4way_2shot_4query_dirichlet1", "4way_2shot_4query_dirichlet0.25"]
    columns.append("variable_accuracy")
    assert [row.column for row in table.rows] == columns
    (line,) = csv.DictReader(io.StringIO(table.csv()))
    assert [line[column] for column in columns] == [repr(row.value) for row in table.rows]
    assert [line[f"{column}_protocol"] for column in columns] == [row.conditions for row in table.rows]
    assert len(table.markdown().splitlines()[2].split(" | ")) == 5
    variable = table.rows[3]
    assert (variable.ways, variable.shots, variable.queries, variable.seed) == (None, None, None, 0)
    assert (variable.figure, variable.of_episodes, variable.count) == ("variable_accuracy", True, COUNT)


def test_a_written_table_is_read_again_and_one_without_the_column_too(tmp_path: Path):
    table = rows_of({"bank": clouds()}, SPECS)
    table.write(tmp_path)
    again = ResultTable.read(tmp_path)
    assert again.rows == table.rows
    assert again.markdown() == table.markdown()
    for own, then in zip(again.rows, table.rows, strict=True):
        assert torch.equal(own.values, then.values)
    older = ResultTable([table.rows[0]])
    older.write(tmp_path)
    cells = [line.split(",") for line in older.figures_csv().splitlines()]
    gone = cells[0].index("query_balance")
    text = "".join(",".join(each[:gone] + each[gone + 1 :]) + "\n" for each in cells)
    assert "query_balance" not in text
    (tmp_path / "figures.csv").write_text(text)
    assert ResultTable.read(tmp_path).rows == older.rows
    (tmp_path / "figures.csv").write_text(text.replace(",ways,", ",", 1))
    with pytest.raises(UsageError, match=r"got a broken table \(columns"):
        ResultTable.read(tmp_path)


def test_several_trainings_need_the_same_unbalanced_episodes():
    result, table = scored(UNBALANCED), ResultTable()
    table.add_episodic(RowContext("x", "", 6), result, result)
    assert (table.rows[0].trained, table.rows[0].query_balance) == (2, 1.0)
    with pytest.raises(UsageError, match="trainings evaluated on the same episodes"):
        table.add_episodic(RowContext("x", "", 6), result, scored(BALANCED))


def test_an_experiment_is_evaluated_on_unbalanced_episodes_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    options = ("--eval-spec.query-balance", "2", "--eval-spec.ways", "2", "--eval-spec.queries", "4")
    monkeypatch.setattr(sys, "argv", ["experiment", "--run-dir", str(tmp_path / "run"), *options])
    table = main(replace(TINY_EXPERIMENTS["protonet"], steps=2, retrieval=None))
    (accuracy,) = table.rows
    assert (accuracy.query_balance, accuracy.column) == (2.0, "2way_1shot_4query_dirichlet2")
    text = (tmp_path / "run" / "config.txt").read_text()
    assert "EpisodeSpec(ways=2, shots=1, queries=4, query_balance=2.0)" in text
    assert ResultTable.read(tmp_path / "run").rows == table.rows


def test_the_command_line_refuses_too_small_classes_and_unbalanced_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for options, message in (
        (("--eval-spec.query-balance", "2"), "error: expected at least 26 items (5-way 1-shot 5-query unbalanced"),
        (("--eval-spec.query-balance", "0"), "error: expected query_balance as a number above 0"),
        (("--train-spec.query-balance", "2"), "error: expected balanced episodes to train on"),
    ):
        monkeypatch.setattr(sys, "argv", ["experiment", "--run-dir", str(tmp_path / "run"), *options])
        with pytest.raises(SystemExit) as stopped:
            main(TINY_EXPERIMENTS["protonet"])
        assert str(stopped.value.code).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_row_is_of_the_head_that_classified_and_not_of_the_one_it_replaced():
    trainer, bank = ProtoNetTrainer(Embedder(nn.Identity()), head=bd_cspn), random_bank()
    for head, protocol in ((None, "transductive"), (nearest_prototype, "inductive")):
        table = benchmark({"x": trainer}, bank.as_dataset(), SMALL, num_episodes=5, retrieval=None, head=head)
        assert [row.protocol for row in table.rows] == [protocol]


def test_balances_that_look_alike_have_columns_of_their_own():
    spec = replace(SMALL, query_balance=2.0)
    row = benchmark(random_bank(), specs=spec, num_episodes=5, retrieval=None).rows[0]
    columns = [replace(row, query_balance=alpha).column for alpha in (2.0, 2.0000001, 1.0)]
    assert columns[0] == "3way_1shot_4query_dirichlet2"
    assert len(set(columns)) == 3


SMALL = EpisodeSpec(3, 1, 4)


def random_bank() -> EmbeddingBank:
    return EmbeddingBank(torch.randn(80, 4, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 4)
