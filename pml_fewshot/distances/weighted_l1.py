"""WeightedL1Similarity: the learned similarity of Siamese networks (Koch et al. 2015) as a PML distance."""

import warnings
from collections import OrderedDict

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.embedders.modes import in_float32

BLOCK = 2**24  # floats of |q - r| that the MLP holds at a time if no gradient is needed: 64 MiB


class WeightedSum(LazyModuleMixin, nn.Module):
    """Weighted sum over the last dimension plus a bias: (..., D) -> (...); D is inferred from the first input.

    The weights are a vector, because PML's record-keeper takes a matrix of one row for a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = UninitializedParameter()
        self.bias = nn.Parameter(torch.zeros(()))

    def initialize_parameters(self, values: Tensor) -> None:
        if isinstance(self.weight, UninitializedParameter):  # else they were loaded
            with torch.no_grad():
                self.weight.materialize((values.shape[-1],))
                self.weight.fill_(-(values.shape[-1] ** -0.5))

    def forward(self, values: Tensor) -> Tensor:
        return values @ self.weight + self.bias


class WeightedL1Similarity(BaseDistance):
    """Scores each pair of embeddings by a learned weighting of |q - r|: a logit, large if both are of one class.

    A similarity in PML's sense (`is_inverted=True`): it works in PML's pair losses and miners, in episode
    classification and in retrieval.

    Args:
        dim: D of the embeddings. When None, it is inferred from the first ones seen, and nothing else is; an optimizer
            may already hold the parameters.
        hidden: None for the paper's weighted sum; a number for a small MLP instead, D -> hidden -> 1 with a ReLU.
        collect_stats: keep PML's statistics for a record-keeper; PML's own default when None.

    Shapes: (B, D) and (R, D) -> (B, R). The weighted sum is the difference of two L1 distance matrices, one for the
    negative weights and one for the positive, and never holds (B, R, D); the MLP does if a gradient is needed.

    The weights of the sum start at -1 / sqrt(D): untrained, it ranks as L1 does, with logits on the order of sqrt(D).

    Source: Koch, Zemel and Salakhutdinov 2015, "Siamese Neural Networks for One-shot Image Recognition", section 3.1,
    where a sigmoid follows; here it is in the loss (PairVerificationLoss).
    """

    def __init__(self, dim: int | None = None, hidden: int | None = None, collect_stats: bool | None = None) -> None:
        super().__init__(normalize_embeddings=False, p=1, is_inverted=True, collect_stats=collect_stats)
        for name, size in (("dim", dim), ("hidden", hidden)):
            if size is not None:
                check_at_least_one(name, size)
        self.hidden = hidden
        self.score: nn.Module = WeightedSum()
        if hidden is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Lazy modules", category=UserWarning)  # "under development"
                first = nn.LazyLinear(hidden)
            # named, because record-keeper names tables after them and SQLite's names must not begin with a digit
            self.score = nn.Sequential(OrderedDict(first=first, relu=nn.ReLU(), last=WeightedSum()))
        if dim is not None:
            self._prepare(dim)

    def _prepare(self, *sizes: int) -> None:
        """Creates the weights for embeddings of D, if they have no shape yet, and refuses those of any other width."""
        first = next(self.score.parameters())
        if is_lazy(first):
            with torch.inference_mode(False), torch.no_grad():  # weights made in inference mode could never train
                self.score(torch.zeros(1, sizes[0], dtype=first.dtype, device=first.device))
        dim = first.shape[-1]  # of (D,), or (hidden, D)
        if wrong := [size for size in sizes if size != dim]:
            wanted, got = f"embeddings of {dim} dimensions, as this similarity has weights for", wrong[0]
            raise UsageError(f"expected {wanted}, got {got}; use the embedder that it was trained with, or a new one")

    @in_float32
    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        self._prepare(query_emb.shape[1], ref_emb.shape[1])
        if isinstance(self.score, WeightedSum):
            mat = self.score.bias.expand(len(query_emb), len(ref_emb))
            # A difference in some dimensions speaks against one class, in others for it: an L1 distance for each kind.
            for sign in (-1, 1):
                weight, query, reference = (sign * self.score.weight).clamp(min=0), query_emb, ref_emb
                if weight.is_cpu:  # half the work without the zeros; counting them would wait for a GPU
                    kind = weight.nonzero().flatten()
                    weight, query, reference = weight[kind], query[:, kind], reference[:, kind]
                mat = mat + sign * torch.cdist(query * weight, reference * weight, p=1)
            return mat
        if torch.is_grad_enabled():
            return self.score((query_emb.unsqueeze(1) - ref_emb).abs())
        rows = max(BLOCK // max(ref_emb.numel(), len(ref_emb) * (self.hidden or 0), 1), 1)
        # Written into one tensor: a result of each block, kept among freed blocks, would leave a hole too small for the
        # next block, and an allocator that returns nothing would take 24 GiB for 9,885 x 3,295 pairs.
        mat = query_emb.new_empty(len(query_emb), len(ref_emb))
        for start in range(0, len(query_emb), rows):
            mat[start : start + rows] = self.score((query_emb[start : start + rows].unsqueeze(1) - ref_emb).abs())
        return mat

    @in_float32
    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D) and (B, D) -> (B,): the score of each query with the reference in the same row."""
        self._prepare(query_emb.shape[1], ref_emb.shape[1])
        return self.score((query_emb - ref_emb).abs())
