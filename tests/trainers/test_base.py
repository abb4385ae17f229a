"""FewShotTrainer: what losses and miners are given, what is skipped, kept, checked and exported."""

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor, nn
from torch.optim import SGD, Adam

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.trainers.matching import MatchingTrainer
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.trainers.siamese import SiameseTrainer
from pml_fewshot.training.fit import fit
from tests.trainers import material as m
from tests.trainers.material import Make

TRAINERS = [ProtoNetTrainer, MatchingTrainer, SiameseTrainer, MetricTrainer]


class Spy(nn.Module):
    """A loss or a miner that notes its arguments."""

    def __init__(self, answer: Callable[[Tensor], Any] = torch.sum) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None, ref_emb: Any = None, ref_labels: Any = None
    ) -> Any:
        self.calls.append((embeddings, labels, indices_tuple, ref_emb, ref_labels))
        return self.answer(embeddings)


@pytest.mark.parametrize("count", [1, 3])
def test_loss_and_miner_are_given_queries_and_support_of_each_episode_and_rotation(count: int) -> None:
    found = tuple(torch.arange(3).split(1))
    loss, miner = Spy(), Spy(lambda embeddings: found)
    trainer, given = FewShotTrainer(m.embedder(), loss, miner, count).double(), m.episode(2)
    trainer(given)
    assert len(loss.calls) == len(miner.calls) == 2 * count
    for call, mining, (support, query) in zip(loss.calls, miner.calls, m.rotations(trainer, given, count), strict=True):
        expected = query.flatten(0, 1), m.ways_of(m.QUERIES), support.flatten(0, 1), m.ways_of(m.SHOTS)
        torch.testing.assert_close(mining[:4], expected)
        assert call[2] is found
        assert all(mining[i] is call[j] for i, j in enumerate((0, 1, 3, 4)))


def test_loss_is_the_mean_over_episodes_and_rotations_that_see_nothing_of_each_other() -> None:
    trainer, given = ProtoNetTrainer(m.embedder(), support_rotations=3).double(), m.episode(2)
    each = [trainer(Episode(given.support[i : i + 1], given.query[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(trainer(given), (each[0] + each[1]) / 2)
    by_rotation = [
        trainer.loss(query.flatten(0, 1), m.ways_of(m.QUERIES), None, support.flatten(0, 1), m.ways_of(m.SHOTS))
        for support, query in m.rotations(trainer, given, 3)
    ]
    torch.testing.assert_close(trainer(given), torch.stack(by_rotation).mean())


def test_all_images_of_a_step_are_embedded_in_one_pass() -> None:
    """So that batch norm sees all of them."""
    seen: list[Tensor] = []
    for trainer, given in (
        (ProtoNetTrainer(m.embedder(), support_rotations=3), m.floats(m.episode(2))),
        (MetricTrainer(m.embedder(), pml.SelfSupervisedLoss(pml.NTXentLoss())), m.floats(m.batch(views=2))),
    ):
        trainer.embedder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        trainer(given)
    assert [len(some) for some in seen] == [2 * m.WAYS * (m.SHOTS + m.QUERIES), 2 * 8]
    assert torch.equal(seen[1], torch.cat([m.floats(m.batch()).images, m.floats(m.batch(views=2)).other_view]))


@pytest.mark.parametrize("given", [m.episode(), m.batch()], ids=["episode", "batch"])
def test_loss_is_computed_in_float32_under_autocast(given: Any) -> None:
    loss = Spy(lambda embeddings: (embeddings @ embeddings.T).sum())
    trainer, some = MetricTrainer(m.embedder(), loss), m.floats(given)
    with torch.autocast("cpu", torch.bfloat16):
        value = trainer(some)
        rounded = trainer.embedder((some.images if isinstance(some, Batch) else some.query).flatten(0, -4))
    assert rounded.dtype == torch.bfloat16, "otherwise there was nothing to be rounded"
    assert loss.calls[0][0].dtype == value.dtype == torch.float32
    expected = (rounded.float() @ rounded.float().T).sum()  # in bfloat16 it would be off by a hundredth
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert trainer.double()(given).dtype == torch.float64


@pytest.mark.parametrize("trainer", TRAINERS)
def test_partials_and_instances_make_the_same_trainer(trainer: Make) -> None:
    trunk = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, m.SIZE * m.SIZE, m.DIMS))
    loss = MatchingLoss if trainer is MatchingTrainer else PrototypicalLoss
    given = trainer(m.embedder(), loss(LpDistance(p=2), scale=3), TripletMarginMiner(0.5))
    torch.manual_seed(0)
    distance, miner = partial(LpDistance, p=2), partial(TripletMarginMiner, 0.5)
    made, other = (trainer(partial(Embedder, trunk), partial(loss, distance, scale=3), miner) for _ in range(2))
    assert torch.equal(made(m.floats(m.episode())), given(m.floats(m.episode())))
    assert made.exports() == {"embedder.safetensors": made.embedder}
    for one, two in ((made, other), (trainer(m.embedder()), trainer(m.embedder()))):
        assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


NOTHING, SOME = torch.empty(0, dtype=torch.int64), torch.tensor([0, 1])


@pytest.mark.parametrize("found", [(NOTHING,) * 3, (NOTHING,) * 4])
def test_nothing_mined_is_a_zero_without_a_gradient_and_no_call_of_the_loss(found: tuple[Tensor, ...]) -> None:
    loss = Spy()
    trainer = FewShotTrainer(m.embedder(), loss, Spy(lambda embeddings: found), 3)
    value = trainer(m.floats(m.episode(2)))
    assert (value.shape, value.item(), value.requires_grad, loss.calls) == ((), 0, False, [])
    assert trainer.accuracy(m.episode(2)) is not None


@pytest.mark.parametrize("found", [(NOTHING, NOTHING, SOME, SOME), (SOME, SOME, NOTHING, NOTHING)])
def test_pairs_of_one_kind_are_something(found: tuple[Tensor, ...]) -> None:
    trainer = FewShotTrainer(m.embedder(), Spy(), Spy(lambda embeddings: found))
    assert trainer(m.floats(m.episode())).requires_grad


def of_equal_images(given: Episode) -> Episode:
    """Every item of a class is one and the same image: no triplet is violated."""
    same = given.support[:, :, :1]
    return Episode(same.expand_as(given.support), same.expand_as(given.query))


@pytest.mark.parametrize("miner", [None, TripletMarginMiner(margin=0.0)])
def test_episodes_without_anything_to_learn_count_as_zero_beside_others(miner: TripletMarginMiner | None) -> None:
    trainer = MetricTrainer(m.embedder(), pml.TripletMarginLoss(margin=0.0), miner).double()
    hard, easy = m.episode(seed=1), of_equal_images(m.episode(seed=1))
    both = Episode(torch.cat([hard.support, easy.support]), torch.cat([hard.query, easy.query]))
    assert not trainer(easy).requires_grad
    torch.testing.assert_close(trainer(both), trainer(hard) / 2)


ONE_CLASS, LONE = m.batch(torch.full((6,), 2)), m.batch(torch.arange(m.CLASSES))
EQUAL = Batch(m.images(3).repeat_interleave(2, dim=0), torch.arange(3).repeat_interleave(2))
WITHIN_MARGIN = pml.TripletMarginLoss(margin=0.0)


@pytest.mark.parametrize(
    ("loss", "miner", "nothing"),
    [
        (WITHIN_MARGIN, None, of_equal_images(m.episode())),
        (WITHIN_MARGIN, None, EQUAL),
        (pml.SelfSupervisedLoss(WITHIN_MARGIN), None, Batch(LONE.images, LONE.labels, LONE.images)),
        (pml.MultipleLosses([pml.TripletMarginLoss(), pml.NTXentLoss()]), None, ONE_CLASS),
        (pml.TripletMarginLoss(), None, LONE),
        (pml.NCALoss(embedding_regularizer=None, distance=CosineSimilarity()), None, LONE),
        (pml.MultipleLosses({"a": pml.NCALoss(), "b": pml.NTXentLoss()}), None, LONE),  # NaN in 0.5
        (None, TripletMarginMiner(0.1), LONE),
    ],
    ids=["equal episode", "equal batch", "equal views", "one class", "lone", "lone nca", "nca and another", "mined"],
)
def test_fit_skips_what_teaches_nothing(loss: nn.Module | None, miner: Any, nothing: Any) -> None:
    views = 2 if isinstance(loss, pml.SelfSupervisedLoss) else 1
    m.assert_skipped(MetricTrainer(m.embedder(), loss, miner).double(), nothing, m.batch(seed=4, views=views))


@pytest.mark.parametrize("miner", [None, TripletMarginMiner(margin=-10)])
def test_weights_of_classes_learn_from_lone_items_beside_a_loss_that_cannot(miner: TripletMarginMiner | None) -> None:
    """The NaN of NCALoss made the whole run end as diverged; now the other losses learn as if it were not there."""
    torch.manual_seed(0)
    classes = pml.ArcFaceLoss(m.CLASSES, m.DIMS)
    both = MetricTrainer(m.embedder(), pml.MultipleLosses([pml.NCALoss(), copy.deepcopy(classes)])).double()
    alone = MetricTrainer(m.embedder(), pml.MultipleLosses([copy.deepcopy(classes)])).double()
    for trainer in (both, alone):
        trainer(LONE).backward()
    for parameter, expected in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)
        assert expected.grad.any()
    plain = pml.NCALoss()(both.embedder(m.batch().images), m.batch().labels)
    assert torch.equal(MetricTrainer(both.embedder, pml.NCALoss())(m.batch()), plain), "with pairs it is PML's own"


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e-300])
def test_only_zero_is_skipped(factor: float) -> None:
    loss = Spy(lambda embeddings: embeddings.square().sum() * factor)
    assert FewShotTrainer(m.embedder(), loss).double()(m.episode()).requires_grad


def test_signature_of_a_loss_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ProtoNetTrainer(m.embedder())
    monkeypatch.delattr(inspect, "signature")
    trainer(m.floats(m.episode()))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_accuracy_is_that_of_the_last_rotation(trainer: Make, count: int) -> None:
    made, given = trainer(m.embedder()).double(), m.episode(3)
    made.support_rotations = count
    assert made.accuracy(given) is None
    made(given)
    correct = []
    for support, query in m.rotations(made, given, count)[-3:]:
        logits = made.classify(support[None], query.flatten(0, 1)[None])[0]
        correct += [int(row.argmax()) == i // m.QUERIES for i, row in enumerate(logits)]
    assert 0 < sum(correct) < len(correct)
    accuracy = made.accuracy(given)
    assert not accuracy.requires_grad  # type: ignore[union-attr]
    assert accuracy.item() == pytest.approx(sum(correct) / len(correct))  # type: ignore[union-attr]


def test_accuracy_runs_no_network_and_draws_nothing() -> None:
    """Another pass would change the running statistics of batch norm and the next dropout."""
    trainer, given = SiameseTrainer(m.embedder(0, nn.BatchNorm1d(m.DIMS), nn.Dropout(0.5))), m.floats(m.episode(2))
    trainer(given)
    before, drawn = copy.deepcopy(trainer.state_dict()), torch.get_rng_state()
    assert trainer.accuracy(given) == trainer.accuracy(given) != None  # noqa: E711
    assert torch.equal(torch.get_rng_state(), drawn)
    tensors = {name: value for name, value in trainer.state_dict().items() if name != "loss._extra_state"}
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())


def test_accuracy_of_a_batch_is_none_even_after_an_episode() -> None:
    trainer = MetricTrainer(m.embedder()).double()
    history = fit(trainer, [m.episode(), m.batch()], Adam(trainer.parameters()), 2, progress=False)
    assert (history.steps, history.skipped, trainer.accuracy(m.batch())) == (2, 0, None)


def test_copies_and_states_hold_nothing_of_the_last_batch() -> None:
    trainer = ProtoNetTrainer(m.embedder())
    size, names = len(pickle.dumps(trainer)), list(trainer.state_dict())
    trainer(m.floats(m.episode(100)))
    assert len(pickle.dumps(trainer)) == size
    assert list(trainer.state_dict()) == names
    assert copy.deepcopy(trainer).accuracy(m.episode()) is None
    assert trainer.accuracy(m.episode()) is not None


def test_a_method_of_ones_own_needs_three_methods() -> None:
    class Constant(FewShotTrainer):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, batch: Episode) -> Tensor:
            return self.weight.square().sum()

    trainer, given = Constant(), m.floats(m.episode())
    assert (trainer.distance, trainer.divergence_hint, trainer.transductive, trainer.thread_safe) == (None, "", 0, 0)
    assert (trainer.accuracy(given), trainer.exports()) == (None, {})
    trainer.check(m.splits(), [EpisodeSpec(2, 1, 1)])
    optimizer = SGD(trainer.parameter_groups({"loss": 0.5}), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    fit(trainer, [given], optimizer, 1, progress=False)
    assert torch.equal(trainer.weight, torch.full((2,), 0.8))


def test_parts_are_known_by_any_of_their_names_and_the_longer_counts() -> None:
    trainer = MetricTrainer(m.embedder(0, nn.Linear(m.DIMS, m.DIMS)), pml.ArcFaceLoss(m.CLASSES, m.DIMS))
    trainer.embedder.alias = trainer.embedder.trunk[2]
    rates = {"embedder.alias": 0.3, "embedder": 0.1, "embedder.trunk.1.bias": 0.2}
    rest, *parts = trainer.parameter_groups(rates)
    found = {group["name"]: (group["lr"], {id(p) for p in group["params"]}) for group in parts}
    trunk = trainer.embedder.trunk
    assert {id(p) for p in rest["params"]} == {id(trainer.loss.W)}
    assert found == {
        "embedder": (0.1, {id(trunk[1].weight)}),
        "embedder.trunk.1.bias": (0.2, {id(trunk[1].bias)}),
        "embedder.alias": (0.3, {id(trunk[2].weight), id(trunk[2].bias)}),
    }
    for wrong, says in (({"embeder": 0.1}, "did you mean 'embedder'"), ({"loss": -1}, "of at least 0, got -1")):
        with pytest.raises(UsageError, match=says):
            trainer.parameter_groups(wrong)
    with pytest.raises(UsageError, match="as a number of at least 0, got '1e-4'"):
        trainer.parameter_groups({"embedder": "1e-4"})  # type: ignore[dict-item]


def test_parameters_of_the_loss_have_a_group_of_their_own_where_asked() -> None:
    trainer = MetricTrainer(m.embedder(), pml.ArcFaceLoss(m.CLASSES, m.DIMS))
    (group,) = trainer.parameter_groups()
    assert group.keys() == {"params"}
    assert list(map(id, group["params"])) == list(map(id, trainer.parameters()))
    for rate in (0.5, 0.0):
        first, second = trainer.parameter_groups({"loss": rate})
        assert list(map(id, first["params"])) == list(map(id, trainer.embedder.parameters()))
        assert (list(map(id, second["params"])), second["lr"]) == ([id(trainer.loss.W)], rate)
    assert len(MetricTrainer(m.embedder(), pml.NTXentLoss()).parameter_groups({"loss": 0.5})) == 1


def test_bank_is_the_embedding_of_the_set_in_eval_mode() -> None:
    trainer, data = ProtoNetTrainer(m.embedder(0, nn.Dropout(0.5))), m.tiny_set()
    bank = trainer.bank(data)
    assert trainer.embedder.training
    assert trainer.thread_safe
    assert not bank.requires_grad
    torch.testing.assert_close(bank, trainer.eval().embedder(data.images / 255).detach())


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_rotations_must_be_a_count(count: Any) -> None:
    with pytest.raises(UsageError, match="expected support_rotations to be an integer of at least 1"):
        ProtoNetTrainer(m.embedder(), support_rotations=count)


@pytest.mark.parametrize(("shots", "queries", "most"), [(1, 5, 6), (2, 4, 3), (2, 5, 3), (3, 2, 1)])
def test_rotations_end_where_the_images_do(shots: int, queries: int, most: int) -> None:
    every, spec = (
        m.floats(Episode(m.images(1, m.WAYS, shots), m.images(1, m.WAYS, queries, seed=1))),
        EpisodeSpec(9, shots, queries),
    )
    fitting, one_more = (ProtoNetTrainer(m.embedder(), support_rotations=most + more) for more in (0, 1))
    assert fitting(every).isfinite()
    fitting.check(m.splits(), [spec])
    message = f"at most {most} support_rotations of {shots} shots and {queries} queries, got {most + 1}; lower"
    assert_refused(one_more, spec, every, message)


def assert_refused(trainer: FewShotTrainer, spec: Any, given: Any, message: str) -> None:
    """Before training and in a step."""
    with pytest.raises(UsageError, match=f"expected .*{message}"):
        trainer.check(m.splits(), [spec, EpisodeSpec(2, 1, 1)])
    with pytest.raises(UsageError, match=f"expected .*{message}"):
        trainer(m.floats(given))


VIEWS, MARGINS = pml.SelfSupervisedLoss(pml.NTXentLoss()), pml.MarginLoss(num_classes=9)
TWO = pml.MultipleLosses([pml.NTXentLoss(), pml.ArcFaceLoss(3, m.DIMS)])
MEMORY = partial(pml.CrossBatchMemory, pml.ContrastiveLoss(), m.DIMS)
MINING = partial(MetricTrainer, miner=TripletMarginMiner())
PLACES = "it keeps something of each class, and an episode's labels are places in it; train it on"


@pytest.mark.parametrize(
    ("make", "loss", "views", "message"),
    [
        (ProtoNetTrainer, None, 1, "an Episode, got a Batch; .*MetricTrainer"),
        (MatchingTrainer, None, 1, "an Episode, got a Batch; .*MetricTrainer"),
        (SiameseTrainer, None, 2, "batches of one view, got two"),
        (MetricTrainer, None, 2, "a loss without labels for batches of two views, .* got MultiSimilarityLoss; wrap"),
        (MetricTrainer, VIEWS, 1, r"two views of each image for SelfSupervisedLoss, got one; use BatchSpec\(views=2"),
        (MINING, VIEWS, 2, "no miner beside SelfSupervisedLoss, which takes no labels, got TripletMarginMiner; drop"),
        (MetricTrainer, TWO, 1, "labels below 3, the num_classes of ArcFaceLoss, got label 3; .*=4, .*class_names"),
        (SiameseTrainer, MEMORY(7), 1, "batches of at most 7, the memory_size of CrossBatchMemory, got 8 items; make"),
        (MetricTrainer, pml.ArcFaceLoss(m.CLASSES, m.DIMS), 0, "got ArcFaceLoss: it takes no ref_emb"),
        (SiameseTrainer, pml.ArcFaceLoss(9, m.DIMS), 0, f"got ArcFaceLoss: {PLACES}"),
        (SiameseTrainer, MEMORY(30), 0, f"got CrossBatchMemory: {PLACES}"),
        (SiameseTrainer, pml.MultipleLosses([pml.NTXentLoss(), MARGINS]), 0, f"got MarginLoss: {PLACES}"),
        (MetricTrainer, MARGINS, 0, f"got MarginLoss: {PLACES}"),
    ],
)
def test_what_cannot_be_trained_is_refused(make: Make, loss: nn.Module | None, views: int, message: str) -> None:
    spec = BatchSpec(4, 2, views) if views else EpisodeSpec(m.WAYS, m.SHOTS, m.QUERIES)
    assert_refused(make(m.embedder(), loss), spec, m.batch(views=views) if views else m.episode(), message)


@pytest.mark.parametrize("trainer", [SiameseTrainer, MetricTrainer])
def test_labels_beyond_the_margins_of_a_loss_in_a_memory_are_refused(trainer: Make) -> None:
    def with_classes(count: int) -> FewShotTrainer:
        return trainer(m.embedder(), pml.CrossBatchMemory(pml.MarginLoss(num_classes=count), m.DIMS, 32))

    message = "labels below 3, the num_classes of MarginLoss, got label 3; give it"
    assert_refused(with_classes(3), BatchSpec(4, 2), m.batch(), message)
    with_classes(4).check(m.splits(), [BatchSpec(4, 2)])
    assert with_classes(4)(m.floats(m.batch())).isfinite()


@pytest.mark.parametrize("nested", [False, True])
def test_miner_beside_a_memory_is_refused(nested: bool) -> None:
    """PML would take its numbers of items of the batch for places in the memory."""
    memory = MEMORY(24)
    loss = pml.MultipleLosses([pml.NTXentLoss(), memory]) if nested else memory
    with pytest.raises(UsageError, match=r"no miner beside CrossBatchMemory.*, got TripletMarginMiner; give it"):
        MetricTrainer(m.embedder(), loss, TripletMarginMiner())


def test_errors_of_a_loss_are_passed_on_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        FewShotTrainer(m.embedder(), Spy(lambda embeddings: 1 / 0))(m.floats(m.episode()))


def test_what_is_no_episode_and_no_batch_is_refused() -> None:
    for given in (None, (torch.zeros(2), torch.zeros(2))):
        with pytest.raises(UsageError, match="expected an Episode or a Batch, got a "):
            ProtoNetTrainer(m.embedder())(given)
