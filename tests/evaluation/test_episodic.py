"""EpisodicEvaluator against scikit-learn fitted episode by episode, and its interval against the formula."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor, nn

from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import EpisodeIndex, EpisodeSampler, EpisodeSpec
from pml_fewshot.evaluation import episodic, memory
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult, evaluate_grid
from pml_fewshot.evaluation.heads import (
    k_nearest_neighbours,
    nearest_neighbour,
    nearest_prototype,
    soft_nearest_neighbour,
)
from pml_fewshot.evaluation.linear_heads import cosine_classifier, logistic_regression, ridge_regression

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


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "prototype": nearest_prototype,
    "neighbour": nearest_neighbour,
    "soft neighbour": partial(soft_nearest_neighbour, temperature=0.5),
    "five neighbours": partial(k_nearest_neighbours, k=5),
    "cosine": cosine_classifier,
    "ridge": ridge_regression,
    "logistic": logistic_regression,
}
# values that no float64 and no int32 tells apart, negative ones, and an order that is not the data set's
NAMES = torch.tensor([2**60 + 1, -7, 2**60, 0, 2**60 + 2, -(2**40)])


def bank_of() -> EmbeddingBank:
    dataset = labelled()
    return EmbeddingBank(clouds(dataset), NAMES[dataset.labels])


def slow_predictions(embeddings: Tensor, index: EpisodeIndex) -> np.ndarray:
    """Ways (E, W, Q) by numpy's nearest mean, one query at a time."""
    items, supports = embeddings.double().numpy(), index.support.numpy()
    episodes, ways, queries = index.query.shape
    predicted = np.empty((episodes, ways, queries), dtype=int)
    for e in range(episodes):
        means = [items[supports[e, way]].mean(axis=0) for way in range(ways)]
        for way, query in np.ndindex(ways, queries):
            item = items[index.query[e, way, query]]
            predicted[e, way, query] = np.argmin([((item - mean) ** 2).sum() for mean in means])
    return predicted


def slow_accuracies(embeddings: Tensor, index: EpisodeIndex) -> list[float]:
    predicted = slow_predictions(embeddings, index)
    truth = np.arange(predicted.shape[1])[None, :, None]
    return (predicted == truth).mean(axis=(1, 2)).tolist()


def drawn(labels: Tensor, spec: EpisodeSpec, count: int, seed: int = 0) -> EpisodeIndex:
    return EpisodeSampler(labels, spec, torch.Generator().manual_seed(seed)).sample(count)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("spec", [SPEC, EpisodeSpec(2, 1, 5), EpisodeSpec(6, 2, 3)])
def test_a_bank_alone_is_judged_by_the_nearest_mean_as_in_a_loop(spec: EpisodeSpec, seed: int):
    bank = bank_of()
    result = EpisodicEvaluator(spec, 60, seed).evaluate(bank)
    index = drawn(bank.labels, spec, 60, seed)
    expected = slow_accuracies(bank.embeddings, index)
    assert result.per_episode.tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 3
    assert result.mean == pytest.approx(sum(expected) / 60)
    assert result.episodes_hash == index.hash(bank.fingerprint())
    assert result.classes is None
    assert result.confusion is None


@pytest.mark.parametrize("name", HEADS)
def test_a_head_classifies_in_place_of_the_trainer_and_for_a_bank(name: str):
    dataset, head = labelled(), HEADS[name]
    bank = EmbeddingBank(clouds(dataset), dataset.labels)

    def forbidden(support: Tensor, query: Tensor) -> Tensor:
        raise AssertionError("the trainer's own head was asked")

    trainer = Judge(bank.embeddings, forbidden)
    with_head = EpisodicEvaluator(SPEC, 20, head=head)
    by_trainer = with_head.evaluate(trainer, dataset)
    assert trainer.banks == 1
    assert trainer.chunks == []
    own = EpisodicEvaluator(SPEC, 20).evaluate(Judge(bank.embeddings, head), dataset)
    for result in (by_trainer, with_head.evaluate(bank), with_head.evaluate(trainer, bank)):
        assert torch.equal(result.per_episode, own.per_episode)
    assert trainer.banks == 1
    index = drawn(dataset.labels, SPEC, 20)
    logits = head(bank.embeddings[index.support], bank.embeddings[index.query].flatten(1, 2))
    expected = (logits.argmax(dim=2).unflatten(1, (4, 4)) == torch.arange(4)[:, None]).double().mean(dim=(1, 2))
    torch.testing.assert_close(own.per_episode, expected, rtol=0, atol=1e-12)


def test_a_trainer_judged_on_a_bank_classifies_its_embeddings_by_itself():
    bank = bank_of()
    trainer = Judge(torch.zeros(1, 1), nearest_neighbour)
    result = EpisodicEvaluator(SPEC, 20).evaluate(trainer, bank)
    assert trainer.banks == 0
    assert sum(trainer.chunks) == 20
    by_head = EpisodicEvaluator(SPEC, 20, head=nearest_neighbour).evaluate(bank)
    assert torch.equal(result.per_episode, by_head.per_episode)
    assert result.episodes_hash == by_head.episodes_hash
    other = EpisodicEvaluator(SPEC, 20).evaluate(trainer, bank, bank=bank.embeddings.flip(1))
    torch.testing.assert_close(other.per_episode, result.per_episode)  # the bank given by hand: columns turned round


def test_a_grid_over_a_bank_and_with_a_head():
    bank = bank_of()
    specs = (EpisodeSpec(2, 1, 3), EpisodeSpec(5, 3, 4))
    for head in (None, ridge_regression):
        results = evaluate_grid(bank, None, specs, num_episodes=20, seed=3, head=head)
        for spec, result in zip(specs, results, strict=True):
            alone = EpisodicEvaluator(spec, 20, 3, head=head).evaluate(bank)
            assert torch.equal(result.per_episode, alone.per_episode)
            assert result.episodes_hash == alone.episodes_hash


@pytest.mark.parametrize("name", HEADS)
def test_the_chunk_changes_nothing_whatever_the_head(name: str):
    bank = bank_of()
    whole = EpisodicEvaluator(SPEC, 15, chunk=15, head=HEADS[name]).evaluate(bank, confusion=True)
    for chunk in (1, 7, 1000):
        result = EpisodicEvaluator(SPEC, 15, chunk=chunk, head=HEADS[name]).evaluate(bank, confusion=True)
        assert torch.equal(result.per_episode, whole.per_episode)
        assert result.confusion is not None
        assert whole.confusion is not None
        assert torch.equal(result.confusion, whole.confusion)
        assert (result.mean, result.ci95, result.episodes_hash) == (whole.mean, whole.ci95, whole.episodes_hash)


def test_free_memory_makes_the_chunk_of_a_cpu_smaller_and_never_larger(monkeypatch: pytest.MonkeyPatch):
    dataset = labelled()
    judge = Judge(clouds(dataset))
    plain = EpisodicEvaluator(SPEC, 40).evaluate(judge, dataset)
    floats = SPEC.ways * (SPEC.shots + SPEC.queries) * DIMS
    three = 3 * 8 * floats / episodic.SHARE_OF_FREE_MEMORY  # bytes that hold three episodes of float64
    for free, expected in ((1, [1] * 40), (0, [1] * 40), (three + 32, [3] * 13 + [1]), (2**60, [40])):
        judge.chunks.clear()
        monkeypatch.setattr(episodic, "free_memory", lambda device, free=free: free)
        result = EpisodicEvaluator(SPEC, 40).evaluate(judge, dataset)
        assert judge.chunks == expected
        assert torch.equal(result.per_episode, plain.per_episode)
    monkeypatch.setattr(episodic, "CPU_CHUNK", 5 * floats)
    judge.chunks.clear()
    EpisodicEvaluator(SPEC, 40).evaluate(judge, dataset)
    assert judge.chunks == [5] * 8
    judge.chunks.clear()
    EpisodicEvaluator(SPEC, 40, chunk=9).evaluate(judge, dataset)  # the caller's own goes first
    assert judge.chunks == [9] * 4 + [4]


def test_free_memory_is_what_linux_says_is_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    cpu = torch.device("cpu")
    assert memory.free_memory(cpu) > 2**20
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "Path", lambda name: meminfo)
    assert memory.free_memory(cpu) == memory.UNKNOWN
    meminfo.write_text("MemTotal:       16000 kB\nMemFree:         200 kB\nMemAvailable:    7000 kB\n")
    assert memory.free_memory(cpu) == 7000 * 1024
    meminfo.write_text("MemTotal:       16000 kB\n")
    assert memory.free_memory(cpu) == memory.UNKNOWN


@pytest.mark.parametrize("spec", [SPEC, EpisodeSpec(2, 2, 5)])
def test_the_confusion_matrix_counts_as_a_loop(spec: EpisodeSpec):
    bank = bank_of()
    result = EpisodicEvaluator(spec, 70, seed=2, chunk=9).evaluate(bank, confusion=True)
    index = drawn(bank.labels, spec, 70, 2)
    predicted = slow_predictions(bank.embeddings, index)
    labels = bank.labels.tolist()
    classes = sorted(set(labels))
    expected = np.zeros((6, 6), dtype=int)
    for e, way, query in np.ndindex(*predicted.shape):
        true = labels[index.query[e, way, query]]
        taken_for = labels[index.support[e, predicted[e, way, query], 0]]
        expected[classes.index(true), classes.index(taken_for)] += 1
    assert result.classes is not None
    assert result.confusion is not None
    assert result.classes.tolist() == classes
    assert result.confusion.dtype == torch.int64
    assert result.confusion.tolist() == expected.tolist()
    assert expected.sum() > expected.trace() > 0
    # each row: the queries of that class
    asked = [labels[item] for item in index.query.flatten().tolist()]
    assert result.confusion.sum(dim=1).tolist() == [asked.count(label) for label in classes]
    assert result.confusion.trace().item() == pytest.approx(result.mean * 70 * spec.ways * spec.queries)
    of_class, shares = result.per_class()
    assert of_class.tolist() == classes
    assert shares.tolist() == pytest.approx([expected[c, c] / expected[c].sum() for c in range(6)])
    without = EpisodicEvaluator(spec, 70, seed=2).evaluate(bank)
    assert torch.equal(without.per_episode, result.per_episode)
    with pytest.raises(ValueError, match=r"^expected a result with its confusion matrix, got none; use evaluate\("):
        without.per_class()


def test_a_class_that_no_episode_drew_has_no_accuracy():
    labels = torch.arange(50).repeat_interleave(2)
    bank = EmbeddingBank(torch.nn.functional.one_hot(labels).double(), labels)
    result = EpisodicEvaluator(EpisodeSpec(2, 1, 1), 3).evaluate(bank, confusion=True)
    seen = set(labels[drawn(labels, EpisodeSpec(2, 1, 1), 3).query].flatten().tolist())
    for label, share in zip(*(part.tolist() for part in result.per_class()), strict=True):
        assert share == 1 if label in seen else math.isnan(share)
    assert len(seen) < 50


def test_episodes_whose_logits_are_not_finite_are_counted():
    bank = bank_of()
    seen = [0]

    def sometimes(support: Tensor, query: Tensor) -> Tensor:
        logits = nearest_prototype(support, query)
        for e in range(len(logits)):
            if seen[0] in (2, 5):
                logits[e, -1, -1] = float("nan")
            if seen[0] == 7:
                logits[e, 0] = float("inf")
            seen[0] += 1
        return logits

    with pytest.raises(
        ValueError,
        match=r"expected finite logits of each episode, got NaN or infinity in 3 of 10 rows, first in row 2;",
    ):
        EpisodicEvaluator(SPEC, 10, chunk=4, head=sometimes).evaluate(bank)


def test_a_bank_that_has_become_nan_is_refused():
    bank = bank_of()
    bank.embeddings[[3, 8], 2] = float("nan")
    with pytest.raises(ValueError, match=r"expected finite bank, got NaN or infinity in 2 of 67 rows, first in row 3"):
        EpisodicEvaluator(SPEC, 10).evaluate(bank)


def test_what_does_not_fit_together_is_refused():
    dataset, bank = labelled(), bank_of()
    evaluator, trainer = EpisodicEvaluator(SPEC, 10), Judge(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="expected a bank of 67 items, got 5; encode this very data set"):
        evaluator.evaluate(trainer, dataset, bank=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="expected a bank of 67 items, got 5; encode this very data set"):
        evaluator.evaluate(trainer, bank, bank=torch.zeros(5, 2))
    with pytest.raises(TypeError, match="expected a data set to judge a trainer on, got none"):
        evaluator.evaluate(trainer)
    with pytest.raises(TypeError, match="expected a data set to judge a trainer on, got none"):
        evaluator.evaluate(trainer, bank=torch.zeros(5, 2))
    for beside in ({"dataset": dataset}, {"dataset": bank}, {"bank": bank.embeddings}):
        with pytest.raises(ValueError, match="expected a bank alone, got a data set beside it; leave one out"):
            evaluator.evaluate(bank, **beside)  # type: ignore[arg-type]


def test_a_bank_too_small_for_the_episodes_is_named():
    bank = bank_of()
    for evaluator, message in (
        (EpisodicEvaluator(EpisodeSpec(7, 1, 1), 10), "at least 7 classes for 7-way 1-shot 1-query, got 6"),
        (EpisodicEvaluator(EpisodeSpec(5, 1, 7), 10), f"got 7 in class {2**60 + 1} "),
    ):
        for judge in (evaluator.check, evaluator.evaluate):
            with pytest.raises(ValueError, match=message):
                judge(bank)


def test_a_set_and_its_bank_are_the_same_episodes_and_another_set_is_not():
    images = torch.randint(0, 256, (67, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = labelled().labels
    named, renamed = (FewShotDataset(images, labels, names) for names in (list("abcdef"), list("abcdeg")))
    embedder = Embedder(nn.Flatten())
    evaluator = EpisodicEvaluator(SPEC, 10)

    class Trainer(Judge):
        def bank(self, dataset: FewShotDataset) -> Tensor:
            return embedder.encode(dataset).embeddings

    trainer = Trainer(torch.zeros(1, 1))
    from_images = evaluator.evaluate(trainer, named)
    from_bank = evaluator.evaluate(embedder.encode(named))
    assert from_images.episodes_hash == from_bank.episodes_hash
    assert torch.equal(from_images.per_episode, from_bank.per_episode)
    assert evaluator.evaluate(trainer, embedder.encode(named)).episodes_hash == from_bank.episodes_hash
    normalized = embedder.encode(named).centred(torch.ones(4)).normalized()
    assert evaluator.evaluate(normalized).episodes_hash == from_bank.episodes_hash
    others = [
        evaluator.evaluate(embedder.encode(renamed)),
        evaluator.evaluate(trainer, renamed),
        evaluator.evaluate(EmbeddingBank(embedder.encode(named).embeddings, labels)),  # of an unknown source
        EpisodicEvaluator(SPEC, 11).evaluate(embedder.encode(named)),
        EpisodicEvaluator(SPEC, 10, seed=1).evaluate(embedder.encode(named)),
        EpisodicEvaluator(EpisodeSpec(4, 3, 3), 10).evaluate(embedder.encode(named)),
    ]
    assert others[0].episodes_hash == others[1].episodes_hash
    assert len({from_bank.episodes_hash, *(other.episodes_hash for other in others)}) == 6


def test_the_interval_covers_a_known_accuracy_as_often_as_it_says():
    """Each episode has a difficulty of its own, so its queries are right or wrong together: 0.5 to 1, 0.75 at large.

    An interval over all queries as if they were independent would cover far less often.
    """
    spec = EpisodeSpec(2, 1, 4)
    labels = torch.arange(2).repeat_interleave(5)
    bank = torch.zeros(10, 1)
    generator = torch.Generator().manual_seed(12)
    true_way = torch.arange(2).repeat_interleave(4)

    def right_with_some_probability(support: Tensor, query: Tensor) -> Tensor:
        easiness = 0.5 + 0.5 * torch.rand(len(support), 1, generator=generator)
        right = torch.rand(len(support), 8, generator=generator) < easiness
        return torch.nn.functional.one_hot(torch.where(right, true_way, 1 - true_way), 2).float()

    evaluator = EpisodicEvaluator(spec, 200, head=right_with_some_probability)
    results = [evaluator.evaluate(EmbeddingBank(bank, labels)) for _ in range(1000)]
    covered = sum(abs(result.mean - 0.75) <= result.ci95 for result in results)
    assert 930 <= covered <= 970
    means = np.array([result.mean for result in results])
    assert means.mean() == pytest.approx(0.75, abs=0.003)
    assert np.mean([result.ci95 for result in results]) == pytest.approx(1.96 * means.std(ddof=1), rel=0.07)


def small_sets() -> st.SearchStrategy[EmbeddingBank]:
    """3 to 6 classes of 4 to 9 items in no order."""

    def build(sizes: list[int], seed: int) -> EmbeddingBank:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
        labels = labels[torch.randperm(len(labels), generator=generator)]
        noise = torch.randn(len(labels), 4, generator=generator, dtype=torch.float64)
        return EmbeddingBank(torch.randn(6, 4, generator=generator, dtype=torch.float64)[labels] + noise, labels)

    return st.builds(build, st.lists(st.integers(4, 9), min_size=3, max_size=6), st.integers(0, 2**32))


@given(bank=small_sets(), factor=st.integers(1, 2**55), offset=st.integers(-(2**58), 2**58), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_relabelling_in_the_same_order_changes_only_the_names(bank: EmbeddingBank, factor: int, offset: int, seed: int):
    evaluator = EpisodicEvaluator(EpisodeSpec(3, 2, 2), 15, seed)
    plain = evaluator.evaluate(bank, confusion=True)
    renamed = evaluator.evaluate(EmbeddingBank(bank.embeddings, bank.labels * factor + offset), confusion=True)
    assert torch.equal(renamed.per_episode, plain.per_episode)
    assert plain.classes is not None
    assert renamed.classes is not None
    assert renamed.classes.tolist() == [label * factor + offset for label in plain.classes.tolist()]
    assert renamed.confusion is not None
    assert plain.confusion is not None
    assert torch.equal(renamed.confusion, plain.confusion)


@given(bank=small_sets(), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_items_in_another_order_under_other_names_are_judged_as_themselves(bank: EmbeddingBank, seed: int):
    """The episodes are others, but each is scored as those items are in the bank as it was."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(bank), generator=generator)
    names = torch.randperm(6, generator=generator)
    moved = EmbeddingBank(bank.embeddings[order], names[bank.labels[order]])
    spec = EpisodeSpec(3, 2, 2)
    result = EpisodicEvaluator(spec, 15, seed).evaluate(moved)
    index = drawn(moved.labels, spec, 15, seed)
    as_it_was = EpisodeIndex(order[index.support], order[index.query])
    assert result.per_episode.tolist() == pytest.approx(slow_accuracies(bank.embeddings, as_it_was), abs=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_another_order_and_other_names_change_the_mean_by_chance_only(name: str):
    bank = bank_of()
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    evaluator = EpisodicEvaluator(SPEC, 400, head=HEADS[name])
    plain = evaluator.evaluate(bank)
    moved = evaluator.evaluate(EmbeddingBank(bank.embeddings[order], -bank.labels[order]))
    assert plain.episodes_hash != moved.episodes_hash
    assert abs(plain.mean - moved.mean) < 2 * math.hypot(plain.ci95, moved.ci95)
    assert 0.3 < plain.mean < 0.95


@given(bank=small_sets(), seed=st.integers(0, 2**32), name=st.sampled_from(sorted(HEADS)))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_rotating_the_embeddings_leaves_every_episode_as_it_was(bank: EmbeddingBank, seed: int, name: str):
    gaussian = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotated = EmbeddingBank(bank.embeddings @ torch.linalg.qr(gaussian).Q, bank.labels)
    evaluator = EpisodicEvaluator(EpisodeSpec(3, 2, 2), 15, head=HEADS[name])
    assert torch.equal(evaluator.evaluate(rotated).per_episode, evaluator.evaluate(bank).per_episode)
