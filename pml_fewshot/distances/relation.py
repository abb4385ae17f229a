"""RelationSimilarity: the relation module of relation networks (Sung et al. 2018) as a PML distance."""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.distances.episodic_distance import EpisodicDistance
from pml_fewshot.distances.nodes import as_maps, check_nodes, in_blocks
from pml_fewshot.embedders.modes import in_float32


class RelationSimilarity(EpisodicDistance):
    """Scores each pair of embeddings that are feature maps with a small network: a logit, large if both are alike.

    The maps of reference and query, concatenated over channels, go through two blocks of [3x3 convolution, batch norm,
    ReLU, 2x2 max-pool] and two linear layers with a ReLU between. It is trained with the embedder, as the loss's
    distance. Not symmetric, like the paper's.

    Args:
        nodes: positions of the feature map, a square number of at least 16, with the map flattened channels first:
            25 for `Conv4(pool=False)` and `ResNet12(pool=False)` at 84 x 84.
        channels: filters of both convolutions.
        hidden: units between the linear layers.
        dim: D of the embeddings, C * nodes. When None, it is inferred from the first ones seen, and nothing else is;
            an optimizer may already hold the parameters.
        collect_stats: keep PML's statistics for a record-keeper; PML's own default when None.

    Shapes: (B, C * nodes) and (R, C * nodes) -> (B, R). The first convolution is linear, so it is applied to queries
    and references once each and the results are added for each pair. Batch norm sees all pairs of a call in train mode,
    and uses its running statistics in eval mode, where pairs are processed in blocks if no gradient is needed.

    The convolutions pad by one, as in the authors' code for Omniglot: a 5 x 5 map becomes 2 x 2, then 1 x 1. (For
    miniImageNet they do not, and use 19 x 19 maps.) The paper ends in a sigmoid and trains with squared error; here the
    score is a logit for the loss: `PrototypicalLoss(distance=RelationSimilarity(25))` is cross-entropy over the
    classes, whose prototypes are the means of their maps where the paper uses sums.

    Raises:
        UsageError: `nodes` is not a square number or is below 16; embeddings of another width than it has weights for,
            or that are not maps of that many nodes.

    Source: Sung, Yang, Zhang, Xiang, Torr and Hospedales 2018, "Learning to Compare: Relation Network for Few-Shot
    Learning", section 3.4 and figure 2.
    """

    ranks_all = False

    def __init__(
        self, nodes: int, channels: int = 64, hidden: int = 8, dim: int | None = None, collect_stats: bool | None = None
    ) -> None:
        super().__init__(normalize_embeddings=False, is_inverted=True, collect_stats=collect_stats)
        check_nodes(nodes)
        self.nodes, self.side = nodes, math.isqrt(nodes)
        if self.side**2 != nodes or self.side < 4:  # two poolings would leave nothing
            do = "take a trunk with square maps of at least 4 x 4: Conv4(pool=False) has 5 x 5 at 84 x 84"
            raise UsageError(f"expected nodes as a square of at least 16, got {nodes}; {do}")
        check_at_least_one("channels", channels)
        check_at_least_one("hidden", hidden)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Lazy modules", category=UserWarning)  # "under development"
            # no biases: batch norm would subtract them again
            self.first = nn.LazyConv2d(channels, kernel_size=3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.hidden = nn.Linear(channels * (self.side // 4) ** 2, hidden)
        # A vector, because PML's record-keeper takes a matrix of one row for a number; initialized as in nn.Linear.
        self.weight = nn.Parameter(nn.init.uniform_(torch.empty(hidden), -(hidden**-0.5), hidden**-0.5))
        self.bias = nn.Parameter(torch.zeros(()))
        if dim is not None:
            check_at_least_one("dim", dim)
            self._prepare(dim)

    def extra_repr(self) -> str:
        return f"nodes={self.nodes}, channels={self.second.out_channels}, hidden={self.hidden.out_features}"

    def _prepare(self, *dims: int) -> None:
        """Creates the first weights for embeddings of D, if they have no shape yet, and refuses any other width."""
        weight = self.first.weight
        if is_lazy(weight):
            channels = as_maps(torch.empty(1, dims[0], device="meta"), self.nodes).shape[-1]
            with torch.inference_mode(False), torch.no_grad():  # weights made in inference mode could never train
                self.first(torch.zeros(1, 2 * channels, 1, 1, dtype=weight.dtype, device=weight.device))
        known = weight.shape[1] // 2 * self.nodes
        if wrong := [dim for dim in dims if dim != known]:
            wanted = f"embeddings of {known} dimensions, {self.nodes} nodes, as this similarity has weights for"
            raise UsageError(
                f"expected {wanted}, got {wrong[0]}; use the embedder that it was trained with, or a new one"
            )

    @in_float32
    def compute_batch(self, query: Tensor, reference: Tensor) -> Tensor:
        self._prepare(query.shape[2], reference.shape[2])
        to_reference, to_query = self.first.weight.chunk(2, dim=1)  # the paper concatenates them in this order
        queries, references = self._convolved(query, to_query), self._convolved(reference, to_reference)
        if self.training or torch.is_grad_enabled():  # batch norm needs all pairs, and backward keeps them anyway
            return self._score(queries, references)
        return in_blocks(self._score, queries, references, self.nodes * len(to_query))

    def _convolved(self, embeddings: Tensor, weight: Tensor) -> Tensor:
        """(E, N, D) -> (E, N, channels, side, side), before the other half is added."""
        maps = embeddings.flatten(0, 1).unflatten(1, (-1, self.side, self.side))
        # channels-last, the faster layout for pooling and batch norm on a CPU
        maps = F.conv2d(maps.contiguous(memory_format=torch.channels_last), weight, padding=1)
        return maps.unflatten(0, embeddings.shape[:2])

    def _score(self, query: Tensor, reference: Tensor) -> Tensor:
        """(E, N, ...) and (E, R, ...) of the first convolution -> (E, N, R)"""
        pairs = query.unsqueeze(2) + reference.unsqueeze(1)
        # pooling before the ReLU: the same with a quarter of the work
        maps = F.max_pool2d(self.first_norm(pairs.flatten(0, 2)), 2).relu()
        maps = F.max_pool2d(self.second_norm(self.second(maps)), 2).relu()
        scores = self.hidden(maps.flatten(1)).relu() @ self.weight + self.bias
        return scores.unflatten(0, pairs.shape[:3])
