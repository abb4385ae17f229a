"""MatchingTrainer: its loss is each query's attention written out in loops, with full context and without."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor, nn

from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.episodes import Episode
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.trainers.matching import SCALE, MatchingTrainer

WAYS, SHOTS, QUERIES, SIZE, DIMS = 3, 2, 4, 5, 6
EUCLID = LpDistance(normalize_embeddings=False, power=2)


def embedder(seed: int = 0) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS)))


def context(seed: int = 3) -> FullContext:
    torch.manual_seed(seed)
    return FullContext(DIMS, read_steps=3)


def episode(tasks: int = 1, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(tasks, WAYS, SHOTS + QUERIES, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return Episode(images[:, :, :SHOTS], images[:, :, SHOTS:])


def episode_of_floats() -> Episode:
    batch = episode()
    return Episode(batch.support.float(), batch.query.float())


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(first: list[float], second: list[float]) -> float:
    products = sum(a * b for a, b in zip(first, second, strict=True))
    return products / math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))


def minus_squared_euclid(first: list[float], second: list[float]) -> float:
    return -sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def shares(query: Tensor, support: Tensor, scale: float, similarity=cosine) -> list[float]:
    """The share of each class (support (W, K, D)) of one query's attention, by equation 1 of the paper."""
    each = [[math.exp(scale * similarity(query.tolist(), item.tolist())) for item in way] for way in support]
    total = sum(map(sum, each))
    return [sum(way) / total for way in each]


def losses_by_hand(support: Tensor, query: Tensor, scale: float = SCALE, similarity=cosine) -> list[float]:
    """Minus the logarithm of each query's own share: support (W, K, D), query (W, Q, D)."""
    return [-math.log(shares(q, support, scale, similarity)[way]) for way in range(WAYS) for q in query[way]]


def embedded_turns(trainer: MatchingTrainer, batch: Episode, turns: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Support (W, K, D) and query (W, Q, D) of every episode and turn, embedded image by image."""
    parts = []
    for images in torch.cat([batch.support, batch.query], dim=2):
        rows = [torch.stack([trainer.embedder(image[None])[0] for image in way]) for way in images]
        embedded = torch.stack(rows).detach()
        for turn in range(turns):
            inside = list(range(turn * SHOTS, (turn + 1) * SHOTS))
            outside = [i for i in range(SHOTS + QUERIES) if i not in inside]
            # those behind the support first, then those before it: a query's place changes nothing
            parts.append((embedded[:, inside], embedded[:, outside]))
    return parts


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- the loss is the explicit one -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_loss_is_the_attention_written_in_loops(tasks: int, turns: int) -> None:
    trainer, batch = MatchingTrainer(embedder(), turns=turns).double(), episode(tasks)
    each = [mean(losses_by_hand(s, q)) for s, q in embedded_turns(trainer, batch, turns)]
    assert len(each) == tasks * turns
    assert trainer(batch).item() == pytest.approx(mean(each), rel=1e-8)


def test_loss_of_another_distance_and_scale() -> None:
    trainer, batch = MatchingTrainer(embedder(), loss=MatchingLoss(EUCLID, scale=0.5)).double(), episode()
    ((support, query),) = embedded_turns(trainer, batch)
    expected = mean(losses_by_hand(support, query, 0.5, minus_squared_euclid))
    assert trainer(batch).item() == pytest.approx(expected, rel=1e-7)


def test_miner_weighs_queries_by_how_often_they_are_anchors() -> None:
    margin = 0.1
    miner = TripletMarginMiner(margin, distance=CosineSimilarity())
    trainer, batch = MatchingTrainer(embedder(), miner=miner).double(), episode()
    ((support, query),) = embedded_turns(trainer, batch)
    anchors: Counter[int] = Counter()
    for i in range(WAYS * QUERIES):
        item, own = query.flatten(0, 1)[i].tolist(), i // QUERIES
        for positive in support[own].tolist():
            for other in range(WAYS):
                for negative in support[other].tolist() if other != own else []:
                    anchors[i] += cosine(item, positive) - cosine(item, negative) <= margin
    assert len(set(anchors.values())) > 2, "equal weights test nothing"
    weights = [anchors[i] / max(anchors.values()) for i in range(WAYS * QUERIES)]
    losses = losses_by_hand(support, query)
    expected = mean([weight * loss for weight, loss in zip(weights, losses, strict=True)])
    assert trainer(batch).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("turns", [1, 3])
def test_loss_with_full_context_is_that_of_the_revised_embeddings(turns: int) -> None:
    trainer, batch = MatchingTrainer(embedder(), context=context(), turns=turns).double(), episode(tasks=2)
    assert trainer.context is not None
    each = []
    for support, query in embedded_turns(trainer, batch, turns):
        revised_support = trainer.context.embed_support(support[None])
        revised = [trainer.context.embed_query(q[None, None], revised_support)[0, 0] for q in query.flatten(0, 1)]
        each.append(mean(losses_by_hand(revised_support[0], torch.stack(revised).unflatten(0, (WAYS, QUERIES)))))
    assert trainer(batch).item() == pytest.approx(mean(each), rel=1e-8)
    plain = MatchingTrainer(embedder(), turns=turns).double()
    assert trainer(batch).item() != pytest.approx(plain(batch).item(), rel=1e-3)


def test_miner_sees_the_embeddings_with_their_context() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(TripletMarginMiner):
        def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> tuple:
            seen.append((embeddings, ref_emb))
            return super().mine(embeddings, labels, ref_emb, ref_labels)

    trainer, batch = MatchingTrainer(embedder(), miner=Spy(), context=context()).double(), episode()
    trainer(batch)
    ((support, query),) = embedded_turns(trainer, batch)
    assert trainer.context is not None
    revised = trainer.context(support[None], query.flatten(0, 1)[None])
    torch.testing.assert_close(seen[0], (revised[1][0], revised[0][0].flatten(0, 1)))


@pytest.mark.parametrize("full_context", [False, True], ids=["plain", "context"])
def test_no_episode_of_a_batch_sees_another(full_context: bool) -> None:
    made = context() if full_context else None
    trainer, batch = MatchingTrainer(embedder(), turns=3, context=made).double(), episode(tasks=2)
    each = [trainer(Episode(batch.support[i : i + 1], batch.query[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(trainer(batch), torch.stack(each).mean())


@pytest.mark.parametrize("turns", [1, 3])
def test_batch_accuracy_is_that_of_the_largest_share_in_the_last_turn(turns: int) -> None:
    trainer, batch = MatchingTrainer(embedder(), turns=turns).double(), episode(tasks=3)
    trainer(batch)
    correct = []
    for support, query in embedded_turns(trainer, batch, turns)[turns - 1 :: turns]:
        for way in range(WAYS):
            for q in query[way]:
                found = shares(q, support, SCALE)
                correct.append(found.index(max(found)) == way)
    assert len(correct) == 3 * WAYS * QUERIES
    assert 0 < sum(correct) < len(correct)
    assert trainer.batch_accuracy is not None
    assert trainer.batch_accuracy.item() == pytest.approx(mean(correct))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_default_is_cosine_with_a_learned_scale_of_ten() -> None:
    trainer = MatchingTrainer(embedder())
    assert isinstance(trainer.distance, CosineSimilarity)
    assert trainer.loss.scale.item() == pytest.approx(10)
    optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
    trainer(episode_of_floats()).backward()
    optimizer.step()
    assert abs(trainer.loss.scale.item() - 10) > 1e-3


def test_two_trainers_without_a_loss_share_no_scale() -> None:
    first, second = (MatchingTrainer(embedder()) for _ in range(2))
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_factories_and_instances_are_both_accepted() -> None:
    instances = MatchingTrainer(
        embedder(),
        MatchingLoss(LpDistance(p=1), scale=3),
        TripletMarginMiner(margin=0.3, distance=CosineSimilarity()),
        context=context(),
    )
    torch.manual_seed(0)
    trunk = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, SIZE * SIZE, DIMS))
    factories = MatchingTrainer(
        partial(Embedder, trunk),
        partial(MatchingLoss, partial(LpDistance, p=1), scale=3),
        partial(TripletMarginMiner, margin=0.3, distance=CosineSimilarity),
        context=context,
    )
    assert torch.equal(instances(episode_of_floats()), factories(episode_of_floats()))


def test_context_is_trained_saved_and_loaded_with_the_trainer() -> None:
    trainer, batch = MatchingTrainer(embedder(), context=context()), episode_of_floats()
    before = {name: weight.detach().clone() for name, weight in trainer.named_parameters()}
    optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
    first = trainer(batch)
    first.backward()
    optimizer.step()
    changed = {name for name, weight in trainer.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == before.keys()
    assert trainer(batch) < first
    again = MatchingTrainer(embedder(1), context=context(1))
    again.load_state_dict(trainer.state_dict())
    assert torch.equal(again(batch), trainer(batch))


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "similarity"), [(None, cosine), (EUCLID, minus_squared_euclid)], ids=["cosine", "euclid"]
)
@pytest.mark.parametrize("scale", [0.7, 5.0])
def test_classify_gives_the_logarithms_of_the_shares(
    distance: BaseDistance | None, similarity: object, scale: float
) -> None:
    trainer = MatchingTrainer(embedder(), MatchingLoss(distance, scale=scale)).double()
    support, query = normal(2, WAYS, SHOTS, DIMS), normal(2, 7, DIMS, seed=2)
    logits = trainer.classify(support, query)
    assert logits.shape == (2, 7, WAYS)
    for e in range(2):
        for n in range(7):
            expected = shares(query[e, n], support[e], scale, similarity)
            assert logits[e, n].softmax(0).tolist() == pytest.approx(expected, rel=1e-6)
            # up to the logarithm of the sum over all classes: the exponentials themselves are the sums of each class
            each = [sum(math.exp(scale * similarity(query[e, n].tolist(), i.tolist())) for i in w) for w in support[e]]
            assert logits[e, n].exp().tolist() == pytest.approx(each, rel=1e-6)


def test_classify_is_not_the_vote_of_the_nearest_item() -> None:
    """Two items of a class that are fairly near outweigh one of another that is a little nearer."""
    trainer = MatchingTrainer(embedder(), MatchingLoss(EUCLID)).double()
    support = torch.tensor([[[1.0], [9.0]], [[-1.1], [1.1]]]).double().unsqueeze(0)
    assert trainer.classify(support, torch.zeros(1, 1, 1).double()).argmax().item() == 1


def test_far_away_support_gives_finite_logits() -> None:
    trainer = MatchingTrainer(embedder(), MatchingLoss(EUCLID))
    support = torch.tensor([[[1000.0, 0], [1001.0, 0]], [[2000.0, 0], [2001.0, 0]]]).unsqueeze(0)
    logits = trainer.classify(support, torch.zeros(1, 1, 2))
    assert logits.isfinite().all()
    assert logits.argmax().item() == 0


def test_logits_are_those_that_the_loss_takes_the_cross_entropy_of() -> None:
    for made in (None, context()):
        trainer, batch = MatchingTrainer(embedder(), context=made).double(), episode()
        ((support, query),) = embedded_turns(trainer, batch)
        logits = trainer.classify(support[None], query.flatten(0, 1)[None])[0]
        truth = torch.arange(WAYS).repeat_interleave(QUERIES)
        torch.testing.assert_close(nn.functional.cross_entropy(logits, truth), trainer(batch))


def test_classify_with_full_context_sees_the_whole_support_and_each_query_alone() -> None:
    trainer = MatchingTrainer(embedder(), context=context()).double()
    plain = MatchingTrainer(embedder()).double()
    support, query = normal(2, WAYS, SHOTS, DIMS), normal(2, 7, DIMS, seed=2)
    logits = trainer.classify(support, query)
    assert trainer.context is not None
    for e in range(2):
        revised = trainer.context.embed_support(support[e : e + 1])
        for n in range(7):
            q = trainer.context.embed_query(query[e : e + 1, n : n + 1], revised)
            assert logits[e, n].softmax(0).tolist() == pytest.approx(shares(q[0, 0], revised[0], SCALE), rel=1e-6)
    assert not torch.allclose(logits, plain.classify(support, query), atol=1e-3)


def test_bank_is_without_context() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (6, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    dataset = FewShotDataset(images, torch.arange(6) // 2, ["a", "b", "c"])
    banks = [MatchingTrainer(embedder(), context=made).bank(dataset) for made in (None, context())]
    assert torch.equal(*banks)
    torch.testing.assert_close(banks[0], embedder()(images / 255).detach())


# --- exceptions -------------------------------------------------------------------------------------------------------


def test_context_of_another_width_raises() -> None:
    with pytest.raises(ValueError, match=rf"expected a support of shape \(E, W, K, {DIMS + 1}\).*set dim"):
        MatchingTrainer(embedder(), context=FullContext(DIMS + 1))(episode_of_floats())


@pytest.mark.parametrize("turns", [0, 1.5])
def test_turns_must_be_a_count(turns: object) -> None:
    with pytest.raises(ValueError, match="turns"):
        MatchingTrainer(embedder(), turns=turns)  # type: ignore[arg-type]


def test_too_many_turns_raise() -> None:
    with pytest.raises(ValueError, match=r"expected at most 3 turns of 2 shots and 4 queries, got 4; lower turns"):
        MatchingTrainer(embedder(), turns=4)(episode_of_floats())


def test_misspelt_keyword_raises() -> None:
    with pytest.raises(TypeError, match="contxt"):
        MatchingTrainer(embedder(), contxt=None)  # type: ignore[call-arg]
