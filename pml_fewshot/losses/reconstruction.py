"""ReconstructionLoss: the loss of feature map reconstruction networks (FRN) as a pytorch-metric-learning (PML) loss."""

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from pytorch_metric_learning.reducers import BaseReducer
from pytorch_metric_learning.regularizers import BaseRegularizer
from torch import Tensor, nn

from pml_fewshot.distances.nodes import as_maps, check_nodes
from pml_fewshot.losses.episodic_loss import EpisodicLoss


def penalty_of(rows: float | Tensor, channels: int, log_penalty: float | Tensor) -> Tensor:
    """Ridge penalty of a class with `rows` nodes: exp(alpha) * rows / channels, so that one alpha fits all shots."""
    return torch.as_tensor(log_penalty).exp() * rows / channels + 1e-6  # (which the authors' code adds)


def ridge_inverse(gram: Tensor, penalty: Tensor) -> Tensor:
    """(gram + penalty I)^-1 of Gram matrices (..., m, m); NaN where one holds NaN."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(gram + penalty * eye).L)


def mean_squares(rows: Tensor, residual: Tensor, nodes: int, log_stretch: float | Tensor) -> Tensor:
    """Mean over a query's nodes of the squared norm of the node minus exp(beta) times its reconstruction: (..., N).

    Args:
        rows: (..., N * nodes, C) of queries.
        residual: the same shape: rows minus their reconstruction.
    """
    stretch = torch.as_tensor(log_stretch).exp()
    left = stretch * residual + (1 - stretch) * rows
    return left.square().sum(dim=-1).unflatten(-1, (-1, nodes)).mean(dim=-1)


class ReconstructionLoss(EpisodicLoss):
    """Cross-entropy over how well the nodes of each class's support reconstruct a query's nodes, by ridge regression.

    Called and configured like any EpisodicLoss; in an ordinary batch each item is reconstructed from the others. The
    penalty alpha, the stretch beta (both logarithms that start at 0) and the scale are trained with the embedder.

    The paper's auxiliary loss, which makes the supports of classes orthogonal, is left out: the authors' code weights
    it to about a hundredth of this one.

    Args:
        nodes: positions of a feature map: 25 for Conv4 and ResNet12(pool=False) at 84 x 84.
        scale: of the logits, 1 as in the paper, and learned.
        reducer: this and the rest as in EpisodicLoss.

    Shapes: embeddings (B, channels * nodes), channels first. `distance` ranks retrieval only: squared Euclidean.

    Raises:
        UsageError: fewer than 2 nodes, or nodes that do not divide D.

    Source: Wertheimer, Tang and Hariharan 2021, "Few-Shot Classification with Feature Map Reconstruction Networks",
    equations 4 to 11.
    """

    def __init__(
        self,
        nodes: int,
        scale: float = 1.0,
        learn_scale: bool = True,
        reducer: BaseReducer | None = None,
        embedding_regularizer: BaseRegularizer | None = None,
        embedding_reg_weight: float = 1.0,
        collect_stats: bool | None = None,
    ) -> None:
        check_nodes(nodes)
        super().__init__(None, scale, learn_scale, reducer, embedding_regularizer, embedding_reg_weight, collect_stats)
        self.nodes = nodes
        self.log_penalty, self.log_stretch = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def get_default_distance(self) -> BaseDistance:
        return LpDistance(normalize_embeddings=False, power=2)

    def class_scores(self, queries: Tensor, support: Tensor, member: Tensor, own_class: Tensor | None) -> Tensor:
        maps = as_maps(support, self.nodes)  # (S, n, C)
        grams = maps.mT @ maps  # (S, C, C)
        of_class = torch.einsum("sw,scd->wcd", member, grams)
        counts = member.sum(dim=0)  # (W,)
        rows = as_maps(queries, self.nodes)  # (B, n, C)
        scores = -self._errors(rows.flatten(0, 1), of_class, counts).T  # (B, W)
        if own_class is not None:
            left_out = of_class[own_class] - grams
            own = -self._errors(rows, left_out, counts[own_class] - 1)  # (B, 1)
            scores = torch.where(own_class.unsqueeze(1) == torch.arange(len(counts), device=own.device), own, scores)
        return self.scale * scores

    def _errors(self, rows: Tensor, grams: Tensor, counts: Tensor) -> Tensor:
        """Errors (W, M / nodes) of rows (M, C) for each class, or of rows (W, M, C) class by class; grams (W, C, C)."""
        penalty = penalty_of(counts * self.nodes, grams.shape[-1], self.log_penalty)[:, None, None]
        residual = rows @ (penalty * ridge_inverse(grams, penalty))
        return mean_squares(rows, residual, self.nodes, self.log_stretch)
