"""Unbalanced and variable episodes through the evaluator and the table, against loops over episodes."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.heads import nearest_neighbour, nearest_prototype
from pml_fewshot.evaluation.statistics import compare
from pml_fewshot.evaluation.support import Support
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.evaluation.transductive_heads import bd_cspn, fit_bd_cspn, pt_map
from pml_fewshot.sampling.episodes import EpisodeSampler, EpisodeSpec
from pml_fewshot.sampling.variable_episodes import VariableEpisodeSampler, VariableEpisodeSpec
from pml_fewshot.trainers.matching import MatchingTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer

LABELS = torch.arange(320) % 8
UNBALANCED = EpisodeSpec(4, 2, 5, query_balance=2.0)
VARIABLE = VariableEpisodeSpec(min_ways=3, max_ways=8)


def bank() -> EmbeddingBank:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(8, 6, generator=generator)
    return EmbeddingBank(centers[LABELS] + 1.5 * torch.randn(320, 6, generator=generator), LABELS)


def test_unbalanced_accuracy_is_that_of_a_loop() -> None:
    result = EpisodicEvaluator(UNBALANCED, 60, seed=3).evaluate(bank(), confusion=True)
    drawn = EpisodeSampler(LABELS, UNBALANCED, torch.Generator().manual_seed(3)).sample(60)
    rows, asked = bank().embeddings, torch.zeros(8)
    for e in range(60):
        prototypes = rows[drawn.support[e]].mean(dim=1)
        nearest = torch.cdist(rows[drawn.query[e].flatten()], prototypes).argmin(dim=1)
        right = LABELS[drawn.support[e, :, 0]][nearest] == LABELS[drawn.query[e].flatten()]
        assert result.per_episode[e].item() == pytest.approx(right.double().mean().item())
        asked += torch.bincount(LABELS[drawn.query[e].flatten()], minlength=8)
    assert result.confusion is not None
    assert result.confusion.sum(dim=1).tolist() == asked.tolist()
    assert result.confusion.diagonal().sum() / asked.sum() == pytest.approx(result.mean)


def test_with_a_large_alpha_the_accuracies_are_the_balanced_ones() -> None:
    nearly = EpisodicEvaluator(EpisodeSpec(4, 2, 5, query_balance=1e9), 40).evaluate(bank())
    assert torch.equal(nearly.per_episode, EpisodicEvaluator(EpisodeSpec(4, 2, 5), 40).evaluate(bank()).per_episode)


def episodes() -> list[tuple[Tensor, tuple[int, ...], Tensor]]:
    """Support items (S, D), their classes' sizes and queries (W, Q, D) of the variable episodes of seed 3."""
    drawn, rows = (
        VariableEpisodeSampler(LABELS, VARIABLE, torch.Generator().manual_seed(3)).sample(30),
        bank().embeddings,
    )
    return [(rows[each.support], each.sizes, rows[each.query]) for each in drawn]


def test_variable_accuracy_is_that_of_a_loop() -> None:
    result = EpisodicEvaluator(VARIABLE, 30, seed=3).evaluate(bank())
    for value, (items, sizes, query) in zip(result.per_episode.tolist(), episodes(), strict=True):
        prototypes = torch.stack([own.mean(dim=0) for own in items.split(list(sizes))])
        nearest = torch.cdist(query.flatten(0, 1), prototypes).argmin(dim=1).view(query.shape[:2])
        assert value == pytest.approx((nearest == torch.arange(len(sizes)).unsqueeze(1)).double().mean().item())
    assert len(set(result.per_episode.tolist())) > 5


def test_a_transductive_head_sees_all_queries_of_a_variable_episode() -> None:
    result = EpisodicEvaluator(VARIABLE, 30, seed=3, head=partial(bd_cspn, scale=5.0)).evaluate(bank())
    assert result.transductive
    for value, (items, sizes, query) in zip(result.per_episode.tolist(), episodes(), strict=True):
        logits = fit_bd_cspn(Support(items[None], sizes), scale=5.0)(query.flatten(0, 1)[None])[0]
        nearest = logits.argmax(dim=1).view(query.shape[:2])
        assert value == pytest.approx((nearest == torch.arange(len(sizes)).unsqueeze(1)).double().mean().item())


def mere(support: Tensor, query: Tensor) -> Tensor:
    return nearest_prototype(support, query)


def trainer() -> ProtoNetTrainer:
    torch.manual_seed(0)
    return ProtoNetTrainer(Embedder(nn.Linear(6, 6)))


def test_what_wants_classes_of_one_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a head with a fit, .* got mere"):
        EpisodicEvaluator(VARIABLE, 5, head=mere).evaluate(bank())
    with pytest.raises(UsageError, match="got MatchingTrainer's own way; give head=nearest_prototype"):
        EpisodicEvaluator(VARIABLE, 5).evaluate(MatchingTrainer(nn.Linear(6, 6)), bank())
    with pytest.raises(UsageError, match="one size for a confusion matrix"):
        EpisodicEvaluator(VARIABLE, 5).evaluate(bank(), confusion=True)
    by_head = EpisodicEvaluator(VARIABLE, 5, head=nearest_prototype).evaluate(trainer(), bank())
    assert torch.equal(by_head.per_episode, EpisodicEvaluator(VARIABLE, 5).evaluate(bank()).per_episode)


def test_nan_in_a_variable_episode_is_an_error() -> None:
    far = EmbeddingBank(bank().embeddings * 1e30, LABELS)
    with pytest.raises(UsageError, match="logits of each episode"):
        EpisodicEvaluator(VARIABLE, 5).evaluate(far)


def test_rows_say_transductive_and_how_queries_divide(tmp_path: Path) -> None:
    specs = (EpisodeSpec(4, 2, 5), UNBALANCED, VARIABLE)
    table = benchmark({"inductive": bank()}, specs=specs, num_episodes=10, retrieval=None)
    together = benchmark({"together": bank()}, specs=specs, num_episodes=10, retrieval=None, head=bd_cspn)
    table.rows += together.rows
    assert [(row.protocol, row.balance) for row in table.rows] == [
        ("inductive", ""),
        ("inductive", "queries unbalanced (Dirichlet 2)"),
        ("inductive", ""),
        ("transductive", "as many queries of each class"),
        ("transductive", "queries unbalanced (Dirichlet 2)"),
        ("transductive", "as many queries of each class"),
    ]
    assert [row.column for row in table.rows[:3]] == [
        "4way_2shot_5query",
        "4way_2shot_5query_dirichlet2",
        "variable_accuracy",
    ]
    text = table.markdown()
    assert "| method | 4-way 2-shot | 4-way 2-shot, Dirichlet 2 | variable ways and shots | seconds |" in text
    assert "together (transductive)" in text
    assert "10 episodes of variable ways and shots, seed 0, transductive, as many queries of each class" in text
    table.write(tmp_path)
    assert repr(ResultTable.read(tmp_path).rows) == repr(table.rows)


def test_figures_of_older_versions_are_read(tmp_path: Path) -> None:
    table = benchmark({"bank": bank()}, specs=[EpisodeSpec(4, 2, 5)], num_episodes=10, retrieval=None)
    table.write(tmp_path)
    path = tmp_path / "figures.csv"
    head, line = path.read_text().splitlines()
    place = head.split(",").index("query_balance")
    assert line.split(",")[place] == ""
    cut = [",".join(each for n, each in enumerate(text.split(",")) if n != place) for text in (head, line)]
    path.write_text("\n".join(cut) + "\n")
    assert repr(ResultTable.read(tmp_path).rows) == repr(table.rows)


def test_a_trainer_with_a_transductive_head_says_so() -> None:
    made = ProtoNetTrainer(Embedder(nn.Linear(6, 6)), head=bd_cspn)
    assert made.transductive
    assert made.classifier == "bd_cspn"
    assert EpisodicEvaluator(EpisodeSpec(4, 2, 5), 5).evaluate(made, bank()).transductive


def test_pt_map_gains_less_where_classes_have_unequal_numbers_of_queries() -> None:
    positive = EmbeddingBank(bank().embeddings.exp(), LABELS)
    gains = []
    for spec in (EpisodeSpec(4, 2, 9), EpisodeSpec(4, 2, 9, query_balance=0.5)):
        results = [EpisodicEvaluator(spec, 200, head=head).evaluate(positive) for head in (pt_map, nearest_neighbour)]
        gains.append(compare(*results).difference)
    assert gains[0] > gains[1] + 0.05
