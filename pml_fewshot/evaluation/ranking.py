"""Ranking: how a PML distance orders references, in the terms of searches: Euclid, inner product, or the distance."""

from dataclasses import dataclass
from typing import Literal

import faiss
import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor

from pml_fewshot.checks import check_finite

FAISS_METRICS = {"Euclid": faiss.METRIC_L2, "inner product": faiss.METRIC_INNER_PRODUCT}


@dataclass(frozen=True)
class Ranking:
    """How references are ordered.

    Args:
        kind: "Euclid" and "inner product" are what faiss and one matrix product can rank by; "distance" calls the PML
            distance block by block.
        normalize: rows are scaled to length 1 first.
        distance: the PML distance; None for plain Euclid.
    """

    kind: Literal["Euclid", "inner product", "distance"]
    normalize: bool = False
    distance: BaseDistance | None = None

    @staticmethod
    def of(distance: BaseDistance | None) -> "Ranking":
        """The simplest ranking with the order of `distance`, Euclid when None."""
        if distance is None:
            return Ranking("Euclid")
        normalize = distance.normalize_embeddings
        # a power above 0 does not change the order; rows are normalised by the distance's own p
        if type(distance) is LpDistance and distance.p == 2 and distance.power > 0:
            return Ranking("Euclid", normalize, distance)
        if type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.p == 2 and distance.power == 1:
            return Ranking("inner product", normalize, distance)
        return Ranking("distance", False, distance)

    def prepare(self, rows: Tensor) -> Tensor:
        """Rows (N, D) as float32, normalised where the ranking wants it; copies nothing that is so already."""
        rows = rows.detach().float()
        if not self.normalize:
            return rows
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        check_finite(lengths, "lengths of the embeddings in float32")
        return rows / lengths.clamp_(min=1e-12)

    def __str__(self) -> str:
        if self.distance is None:
            return self.kind + (", normalized" if self.normalize else "")
        normalized = ", normalized" if self.distance.normalize_embeddings else ""
        return f"{type(self.distance).__name__}(p={self.distance.p}, power={self.distance.power}{normalized})"
