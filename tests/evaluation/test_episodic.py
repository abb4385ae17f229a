"""EpisodicEvaluator against scikit-learn fitted episode by episode, and its interval against the formula."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor

from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.episodes import EpisodeSampler, EpisodeSpec
from pml_fewshot.evaluation import episodic
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult, evaluate_grid
from pml_fewshot.evaluation.heads import nearest_neighbour, nearest_prototype

DIMS = 8


def labelled(sizes: tuple[int, ...] = (7, 12, 9, 8, 20, 11)) -> FewShotDataset:
    """Classes of different sizes whose items do not stand together; only its labels matter."""
    labels = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return FewShotDataset(
        torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, [str(c) for c in range(len(sizes))]
    )


def clouds(dataset: FewShotDataset, spread: float = 1.2) -> Tensor:
    """Overlapping clouds, one a class, so that accuracies lie between chance and 1."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(len(dataset.class_names), DIMS, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(dataset), DIMS, generator=generator, dtype=torch.float64)
    return centres[dataset.labels] + spread * noise


class Judge:
    """A bank and a head; it counts the calls."""

    def __init__(self, bank: Tensor, head: Callable[[Tensor, Tensor], Tensor] = nearest_prototype) -> None:
        self.embeddings = bank
        self.head = head
        self.banks = 0
        self.chunks: list[int] = []

    def bank(self, dataset: FewShotDataset) -> Tensor:
        self.banks += 1
        return self.embeddings

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.chunks.append(len(support))
        return self.head(support, query)


SPEC = EpisodeSpec(4, 3, 4)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    ("head", "classifier"),
    [(nearest_prototype, NearestCentroid), (nearest_neighbour, partial(KNeighborsClassifier, n_neighbors=1))],
)
def test_each_accuracy_equals_scikit_learns_on_the_same_episode(
    head: Callable[..., Tensor], classifier: Callable[[], NearestCentroid | KNeighborsClassifier], seed: int
):
    dataset = labelled()
    bank = clouds(dataset)
    result = EpisodicEvaluator(SPEC, 60, seed).evaluate(Judge(bank, head), dataset)
    index = EpisodeSampler(dataset.labels, SPEC, torch.Generator().manual_seed(seed)).sample(60)
    expected = []
    for support, query in zip(index.support, index.query, strict=True):
        fitted = classifier().fit(bank[support.flatten()].numpy(), dataset.labels[support.flatten()].numpy())
        expected.append(fitted.score(bank[query.flatten()].numpy(), dataset.labels[query.flatten()].numpy()))
    assert result.per_episode.tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 5  # neither chance nor perfect
    assert result.mean == pytest.approx(sum(expected) / 60)
    assert result.episodes_hash == index.hash(dataset.fingerprint())
    assert (result.spec, result.seed) == (SPEC, seed)


def test_the_interval_is_1_96_standard_errors():
    dataset = labelled()
    result = EpisodicEvaluator(SPEC, 300).evaluate(Judge(clouds(dataset)), dataset)
    values = result.per_episode.tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    assert result.ci95 == pytest.approx(1.96 * deviation / math.sqrt(300), rel=1e-12)
    assert result.ci95 == pytest.approx(1.96 * scipy.stats.sem(values), rel=1e-12)
    low, high = scipy.stats.norm.interval(0.95, loc=mean, scale=np.std(values, ddof=1) / math.sqrt(300))
    assert result.ci95 == pytest.approx((high - low) / 2, rel=1e-4)


def test_the_interval_covers_the_long_run_mean_in_nineteen_of_twenty_cases():
    dataset = labelled()
    judge = Judge(clouds(dataset))
    truth = EpisodicEvaluator(SPEC, 20_000, seed=99).evaluate(judge, dataset).mean
    results = [EpisodicEvaluator(SPEC, 200, seed).evaluate(judge, dataset) for seed in range(200)]
    covered = sum(abs(result.mean - truth) <= result.ci95 for result in results)
    assert 180 <= covered <= 199


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000, None])
def test_the_chunk_changes_nothing(chunk: int | None):
    dataset = labelled()
    bank = clouds(dataset)
    whole = EpisodicEvaluator(SPEC, 50, chunk=50).evaluate(Judge(bank), dataset)
    judge = Judge(bank)
    result = EpisodicEvaluator(SPEC, 50, chunk=chunk).evaluate(judge, dataset)
    assert torch.equal(result.per_episode, whole.per_episode)
    assert (result.mean, result.ci95, result.episodes_hash) == (whole.mean, whole.ci95, whole.episodes_hash)
    assert sum(judge.chunks) == 50
    assert max(judge.chunks) <= (chunk or 50)


def test_the_chunk_of_the_memory_at_hand_is_at_least_one_episode(monkeypatch: pytest.MonkeyPatch):
    dataset = labelled()
    judge = Judge(clouds(dataset))
    floats = SPEC.ways * (SPEC.shots + SPEC.queries) * DIMS
    for room, expected in ((3 * floats + 1, [3, 3, 3, 1]), (1, [1] * 10)):
        judge.chunks.clear()
        monkeypatch.setattr(episodic, "CPU_CHUNK", room)
        EpisodicEvaluator(SPEC, 10).evaluate(judge, dataset)
        assert judge.chunks == expected


def test_items_of_any_shape_are_gathered_as_they_are():
    """The bank of a method that adapts to each episode is the images themselves."""
    dataset = labelled()
    bank = torch.arange(len(dataset)).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()
    seen: list[tuple[Tensor, Tensor]] = []

    def head(support: Tensor, query: Tensor) -> Tensor:
        seen.append((support, query))
        return torch.zeros(len(support), query.shape[1], support.shape[1])

    EpisodicEvaluator(SPEC, 5, chunk=5).evaluate(Judge(bank, head), dataset)
    ((support, query),) = seen
    index = EpisodeSampler(dataset.labels, SPEC, torch.Generator().manual_seed(0)).sample(5)
    assert support.shape == (5, 4, 3, 3, 2, 2)
    assert query.shape == (5, 16, 3, 2, 2)
    assert torch.equal(support[..., 0, 0, 0].long(), index.support)
    assert torch.equal(query[..., 0, 0, 0].long(), index.query.flatten(1))


def test_rotating_the_embeddings_leaves_the_accuracy_and_noise_falls_to_chance():
    dataset = labelled()
    bank = clouds(dataset)
    rotation = torch.linalg.qr(torch.randn(DIMS, DIMS, generator=torch.Generator().manual_seed(1)).double()).Q
    evaluator = EpisodicEvaluator(SPEC, 400)
    plain = evaluator.evaluate(Judge(bank), dataset)
    rotated = evaluator.evaluate(Judge(bank @ rotation), dataset)
    assert torch.equal(plain.per_episode, rotated.per_episode)
    noise = torch.randn(bank.shape, generator=torch.Generator().manual_seed(2))
    chance = evaluator.evaluate(Judge(noise), dataset)
    assert abs(chance.mean - 0.25) < 4 * chance.ci95
    perfect = torch.nn.functional.one_hot(dataset.labels).float()
    assert evaluator.evaluate(Judge(perfect), dataset).mean == 1
    assert evaluator.evaluate(Judge(perfect), dataset).ci95 == 0


def test_logits_that_are_all_equal_are_right_by_chance_only():
    dataset = labelled()
    result = EpisodicEvaluator(SPEC, 20).evaluate(Judge(torch.zeros(len(dataset), DIMS)), dataset)
    assert result.per_episode.tolist() == [0.25] * 20


def test_all_methods_are_judged_on_the_same_episodes():
    dataset = labelled()
    first = EpisodicEvaluator(SPEC, 30).evaluate(Judge(clouds(dataset)), dataset)
    second = EpisodicEvaluator(SPEC, 30).evaluate(Judge(clouds(dataset), nearest_neighbour), dataset)
    other = EpisodicEvaluator(SPEC, 30, seed=1).evaluate(Judge(clouds(dataset)), dataset)
    assert first.episodes_hash == second.episodes_hash != other.episodes_hash
    before = torch.get_rng_state()
    evaluator = EpisodicEvaluator(SPEC, 30)
    again = [evaluator.evaluate(Judge(clouds(dataset)), dataset) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for result in again:
        assert torch.equal(result.per_episode, first.per_episode)


def test_a_grid_makes_one_bank():
    dataset = labelled()
    judge = Judge(clouds(dataset))
    specs = (EpisodeSpec(2, 1, 3), EpisodeSpec(5, 3, 4))
    results = evaluate_grid(judge, dataset, specs, num_episodes=20, seed=3)
    assert judge.banks == 1
    for spec, result in zip(specs, results, strict=True):
        alone = EpisodicEvaluator(spec, 20, 3).evaluate(judge, dataset)
        assert result.spec == spec
        assert torch.equal(result.per_episode, alone.per_episode)
    given = Judge(clouds(dataset))
    EpisodicEvaluator(specs[0], 20).evaluate(given, dataset, bank=given.embeddings)
    assert given.banks == 0


def test_a_result_reads_with_its_interval_and_count():
    result = EpisodicResult(0.98765, 0.00123, torch.zeros(600), EpisodeSpec(5, 1, 15), 0, "ab")
    assert str(result) == "98.77 +- 0.12 % (5-way 1-shot 15-query, 600 episodes)"


def test_a_bank_that_is_not_finite_or_of_another_set_is_refused():
    dataset = labelled()
    bank = clouds(dataset)
    bank[[3, 8], 2] = float("nan")
    with pytest.raises(
        ValueError, match=f"expected finite bank, got NaN or infinity in 2 of {len(bank)} rows, first in row 3"
    ):
        EpisodicEvaluator(SPEC, 10).evaluate(Judge(bank), dataset)
    with pytest.raises(ValueError, match=f"expected a bank of {len(bank)} items, got 5; encode this very data set"):
        EpisodicEvaluator(SPEC, 10).evaluate(Judge(torch.zeros(5, 2)), dataset)


def test_logits_that_are_nan_are_refused():
    dataset = labelled()

    def diverged(support: Tensor, query: Tensor) -> Tensor:
        return torch.full((len(support), query.shape[1], support.shape[1]), float("nan"))

    with pytest.raises(ValueError, match="NaN"):
        EpisodicEvaluator(SPEC, 10).evaluate(Judge(clouds(dataset), diverged), dataset)


def test_a_set_too_small_for_the_episodes_is_named():
    dataset = labelled()
    judge = Judge(clouds(dataset))
    with pytest.raises(ValueError, match="at least 7 classes for 7-way 1-shot 1-query, got 6"):
        EpisodicEvaluator(EpisodeSpec(7, 1, 1), 10).evaluate(judge, dataset)
    with pytest.raises(ValueError, match="got 7 in class 0"):
        EpisodicEvaluator(EpisodeSpec(5, 1, 7), 10).evaluate(judge, dataset)


@pytest.mark.parametrize("wrong", [0, -1, True, 10.0])
def test_wrong_counts_are_refused(wrong: object):
    with pytest.raises(ValueError, match="expected num_episodes to be an integer of at least 1"):
        EpisodicEvaluator(SPEC, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected chunk to be an integer of at least 1"):
        EpisodicEvaluator(SPEC, 10, chunk=wrong)  # type: ignore[arg-type]


def test_one_episode_has_no_interval():
    with pytest.raises(ValueError, match="an interval needs at least two episodes"):
        EpisodicEvaluator(SPEC, 1)
