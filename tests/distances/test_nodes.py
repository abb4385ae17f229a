"""Embeddings split into the nodes of their feature maps."""

import pytest
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.distances import nodes
from pml_fewshot.embedders.conv4 import Conv4
from tests.losses.formulas import normal


def test_maps_are_the_channels_at_each_place_of_what_a_trunk_flattens() -> None:
    trunk, images = Conv4(1, 3).eval(), torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, split = trunk.blocks(images), nodes.as_maps(trunk(images), 6)
    assert split.shape == (2, 6, 3)
    for node in range(6):
        assert torch.equal(split[:, node], maps[:, :, node // 3, node % 3])


@pytest.mark.parametrize("wrong", [0, True, 2.0])
def test_nodes_are_an_integer_above_one(wrong: object) -> None:
    with pytest.raises(UsageError, match="expected nodes to be an integer of at least 1"):
        nodes.check_nodes(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 2 nodes, got 1; with one the distance would be plain cosine"):
        nodes.check_nodes(1)
    nodes.check_nodes(2)


@pytest.mark.parametrize("dim", [64, 24, 26, 640, 25])  # with 25, a node would have one channel
def test_embeddings_that_are_no_maps_of_so_many_nodes_are_refused(dim: int) -> None:
    with pytest.raises(UsageError, match=rf"of a multiple of 25 dimensions, got {dim}; .* Conv4\(pool=False\) and"):
        nodes.as_maps(torch.zeros(3, dim), 25)


def test_nodes_of_length_one_and_the_gradient_of_a_node_of_zeros() -> None:
    maps = normal(2, 3, 4)
    maps[1, 1] = 0
    expected = torch.stack([node / max(node.norm(), 1e-300) for node in maps.flatten(0, 1)]).view_as(maps)
    torch.testing.assert_close(nodes.unit_nodes(maps.requires_grad_()), expected)
    pull = normal(2, 3, 4, seed=1)
    gradient, wanted = (
        torch.autograd.grad((unit * pull).sum(), maps)[0]
        for unit in (nodes.unit_nodes(maps), torch.nn.functional.normalize(maps, dim=-1))
    )
    other = torch.ones(2, 3, dtype=torch.bool)
    other[1, 1] = False
    torch.testing.assert_close(gradient[other], wanted[other])
    assert gradient[1, 1].abs().max() < 10 < 1e6 < wanted[1, 1].abs().max()
    assert nodes.unit_nodes(torch.tensor([[torch.nan, 1.0]])).isnan().all()


@pytest.mark.parametrize("block", [1, 7, 8, 20, 41, 83, 200, 10**6])
@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 9, 2), (3, 1, 8), (2, 0, 3), (2, 3, 0)])
def test_blocks_hold_no_more_than_they_may_and_give_what_one_gives(
    shape: tuple[int, int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "BLOCK", block)
    episodes, queries, references = shape
    query, reference, seen = normal(episodes, queries, 4), normal(episodes, references, 4, seed=1), []

    def compare(query: Tensor, reference: Tensor) -> Tensor:
        seen.append(len(query) * query.shape[1] * reference.shape[1])
        return query @ reference.mT

    torch.testing.assert_close(nodes.in_blocks(compare, query, reference, 2), query @ reference.mT)
    pairs = episodes * queries * references
    assert sum(seen) == pairs
    assert max([0, *seen]) <= max(block // 2, 1)
    assert len(seen) <= 4 * pairs / max(block // 2, 1) + 2 * episodes  # and not many fewer
    assert len(seen) == 1 or block < 2 * pairs or not pairs
