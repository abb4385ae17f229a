"""LocalNeighborSimilarity: DN4's comparison of two images by the nearest neighbors of their local features."""

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.distances.episodic_distance import EpisodicDistance
from pml_fewshot.distances.nodes import as_maps, check_nodes, in_blocks, unit_nodes
from pml_fewshot.embedders.modes import in_float32


class LocalNeighborSimilarity(EpisodicDistance):
    """Compares embeddings that are feature maps: each node of the query finds its k nearest nodes in the reference.

    The similarity is the sum of the k largest cosines, averaged over the query's nodes: from -k to k. It has nothing to
    learn, ignores where in the image the nodes are, and is not symmetric. A zero node has cosine 0 with every other.

    Args:
        nodes: positions of the feature map, which is flattened channels first: 25 for `Conv4(pool=False)` and
            `ResNet12(pool=False)` at 84 x 84.
        k: nearest neighbors of each node; 3 as in the paper. At most `nodes`.
        collect_stats: keep PML's statistics for a record-keeper; PML's own default when None.

    Shapes: (B, C * nodes) and (R, C * nodes) -> (B, R), with 2 * C * nodes^2 operations per pair. Pairs are compared
    in blocks, so that no more than about 8 MiB of cosines exist at once, with or without a gradient.

    The paper sums over the query's nodes, which is `nodes` times this value: `scale=25.0` in the loss is the same.
    For a class with several shots it searches for neighbors among the nodes of all of them: `pooled(support)` returns
    references that hold those. Of the heads, `nearest_neighbour` uses the best shot and `mean_similarity` the mean of
    all; `nearest_prototype` averages maps position by position, which blurs features whose position varies.

    Raises:
        UsageError: one node, or k above `nodes`; embeddings that are not maps of that many nodes.

    Source: Li, Wang, Xu, Huo, Gao and Luo 2019, "Revisiting Local Descriptor based Image-to-Class Measure for Few-shot
    Learning", section 3.3.
    """

    ranks_all = False

    def __init__(self, nodes: int, k: int = 3, collect_stats: bool | None = None) -> None:
        super().__init__(normalize_embeddings=False, is_inverted=True, collect_stats=collect_stats)
        check_nodes(nodes)
        check_at_least_one("k", k)
        if k > nodes:
            raise UsageError(f"expected k of at most {nodes}, the nodes of a reference, got {k}; lower k")
        self.nodes, self.k, self.span = nodes, k, 2.0 * k

    def extra_repr(self) -> str:
        return f"nodes={self.nodes}, k={self.k}"

    @in_float32
    def compute_batch(self, query: Tensor, reference: Tensor) -> Tensor:
        """Compares each query (E, N, D) with each reference (E, R, D) of its episode: (E, N, R).

        References may hold the nodes of K items, (E, R, K * D); see `pooled`.
        """
        queries = as_maps(query, self.nodes)
        items, rest = divmod(reference.shape[2], query.shape[2])
        if rest or items < 1:
            wanted = f"references of {query.shape[2]} dimensions as the queries have, or a multiple"
            raise UsageError(f"expected {wanted}, got {reference.shape[2]}; embed both alike")
        references = as_maps(reference, items * self.nodes)
        pair = self.nodes * self.nodes * items
        return in_blocks(self._of_units, unit_nodes(queries), unit_nodes(references), pair)

    def pooled(self, support: Tensor) -> Tensor:
        """Joins the maps of each class of a support (E, W, K, D) to references (E, W, K * D) of K * nodes nodes."""
        maps = as_maps(support, self.nodes)  # (E, W, K, nodes, C)
        return maps.flatten(2, 3).mT.flatten(2)

    def _of_units(self, query: Tensor, reference: Tensor) -> Tensor:
        """(E, N, nodes, C) and (E, R, nodes', C), L2-normalized -> (E, N, R)"""
        references, nodes = reference.shape[1:3]
        # the reference's nodes come first, so that each is contiguous in memory
        rows = reference.transpose(1, 2).flatten(1, 2)  # (E, nodes' * R, C)
        cosines = (rows @ query.flatten(1, 2).mT).unflatten(1, (nodes, references))  # (E, nodes', R, N * nodes)
        nearest = sum_of_largest(cosines, self.k)
        return nearest.unflatten(2, query.shape[1:3]).mean(dim=3).mT


def sum_of_largest(values: Tensor, k: int) -> Tensor:
    """(E, nodes, ...) -> (E, ...): the sum of the k largest along the second axis."""
    if torch.is_grad_enabled():
        return values.topk(k, dim=1).values.sum(dim=1)
    # without a gradient only the values count, and this is 6 times as fast as topk: each value moves down the ranks to
    # its place, all values of a node at once
    largest: list[Tensor] = []
    for node in values.unbind(1):
        for rank, kept in enumerate(largest):
            largest[rank], node = torch.maximum(kept, node), torch.minimum(kept, node)
        if len(largest) < k:
            largest.append(node)
    return torch.stack(largest).sum(dim=0)
