"""SiameseTrainer: its loss is that of all pairs of a batch or an episode, written in loops; the similarity learns."""

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, TripletMarginLoss
from pytorch_metric_learning.miners import BaseMiner, PairMarginMiner, TripletMarginMiner
from torch import Tensor, nn
from torch.optim import Adam

from pml_fewshot.batches import Batch, BatchSpec
from pml_fewshot.data.batch_stream import BatchStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import Episode, EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.heads import Head, mean_similarity, nearest_neighbour
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.trainers.fit import fit
from pml_fewshot.trainers.siamese import SiameseTrainer

WAYS, SHOTS, QUERIES, SIZE, DIMS = 3, 2, 4, 5, 6
LABELS = torch.tensor([7, 0, 7, 2**40, 0, 7, -3, 0])  # -3 and 2**40 stand alone


def embedder(seed: int = 0) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS)))


def similarity(seed: int = 5) -> WeightedL1Similarity:
    """One that has learned something already: weights of both signs and a threshold."""
    made = WeightedL1Similarity(DIMS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.score.weight.copy_(torch.randn(DIMS, generator=generator))
        made.score.bias.fill_(0.3)
    return made


def episode(tasks: int = 1, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(tasks, WAYS, SHOTS + QUERIES, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return Episode(images[:, :, :SHOTS], images[:, :, SHOTS:])


def batch(labels: Tensor = LABELS, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(len(labels), 1, SIZE, SIZE, generator=generator, dtype=torch.float64), labels)


def all_pairs() -> SiameseTrainer:
    return SiameseTrainer(embedder(), PairVerificationLoss(similarity(), balanced=False)).double()


def drawing_pairs(miner: BaseMiner | None = None) -> SiameseTrainer:
    return SiameseTrainer(embedder(), PairVerificationLoss(similarity()), miner).double()


def score(trainer: SiameseTrainer, first: Tensor, second: Tensor) -> float:
    """The weighted sum of |q - r|, dimension by dimension."""
    assert isinstance(trainer.distance, WeightedL1Similarity)
    weight, bias = trainer.distance.score.weight.tolist(), trainer.distance.score.bias.item()
    differences = [abs(a - b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    return bias + sum(w * d for w, d in zip(weight, differences, strict=True))


def cross_entropy(logit: float, same: bool) -> float:
    return math.log1p(math.exp(-logit if same else logit))


def loss_by_hand(trainer: SiameseTrainer, embedded: list[Tensor], labels: list[int]) -> float:
    """Mean binary cross-entropy over all ordered pairs."""
    losses = [
        cross_entropy(score(trainer, embedded[i], embedded[j]), labels[i] == labels[j])
        for i, j in permutations(range(len(labels)), 2)
    ]
    return sum(losses) / len(losses)


def embedded_episode(trainer: SiameseTrainer, support: Tensor, query: Tensor) -> tuple[list[Tensor], list[int]]:
    """Embeddings and labels of the items of one episode, class by class."""
    items = [(way, image) for way in range(WAYS) for image in [*support[way], *query[way]]]
    return [trainer.embedder(image[None])[0].detach() for _, image in items], [way for way, _ in items]


# --- the loss is the explicit one -------------------------------------------------------------------------------------


def test_loss_of_a_batch_is_that_of_all_its_pairs() -> None:
    trainer, given = all_pairs(), batch()
    embedded = [trainer.embedder(image[None])[0] for image in given.images]
    assert trainer(given).item() == pytest.approx(loss_by_hand(trainer, embedded, LABELS.tolist()), rel=1e-9)


@pytest.mark.parametrize("tasks", [1, 3])
def test_loss_of_episodes_is_the_mean_over_all_pairs_of_each(tasks: int) -> None:
    trainer, given = all_pairs(), episode(tasks)
    each = [
        loss_by_hand(trainer, *embedded_episode(trainer, s, q)) for s, q in zip(given.support, given.query, strict=True)
    ]
    assert trainer(given).item() == pytest.approx(sum(each) / tasks, rel=1e-9)


def test_an_episode_is_the_batch_of_its_items() -> None:
    trainer, given = all_pairs(), episode()
    images = torch.cat([given.support, given.query], dim=2)[0]
    labels = torch.arange(WAYS).repeat_interleave(SHOTS + QUERIES)
    torch.testing.assert_close(trainer(given), trainer(Batch(images.flatten(0, 1), labels)))


def test_default_loss_draws_as_many_pairs_of_either_kind() -> None:
    trainer = SiameseTrainer(embedder())
    assert isinstance(trainer.loss, PairVerificationLoss)
    assert trainer.loss.balanced
    assert isinstance(trainer.distance, WeightedL1Similarity)
    drawn_the_same_way = copy.deepcopy(trainer.loss)
    given = Episode(episode().support.float(), episode().query.float())
    embedded, labels = embedded_episode(trainer, given.support[0], given.query[0])
    expected = drawn_the_same_way(torch.stack(embedded), torch.tensor(labels))
    torch.testing.assert_close(trainer(given), expected)


def pairs_by_hand(trainer: SiameseTrainer, embedded: list[Tensor], positive: float, negative: float) -> list[float]:
    """Losses of the pairs that a PairMarginMiner with these margins keeps."""
    losses = []
    for i, j in permutations(range(len(embedded)), 2):
        logit, same = score(trainer, embedded[i], embedded[j]), bool(LABELS[i] == LABELS[j])
        if logit < positive if same else logit > negative:
            losses.append(cross_entropy(logit, same))
    return losses


def test_mined_pairs_alone_are_trained_on() -> None:
    distance = similarity()
    miner = PairMarginMiner(pos_margin=0.2, neg_margin=0.1, distance=distance)
    trainer = SiameseTrainer(embedder(), PairVerificationLoss(distance), miner).double()
    given = batch()
    embedded = [trainer.embedder(image[None])[0] for image in given.images]
    losses = pairs_by_hand(trainer, embedded, 0.2, 0.1)
    assert 0 < len(losses) < len(LABELS) * (len(LABELS) - 1)
    assert trainer(given).item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)


@pytest.mark.parametrize("kind", ["batch", "episode"])
def test_a_triplet_loss_of_pml_takes_the_similarity(kind: str) -> None:
    trainer = SiameseTrainer(embedder(), TripletMarginLoss(margin=0.4, distance=similarity())).double()
    if kind == "batch":
        given: Batch | Episode = batch()
        embedded = [trainer.embedder(image[None])[0] for image in given.images]
        labels = LABELS.tolist()
    else:
        given = episode()
        embedded, labels = embedded_episode(trainer, given.support[0], given.query[0])
    violated = []
    for a, p, n in permutations(range(len(labels)), 3):
        if labels[a] == labels[p] != labels[n]:
            value = score(trainer, embedded[a], embedded[n]) - score(trainer, embedded[a], embedded[p]) + 0.4
            violated += [value] if value > 0 else []
    assert trainer(given).item() == pytest.approx(sum(violated) / len(violated), rel=1e-9)


def test_any_other_distance_will_do() -> None:
    trainer, given = SiameseTrainer(embedder(), ContrastiveLoss(distance=LpDistance())).double(), batch()
    embedded = nn.functional.normalize(trainer.embedder(given.images), dim=1)
    same, other = [], []
    for i, j in permutations(range(len(LABELS)), 2):
        far = (embedded[i] - embedded[j]).square().sum().sqrt().item()
        if LABELS[i] == LABELS[j]:
            same.append(far)
        elif far < 1:
            other.append(1 - far)
    expected = sum(same) / len(same) + sum(other) / len(other)
    assert trainer(given).item() == pytest.approx(expected, rel=1e-9)


def test_permuting_the_items_changes_nothing() -> None:
    trainer, given = all_pairs(), batch()
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(trainer(Batch(given.images[order], LABELS[order])), trainer(given))


def test_loss_is_computed_in_float32_under_autocast() -> None:
    torch.manual_seed(2)
    loss = PairVerificationLoss(WeightedL1Similarity(DIMS, hidden=4), balanced=False)
    trainer = SiameseTrainer(embedder(), loss)
    one, several = batch(), episode()
    images = torch.cat([several.support, several.query], dim=2)[0].flatten(0, 1).float()
    ways = torch.arange(WAYS).repeat_interleave(SHOTS + QUERIES)
    for given, flat, labels in (
        (Batch(one.images.float(), LABELS), one.images.float(), LABELS),
        (Episode(several.support.float(), several.query.float()), images, ways),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            value, rounded = trainer(given), trainer.embedder(flat)
        assert rounded.dtype == torch.bfloat16, "else there was nothing to be rounded"
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(rounded.float(), labels), rtol=1e-5, atol=0)


# --- learning ---------------------------------------------------------------------------------------------------------


def tiny_set(classes: int = 8) -> FewShotDataset:
    """Each class is a pattern of its own with noise upon it."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(40, 216, (classes, 1, 1, SIZE, SIZE), generator=generator)
    images = (pattern + torch.randint(-60, 61, (classes, 10, 1, SIZE, SIZE), generator=generator)).clamp(0, 255)
    names = [str(c) for c in range(classes)]
    return FewShotDataset(images.byte().flatten(0, 1), torch.arange(classes).repeat_interleave(10), names)


@pytest.mark.parametrize("loss", [None, partial(ContrastiveLoss, distance=CosineSimilarity, neg_margin=0.5)])
def test_it_learns_from_batches(loss: Callable[[], nn.Module] | None) -> None:
    trainer, data = SiameseTrainer(embedder(), loss), tiny_set()
    evaluator = EpisodicEvaluator(EpisodeSpec(5, 1, 5), 100)
    before = evaluator.evaluate(trainer, data).mean
    history = fit(
        trainer, BatchStream(data, BatchSpec(4, 4), 0), Adam(trainer.parameters(), lr=0.02), 60, progress=False
    )
    assert history.losses[-1][1] < 0.8 * history.losses[0][1]
    assert evaluator.evaluate(trainer, data).mean > before + 0.1


def test_double_precision_reaches_a_similarity_that_takes_its_width_from_the_first_batch() -> None:
    assert SiameseTrainer(embedder()).double()(batch()).dtype == torch.float64


def test_similarity_that_takes_its_width_from_the_first_batch_is_trained_and_saved() -> None:
    """The optimizer is made before the weights have a shape."""
    trainer = SiameseTrainer(embedder())
    optimizer = Adam(trainer.parameters(), lr=0.1)
    fit(trainer, BatchStream(tiny_set(), BatchSpec(4, 4), 0), optimizer, 2, progress=False)
    assert isinstance(trainer.distance, WeightedL1Similarity)
    weight = trainer.distance.score.weight
    assert weight.shape == (DIMS,)
    assert not torch.allclose(weight, torch.full_like(weight, -(DIMS**-0.5)))
    again = SiameseTrainer(embedder(1))
    again.load_state_dict(trainer.state_dict())
    support, query = (
        torch.randn(1, *shape, DIMS, generator=torch.Generator().manual_seed(1)) for shape in [(3, 2), (4,)]
    )
    assert torch.equal(again.classify(support, query), trainer.classify(support, query))


def test_resumed_training_draws_the_pairs_of_the_uninterrupted_one(tmp_path: Path) -> None:
    def sitting(steps: int, name: str, seed: int, resume: bool = False) -> SiameseTrainer:
        trainer = SiameseTrainer(embedder(seed), PairVerificationLoss(seed=seed))
        batches = BatchStream(tiny_set(), BatchSpec(3, 4), seed)
        optimizer = Adam(trainer.parameters(), lr=0.05)
        fit(trainer, batches, optimizer, steps, checkpoint=tmp_path / name, resume=resume, progress=False)
        return trainer

    whole = sitting(6, "whole.pt", 0)
    sitting(3, "cut.pt", 0)
    resumed = sitting(6, "cut.pt", 99, resume=True)
    expected = whole.state_dict()
    assert resumed.state_dict().keys() == expected.keys()
    tensors = {name: value for name, value in resumed.state_dict().items() if isinstance(value, Tensor)}
    assert len(tensors) == 5  # two of the embedder, two of the similarity and the state of the drawing of pairs
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


def test_memory_of_batches_before_is_kept_with_the_trainer() -> None:
    def make(seed: int) -> SiameseTrainer:
        loss = CrossBatchMemory(ContrastiveLoss(1.0, -1.0, distance=similarity(seed)), DIMS, 18)
        return SiameseTrainer(embedder(seed), loss).double()

    trainer, other = make(0), make(1)
    for seed in range(3):
        trainer(batch(seed=seed))
    other.load_state_dict(trainer.state_dict())
    assert (other.loss.queue_idx, other.loss.has_been_filled) == (6, True)
    assert torch.equal(other(batch(seed=9)), trainer(batch(seed=9)))


def test_miner_beside_a_memory_is_refused() -> None:
    memory = CrossBatchMemory(ContrastiveLoss(1.0, -1.0, distance=similarity()), DIMS, 18)
    with pytest.raises(
        ValueError, match=r"expected no miner beside CrossBatchMemory.*, got TripletMarginMiner; give it"
    ):
        SiameseTrainer(embedder(), memory, TripletMarginMiner()).double()(batch())


# --- nothing to learn from --------------------------------------------------------------------------------------------


def assert_skipped(trainer: SiameseTrainer, given: Batch | Episode) -> None:
    """Two steps of training before give Adam a momentum, which must not move the weights any further."""
    optimizer = Adam(trainer.parameters(), lr=0.05)
    useful = batch(torch.arange(3).repeat_interleave(3), seed=4)
    fit(trainer, [useful, useful], optimizer, 2, progress=False)
    weights = {name: weight.clone() for name, weight in trainer.named_parameters()}
    slots = copy.deepcopy(optimizer.state_dict()["state"])
    history = fit(trainer, [given, given], optimizer, 2, progress=False)
    for name, weight in trainer.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert slots
    for number, slot in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, slots[number][name]) for name, value in slot.items())
    assert (history.steps, history.skipped) == (2, 2)


def test_batch_of_one_class_is_skipped_where_the_loss_wants_two() -> None:
    assert_skipped(drawing_pairs(), batch(torch.full((6,), 3)))


def test_batch_without_a_matching_pair_is_skipped_where_the_loss_wants_one() -> None:
    assert_skipped(drawing_pairs(), batch(torch.arange(6)))


def test_loss_of_zero_is_skipped() -> None:
    trainer = SiameseTrainer(embedder(), TripletMarginLoss(margin=0.0, distance=similarity())).double()
    same = batch(torch.arange(3)).images.repeat_interleave(3, dim=0)  # a class is one image three times
    with torch.no_grad():
        trainer.distance.score.weight.fill_(-1)  # type: ignore[union-attr]
    assert_skipped(trainer, Batch(same, torch.arange(3).repeat_interleave(3)))


@pytest.mark.parametrize("kind", ["batch", "episode"])
@pytest.mark.parametrize(
    "miner",
    [
        PairMarginMiner(pos_margin=-1e6, neg_margin=1e6, distance=CosineSimilarity()),
        TripletMarginMiner(margin=-1e6),
    ],
    ids=["pairs", "triplets"],
)
def test_nothing_mined_is_skipped(miner: BaseMiner, kind: str) -> None:
    trainer = drawing_pairs(miner)
    given = batch() if kind == "batch" else episode()
    value = trainer(given)
    assert value.item() == 0
    assert not value.requires_grad
    optimizer = Adam(trainer.parameters(), lr=0.05)
    weights = copy.deepcopy(trainer.embedder.state_dict())
    history = fit(trainer, [given], optimizer, 1, progress=False)
    assert history.skipped == 1
    assert all(torch.equal(value, weights[name]) for name, value in trainer.embedder.state_dict().items())
    assert not optimizer.state


def test_training_whose_first_step_is_skipped_can_be_resumed(tmp_path: Path) -> None:
    """The similarity that takes its width from the first batch has seen none when the first checkpoint is written."""
    given = Batch(batch().images.float(), LABELS)
    for steps, margin in ((1, -1e6), (3, 1e6)):
        trainer = SiameseTrainer(embedder(), miner=TripletMarginMiner(margin))
        optimizer = Adam(trainer.parameters(), lr=0.05)
        checkpoint = tmp_path / "last.pt"
        history = fit(trainer, [given] * 3, optimizer, steps, checkpoint=checkpoint, resume=True, progress=False)
    assert (history.steps, history.skipped) == (3, 1)


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "of"),
    [(None, "mean"), (mean_similarity, "mean"), (nearest_neighbour, "max")],
    ids=["default", "mean", "nn"],
)
def test_classify_scores_a_class_by_its_items(head: Head | None, of: str) -> None:
    loss = PairVerificationLoss(similarity())
    trainer = (
        SiameseTrainer(embedder(), loss) if head is None else SiameseTrainer(embedder(), loss, head=head)
    ).double()
    generator = torch.Generator().manual_seed(3)
    support = torch.randn(2, WAYS, SHOTS, DIMS, generator=generator, dtype=torch.float64)
    query = torch.randn(2, 5, DIMS, generator=generator, dtype=torch.float64)
    logits = trainer.classify(support, query)
    assert logits.shape == (2, 5, WAYS)
    for e in range(2):
        for n in range(5):
            for way in range(WAYS):
                scores = [score(trainer, query[e, n], item) for item in support[e, way]]
                expected = max(scores) if of == "max" else sum(scores) / SHOTS
                assert logits[e, n, way].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("hidden", [None, 4])
def test_classify_before_any_training_begins_the_similarity(hidden: int | None) -> None:
    torch.manual_seed(0)
    trainer = SiameseTrainer(embedder(), PairVerificationLoss(WeightedL1Similarity(hidden=hidden)))
    generator = torch.Generator().manual_seed(3)
    support = torch.randn(2, WAYS, SHOTS, DIMS, generator=generator)
    query = torch.randn(2, 5, DIMS, generator=generator)
    logits = trainer.classify(support, query)
    for e in range(2):
        for n in range(5):
            by_pairs = [trainer.distance.pairwise_distance(query[e, n].expand(SHOTS, -1), way) for way in support[e]]
            torch.testing.assert_close(logits[e, n], torch.stack([pairs.mean() for pairs in by_pairs]))
    if hidden is None:  # ranks as L1 does
        far = (query[:, :, None, None] - support[:, None]).abs().sum(4).mean(3)
        assert torch.equal(logits.argsort(2), far.argsort(2, descending=True))


def test_batch_accuracy_of_episodes_is_that_of_the_head() -> None:
    trainer, given = all_pairs(), episode(tasks=3)
    trainer(given)
    correct = []
    for support, query in zip(given.support, given.query, strict=True):
        for way in range(WAYS):
            for q in trainer.embedder(query[way]):
                scores = [sum(score(trainer, q, item) for item in trainer.embedder(support[w])) for w in range(WAYS)]
                correct.append(scores.index(max(scores)) == way)
    assert 0 < sum(correct) < len(correct)
    assert trainer.batch_accuracy is not None
    assert trainer.batch_accuracy.item() == pytest.approx(sum(correct) / len(correct))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_two_trainers_without_a_loss_share_nothing() -> None:
    first, second = (SiameseTrainer(embedder()) for _ in range(2))
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_factories_and_instances_are_both_accepted() -> None:
    given = SiameseTrainer(embedder(), TripletMarginLoss(distance=LpDistance(p=1)), TripletMarginMiner(margin=0.5))
    torch.manual_seed(0)
    trunk = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, SIZE * SIZE, DIMS))
    made = SiameseTrainer(
        partial(Embedder, trunk),
        partial(TripletMarginLoss, distance=partial(LpDistance, p=1)),
        partial(TripletMarginMiner, margin=0.5),
    )
    assert torch.equal(given.double()(batch()), made.double()(batch()))


def test_misspelt_keyword_raises() -> None:
    with pytest.raises(TypeError, match="haed"):
        SiameseTrainer(embedder(), haed=mean_similarity)  # type: ignore[call-arg]
