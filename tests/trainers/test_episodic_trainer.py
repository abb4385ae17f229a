"""EpisodicTrainer: what it hands to losses and miners, what of PML trains on episodes, and whose distance it judges by.

The sums over episodes and turns are tested with ProtoNetTrainer, in test_protonet.py.
"""

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from pytorch_metric_learning.distances import (
    BaseDistance,
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    MultipleLosses,
    NTXentLoss,
    SelfSupervisedLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import BaseMiner, MultiSimilarityMiner, PairMarginMiner, TripletMarginMiner
from torch import Tensor, nn
from torch.optim import Adam

from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import Episode
from pml_fewshot.evaluation.heads import nearest_prototype
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.trainers.episodic import EpisodicTrainer, distance_of
from pml_fewshot.trainers.fit import fit
from pml_fewshot.trainers.protonet import ProtoNetTrainer

WAYS, SHOTS, QUERIES, SIZE, DIMS = 3, 2, 4, 5, 6


class Plain(EpisodicTrainer):
    """The least that a trainer is."""

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        return nearest_prototype(support, query)


def embedder(seed: int = 0) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS)))


def episode(tasks: int = 1, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(tasks, WAYS, SHOTS + QUERIES, 1, SIZE, SIZE, generator=generator)
    return Episode(images[:, :, :SHOTS], images[:, :, SHOTS:])


class Spy(nn.Module):
    """A loss, or a miner, that notes its arguments."""

    def __init__(self, answer: Callable[..., object]) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple] = []

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> object:
        self.calls.append((embeddings, labels, indices_tuple, ref_emb, ref_labels))
        return self.answer(embeddings)


class SpyMiner(nn.Module):
    def __init__(self, found: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.found = found
        self.calls: list[tuple] = []

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        self.calls.append(arguments)
        return self.found


# --- what losses and miners are given ---------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 3])
def test_loss_and_miner_are_given_queries_and_support_of_each_episode_and_turn(turns: int) -> None:
    found = (torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    loss, miner = Spy(lambda embeddings: embeddings.sum()), SpyMiner(found)
    trainer, batch = Plain(embedder(), loss, miner, turns), episode(tasks=2)
    trainer(batch)
    assert len(loss.calls) == len(miner.calls) == 2 * turns
    expected = []
    for turn in range(turns):
        for images in torch.cat([batch.support, batch.query], dim=2):
            inside = list(range(turn * SHOTS, (turn + 1) * SHOTS))
            behind = list(range((turn + 1) * SHOTS, SHOTS + QUERIES)) + list(range(turn * SHOTS))
            query = torch.stack([trainer.embedder(images[w, i][None])[0] for w in range(WAYS) for i in behind])
            support = torch.stack([trainer.embedder(images[w, i][None])[0] for w in range(WAYS) for i in inside])
            labels = torch.tensor([w for w in range(WAYS) for _ in behind])
            expected.append((query, labels, support, torch.tensor([w for w in range(WAYS) for _ in inside])))
    for call, mining, (query, labels, support, support_labels) in zip(loss.calls, miner.calls, expected, strict=True):
        torch.testing.assert_close(call[0], query)
        torch.testing.assert_close(call[3], support)
        assert torch.equal(call[1], labels)
        assert torch.equal(call[4], support_labels)
        assert call[2] is found
        assert mining[0] is call[0]
        assert mining[1] is call[1]
        assert mining[2] is call[3]
        assert mining[3] is call[4]


def test_without_a_miner_the_loss_is_given_no_indices() -> None:
    loss = Spy(lambda embeddings: embeddings.sum())
    Plain(embedder(), loss)(episode())
    assert loss.calls[0][2] is None


def test_all_images_are_embedded_in_one_pass() -> None:
    trainer, batches = Plain(embedder(), NTXentLoss(), turns=3), []
    trainer.embedder.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    trainer(episode(tasks=2))
    assert batches == [2 * WAYS * (SHOTS + QUERIES)]


def test_loss_is_computed_in_float32_whatever_the_embedder_gives() -> None:
    loss = Spy(lambda embeddings: (embeddings @ embeddings.T).sum())
    plain = embedder()
    trainer, batch = Plain(plain, loss), episode()
    with torch.autocast("cpu", torch.bfloat16):
        value = trainer(batch)
    assert value.dtype == torch.float32
    assert loss.calls[0][0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rounded = plain(batch.query.flatten(0, 2))
    assert rounded.dtype == torch.bfloat16, "else there was nothing to be rounded"
    expected = (rounded.float() @ rounded.float().T).sum()  # in bfloat16 it would be off by a hundredth
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


def test_embeddings_of_double_precision_stay_so() -> None:
    trainer, batch = Plain(embedder(), NTXentLoss()).double(), episode()
    assert trainer(Episode(batch.support.double(), batch.query.double())).dtype == torch.float64


# --- a miner that finds nothing ---------------------------------------------------------------------------------------

NOTHING = torch.empty(0, dtype=torch.int64)
SOME = torch.tensor([0, 1])


@pytest.mark.parametrize("places", [3, 4])
@pytest.mark.parametrize("turns", [1, 3])
def test_nothing_mined_is_a_zero_without_a_gradient_and_no_call_of_the_loss(places: int, turns: int) -> None:
    loss = Spy(lambda embeddings: embeddings.sum())
    trainer = Plain(embedder(), loss, SpyMiner((NOTHING,) * places), turns)
    value = trainer(episode(tasks=2))
    assert value.shape == ()
    assert value.item() == 0
    assert not value.requires_grad
    assert loss.calls == []
    assert trainer.batch_accuracy is not None


@pytest.mark.parametrize("found", [(NOTHING, NOTHING, SOME, SOME), (SOME, SOME, NOTHING, NOTHING)])
def test_pairs_of_one_kind_are_something(found: tuple[Tensor, ...]) -> None:
    loss = Spy(lambda embeddings: embeddings.sum())
    assert Plain(embedder(), loss, SpyMiner(found))(episode()).requires_grad
    assert len(loss.calls) == 1


def test_episodes_without_anything_mined_count_as_zero_beside_others() -> None:
    """Half of the mean of two episodes, one of which has no violated triplet."""
    miner = TripletMarginMiner(margin=0.0)
    trainer = Plain(embedder(), TripletMarginLoss(margin=0.2), miner)
    hard = episode(seed=1)
    easy = hard.support.mean(2, keepdim=True)  # every item of a class the same image
    both = Episode(
        torch.cat([hard.support, easy.expand_as(hard.support)]),
        torch.cat([hard.query, easy.expand_as(hard.query)]),
    )
    assert not trainer(Episode(both.support[1:], both.query[1:])).requires_grad
    value = trainer(both)
    assert value.requires_grad
    torch.testing.assert_close(value, trainer(hard) / 2)


@pytest.mark.parametrize(
    "miner",
    [
        TripletMarginMiner(margin=-100.0),
        PairMarginMiner(pos_margin=100.0, neg_margin=-100.0),
        MultiSimilarityMiner(epsilon=-2.1),  # a pair would have to be harder by more than cosine's whole range
    ],
    ids=["triplets", "pair margin", "similarity"],
)
def test_fit_skips_and_counts_what_the_miner_leaves_nothing_of(miner: BaseMiner) -> None:
    trainer = Plain(embedder(), TripletMarginLoss(), miner)
    before = {name: weight.clone() for name, weight in trainer.state_dict().items()}
    optimizer = Adam(trainer.parameters(), lr=0.1)
    history = fit(trainer, [episode(seed=i) for i in range(3)], optimizer, 3, progress=False)
    assert (history.steps, history.skipped, history.losses) == (3, 3, [])
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.state_dict().items())
    assert not optimizer.state


def test_fit_skips_an_episode_whose_loss_is_zero() -> None:
    """Adam would go on by the momentum of the steps before, and call it learning from this one."""
    trainer = ProtoNetTrainer(embedder(), loss=TripletMarginLoss(margin=0.0))
    hard = episode(seed=1)
    same = hard.support.mean(2, keepdim=True)  # every item of a class the same image: no triplet is violated
    easy = Episode(same.expand_as(hard.support), same.expand_as(hard.query))
    optimizer = Adam(trainer.parameters(), lr=0.01)
    fit(trainer, [hard, hard], optimizer, 2, progress=False)
    trainer.train()
    before = {name: weight.clone() for name, weight in trainer.state_dict().items()}
    history = fit(trainer, [easy, easy], optimizer, 2, progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.state_dict().items())
    assert history.skipped == 2


# --- every loss of PML ------------------------------------------------------------------------------------------------

# how each loss is made that wants arguments
MADE: dict[str, Callable[[], nn.Module]] = {
    **{
        name: partial(getattr(pml_losses, name), num_classes=WAYS, embedding_size=DIMS)
        for name in (
            "ArcFaceLoss",
            "CosFaceLoss",
            "LargeMarginSoftmaxLoss",
            "NormalizedSoftmaxLoss",
            "ProxyAnchorLoss",
            "ProxyNCALoss",
            "SoftTripleLoss",
            "SphereFaceLoss",
            "SubCenterArcFaceLoss",
        )
    },
    "P2SGradLoss": partial(pml_losses.P2SGradLoss, DIMS, WAYS),
    "ManifoldLoss": partial(pml_losses.ManifoldLoss, l=DIMS, K=3),
    "RankedListLoss": partial(pml_losses.RankedListLoss, margin=0.4, Tn=5),
    "CrossBatchMemory": lambda: CrossBatchMemory(ContrastiveLoss(), DIMS, 24),
    "SelfSupervisedLoss": lambda: SelfSupervisedLoss(NTXentLoss()),
    "MultipleLosses": lambda: MultipleLosses([NTXentLoss(), TripletMarginLoss()]),
}
ABSTRACT = {"BaseLossWrapper", "BaseMetricLossFunction", "GenericPairLoss"}
# what says "ref_emb is not supported" itself, or has no place for it
REFUSE = {
    *MADE,
    "FastAPLoss",
    "HistogramLoss",
    "InstanceLoss",
    "NPairsLoss",
    "PNPLoss",
    "SmoothAPLoss",
    "ThresholdConsistentMarginLoss",  # takes ref_emb, and compares queries by the places that were meant for it
    "VICRegLoss",
}
EXPORTED = {
    name: part
    for name, part in vars(pml_losses).items()
    if inspect.isclass(part) and issubclass(part, nn.Module) and name not in ABSTRACT
}


def make(name: str) -> nn.Module:
    return MADE.get(name, EXPORTED[name])()


def test_the_losses_that_are_told_to_refuse_exist() -> None:
    assert EXPORTED.keys() >= REFUSE
    assert len(EXPORTED.keys() - REFUSE) > 10


# numpy warns of scipy's results that become tensors, in PML
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("miner", [None, TripletMarginMiner(margin=0.5)], ids=["no miner", "miner"])
@pytest.mark.parametrize("name", sorted(REFUSE))
def test_losses_without_a_support_set_are_refused_by_name(name: str, miner: BaseMiner | None) -> None:
    trainer = Plain(embedder(), make(name), miner if name != "CrossBatchMemory" else None)
    with pytest.raises(ValueError, match=rf"expected a loss that compares queries .*, got {name}: .*BatchSpec\("):
        trainer(episode())


@pytest.mark.parametrize("name", sorted(EXPORTED.keys() - REFUSE))
def test_all_other_losses_learn_from_queries_and_support(name: str) -> None:
    seen: list[Tensor] = []
    loss = make(name)
    loss.register_forward_pre_hook(lambda module, arguments: seen.extend([arguments[0], arguments[3]]))
    trainer = Plain(embedder(), loss)
    value = trainer(episode())
    assert value.isfinite()
    gradients = torch.autograd.grad(value, seen, allow_unused=True)
    assert len(gradients) == 2
    assert all(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["CrossBatchMemory", "MultipleLosses", "SelfSupervisedLoss"])
def test_protonet_refuses_wrappers_before_it_sees_an_episode(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name}: its forward has no argument"):
        ProtoNetTrainer(embedder(), loss=make(name))  # type: ignore[arg-type]


def test_refusal_says_why_and_what_to_do() -> None:
    message = (
        r"expected a loss that compares queries with a support set \(PML's ref_emb\), got ArcFaceLoss: ref_emb is not "
        r"supported for this loss function; train it on ordinary batches, MetricTrainer with "
        r"train_spec=BatchSpec\(classes, per_class\), or take a loss of pairs, triplets or prototypes"
    )
    with pytest.raises(ValueError, match=message):
        Plain(embedder(), ArcFaceLoss(num_classes=WAYS, embedding_size=DIMS))(episode())


def test_other_errors_of_a_loss_are_passed_on_as_they_are() -> None:
    def broken(embeddings: Tensor) -> Tensor:
        raise ValueError("a mistake of my own")

    with pytest.raises(ValueError, match=r"^a mistake of my own$"):
        Plain(embedder(), Spy(broken))(episode())


# --- the distance to judge by -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distance", [LpDistance(p=1), CosineSimilarity(), SNRDistance(), DotProductSimilarity()], ids=lambda d: str(type(d))
)
@pytest.mark.parametrize("wrap", ["none", "memory", "list", "dict", "self", "memory in list"])
def test_distance_is_found_in_every_wrapper(distance: BaseDistance, wrap: str) -> None:
    loss = ContrastiveLoss(distance=distance)
    other = NTXentLoss(distance=LpDistance(p=3))
    wrapped = {
        "none": lambda: loss,
        "memory": lambda: CrossBatchMemory(loss, DIMS),
        "list": lambda: MultipleLosses([loss, other]),
        "dict": lambda: MultipleLosses({"z": loss, "a": other}),
        "self": lambda: SelfSupervisedLoss(loss),
        "memory in list": lambda: MultipleLosses([CrossBatchMemory(loss, DIMS), other]),
    }[wrap]()
    assert distance_of(wrapped) is distance
    assert Plain(embedder(), wrapped).distance is distance


@pytest.mark.parametrize("loss", [PrototypicalLoss, MatchingLoss, PairVerificationLoss])
def test_distance_of_our_own_losses(loss: Callable[..., nn.Module]) -> None:
    distance = SNRDistance()
    assert Plain(embedder(), loss(distance)).distance is distance


def test_a_loss_without_a_distance_has_none() -> None:
    assert distance_of(nn.CrossEntropyLoss()) is None
    assert distance_of(MultipleLosses([])) is None
    assert Plain(embedder(), nn.CrossEntropyLoss()).distance is None


# --- parts ------------------------------------------------------------------------------------------------------------


def test_parts_may_be_factories() -> None:
    trunk = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, SIZE * SIZE, DIMS))
    torch.manual_seed(0)
    made = Plain(
        partial(Embedder, trunk), partial(NTXentLoss, distance=CosineSimilarity), partial(TripletMarginMiner, margin=1)
    )
    given = Plain(embedder(), NTXentLoss(distance=CosineSimilarity()), TripletMarginMiner(margin=1))
    assert torch.equal(made(episode()), given(episode()))


@pytest.mark.parametrize("turns", [0, -1, 1.5, True])
def test_turns_must_be_a_count(turns: object) -> None:
    with pytest.raises(ValueError, match="expected turns to be an integer of at least 1"):
        Plain(embedder(), NTXentLoss(), turns=turns)  # type: ignore[arg-type]


# as many as there are supports among the images, and one more
@pytest.mark.parametrize(("shots", "queries", "most"), [(1, 5, 6), (2, 4, 3), (2, 5, 3), (3, 2, 1)])
def test_turns_end_where_the_images_do(shots: int, queries: int, most: int) -> None:
    images = torch.rand(1, WAYS, shots + queries, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    batch = Episode(images[:, :, :shots], images[:, :, shots:])
    assert Plain(embedder(), NTXentLoss(), turns=most)(batch).isfinite()
    with pytest.raises(ValueError, match=f"expected at most {most} turns of {shots} shots and {queries} queries"):
        Plain(embedder(), NTXentLoss(), turns=most + 1)(batch)
