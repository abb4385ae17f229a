"""EpisodicEvaluator against numpy episode by episode, and its interval against the formula."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation import episodic
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult, adaptation_curve
from pml_fewshot.evaluation.heads import k_nearest_neighbours, nearest_neighbour, nearest_prototype
from pml_fewshot.evaluation.linear_heads import cosine_classifier, logistic_regression, ridge_regression
from pml_fewshot.sampling.episodes import EpisodeIndex, EpisodeSampler, EpisodeSpec
from pml_fewshot.trainers.protonet import ProtoNetTrainer

DIMS = 8
SPEC = EpisodeSpec(4, 3, 4)
FLOATS = SPEC.ways * (SPEC.shots + SPEC.queries) * DIMS  # gathered for an episode

HEADS: dict[str, Callable[..., Tensor]] = {
    "prototype": nearest_prototype,
    "neighbour": nearest_neighbour,
    "five neighbours": partial(k_nearest_neighbours, k=5),
    "cosine": cosine_classifier,
    "ridge": ridge_regression,
    "logistic": logistic_regression,
}


def labeled(sizes: tuple[int, ...] = (7, 12, 9, 8, 20, 11)) -> FewShotDataset:
    """Random images in classes of different sizes whose items do not stand together."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 256, (len(labels), 1, 2, 4), generator=generator, dtype=torch.uint8)
    return FewShotDataset(images, labels, [str(c) for c in range(len(sizes))])


def clouds(dataset: FewShotDataset) -> Tensor:
    """Overlapping clouds, one a class, so that accuracies lie between chance and 1."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(len(dataset.class_names), DIMS, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(dataset), DIMS, generator=generator, dtype=torch.float64)
    return centres[dataset.labels] + 1.2 * noise


def bank_of() -> EmbeddingBank:
    """Labels that no float64 and no int32 can tell apart, negative ones, and an order that is not the data set's."""
    dataset, labels = labeled(), torch.tensor([2**60 + 1, -7, 2**60, 0, 2**60 + 2, -(2**40)])
    return EmbeddingBank(clouds(dataset), labels[dataset.labels])


@dataclass
class Method:
    """A bank and a head; it notes the size and the thread of each call."""

    embeddings: Tensor
    head: Callable[..., Tensor] = nearest_prototype
    banks: int = 0
    chunks: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

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


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and chunks of three episodes of SPEC."""
    monkeypatch.setattr(episodic, "CPU_CHUNK", 3 * FLOATS)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # whatever an evaluation sets, it restores
    torch.set_num_threads(before)


@pytest.mark.parametrize("spec", [SPEC, EpisodeSpec(2, 1, 5), EpisodeSpec(6, 2, 3)])
def test_each_accuracy_equals_that_of_a_loop(spec: EpisodeSpec):
    bank = bank_of()
    result = EpisodicEvaluator(spec, 60, seed=3).evaluate(bank)
    index = drawn(bank.labels, spec, 60, seed=3)
    right = slow_predictions(bank.embeddings, index) == np.arange(spec.ways)[:, None]
    expected = right.mean(axis=(1, 2)).tolist()
    assert result.per_episode.tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 3  # neither chance nor perfect
    assert (result.spec, result.seed, result.classes, result.confusion) == (spec, 3, (), None)
    assert result.classifier == "nearest_prototype"
    assert result.mean == pytest.approx(sum(expected) / 60)
    assert result.ci95 == pytest.approx(1.96 * scipy.stats.sem(expected), rel=1e-12)
    assert result.episodes_hash == index.hash(bank.fingerprint())
    assert str(result) == f"{100 * result.mean:.2f} +- {100 * result.ci95:.2f} % ({spec}, 60 episodes)"


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
    assert result.classes == tuple(names)
    assert result.per_class() == pytest.approx({n: expected[c, c] / expected[c].sum() for c, n in enumerate(names)})
    assert result.confusion is not None
    assert result.confusion.tolist() == expected.tolist()
    assert expected.sum() > expected.trace() > 0
    without = EpisodicEvaluator(spec, 70, seed=2).evaluate(bank)
    assert torch.equal(without.per_episode, result.per_episode)
    with pytest.raises(UsageError, match=r"^expected a result with its confusion matrix, got none; use evaluate\("):
        without.per_class()


def test_a_trainer_in_a_wrapper_is_refused_and_numpys_seeds_are_taken():
    with pytest.raises(UsageError, match=r"got a trainer within DataParallel; give the trainer itself, its \.module"):
        EpisodicEvaluator(SPEC, 20).evaluate(nn.DataParallel(ProtoNetTrainer(nn.Flatten())), labeled())
    bank = bank_of()
    hashes = {EpisodicEvaluator(SPEC, 20, seed=seed).evaluate(bank).episodes_hash for seed in (3, np.int64(3))}
    assert len(hashes) == 1


def test_images_are_gathered_as_floats_in_0_to_1():
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
        *(EpisodicEvaluator(*size).evaluate(bank) for size in ((SPEC, 11), (SPEC, 10, 1), (EpisodeSpec(4, 3, 3), 10))),
    ]
    assert len({from_bank.episodes_hash, *(other.episodes_hash for other in others)}) == 6
    assert torch.equal(torch.get_rng_state(), before)


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


def test_heads_of_two_arguments_are_called_without_the_distance():
    trainer = ProtoNetTrainer(Embedder(nn.Flatten()))
    seen: list[tuple[Any, ...]] = []

    def noted(support: Tensor, query: Tensor, *more: Any) -> Tensor:
        seen.append(more)
        return nearest_prototype(support, query)

    def with_an_option(support: Tensor, query: Tensor, temperature: float = 1.0) -> Tensor:
        return noted(support, query, temperature)

    for head in (lambda s, q: noted(s, q), with_an_option, lambda s, q, measure: noted(s, q, measure), noted):
        EpisodicEvaluator(SPEC, 5, head=head).evaluate(trainer, labeled())
    assert seen == [(), (1.0,), (trainer.distance,), (trainer.distance,)]


def test_methods_are_evaluated_in_eval_mode_and_get_their_modes_back():
    class Dropping(nn.Sequential):
        def bank(self, dataset: FewShotDataset) -> Tensor:
            return self(dataset.images.float() / 255)

        def classify(self, support: Tensor, query: Tensor) -> Tensor:
            return nearest_prototype(support, self[1](query))

    dataset, method = labeled(), Dropping(nn.Flatten().eval(), nn.Dropout(0.9))
    in_training = EpisodicEvaluator(SPEC, 50).evaluate(method, dataset)
    assert [part.training for part in method.modules()] == [True, False, True]
    in_eval = EpisodicEvaluator(SPEC, 50).evaluate(method.eval(), dataset)
    assert torch.equal(in_training.per_episode, in_eval.per_episode)
    assert not any(part.training for part in method.modules())
    method.train()
    with pytest.raises(UsageError, match="at least 7 classes for 7-way 1-shot 1-query, got 6"):
        EpisodicEvaluator(EpisodeSpec(7, 1, 1), 50).evaluate(method, dataset)
    assert method[1].training


def test_an_adaptation_curve_evaluates_each_number_of_steps_on_the_same_episodes():
    class Adapting(Method):
        eval_inner_steps = 2
        transductive = True

        def classify(self, support: Tensor, query: Tensor, inner_steps: int = 9) -> Tensor:
            logits = super().classify(support, query)
            return logits if inner_steps == 2 else logits.flip(2) if inner_steps == 1 else 0 * logits

    dataset = labeled()
    before, first, second = adaptation_curve(Adapting(clouds(dataset)), dataset, SPEC, 40, seed=1)
    expected = EpisodicEvaluator(SPEC, 40, seed=1).evaluate(Method(clouds(dataset)), dataset)
    assert (before.mean, second.mean) == (0.25, expected.mean)
    assert first.mean < 0.25
    assert {each.episodes_hash for each in (before, first, second)} == {expected.episodes_hash}
    assert all(each.transductive for each in (before, first, second))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.usefixtures("two_threads")
def test_neither_chunk_nor_threads_change_anything(name: str):
    def evaluate(chunk: int | None = None) -> EpisodicResult:
        return EpisodicEvaluator(SPEC, 20, chunk=chunk, head=HEADS[name]).evaluate(bank, confusion=True)

    bank = bank_of()
    results = [evaluate()]
    with torch.inference_mode():
        results.append(evaluate())
    torch.set_num_threads(1)
    whole, *more = map(evaluate, (None, 1, 7, 1000))
    torch.set_num_threads(2)
    for result in results + more:
        assert torch.equal(result.per_episode, whole.per_episode)
        assert torch.equal(result.confusion, whole.confusion)
        assert result.episodes_hash == whole.episodes_hash


@pytest.mark.usefixtures("two_threads")
def test_only_functions_and_trainers_that_say_so_are_called_in_threads():
    dataset, mine = labeled(), threading.get_ident()
    threads, torch_threads = set(), set()

    def head(support: Tensor, query: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        threads.add(threading.get_ident())
        torch_threads.add(torch.get_num_threads())
        return nearest_prototype(support, query)

    bank = EmbeddingBank(clouds(dataset), dataset.labels)
    EpisodicEvaluator(SPEC, 40, head=head).evaluate(bank)
    assert threads > {mine}  # the first chunk here, before any thread, so that lazy weights are there
    assert torch_threads == {1}
    alone, safe, stateful, images = (Method(bank.embeddings) for _ in range(4))
    safe.thread_safe = images.thread_safe = True
    for method in (alone, safe):
        EpisodicEvaluator(SPEC, 40).evaluate(method, dataset)
        assert sum(method.chunks) == 40
        assert max(method.chunks) == 3
    assert alone.threads == {mine}
    assert safe.threads > {mine}
    EpisodicEvaluator(SPEC, 40, head=stateful.classify).evaluate(bank)
    assert stateful.threads == {mine}
    threads.clear()
    EpisodicEvaluator(SPEC, 40, head=head, chunk=3).evaluate(bank)  # one chunk after the other
    images.embeddings = dataset.images
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
        return nearest_prototype(support, query) if threading.current_thread() is threading.main_thread() else {}[0]

    with pytest.raises(KeyError):
        EpisodicEvaluator(SPEC, 40, head=broken).evaluate(bank_of())


def test_a_chunk_holds_at_least_one_episode_and_the_callers_own_comes_first(monkeypatch: pytest.MonkeyPatch):
    dataset, three = labeled(), 3 * FLOATS
    for floats, chunk, expected in ((three + 1, None, [3, 3, 3, 1]), (1, None, [1] * 10), (three, 4, [4, 4, 2])):
        monkeypatch.setattr(episodic, "CPU_CHUNK", floats)
        method = Method(clouds(dataset))
        EpisodicEvaluator(SPEC, 10, chunk=chunk).evaluate(method, dataset)
        assert method.chunks == expected


def test_what_is_not_finite_is_counted_and_refused():
    bank = bank_of()

    def sometimes(support: Tensor, query: Tensor) -> Tensor:
        logits = nearest_prototype(support, query)
        logits[2::3, -1, -1] = torch.nan
        logits[7, 0] = torch.inf
        return logits

    method = Method(bank.embeddings, sometimes)
    method.divergence_hint = "lower it"
    with pytest.raises(UsageError, match=r"finite logits of each episode, got NaN or infinity in 4 of 10 .*; lower it"):
        EpisodicEvaluator(SPEC, 10).evaluate(method, bank)
    bank.embeddings[[3, 8], 2] = torch.nan
    with pytest.raises(UsageError, match="expected finite bank, got NaN or infinity in 2 of 67 rows, first in row 3"):
        EpisodicEvaluator(SPEC, 10).evaluate(bank)


def test_what_does_not_fit_together_is_refused():
    dataset, bank = labeled(), bank_of()
    evaluator, trainer = EpisodicEvaluator(SPEC, 10), Method(torch.zeros(5, 2))
    transposed = EpisodicEvaluator(SPEC, 10, head=lambda s, q: nearest_prototype(s, q).transpose(1, 2))
    for action, says in (
        (lambda: evaluator.evaluate(trainer, dataset), "a bank of 67 items, got 5; encode this very data set"),
        (lambda: evaluator.evaluate(trainer, bank, torch.zeros(5, 2)), "a bank of 67 items, got 5"),
        (lambda: evaluator.evaluate(trainer), "a data set to evaluate Method on, got none; give images"),
        (lambda: evaluator.evaluate(bank, dataset), "a bank alone, got a data set beside it; leave one out"),
        (lambda: EpisodicEvaluator((5, 1, 15)), r"the size of an episode, got \(5, 1, 15\); write EpisodeSpec\(ways=5"),
        (lambda: adaptation_curve(trainer, dataset, SPEC), "a MAMLTrainer, got Method, which has no inner steps"),
        (lambda: transposed.evaluate(bank), r"logits \(E, N, W\) of shape \(10, 16, 4\), got \(10, 4, 16\); return"),
    ):
        with pytest.raises(UsageError, match=f"^expected {says}"):
            action()
    small = EpisodicEvaluator(EpisodeSpec(5, 1, 7), 10)
    for action in (small.check, small.evaluate):
        with pytest.raises(UsageError, match=f"got 7 in class {2**60 + 1} "):
            action(bank)
    for wrong in (0, True, 10.0):
        for name in ("num_episodes", "chunk"):
            with pytest.raises(UsageError, match=f"expected {name} to be an integer of at least 1"):
                EpisodicEvaluator(SPEC, **{name: wrong})
    with pytest.raises(UsageError, match="an interval needs at least two episodes"):
        EpisodicEvaluator(SPEC, 1)
