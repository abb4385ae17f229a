"""LocalNeighborSimilarity: DN4's comparison of two images by the nearest neighbors of their local features."""

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.distances.episodic_distance import EpisodicDistance
from pml_fewshot.distances.nodes import as_maps, check_nodes, in_blocks, unit_nodes
from pml_fewshot.embedders.modes import in_float32


class LocalNeighborSimilarity(EpisodicDistance):
    """Compares embeddings that are feature maps: each node of the query seeks its k nearest nodes in the reference.

    The similarity is the sum of the k largest cosines, averaged over the query's nodes: from -k to k. It has nothing to
    learn, does not see where in the image nodes are, and is not symmetric. A node of zeros has cosine 0 to every other.

    Args:
        nodes: positions of the feature map, which is flattened channels first: 25 of `Conv4(pool=False)` and
            `ResNet12(pool=False)` at 84 x 84.
        k: nearest neighbors of each node; 3 as in the paper. At most `nodes`.
        collect_stats: keep PML's statistics for a record-keeper; PML's own default when None.

    Shapes: (B, C * nodes) and (R, C * nodes) -> (B, R), by 2 * C * nodes^2 operations a pair. Pairs are compared in
    blocks, so that no more than about 8 MiB of cosines are there at once, with or without gradient.

    The paper's is the sum over the query's nodes, `nodes` times this one: as the loss's scale, `scale=25.0`, the same.
    For a class of several shots it seeks neighbors among the nodes of all of them: `pooled(support)` are references
    that hold those. Of the heads, `nearest_neighbour` takes the best shot and `mean_similarity` the mean of all;
    `nearest_prototype` averages maps position by position, which blurs what is elsewhere in each image.

    Raises:
        UsageError: one node, k above the nodes; embeddings that are no maps of so many nodes.

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

        References may hold the nodes of K items, (E, R, K * D), see `pooled`.
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
        """Joins the maps of each class of a support (E, W, K, D): references (E, W, K * D) of K * nodes nodes."""
        maps = as_maps(support, self.nodes)  # (E, W, K, nodes, C)
        return maps.flatten(2, 3).mT.flatten(2)

    def _of_units(self, query: Tensor, reference: Tensor) -> Tensor:
        """(E, N, nodes, C) and (E, R, nodes', C) of length 1 -> (E, N, R)"""
        references, nodes = reference.shape[1:3]
        # the reference's nodes in front, so that each is one piece of memory
        rows = reference.transpose(1, 2).flatten(1, 2)  # (E, nodes' * R, C)
        cosines = (rows @ query.flatten(1, 2).mT).unflatten(1, (nodes, references))  # (E, nodes', R, N * nodes)
        nearest = sum_of_largest(cosines, self.k)
        return nearest.unflatten(2, query.shape[1:3]).mean(dim=3).mT


def sum_of_largest(values: Tensor, k: int) -> Tensor:
    """(E, nodes, ...) -> (E, ...): the sum of the k largest along the second axis."""
    if torch.is_grad_enabled():
        return values.topk(k, dim=1).values.sum(dim=1)
    # without a gradient, where only the values count, 6 times as fast as topk: each goes down the ranks as far as it is
    # large, all of a node at once
    largest: list[Tensor] = []
    for node in values.unbind(1):
        for rank, kept in enumerate(largest):
            largest[rank], node = torch.maximum(kept, node), torch.minimum(kept, node)
        if len(largest) < k:
            largest.append(node)
    return torch.stack(largest).sum(dim=0)
