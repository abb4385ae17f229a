"""LocalNeighborSimilarity against loops over nodes: values, gradients, pooled references, blocks, bad input."""

import pytest
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.distances import nodes as blocks
from pml_fewshot.distances.local_neighbors import LocalNeighborSimilarity
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.heads import mean_similarity, nearest_neighbour, nearest_prototype
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.episodes import Episode
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from tests.losses.formulas import normal
from tests.trainers import material as m

NODES, CHANNELS = 6, 3
DIMS = NODES * CHANNELS


def written_out(query: Tensor, reference: Tensor, k: int, nodes: int = NODES) -> float:
    """Of two embeddings (D,) and (D',), in Python's own numbers; channels first."""

    def nodes_of(embedding: list[float], count: int) -> m.Rows:
        rows = [[embedding[channel * count + node] for channel in range(CHANNELS)] for node in range(count)]
        lengths = [m.dot(row, row) ** 0.5 for row in rows]
        return [[x / length if length else 0.0 for x in row] for row, length in zip(rows, lengths, strict=True)]

    others = nodes_of(reference.tolist(), len(reference) // CHANNELS)
    sums = [sum(sorted(m.dot(node, other) for other in others)[-k:]) for node in nodes_of(query.tolist(), nodes)]
    return sum(sums) / nodes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("k", [1, 3, NODES])
def test_it_is_the_mean_over_nodes_of_the_sum_of_their_k_largest_cosines(
    k: int, grad: bool, dtype: torch.dtype
) -> None:
    similarity = LocalNeighborSimilarity(NODES, k)
    query, reference = normal(2, 4, DIMS, seed=1).to(dtype), normal(2, 5, DIMS, seed=2).to(dtype)
    query[0, 1] = 0  # of zeros
    query[1, 2, 0::NODES] = 0  # one node of zeros
    expected = torch.tensor([[[written_out(a, b, k) for b in r] for a in q] for q, r in zip(query, reference)])  # noqa: B905
    with torch.set_grad_enabled(grad):
        got = similarity.compute_batch(query, reference)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(similarity(query[0], reference[0]), got[0])
        torch.testing.assert_close(similarity.pairwise_distance(query[0], reference[0, :4]), got[0, :4].diagonal())
    assert got[0, 1].eq(0).all()
    assert similarity.is_inverted
    assert similarity.span == 2 * k
    same = similarity(query[1, :2], query[1, :2])
    assert k > 1 or torch.allclose(same.diagonal(), torch.ones(2).to(same))


def test_gradients_are_those_of_central_differences_also_at_maps_of_zeros_where_they_are_finite() -> None:
    query, reference = normal(2, 2, DIMS, seed=1).requires_grad_(), normal(2, 3, DIMS, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(LocalNeighborSimilarity(NODES, 2).compute_batch, (query, reference))
    zeros = torch.zeros(1, 2, DIMS, dtype=torch.float64, requires_grad=True)
    LocalNeighborSimilarity(NODES).compute_batch(zeros, reference[:1]).sum().backward()
    assert zeros.grad.abs().max() < 10  # type: ignore[union-attr]
    assert reference.grad.eq(0).all()  # type: ignore[union-attr]


def test_blocks_give_what_one_gives_in_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    query, reference = normal(3, 5, DIMS, seed=1).requires_grad_(), normal(3, 4, DIMS, seed=2).requires_grad_()

    def results() -> tuple[Tensor, ...]:
        got = LocalNeighborSimilarity(NODES).compute_batch(query, reference)
        with torch.no_grad():
            plain = LocalNeighborSimilarity(NODES).compute_batch(query, reference)
        return (got, plain, *torch.autograd.grad(got.sin().sum(), (query, reference)))

    whole = results()
    monkeypatch.setattr(blocks, "BLOCK", 7 * NODES * NODES)
    torch.testing.assert_close(results(), whole)


def test_pooled_references_hold_the_nodes_of_all_shots_of_their_class() -> None:
    similarity, support, query = LocalNeighborSimilarity(NODES), normal(2, 3, 2, DIMS), normal(2, 4, DIMS, seed=1)
    got = similarity.compute_batch(query, similarity.pooled(support))
    for episode in range(2):
        for way in range(3):
            shots = support[episode, way].unflatten(1, (CHANNELS, NODES))  # (K, C, nodes)
            joined = torch.cat(list(shots), dim=1).flatten()
            for number in range(4):
                wanted = written_out(query[episode, number], joined, 3)
                assert got[episode, number, way].item() == pytest.approx(wanted)
    one = support[:, :, :1]
    assert torch.equal(similarity.pooled(one), one.squeeze(2))


def test_heads_and_losses_use_it_as_any_distance() -> None:
    similarity, support, query = LocalNeighborSimilarity(NODES), normal(2, 3, 2, DIMS), normal(2, 6, DIMS, seed=1)
    each = similarity.compute_batch(query, support.flatten(1, 2)).unflatten(2, (3, 2))
    torch.testing.assert_close(nearest_neighbour(support, query, similarity), each.amax(dim=3))
    torch.testing.assert_close(mean_similarity(support, query, similarity), each.mean(dim=3))
    of_mean = similarity.compute_batch(query, support.mean(dim=2))
    torch.testing.assert_close(nearest_prototype(support, query, similarity), of_mean)
    labels, ways = torch.arange(3).repeat_interleave(2), torch.arange(3).repeat_interleave(2)
    for loss, logits in (
        (PrototypicalLoss(similarity, scale=2.0), 2 * of_mean[0]),
        (MatchingLoss(similarity, scale=2.0), (2 * each[0]).logsumexp(dim=2)),
    ):
        got = loss(query[0], labels, ref_emb=support[0].flatten(0, 1), ref_labels=ways)
        torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits, labels))


def test_the_same_object_elsewhere_in_the_image_is_found_and_flat_cosine_misses_it() -> None:
    image, other = normal(DIMS).unflatten(0, (CHANNELS, NODES)), normal(DIMS, seed=3)
    moved = torch.roll(image, 2, dims=1).flatten()
    values = LocalNeighborSimilarity(NODES, 1)(image.flatten()[None], torch.stack([moved, other]))
    assert values[0, 0].item() == pytest.approx(1)
    assert values[0, 1] < 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 1}, "at least 2 nodes, got 1; with one the distance would be plain cosine"),
        ({"nodes": 0}, "nodes to be an integer of at least 1"),
        ({"nodes": 4, "k": 5}, "expected k of at most 4, the nodes of a reference, got 5; lower k"),
        ({"nodes": 4, "k": 0}, "expected k to be an integer of at least 1"),
        ({"nodes": 2}, "k of at most 2, .* got 3"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LocalNeighborSimilarity(**arguments)


def test_embeddings_that_do_not_fit_are_refused_and_nan_stays_nan() -> None:
    similarity = LocalNeighborSimilarity(NODES)
    with pytest.raises(UsageError, match="multiple of 6 dimensions, got 16"):
        similarity(normal(2, 16), normal(2, 16))
    for dim in (DIMS - NODES, DIMS + NODES):
        with pytest.raises(UsageError, match=f"one width, got {DIMS} and {dim} dimensions"):
            similarity(normal(2, DIMS), normal(2, dim))
    query, reference = normal(1, 2, DIMS), normal(1, 3, DIMS, seed=1)
    query[0, 0, 4], reference[0, 2, 5] = torch.nan, torch.nan
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            bad = similarity.compute_batch(query, reference).isnan()[0]
        assert bad.tolist() == [[True, True, True], [False, False, True]]


def test_a_trainer_of_a_trunk_with_maps_learns_by_it() -> None:
    torch.manual_seed(0)
    trainer = ProtoNetTrainer(Embedder(Conv4(1, 4)), PrototypicalLoss(LocalNeighborSimilarity(4), scale=4.0))
    draw = torch.Generator().manual_seed(0)
    support, query = torch.rand(2, 1, 3, 2, 1, 32, 32, generator=draw)
    trainer(Episode(support, query)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainer.embedder.parameters())
    assert trainer.classifier == "nearest_prototype by LocalNeighborSimilarity(nodes=4, k=3)"
