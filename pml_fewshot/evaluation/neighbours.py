"""The k nearest references of every query, by faiss where the distance allows it, else by blocked torch."""

from typing import Literal

import faiss
import numpy as np
import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor

Index = Literal["flat", "ivf", "hnsw"]

BLOCK = 2**24  # distances held at a time by the torch search: 64 MiB in float32


def nearest_neighbours(
    query: Tensor,
    reference: Tensor,
    k: int,
    distance: BaseDistance | None = None,
    index: Index = "flat",
) -> Tensor:
    """Finds the k nearest references of each query, nearest first.

    Args:
        query: (N, D) floats.
        reference: (M, D) floats.
        k: neighbours, at most M.
        distance: the PML distance that ranks; Euclid when None. Euclid, cosine and dot product go to faiss, any other
            distance to a blocked exact search in torch.
        index: "flat" is exact; "ivf" (inverted lists, trained on the references) and "hnsw" (a graph) are approximate
            and worth it from about a million references on.

    Returns:
        (N, k) int64 indices into the references, on the CPU; -1 where an approximate index found fewer.

    Raises:
        ValueError: an approximate index with a distance that faiss does not know.
    """
    kind = _faiss_metric(distance)
    if kind is None:
        if index != "flat":
            raise ValueError(
                f"expected Euclid, cosine or dot product for index {index!r}, got {distance}; use index='flat', which "
                "takes any PML distance"
            )
        assert distance is not None
        return _torch_search(query, reference, k, distance)
    metric, normalize = kind
    references, queries = _rows(reference, normalize), _rows(query, normalize)
    search = _build(index, references, metric)
    search.add(references)
    return torch.from_numpy(search.search(queries, k)[1])


def _faiss_metric(distance: BaseDistance | None) -> tuple[int, bool] | None:
    """(faiss metric, whether rows are normalised first), or None where faiss has no such metric."""
    if distance is None:
        return faiss.METRIC_L2, False
    normalize = distance.normalize_embeddings
    # a power above 0 does not change the order; rows are normalised by the distance's own p
    if type(distance) is LpDistance and distance.p == 2 and distance.power > 0:
        return faiss.METRIC_L2, normalize
    if type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.p == 2 and distance.power == 1:
        return faiss.METRIC_INNER_PRODUCT, normalize
    return None


def _rows(embeddings: Tensor, normalize: bool) -> np.ndarray:
    rows = embeddings.detach().float()
    rows = torch.nn.functional.normalize(rows, dim=1) if normalize else rows
    return np.ascontiguousarray(rows.cpu().numpy())


def _build(index: Index, references: np.ndarray, metric: int) -> faiss.Index:
    count, dims = references.shape
    if index == "flat":
        return faiss.IndexFlat(dims, metric)
    if index == "hnsw":
        hnsw = faiss.IndexHNSWFlat(dims, 32, metric)  # 32 links an item: faiss's own advice for D >= 64
        hnsw.hnsw.efConstruction, hnsw.hnsw.efSearch = 200, 256
        return hnsw
    # about 4 sqrt(M) lists and a sixteenth of them looked into, faiss's guidelines for up to a million items; a list
    # needs 39 training points
    lists = max(1, min(int(4 * count**0.5), count // 39))
    ivf = faiss.IndexIVFFlat(faiss.IndexFlat(dims, metric), dims, lists, metric)
    ivf.nprobe = max(8, lists // 16)
    ivf.train(references)
    return ivf


def _torch_search(query: Tensor, reference: Tensor, k: int, distance: BaseDistance) -> Tensor:
    rows = max(1, BLOCK // len(reference))
    with torch.no_grad():
        blocks = [
            distance(block, reference).topk(k, dim=1, largest=distance.is_inverted).indices
            for block in query.split(rows)
        ]
    return torch.cat(blocks).cpu()
