"""EpisodicEvaluator against scikit-learn and numpy episode by episode, and its interval against the formula."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation import episodic
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, adaptation_curve
from pml_fewshot.evaluation.heads import (
    k_nearest_neighbours,
    nearest_neighbour,
    nearest_prototype,
    soft_nearest_neighbour,
)
from pml_fewshot.evaluation.linear_heads import cosine_classifier, logistic_regression, ridge_regression
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.episodes import EpisodeIndex, EpisodeSampler, EpisodeSpec
from pml_fewshot.trainers.protonet import ProtoNetTrainer

DIMS = 8
SPEC = EpisodeSpec(4, 3, 4)
FLOATS = SPEC.ways * (SPEC.shots + SPEC.queries) * DIMS  # gathered for an episode

HEADS: dict[str, Callable[..., Tensor]] = {
    "prototype": nearest_prototype,
    "neighbour": nearest_neighbour,
    "soft neighbour": partial(soft_nearest_neighbour, temperature=0.5),
    "five neighbours": partial(k_nearest_neighbours, k=5),
    "cosine": cosine_classifier,
    "ridge": ridge_regression,
    "logistic": logistic_regression,
}


def labeled(sizes: tuple[int, ...] = (7, 12, 9, 8, 20, 11), seed: int = 0) -> FewShotDataset:
    """Random images in classes of different sizes whose items do not stand together."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 256, (len(labels), 1, 2, 4), generator=generator, dtype=torch.uint8)
    return FewShotDataset(images, labels, [str(c) for c in range(len(sizes))])


def clouds(dataset: FewShotDataset, spread: float = 1.2) -> Tensor:
    """Overlapping clouds, one a class, so that accuracies lie between chance and 1."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(len(dataset.class_names), DIMS, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(dataset), DIMS, generator=generator, dtype=torch.float64)
    return centres[dataset.labels] + spread * noise


def bank_of() -> EmbeddingBank:
    """Labels that no float64 and no int32 can tell apart, negative ones, and an order that is not the data set's."""
    dataset, labels = labeled(), torch.tensor([2**60 + 1, -7, 2**60, 0, 2**60 + 2, -(2**40)])
    return EmbeddingBank(clouds(dataset), labels[dataset.labels])


class Method:
    """A bank and a head; it notes the size and the thread of each call."""

    def __init__(self, bank: Tensor, head: Callable[..., Tensor] = nearest_prototype) -> None:
        self.embeddings = bank
        self.head = head
        self.banks = 0
        self.chunks: list[int] = []
        self.threads: set[int] = set()

    def bank(self, dataset: FewShotDataset) -> Tensor:
        self.banks += 1
        return self.embeddings

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.chunks.append(len(support))
        self.threads.add(threading.get_ident())
        return self.head(support, query)


def drawn(labels: Tensor, spec: EpisodeSpec, count: int, seed: int = 0) -> EpisodeIndex:
    return EpisodeSampler(labels, spec, torch.Generator().manual_seed(seed)).sample(count)


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
    return (predicted == np.arange(predicted.shape[1])[None, :, None]).mean(axis=(1, 2)).tolist()


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and chunks of three episodes of SPEC."""
    monkeypatch.setattr(episodic, "CPU_CHUNK", 3 * FLOATS)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # whatever an evaluation sets, it restores
    torch.set_num_threads(before)


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, EpisodeSpec(2, 1, 5), EpisodeSpec(6, 2, 3)])
def test_each_accuracy_equals_that_of_a_loop(spec: EpisodeSpec):
    bank = bank_of()
    result = EpisodicEvaluator(spec, 60, seed=3).evaluate(bank)
    index = drawn(bank.labels, spec, 60, seed=3)
    expected = slow_accuracies(bank.embeddings, index)
    assert result.per_episode.tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 3  # neither chance nor perfect
    assert (result.spec, result.seed, result.classes, result.confusion) == (spec, 3, None, None)
    assert result.mean == pytest.approx(sum(expected) / 60)
    assert result.ci95 == pytest.approx(1.96 * scipy.stats.sem(expected), rel=1e-12)
    assert result.episodes_hash == index.hash(bank.fingerprint())
    assert str(result) == f"{100 * result.mean:.2f} +- {100 * result.ci95:.2f} % ({spec}, 60 episodes)"


@pytest.mark.parametrize("shots", [1, 3])
def test_each_accuracy_equals_scikit_learns_on_the_same_episode(shots: int):
    """At one shot the nearest mean is the nearest neighbor."""
    dataset, spec = labeled(), EpisodeSpec(4, shots, 4)
    bank = clouds(dataset)
    result = EpisodicEvaluator(spec, 60).evaluate(Method(bank), dataset)
    for e, (support, query) in enumerate(zip(*vars(drawn(dataset.labels, spec, 60)).values(), strict=True)):
        classifier = NearestCentroid() if shots > 1 else KNeighborsClassifier(n_neighbors=1)
        fitted = classifier.fit(bank[support.flatten()].numpy(), dataset.labels[support.flatten()].numpy())
        expected = fitted.score(bank[query.flatten()].numpy(), dataset.labels[query.flatten()].numpy())
        assert result.per_episode[e] == pytest.approx(expected, abs=1e-12)


def test_the_interval_covers_a_known_accuracy_as_often_as_it_says():
    """Each episode has a difficulty of its own, so its queries are right or wrong together: 0.5 to 1, 0.75 at large.

    An interval over all queries as if they were independent would cover far less often.
    """
    generator = torch.Generator().manual_seed(12)
    true_way = torch.arange(2).repeat_interleave(4)

    def right_with_some_probability(support: Tensor, query: Tensor) -> Tensor:
        easiness = 0.5 + 0.5 * torch.rand(len(support), 1, generator=generator)
        right = torch.rand(len(support), 8, generator=generator) < easiness
        return F.one_hot(torch.where(right, true_way, 1 - true_way), 2).float()

    bank = EmbeddingBank(torch.zeros(10, 1), torch.arange(2).repeat_interleave(5))
    evaluator = EpisodicEvaluator(EpisodeSpec(2, 1, 4), 200, head=right_with_some_probability)
    results = [evaluator.evaluate(bank) for _ in range(500)]
    means = np.array([result.mean for result in results])
    assert 460 <= sum(abs(result.mean - 0.75) <= result.ci95 for result in results) <= 490
    assert means.mean() == pytest.approx(0.75, abs=0.004)
    assert np.mean([result.ci95 for result in results]) == pytest.approx(1.96 * means.std(ddof=1), rel=0.07)


def test_rotated_embeddings_give_the_same_noise_gives_chance_and_one_hot_embeddings_give_1():
    dataset = labeled()
    bank = clouds(dataset)
    rotation = torch.linalg.qr(torch.randn(DIMS, DIMS, generator=torch.Generator().manual_seed(1)).double()).Q
    noise = torch.randn(bank.shape, generator=torch.Generator().manual_seed(2))
    embeddings = (bank, bank @ rotation, noise, F.one_hot(dataset.labels).float(), torch.zeros(len(bank), DIMS))
    evaluator = EpisodicEvaluator(SPEC, 400)
    plain, rotated, chance, perfect, equal = (
        evaluator.evaluate(EmbeddingBank(each, dataset.labels)) for each in embeddings
    )
    assert torch.equal(plain.per_episode, rotated.per_episode)
    assert abs(chance.mean - 0.25) < 4 * chance.ci95
    assert (perfect.mean, perfect.ci95) == (1, 0)
    assert equal.per_episode.tolist() == [0.25] * 400  # all logits are equal


def test_the_confusion_matrix_counts_as_a_loop():
    spec, bank = EpisodeSpec(2, 2, 5), bank_of()
    result = EpisodicEvaluator(spec, 70, seed=2, chunk=9).evaluate(bank, confusion=True)
    index = drawn(bank.labels, spec, 70, 2)
    predicted = slow_predictions(bank.embeddings, index)
    labels = bank.labels.tolist()
    names = sorted(set(labels))
    expected = np.zeros((6, 6), dtype=int)
    for e, way, query in np.ndindex(*predicted.shape):
        true = labels[index.query[e, way, query]]
        taken_for = labels[index.support[e, predicted[e, way, query], 0]]
        expected[names.index(true), names.index(taken_for)] += 1
    classes, accuracies = result.per_class()
    assert classes.tolist() == names
    assert accuracies.tolist() == pytest.approx([expected[c, c] / expected[c].sum() for c in range(6)])
    assert result.confusion is not None
    assert result.confusion.tolist() == expected.tolist()
    assert expected.sum() > expected.trace() > 0
    without = EpisodicEvaluator(spec, 70, seed=2).evaluate(bank)
    assert torch.equal(without.per_episode, result.per_episode)
    with pytest.raises(UsageError, match=r"^expected a result with its confusion matrix, got none; use evaluate\("):
        without.per_class()


# --- banks ------------------------------------------------------------------------------------------------------------


def test_images_are_gathered_as_floats_in_0_to_1():
    """The bank of a method that adapts to each episode is the images themselves."""
    dataset = labeled()
    seen: list[tuple[Tensor, Tensor]] = []

    def head(support: Tensor, query: Tensor) -> Tensor:
        seen.append((support, query))
        return torch.zeros(len(support), query.shape[1], support.shape[1])

    EpisodicEvaluator(SPEC, 5).evaluate(Method(dataset.images, head), dataset)
    ((support, query),) = seen
    index = drawn(dataset.labels, SPEC, 5)
    assert torch.equal(support, dataset.floats(index.support))
    assert torch.equal(query, dataset.floats(index.query).flatten(1, 2))
    EpisodicEvaluator(SPEC, 5).evaluate(Method(dataset.images.half(), head), dataset)
    assert torch.equal(seen[1][0], 255 * support)  # floats stay what they are, in float32


def test_a_set_and_its_bank_are_the_same_episodes_and_another_set_is_not():
    dataset, embedder, evaluator = labeled(), Embedder(nn.Flatten()), EpisodicEvaluator(SPEC, 10)
    before = torch.get_rng_state()
    bank = embedder.encode(dataset)
    trainer = Method(bank.embeddings)
    from_bank = evaluator.evaluate(bank)
    for result in (
        evaluator.evaluate(embedder, dataset),
        evaluator.evaluate(trainer, dataset),
        evaluator.evaluate(trainer, dataset, bank.embeddings),
        evaluator.evaluate(trainer, bank),
    ):
        assert torch.equal(result.per_episode, from_bank.per_episode)
        assert result.episodes_hash == from_bank.episodes_hash
    assert trainer.banks == 1
    others = [
        evaluator.evaluate(embedder, FewShotDataset(dataset.images, dataset.labels, list("uvwxyz"))),
        evaluator.evaluate(EmbeddingBank(bank.embeddings, bank.labels)),  # of an unknown source
        EpisodicEvaluator(SPEC, 11).evaluate(bank),
        EpisodicEvaluator(SPEC, 10, seed=1).evaluate(bank),
        EpisodicEvaluator(EpisodeSpec(4, 3, 3), 10).evaluate(bank),
    ]
    assert len({from_bank.episodes_hash, *(other.episodes_hash for other in others)}) == 6
    assert torch.equal(torch.get_rng_state(), before)


# --- heads and modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_a_head_replaces_the_trainers_own_and_classifies_banks(name: str):
    dataset, head = labeled(), HEADS[name]
    bank = EmbeddingBank(clouds(dataset), dataset.labels)
    trainer = Method(bank.embeddings)
    evaluator = EpisodicEvaluator(SPEC, 20, head=head)
    index = drawn(dataset.labels, SPEC, 20)
    logits = head(bank.embeddings[index.support], bank.embeddings[index.query].flatten(1, 2))
    expected = (logits.argmax(dim=2).unflatten(1, (4, 4)) == torch.arange(4)[:, None]).double().mean(dim=(1, 2))
    for result in (evaluator.evaluate(trainer, dataset), evaluator.evaluate(bank)):
        torch.testing.assert_close(result.per_episode, expected, rtol=0, atol=1e-12)
    assert trainer.chunks == []


def test_a_head_gets_the_trainers_distance():
    dataset = labeled((30,) * 6)
    trainer = ProtoNetTrainer(Embedder(nn.Flatten()), PrototypicalLoss(distance=CosineSimilarity(), scale=10))
    own = EpisodicEvaluator(SPEC, 300).evaluate(trainer, dataset)
    with_head = partial(EpisodicEvaluator, SPEC, 300)
    assert torch.equal(with_head(head=nearest_prototype).evaluate(trainer, dataset).per_episode, own.per_episode)
    euclidean = partial(nearest_prototype, distance=LpDistance(normalize_embeddings=False, power=2))
    by_euclid = with_head(head=euclidean).evaluate(trainer, dataset)  # a head that has its distance keeps it
    plain = with_head().evaluate(trainer.embedder, dataset)
    assert torch.equal(by_euclid.per_episode, plain.per_episode)
    assert not torch.equal(plain.per_episode, own.per_episode)


def test_heads_of_two_arguments_are_called_without_the_distance():
    trainer = ProtoNetTrainer(Embedder(nn.Flatten()))
    seen: list[tuple[Any, ...]] = []

    def noted(support: Tensor, query: Tensor, *more: Any) -> Tensor:
        seen.append(more)
        return nearest_prototype(support, query)

    def with_an_option(support: Tensor, query: Tensor, temperature: float = 1.0) -> Tensor:
        return noted(support, query, temperature)

    heads: list[Callable[..., Tensor]] = [
        lambda support, query: noted(support, query),
        with_an_option,
        lambda support, query, measure: noted(support, query, measure),
        noted,
    ]
    for head in heads:
        EpisodicEvaluator(SPEC, 5, head=head).evaluate(trainer, labeled())
    assert seen == [(), (1.0,), (trainer.distance,), (trainer.distance,)]


class Dropping(nn.Module):
    """Dropout and batch norm in `classify`; the trunk is frozen in eval mode by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Flatten()
        self.norm = nn.BatchNorm1d(DIMS)
        self.drop = nn.Dropout(0.9)
        self.trunk.eval()

    def bank(self, dataset: FewShotDataset) -> Tensor:
        return self.drop(self.trunk(dataset.images.float() / 255))

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        query = self.drop(self.norm(query.flatten(0, 1)).unflatten(0, query.shape[:2]))
        return nearest_prototype(support, query)


def test_methods_are_evaluated_in_eval_mode_and_get_their_modes_back():
    dataset, method = labeled(), Dropping()
    running = method.norm.running_mean.clone()
    in_training = EpisodicEvaluator(SPEC, 50).evaluate(method, dataset)
    assert [part.training for part in method.modules()] == [True, False, True, True]
    assert torch.equal(method.norm.running_mean, running)
    in_eval = EpisodicEvaluator(SPEC, 50).evaluate(method.eval(), dataset)
    assert torch.equal(in_training.per_episode, in_eval.per_episode)
    assert not any(part.training for part in method.modules())
    method.train()
    with pytest.raises(UsageError):
        EpisodicEvaluator(EpisodeSpec(7, 1, 1), 50).evaluate(method, dataset)
    assert method.drop.training


def test_an_adaptation_curve_evaluates_each_number_of_steps_on_the_same_episodes():
    class Adapting(Method):
        eval_inner_steps = 2

        def classify(self, support: Tensor, query: Tensor, inner_steps: int = 9) -> Tensor:
            logits = super().classify(support, query)
            return logits if inner_steps == 2 else logits.flip(2) if inner_steps == 1 else 0 * logits

    dataset = labeled()
    before, first, second = adaptation_curve(Adapting(clouds(dataset)), dataset, SPEC, 40, seed=1)
    expected = EpisodicEvaluator(SPEC, 40, seed=1).evaluate(Method(clouds(dataset)), dataset)
    assert (before.mean, second.mean) == (0.25, expected.mean)
    assert first.mean < 0.25
    assert {each.episodes_hash for each in (before, first, second)} == {expected.episodes_hash}


# --- chunks and threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.usefixtures("two_threads")
def test_neither_chunk_nor_threads_change_anything(name: str):
    bank = bank_of()
    in_threads = EpisodicEvaluator(SPEC, 20, head=HEADS[name])
    results = [in_threads.evaluate(bank, confusion=True)]
    with torch.inference_mode():
        results.append(in_threads.evaluate(bank, confusion=True))
    torch.set_num_threads(1)
    for chunk in (1, 7, 1000, None):
        evaluator = EpisodicEvaluator(SPEC, 20, chunk=chunk, head=HEADS[name])
        results.append(evaluator.evaluate(bank, confusion=True))
    torch.set_num_threads(2)
    whole = results.pop()
    for result in results:
        assert torch.equal(result.per_episode, whole.per_episode)
        assert torch.equal(result.confusion, whole.confusion)
        assert (result.mean, result.ci95, result.episodes_hash) == (whole.mean, whole.ci95, whole.episodes_hash)


@pytest.mark.usefixtures("two_threads")
def test_only_functions_and_trainers_that_say_so_are_called_in_threads():
    dataset, mine = labeled(), threading.get_ident()
    threads: set[int] = set()
    torch_threads: set[int] = set()

    def head(support: Tensor, query: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        threads.add(threading.get_ident())
        torch_threads.add(torch.get_num_threads())
        return nearest_prototype(support, query)

    bank = EmbeddingBank(clouds(dataset), dataset.labels)
    EpisodicEvaluator(SPEC, 40, head=head).evaluate(bank)
    assert threads > {mine}  # the first chunk here, before any thread, so that lazy weights are there
    assert torch_threads == {1}
    alone, safe = Method(bank.embeddings), Method(bank.embeddings)
    safe.thread_safe = True
    for method in (alone, safe):
        EpisodicEvaluator(SPEC, 40).evaluate(method, dataset)
        assert sum(method.chunks) == 40
        assert max(method.chunks) == 3
    assert alone.threads == {mine}
    assert safe.threads > {mine}
    stateful = Method(bank.embeddings)
    EpisodicEvaluator(SPEC, 40, head=stateful.classify).evaluate(bank)
    assert stateful.threads == {mine}
    threads.clear()
    EpisodicEvaluator(SPEC, 40, head=head, chunk=3).evaluate(bank)  # one chunk after the other
    with torch.autocast("cpu"):  # which a new thread would not have
        EpisodicEvaluator(SPEC, 40, head=head).evaluate(bank)
    images = Method(dataset.images)
    images.thread_safe = True
    images.head = lambda support, query: nearest_prototype(support.flatten(3), query.flatten(2))
    EpisodicEvaluator(SPEC, 40).evaluate(images, dataset)  # adapting to images is work enough for all cores
    assert threads == images.threads == {mine}


@pytest.mark.usefixtures("two_threads")
def test_a_distance_without_weights_yet_gets_them_once():
    bank = EmbeddingBank(bank_of().embeddings.float(), labeled().labels)
    distance = WeightedL1Similarity()
    lazy = EpisodicEvaluator(SPEC, 40, head=partial(nearest_neighbour, distance=distance)).evaluate(bank)
    head = partial(nearest_neighbour, distance=WeightedL1Similarity(dim=DIMS))
    assert torch.equal(lazy.per_episode, EpisodicEvaluator(SPEC, 40, head=head).evaluate(bank).per_episode)
    assert not distance.score.weight.is_inference()


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_is_the_heads_own():
    def broken(support: Tensor, query: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("a bug in this head")
        return nearest_prototype(support, query)

    with pytest.raises(KeyError, match="a bug in this head"):
        EpisodicEvaluator(SPEC, 40, head=broken).evaluate(bank_of())


def test_a_chunk_holds_at_least_one_episode_and_the_callers_own_comes_first(monkeypatch: pytest.MonkeyPatch):
    dataset = labeled()
    for floats, chunk, expected in (
        (3 * FLOATS + 1, None, [3, 3, 3, 1]),
        (1, None, [1] * 10),
        (3 * FLOATS, 4, [4, 4, 2]),
    ):
        monkeypatch.setattr(episodic, "CPU_CHUNK", floats)
        method = Method(clouds(dataset))
        EpisodicEvaluator(SPEC, 10, chunk=chunk).evaluate(method, dataset)
        assert method.chunks == expected


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_counted_and_refused():
    bank = bank_of()

    def sometimes(support: Tensor, query: Tensor) -> Tensor:
        logits = nearest_prototype(support, query)
        logits[2::3, -1, -1] = torch.nan
        logits[7, 0] = torch.inf
        return logits

    with pytest.raises(UsageError, match="finite logits of each episode, got NaN or infinity in 4 of 10 rows"):
        EpisodicEvaluator(SPEC, 10, head=sometimes).evaluate(bank)
    bank.embeddings[[3, 8], 2] = torch.nan
    with pytest.raises(UsageError, match="expected finite bank, got NaN or infinity in 2 of 67 rows, first in row 3"):
        EpisodicEvaluator(SPEC, 10).evaluate(bank)


def test_what_does_not_fit_together_is_refused():
    dataset, bank = labeled(), bank_of()
    evaluator, trainer = EpisodicEvaluator(SPEC, 10), Method(torch.zeros(5, 2))
    for beside in ((dataset,), (bank, torch.zeros(5, 2))):
        with pytest.raises(UsageError, match="expected a bank of 67 items, got 5; encode this very data set"):
            evaluator.evaluate(trainer, *beside)
    with pytest.raises(UsageTypeError, match="expected a data set to evaluate Method on, got none; give images"):
        evaluator.evaluate(trainer)
    with pytest.raises(UsageError, match="expected a bank alone, got a data set beside it; leave one out"):
        evaluator.evaluate(bank, dataset)
    transposed = EpisodicEvaluator(SPEC, 10, head=lambda s, q: nearest_prototype(s, q).transpose(1, 2))
    with pytest.raises(UsageError, match=r"logits \(E, N, W\) of shape \(10, 16, 4\), got \(10, 4, 16\); return one"):
        transposed.evaluate(bank)


def test_a_bank_too_small_for_the_episodes_is_named():
    bank = bank_of()
    for evaluator, message in (
        (EpisodicEvaluator(EpisodeSpec(7, 1, 1), 10), "at least 7 classes for 7-way 1-shot 1-query, got 6"),
        (EpisodicEvaluator(EpisodeSpec(5, 1, 7), 10), f"got 7 in class {2**60 + 1} "),
    ):
        for action in (evaluator.check, evaluator.evaluate):
            with pytest.raises(UsageError, match=message):
                action(bank)


def test_wrong_counts_are_refused():
    for wrong in (0, True, 10.0):
        with pytest.raises(UsageError, match="expected num_episodes to be an integer of at least 1"):
            EpisodicEvaluator(SPEC, wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="expected chunk to be an integer of at least 1"):
            EpisodicEvaluator(SPEC, 10, chunk=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="an interval needs at least two episodes"):
        EpisodicEvaluator(SPEC, 1)
