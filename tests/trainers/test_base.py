"""FewShotTrainer and EpisodicTrainer: what losses and miners are given, what is skipped, kept, checked and exported."""

import copy
import inspect
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    MultipleLosses,
    NCALoss,
    NTXentLoss,
    SelfSupervisedLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor, nn
from torch.optim import SGD, Adam

from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers.base import EpisodicTrainer, FewShotTrainer
from pml_fewshot.trainers.matching import MatchingTrainer
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.trainers.siamese import SiameseTrainer
from pml_fewshot.training.fit import fit
from tests.trainers.material import (
    CLASSES,
    DIMS,
    QUERIES,
    SHOTS,
    SIZE,
    WAYS,
    assert_skipped,
    batch,
    embedder,
    episode,
    floats,
    images,
    rotations,
    splits,
    tiny_set,
)

TRAINERS = [ProtoNetTrainer, MatchingTrainer, SiameseTrainer, MetricTrainer]


class Spy(nn.Module):
    """A loss that notes its arguments."""

    def __init__(self, answer: Callable[[Tensor], Any] = torch.sum) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None, ref_emb: Any = None, ref_labels: Any = None
    ) -> Any:
        self.calls.append((embeddings, labels, indices_tuple, ref_emb, ref_labels))
        return self.answer(embeddings)


class SpyMiner(nn.Module):
    def __init__(self, *found: Tensor) -> None:
        super().__init__()
        self.found = found
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        self.calls.append(arguments)
        return self.found


# --- what losses and miners are given ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_loss_and_miner_are_given_queries_and_support_of_each_episode_and_rotation(count: int) -> None:
    loss, miner = Spy(), SpyMiner(torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    trainer, given = EpisodicTrainer(embedder(), loss, miner, count).double(), episode(2)  # type: ignore[arg-type]
    trainer(given)
    assert len(loss.calls) == len(miner.calls) == 2 * count
    for call, mining, (support, query) in zip(loss.calls, miner.calls, rotations(trainer, given, count), strict=True):
        torch.testing.assert_close(call[0], query.flatten(0, 1))
        torch.testing.assert_close(call[3], support.flatten(0, 1))
        assert call[1].tolist() == [way for way in range(WAYS) for _ in range(QUERIES)]
        assert call[4].tolist() == [way for way in range(WAYS) for _ in range(SHOTS)]
        assert call[2] is miner.found
        assert all(mining[i] is call[j] for i, j in enumerate((0, 1, 3, 4)))


def test_loss_is_the_mean_over_episodes_and_rotations_that_see_nothing_of_each_other() -> None:
    trainer, given = ProtoNetTrainer(embedder(), support_rotations=3).double(), episode(2)
    each = [trainer(Episode(given.support[i : i + 1], given.query[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(trainer(given), (each[0] + each[1]) / 2)
    by_rotation = []
    for support, query in rotations(trainer, given, 3):
        labels = [torch.arange(WAYS).repeat_interleave(count) for count in (QUERIES, SHOTS)]
        by_rotation.append(trainer.loss(query.flatten(0, 1), labels[0], None, support.flatten(0, 1), labels[1]))
    torch.testing.assert_close(trainer(given), torch.stack(by_rotation).mean())


def test_all_images_of_a_step_are_embedded_in_one_pass() -> None:
    """So that batch norm sees all of them."""
    seen: list[Tensor] = []
    for trainer, given in (
        (ProtoNetTrainer(embedder(), support_rotations=3), floats(episode(2))),
        (MetricTrainer(embedder(), SelfSupervisedLoss(NTXentLoss())), floats(batch(views=2))),
    ):
        trainer.embedder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        trainer(given)
    assert [len(some) for some in seen] == [2 * WAYS * (SHOTS + QUERIES), 2 * 8]
    assert torch.equal(seen[1], torch.cat([floats(batch()).images, floats(batch(views=2)).other_view]))


@pytest.mark.parametrize("given", [episode(), batch()], ids=["episode", "batch"])
def test_loss_is_computed_in_float32_under_autocast(given: Any) -> None:
    loss = Spy(lambda embeddings: (embeddings @ embeddings.T).sum())
    trainer, some = MetricTrainer(embedder(), loss), floats(given)
    with torch.autocast("cpu", torch.bfloat16):
        value = trainer(some)
        rounded = trainer.embedder((some.images if isinstance(some, Batch) else some.query).flatten(0, -4))
    assert rounded.dtype == torch.bfloat16, "otherwise there was nothing to be rounded"
    assert loss.calls[0][0].dtype == value.dtype == torch.float32
    expected = (rounded.float() @ rounded.float().T).sum()  # in bfloat16 it would be off by a hundredth
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert trainer.double()(given).dtype == torch.float64


@pytest.mark.parametrize("trainer", TRAINERS)
def test_partials_and_instances_make_the_same_trainer(trainer: Callable[..., EpisodicTrainer]) -> None:
    trunk = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, SIZE * SIZE, DIMS))
    loss = MatchingLoss if trainer is MatchingTrainer else PrototypicalLoss
    given = trainer(embedder(), loss(LpDistance(p=2), scale=3), TripletMarginMiner(0.5))
    torch.manual_seed(0)
    distance, miner = partial(LpDistance, p=2), partial(TripletMarginMiner, 0.5)
    made, other = (trainer(partial(Embedder, trunk), partial(loss, distance, scale=3), miner) for _ in range(2))
    assert torch.equal(made(floats(episode())), given(floats(episode())))
    assert not {id(p) for p in made.parameters()} & {id(p) for p in other.parameters()}
    first, second = trainer(embedder()), trainer(embedder())
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


# --- nothing to learn from --------------------------------------------------------------------------------------------

NOTHING, SOME = torch.empty(0, dtype=torch.int64), torch.tensor([0, 1])


@pytest.mark.parametrize("found", [(NOTHING,) * 3, (NOTHING,) * 4])
def test_nothing_mined_is_a_zero_without_a_gradient_and_no_call_of_the_loss(found: tuple[Tensor, ...]) -> None:
    loss = Spy()
    trainer = EpisodicTrainer(embedder(), loss, SpyMiner(*found), 3)  # type: ignore[arg-type]
    value = trainer(floats(episode(2)))
    assert (value.shape, value.item(), value.requires_grad) == ((), 0, False)
    assert loss.calls == []
    assert trainer.accuracy(episode(2)) is not None


@pytest.mark.parametrize("found", [(NOTHING, NOTHING, SOME, SOME), (SOME, SOME, NOTHING, NOTHING)])
def test_pairs_of_one_kind_are_something(found: tuple[Tensor, ...]) -> None:
    assert EpisodicTrainer(embedder(), Spy(), SpyMiner(*found))(floats(episode())).requires_grad  # type: ignore[arg-type]


def of_equal_images(given: Episode) -> Episode:
    """Every item of a class is one and the same image: no triplet is violated."""
    same = given.support[:, :, :1]
    return Episode(same.expand_as(given.support), same.expand_as(given.query))


def test_episodes_without_anything_to_learn_count_as_zero_beside_others() -> None:
    for miner in (None, TripletMarginMiner(margin=0.0)):
        trainer = MetricTrainer(embedder(), TripletMarginLoss(margin=0.0), miner).double()
        hard, easy = episode(seed=1), of_equal_images(episode(seed=1))
        both = Episode(torch.cat([hard.support, easy.support]), torch.cat([hard.query, easy.query]))
        assert not trainer(easy).requires_grad
        torch.testing.assert_close(trainer(both), trainer(hard) / 2)


ONE_CLASS = batch(torch.full((6,), 2))
EQUAL = Batch(images(3).repeat_interleave(2, dim=0), torch.arange(3).repeat_interleave(2))
LONE = batch(torch.arange(CLASSES))


@pytest.mark.parametrize(
    ("loss", "nothing"),
    [
        (TripletMarginLoss(margin=0.0), of_equal_images(episode())),
        (TripletMarginLoss(margin=0.0), EQUAL),
        (TripletMarginLoss(), ONE_CLASS),
        (MultipleLosses([TripletMarginLoss(), NTXentLoss()]), ONE_CLASS),
        (TripletMarginLoss(), LONE),
        (NCALoss(), LONE),
        (NCALoss(embedding_regularizer=None, distance=CosineSimilarity()), LONE),
        (MultipleLosses({"a": NCALoss(), "b": NTXentLoss()}), LONE),  # NaN in 0.5
    ],
    ids=["equal episode", "equal batch", "one class", "one class, two losses", "lone", "lone nca", "cosine", "nca"],
)
def test_fit_skips_what_teaches_nothing(loss: nn.Module, nothing: Any) -> None:
    assert_skipped(MetricTrainer(embedder(), loss).double(), nothing, batch(seed=4))


def test_fit_skips_equal_views_and_what_a_miner_leaves_nothing_of() -> None:
    trainer = MetricTrainer(embedder(), SelfSupervisedLoss(TripletMarginLoss(margin=0.0))).double()
    assert_skipped(trainer, Batch(LONE.images, LONE.labels, LONE.images), batch(seed=4, views=2))
    assert_skipped(MetricTrainer(embedder(), miner=TripletMarginMiner(0.1)).double(), LONE, batch(seed=4))


@pytest.mark.parametrize("miner", [None, TripletMarginMiner(margin=-10)])
def test_weights_of_classes_learn_from_lone_items_beside_a_loss_that_cannot(miner: TripletMarginMiner | None) -> None:
    """The NaN of NCALoss made the whole run end as diverged; now the other losses learn as if it were not there."""
    torch.manual_seed(0)
    classes = ArcFaceLoss(CLASSES, DIMS)
    both = MetricTrainer(embedder(), MultipleLosses([NCALoss(), copy.deepcopy(classes)])).double()
    alone = MetricTrainer(embedder(), MultipleLosses([copy.deepcopy(classes)])).double()
    for trainer in (both, alone):
        trainer(LONE).backward()
    for parameter, expected in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)
        assert expected.grad.any()
    plain = NCALoss()(both.embedder(batch().images), batch().labels)
    assert torch.equal(MetricTrainer(both.embedder, NCALoss())(batch()), plain), "with pairs it is PML's own"


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e-300])
def test_only_zero_is_skipped(factor: float) -> None:
    loss = Spy(lambda embeddings: embeddings.square().sum() * factor)
    assert EpisodicTrainer(embedder(), loss).double()(episode()).requires_grad


# --- no wait for a GPU ------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[], EpisodicTrainer]] = {
    "protonet": lambda: ProtoNetTrainer(embedder(), support_rotations=3),
    "matching": lambda: MatchingTrainer(embedder(), context=FullContext(DIMS)),
    "metric": lambda: MetricTrainer(embedder(), PrototypicalLoss()),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_never_looks_at_a_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values: what would wait for a GPU (`item`, `if`, `unique`) fails on them."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no such device
    trainer = STEPS[name]().to("meta")
    given = floats(episode(2)).to("meta")
    trainer(given).backward()
    assert trainer.accuracy(given).is_meta  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_step_never_waits_for_the_gpu(name: str) -> None:
    trainer, given = STEPS[name]().to("cuda"), floats(episode(2)).to("cuda")
    trainer(given).backward()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer(given).backward()
        trainer.accuracy(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_signature_of_a_loss_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, given = ProtoNetTrainer(embedder()), floats(episode())

    def refuse(*_: object) -> None:
        raise AssertionError("a step has read a signature")

    monkeypatch.setattr(inspect, "signature", refuse)
    trainer(given)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("trainer", [ProtoNetTrainer, MatchingTrainer, MetricTrainer])
def test_accuracy_is_that_of_the_last_rotation(trainer: Callable[..., EpisodicTrainer], count: int) -> None:
    made, given = trainer(embedder(), support_rotations=count).double(), episode(3)
    assert made.accuracy(given) is None
    made(given)
    correct = []
    for support, query in rotations(made, given, count)[-3:]:
        logits = made.classify(support[None], query.flatten(0, 1)[None])[0]
        correct += [int(row.argmax()) == i // QUERIES for i, row in enumerate(logits)]
    assert 0 < sum(correct) < len(correct)
    accuracy = made.accuracy(given)
    assert accuracy is not None
    assert not accuracy.requires_grad
    assert accuracy.item() == pytest.approx(sum(correct) / len(correct))


def test_accuracy_runs_no_network_and_draws_nothing() -> None:
    """Another pass would change the running statistics of batch norm and the next dropout."""
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS), nn.BatchNorm1d(DIMS), nn.Dropout(0.5))
    trainer, given = SiameseTrainer(Embedder(trunk)), floats(episode(2))
    trainer(given)
    before, drawn = copy.deepcopy(trainer.state_dict()), torch.get_rng_state()
    first, second = trainer.accuracy(given), trainer.accuracy(given)
    assert first is not None
    assert torch.equal(first, second)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), drawn)
    tensors = {name: value for name, value in trainer.state_dict().items() if name != "loss._extra_state"}
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())


def test_accuracy_of_a_batch_is_none_even_after_an_episode() -> None:
    trainer = MetricTrainer(embedder()).double()
    trainer(episode())
    trainer(batch())
    assert trainer.accuracy(batch()) is None


def test_copies_and_states_hold_nothing_of_the_last_batch() -> None:
    trainer = ProtoNetTrainer(embedder())
    size, names = len(pickle.dumps(trainer)), list(trainer.state_dict())
    trainer(floats(episode(100)))
    assert len(pickle.dumps(trainer)) == size
    assert list(trainer.state_dict()) == names
    assert copy.deepcopy(trainer).accuracy(episode()) is None
    assert trainer.accuracy(episode()) is not None


# --- the contract -----------------------------------------------------------------------------------------------------


def test_a_method_of_ones_own_needs_three_methods() -> None:
    class Constant(FewShotTrainer):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, batch: Episode) -> Tensor:
            return self.weight.square().sum()

    trainer, given = Constant(), floats(episode())
    assert (trainer.distance, trainer.divergence_hint, trainer.transductive) == (None, "", False)
    assert trainer.accuracy(given) is None
    assert trainer.exports() == {}
    trainer.check(splits(), [EpisodeSpec(2, 1, 1)])
    optimizer = SGD(trainer.parameter_groups(loss_lr=0.5), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    fit(trainer, [given], optimizer, 1, progress=False)
    assert torch.equal(trainer.weight, torch.full((2,), 0.8))


def test_parameters_of_the_loss_have_a_group_of_their_own_where_asked() -> None:
    trainer = MetricTrainer(embedder(), ArcFaceLoss(CLASSES, DIMS))
    (group,) = trainer.parameter_groups()
    assert group.keys() == {"params"}
    assert list(map(id, group["params"])) == list(map(id, trainer.parameters()))
    for rate in (0.5, 0.0):
        first, second = trainer.parameter_groups(rate)
        assert list(map(id, first["params"])) == list(map(id, trainer.embedder.parameters()))
        assert (list(map(id, second["params"])), second["lr"]) == ([id(trainer.loss.W)], rate)
    assert len(MetricTrainer(embedder(), NTXentLoss()).parameter_groups(0.5)) == 1


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_embedder_is_exported(trainer: Callable[..., EpisodicTrainer]) -> None:
    made = trainer(embedder())
    assert made.exports() == {"embedder.safetensors": made.embedder}


def test_bank_is_the_embedding_of_the_set_in_eval_mode() -> None:
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS), nn.Dropout(0.5))
    trainer, data = ProtoNetTrainer(Embedder(trunk)), tiny_set()
    bank = trainer.bank(data)
    assert trainer.embedder.training
    assert not bank.requires_grad
    torch.testing.assert_close(bank, trainer.eval().embedder(data.images / 255).detach())


# --- what cannot be trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_rotations_must_be_a_count(count: Any) -> None:
    with pytest.raises(ValueError, match="expected support_rotations to be an integer of at least 1"):
        ProtoNetTrainer(embedder(), support_rotations=count)


@pytest.mark.parametrize(("shots", "queries", "most"), [(1, 5, 6), (2, 4, 3), (2, 5, 3), (3, 2, 1)])
def test_rotations_end_where_the_images_do(shots: int, queries: int, most: int) -> None:
    every = floats(Episode(images(1, WAYS, shots), images(1, WAYS, queries, seed=1)))
    fitting, one_more = (ProtoNetTrainer(embedder(), support_rotations=most + more) for more in (0, 1))
    assert fitting(every).isfinite()
    fitting.check(splits(), [EpisodeSpec(WAYS, shots, queries)])
    message = f"expected at most {most} support_rotations of {shots} shots and {queries} queries, got {most + 1}; lower"
    with pytest.raises(ValueError, match=message):
        one_more(every)
    with pytest.raises(ValueError, match=message):
        one_more.check(splits(), [EpisodeSpec(WAYS, shots, queries)])


CHECKS: list[tuple[str, Callable[[], EpisodicTrainer], Any, Any]] = [
    (
        r"expected an Episode, got a Batch; .*MetricTrainer",
        lambda: ProtoNetTrainer(embedder()),
        BatchSpec(4, 2),
        batch(),
    ),
    (
        r"expected an Episode, got a Batch; .*MetricTrainer",
        lambda: MatchingTrainer(embedder()),
        BatchSpec(4, 2),
        batch(),
    ),
    (
        "expected batches of one view, got two",
        lambda: SiameseTrainer(embedder()),
        BatchSpec(4, 2, views=2),
        batch(views=2),
    ),
    (
        "expected a loss without labels for batches of two views, .* got MultiSimilarityLoss; wrap",
        lambda: MetricTrainer(embedder()),
        BatchSpec(4, 2, views=2),
        batch(views=2),
    ),
    (
        r"expected two views of each image for SelfSupervisedLoss, got one; use BatchSpec\(views=2",
        lambda: MetricTrainer(embedder(), SelfSupervisedLoss(NTXentLoss())),
        BatchSpec(4, 2),
        batch(),
    ),
    (
        "expected no miner beside SelfSupervisedLoss, which takes no labels, got TripletMarginMiner; drop it",
        lambda: MetricTrainer(embedder(), SelfSupervisedLoss(NTXentLoss()), TripletMarginMiner()),
        BatchSpec(4, 2, views=2),
        batch(views=2),
    ),
    (
        r"expected labels below 3, the num_classes of ArcFaceLoss, got label 3; give it num_classes=4, .*class_names",
        lambda: MetricTrainer(embedder(), MultipleLosses([NTXentLoss(), ArcFaceLoss(3, DIMS)])),
        BatchSpec(2, 4),
        batch(),
    ),
    (
        "expected batches of at most 7, the memory_size of CrossBatchMemory, got 8 items; make the memory larger",
        lambda: SiameseTrainer(embedder(), CrossBatchMemory(ContrastiveLoss(), DIMS, 7)),  # type: ignore[arg-type]
        BatchSpec(4, 2),
        batch(),
    ),
    (
        "got ArcFaceLoss: it takes no ref_emb",
        lambda: MetricTrainer(embedder(), ArcFaceLoss(CLASSES, DIMS)),
        EpisodeSpec(WAYS, SHOTS, QUERIES),
        episode(),
    ),
]


@pytest.mark.parametrize(("message", "make", "spec", "given"), CHECKS, ids=[message[:40] for message, *_ in CHECKS])
def test_what_cannot_be_trained_is_refused_before_training_and_in_a_step(
    message: str, make: Callable[[], EpisodicTrainer], spec: Any, given: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        make().check(splits(), [spec, EpisodeSpec(2, 1, 1)])
    with pytest.raises(ValueError, match=message):
        make()(floats(given))


@pytest.mark.parametrize("nested", [False, True])
def test_miner_beside_a_memory_is_refused(nested: bool) -> None:
    """PML would take its numbers of items of the batch for places in the memory."""
    memory = CrossBatchMemory(ContrastiveLoss(), DIMS, 24)
    with pytest.raises(ValueError, match=r"no miner beside CrossBatchMemory.*, got TripletMarginMiner; give it"):
        MetricTrainer(embedder(), MultipleLosses([NTXentLoss(), memory]) if nested else memory, TripletMarginMiner())


def test_errors_of_a_loss_are_passed_on_as_they_are() -> None:
    def broken(embeddings: Tensor) -> Tensor:
        raise ValueError("not supported for this loss, a mistake of my own")

    with pytest.raises(ValueError, match=r"^not supported for this loss, a mistake of my own$"):
        EpisodicTrainer(embedder(), Spy(broken))(floats(episode()))


def test_batches_and_episodes_train_one_and_the_same_trainer() -> None:
    trainer = MetricTrainer(embedder()).double()
    history = fit(trainer, [batch(), episode()], Adam(trainer.parameters()), 2, progress=False)
    assert (history.steps, history.skipped) == (2, 0)
