"""PML distances written out in numpy, in float64."""

from functools import partial

import numpy as np
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from torch import Tensor

RawLp = partial(LpDistance, normalize_embeddings=False)
RawDot = partial(DotProductSimilarity, normalize_embeddings=False)


def unit(values: np.ndarray, p: float = 2) -> np.ndarray:
    return values / (np.abs(values) ** p).sum(axis=-1, keepdims=True) ** (1 / p)


# PML distance, and the same as "smaller is nearer" of one query (D,) and all references (M, D)
DISTANCES = {
    "none": (None, lambda q, r: np.sqrt(((q - r) ** 2).sum(1))),
    "power 0.5": (RawLp(power=0.5), lambda q, r: ((q - r) ** 2).sum(1)),
    "normalized": (LpDistance(), lambda q, r: ((unit(q) - unit(r)) ** 2).sum(1)),
    "cosine": (CosineSimilarity(), lambda q, r: -(unit(r) @ unit(q))),
    "dot": (RawDot(), lambda q, r: -(r @ q)),
    "dot squared": (RawDot(power=2), lambda q, r: -((r @ q) ** 2)),
    "p=1": (RawLp(p=1), lambda q, r: np.abs(q - r).sum(1)),
    "p=1, normalized": (LpDistance(p=1), lambda q, r: np.abs(unit(q, 1) - unit(r, 1)).sum(1)),
    "dot, p=1": (DotProductSimilarity(p=1), lambda q, r: -(unit(r, 1) @ unit(q, 1))),
    "SNR": (SNRDistance(normalize_embeddings=False), lambda q, r: np.var(q - r, axis=1, ddof=1) / np.var(q, ddof=1)),
}


def all_distances(query: Tensor, reference: Tensor, name: str = "none") -> np.ndarray:
    """(N, M), smaller is nearer."""
    references = reference.double().numpy()
    return np.stack([DISTANCES[name][1](q, references) for q in query.double().numpy()])
