"""EarthMoversDistance: the paper's formula pair by pair with POT's solver, and in losses, heads and retrieval."""

import math
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.distances.earth_movers import EarthMoversDistance
from pml_fewshot.distances.local_neighbors import LocalNeighborSimilarity
from pml_fewshot.distances.relation import RelationSimilarity
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.heads import mean_similarity, nearest_neighbour, nearest_prototype
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.structured import structured_classifier
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.training.fit import fit

ot = pytest.importorskip("ot", reason="POT is not installed: pip install -c constraints.txt -e '.[emd]'")

NODES, CHANNELS = 6, 8


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Embeddings of feature maps with dead nodes, as ReLUs leave them."""
    values = torch.randn(*shape, CHANNELS * NODES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values + 0.3).relu().to(dtype)


def slow_score(u: Tensor, v: Tensor, nodes: int = NODES) -> float:
    """The score of two embeddings (D,), written from the paper's equations."""
    u, v = (np.asarray(each.double()).reshape(-1, nodes).T for each in (u, v))  # (nodes, C)
    a = np.array([max(node @ v.mean(axis=0), 0) + 1e-3 for node in u])
    b = np.array([max(node @ u.mean(axis=0), 0) + 1e-3 for node in v])
    costs = np.empty((nodes, nodes))
    for i, j in np.ndindex(nodes, nodes):
        x, y = u[i] - u[i].mean(), v[j] - v[j].mean()
        lengths = np.linalg.norm(x) * np.linalg.norm(y)
        costs[i, j] = 1 - (x @ y / lengths if lengths > 0 else 0)
    return 1 - ot.emd2(a / a.sum(), b / b.sum(), costs)


@pytest.mark.parametrize(("solver", "tolerance"), [("exact", 1e-9), ("auto", 1e-9), ("sinkhorn", 3e-3)])
def test_scores_are_the_papers(solver: str, tolerance: float) -> None:
    query, reference = maps(7), maps(5, seed=1)
    expected = [[slow_score(q, r) for r in reference] for q in query]
    distance = EarthMoversDistance(NODES, solver)
    assert distance(query, reference).numpy() == pytest.approx(np.array(expected), abs=tolerance)
    paired = distance.pairwise_distance(query[:5], reference)
    assert paired.numpy() == pytest.approx(np.diag(expected), abs=tolerance)
    assert distance(query.float(), reference.float()).numpy() == pytest.approx(np.array(expected), abs=tolerance + 1e-5)


def test_equal_maps_score_1_and_a_permutation_of_nodes_changes_nothing() -> None:
    query, reference = maps(4), maps(3, seed=1)
    distance = EarthMoversDistance(NODES)
    alive = query + 0.1 * torch.arange(CHANNELS * NODES)  # dead nodes have no cosine, not even with themselves
    assert distance(alive, alive).diagonal().numpy() == pytest.approx(1.0)
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(2))
    shuffled = reference.unflatten(1, (CHANNELS, NODES))[:, :, order].flatten(1)
    assert torch.allclose(distance(query, shuffled), distance(query, reference))
    assert torch.allclose(distance(reference, query), distance(query, reference).T)


def test_nodes_that_are_all_equal_give_the_cosine() -> None:
    one, other = (torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    repeated = (each.unsqueeze(2).expand(-1, -1, NODES).flatten(1) for each in (one, other))
    centered = (each - each.mean(dim=1, keepdim=True) for each in (one, other))
    assert torch.allclose(EarthMoversDistance(NODES)(*repeated), CosineSimilarity()(*centered), atol=1e-6)


@pytest.mark.parametrize("length", [1.0, 1e4])
@pytest.mark.parametrize("epsilon", [0.003, 0.02])
def test_sinkhorn_is_finite_in_float32_where_masses_are_very_uneven(length: float, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    signed = [length * torch.randn(8, 1600, generator=generator) for _ in range(2)]  # many masses of 0.001 beside large
    query = signed[0].clone().requires_grad_()
    scores = EarthMoversDistance(25, "sinkhorn", epsilon)(query, signed[1])
    assert torch.allclose(scores, EarthMoversDistance(25, "exact")(*signed), atol=0.003 if epsilon < 0.01 else 0.03)
    scores.sum().backward()
    assert query.grad.isfinite().all()


def test_gradients_are_those_of_central_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        torch.randn(rows, 4 * 5, generator=generator, dtype=torch.float64, requires_grad=True) for rows in (2, 3)
    )
    assert torch.autograd.gradcheck(EarthMoversDistance(5, "exact"), inputs, atol=1e-5)


def test_maps_of_zeros_have_a_score_and_a_gradient() -> None:
    query = torch.cat([maps(1), torch.zeros(1, CHANNELS * NODES)]).requires_grad_()
    scores = EarthMoversDistance(NODES)(query, maps(2, seed=1))
    scores.sum().backward()
    assert scores[1].tolist() == pytest.approx([0.0, 0.0])
    assert query.grad.isfinite().all()


def test_episodes_are_scored_as_one_by_one_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, reference = maps(3, 4), maps(3, 5, seed=1)
    distance = EarthMoversDistance(NODES)
    alone = torch.stack([distance(q, r) for q, r in zip(query, reference, strict=True)])
    assert torch.allclose(distance.compute_batch(query, reference), alone)
    monkeypatch.setattr("pml_fewshot.distances.nodes.BLOCK", 4 * NODES**2)
    assert torch.allclose(distance.compute_batch(query, reference), alone)


@pytest.mark.parametrize("head", [nearest_prototype, nearest_neighbour, mean_similarity])
def test_heads_score_by_it(head: object) -> None:
    support, query = maps(2, 3, 2), maps(2, 4, seed=1)
    logits = head(support, query, EarthMoversDistance(NODES))  # type: ignore[operator]
    for e, n, w in np.ndindex(2, 4, 3):
        if head is nearest_prototype:
            expected = slow_score(query[e, n], support[e, w].mean(dim=0))
        else:
            each = [slow_score(query[e, n], item) for item in support[e, w]]
            expected = max(each) if head is nearest_neighbour else sum(each) / 2
        assert logits[e, n, w].item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [PrototypicalLoss, MatchingLoss])
def test_losses_take_it(loss: type[nn.Module]) -> None:
    support, query = maps(3), maps(4, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0])
    value = loss(distance=EarthMoversDistance(NODES), scale=12.5)(query, labels, None, support, torch.arange(3))
    logits = torch.tensor([[12.5 * slow_score(q.detach(), s) for s in support] for q in query], dtype=torch.float64)
    assert value.item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    value.backward()
    assert query.grad.abs().sum() > 0
    # an ordinary batch: each item against the prototypes, or items, of the others
    assert loss(distance=EarthMoversDistance(NODES), scale=12.5)(maps(6), torch.arange(6) // 2).isfinite()


def test_a_softmax_over_it_without_a_scale_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="at most 0.65"):
        PrototypicalLoss(distance=EarthMoversDistance(NODES))


def test_a_protonet_trains_with_it() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) // 10
    images = torch.randint(0, 120, (6, 1, 32, 32), generator=generator)[labels]
    images = images + torch.randint(0, 120, images.shape, generator=generator)
    data = FewShotDataset(images.byte(), labels, list("abcdef"))
    torch.manual_seed(0)
    loss = PrototypicalLoss(distance=EarthMoversDistance(4), scale=12.5)
    trainer = ProtoNetTrainer(Embedder(Conv4(channels=8)), loss)
    evaluator = EpisodicEvaluator(EpisodeSpec(5, 1, 5), num_episodes=50)
    before = evaluator.evaluate(trainer, data)
    stream = EpisodeStream(data, EpisodeSpec(5, 1, 5), seed=0)
    fit(trainer, stream, torch.optim.Adam(trainer.parameters(), lr=3e-3), steps=30, progress=False)
    after = evaluator.evaluate(trainer, data)
    assert after.mean > before.mean + 0.03
    assert after.classifier == "nearest_prototype by EarthMoversDistance(4 nodes, auto)"


def labeled_bank() -> EmbeddingBank:
    labels = torch.arange(24) % 4
    return EmbeddingBank(maps(4)[labels] + maps(24, seed=1), labels)


def test_retrieval_reorders_the_first_neighbors_by_it() -> None:
    bank, distance = labeled_bank(), EarthMoversDistance(NODES)
    rows = bank.embeddings.float()
    first = torch.cdist(rows, rows).fill_diagonal_(math.inf).topk(9, largest=False).indices
    scores = distance(rows, rows)
    nearest = first.gather(1, scores.gather(1, first).argsort(dim=1, descending=True))
    expected = (bank.labels[nearest[:, 0]] == bank.labels).double().mean()
    for tester in (RetrievalTester(k=9, distance=distance), RetrievalTester(k=9, rerank=distance)):
        result = tester.test(bank)
        assert result["precision_at_1"] == pytest.approx(expected.item())
        assert result.ranking == "exact, euclidean, the first 9 re-ranked by EarthMoversDistance(6 nodes, auto)"
    everything = RetrievalTester(["precision_at_1"], k=23, rerank=distance).test(bank)
    best = scores.fill_diagonal_(-2).argmax(dim=1)
    assert everything["precision_at_1"] == pytest.approx((bank.labels[best] == bank.labels).double().mean().item())


def test_retrieval_by_an_approximate_index_reorders_too_and_a_gallery_cannot() -> None:
    from pml_fewshot.evaluation.gallery import Gallery

    bank = labeled_bank()
    tester = RetrievalTester(["precision_at_1"], index="hnsw", k=23, rerank=EarthMoversDistance(NODES))
    exact = RetrievalTester(["precision_at_1"], k=23, rerank=EarthMoversDistance(NODES)).test(bank)
    assert tester.test(bank)["precision_at_1"] == exact["precision_at_1"]
    with pytest.raises(UsageError, match="holds no embeddings"):
        RetrievalTester(distance=EarthMoversDistance(NODES)).test(bank, Gallery(bank))


def test_structured_prototypes_follow_the_gradient_of_the_papers_loss() -> None:
    support, query = maps(2, 3, 2), maps(2, 4, seed=1)
    distance = EarthMoversDistance(NODES)
    head = partial(structured_classifier, epochs=2, batch_size=4, lr=0.5)
    with torch.no_grad():
        logits = head(support, query, distance)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(6, generator=generator) for _ in range(2)]
    for e in range(2):
        prototypes, velocity = support[e].mean(dim=1), torch.zeros(3, CHANNELS * NODES, dtype=torch.float64)
        first = True
        for order in orders:
            for batch in order.split(4):
                prototypes = prototypes.detach().requires_grad_()
                scores = distance(support[e].flatten(0, 1)[batch], prototypes)
                nn.functional.cross_entropy(12.5 * scores, batch // 2).backward()
                velocity = prototypes.grad if first else 0.9 * velocity + 0.1 * prototypes.grad
                prototypes, first = prototypes - 0.5 * velocity, False
        assert torch.allclose(logits[e], distance(query[e], prototypes.detach()), atol=1e-8)
    assert not torch.allclose(logits, nearest_prototype(support, query, distance), atol=1e-3)
    with torch.inference_mode():
        assert torch.allclose(head(support, query, distance), logits)
    with pytest.raises(UsageError, match="epochs"):
        structured_classifier(support, query, distance, epochs=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EarthMoversDistance(1), "at least 2 nodes, got 1; with one the distance would be plain cosine"),
        (lambda: EarthMoversDistance(0), "nodes"),
        (lambda: EarthMoversDistance(6, "simplex"), "solver"),  # type: ignore[arg-type]
        (lambda: EarthMoversDistance(6, epsilon=0), "epsilon above 0"),
        (lambda: EarthMoversDistance(7)(maps(2), maps(2)), "multiple of 7 dimensions, got 48"),
        (lambda: EarthMoversDistance(6, "sinkhorn", 1e-6)(maps(2).float(), maps(2).float()), "at least 1.2e-04"),
    ],
)
def test_bad_options_are_refused(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]


def test_nan_is_an_error_of_the_evaluation() -> None:
    bank = labeled_bank()
    bank.embeddings[:] = bank.embeddings * 1e200  # finite, but its squares are not
    head = partial(nearest_prototype, distance=EarthMoversDistance(6))
    with pytest.raises(UsageError, match="finite"):
        EpisodicEvaluator(EpisodeSpec(2, 1, 2), 10, head=head).evaluate(bank)


def test_without_pot_the_extra_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    monkeypatch.setitem(sys.modules, "ot.lp.emd_wrap", None)
    for solver in ("exact", "auto"):
        if solver == "auto" and torch.cuda.is_available():
            continue
        with pytest.raises(ImportError, match=r"pip install 'pml_fewshot\[emd\]'"):
            EarthMoversDistance(6, solver)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EarthMoversDistance(6, "sinkhorn")(maps(2), maps(2)).isfinite().all()


@pytest.mark.gpu
def test_sinkhorn_on_a_gpu_is_near_the_exact_score() -> None:
    query, reference = maps(7, dtype=torch.float32), maps(5, seed=1, dtype=torch.float32)
    expected = EarthMoversDistance(NODES, "exact")(query, reference)
    for solver in ("auto", "exact"):
        found = EarthMoversDistance(NODES, solver)(query.cuda(), reference.cuda())  # type: ignore[arg-type]
        assert found.is_cuda
        assert torch.allclose(found.cpu(), expected, atol=3e-3)


def test_a_costly_distance_never_ranks_all_pairs_beside_another() -> None:
    bank, seen = labeled_bank(), 0

    class Counting(EarthMoversDistance):
        def compute_batch(self, query: Tensor, reference: Tensor) -> Tensor:
            nonlocal seen
            seen += query.shape[0] * query.shape[1] * reference.shape[1]
            return super().compute_batch(query, reference)

    other = LocalNeighborSimilarity(NODES)
    result = RetrievalTester(["precision_at_1"], k=5, distance=Counting(NODES), rerank=other).test(bank)
    assert seen == 0
    assert "the first 5 re-ranked by LocalNeighborSimilarity" in result.ranking
    RetrievalTester(["precision_at_1"], k=5, distance=Counting(NODES)).test(bank)
    assert seen == 24 * 5


def test_what_is_no_distance_is_refused_when_the_tester_is_made() -> None:
    for wrong in ("emd", EarthMoversDistance):
        with pytest.raises(UsageError, match="expected rerank as a PML distance or None"):
            RetrievalTester(rerank=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("evaluate", ["episodes", "retrieval"])
def test_a_learned_distance_is_evaluated_in_eval_mode_and_keeps_its_statistics(evaluate: str) -> None:
    distance = RelationSimilarity(16, channels=4, hidden=3, dim=64)
    rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    bank, before = EmbeddingBank(rows, torch.arange(40) % 4), distance.first_norm.running_mean.clone()
    if evaluate == "episodes":
        head = partial(nearest_prototype, distance=distance)
        EpisodicEvaluator(EpisodeSpec(3, 1, 4), 5, head=head).evaluate(bank)
    else:
        RetrievalTester(["precision_at_1"], k=5, rerank=distance).test(bank)
    assert distance.training
    assert torch.equal(distance.first_norm.running_mean, before)


def test_widths_that_differ_and_supports_without_items_are_refused() -> None:
    for distance in (EarthMoversDistance(NODES), LocalNeighborSimilarity(NODES)):
        with pytest.raises(UsageError, match="one width, got 48 and 96 dimensions"):
            distance(maps(2), torch.cat([maps(2), maps(2)], dim=1))
    with pytest.raises(UsageError, match="at least one class and shot"):
        nearest_prototype(maps(1, 2, 1)[:, :, :0], maps(1, 3), EarthMoversDistance(NODES))
    with pytest.raises(UsageError, match="expected a distance to fit prototypes by, got none"):
        structured_classifier(maps(1, 2, 1), maps(1, 3))
    empty = PrototypicalLoss(distance=EarthMoversDistance(NODES), scale=12.5)(
        maps(2)[:0], torch.arange(0), None, maps(2), torch.arange(2)
    )
    assert empty == 0
