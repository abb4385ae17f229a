"""Exact search of the k nearest references, by any PML distance, on a CPU or a GPU.

Letters: N queries, M references, D dimensions, k neighbors.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor

from pml_fewshot.checks import check_finite
from pml_fewshot.distances.episodic_distance import EpisodicDistance

CPU_TILE = 2048  # on a side, 16 MiB: large enough for the matrix product, small enough for a third-level cache
CUDA_TILE = 16384  # 1 GiB
STEP = 64  # of a tile's sides: matrix products are fastest in multiples of it
GROUP = 16  # similarities of which only the largest bounds the k-th best
FAISS_BLOCK = 2**17  # references at a time
PAIR_NUMBERS = 2**22  # at a time where pairs are compared one by one: 16 MiB
# Where faiss is faster, on one core. 1 query into 100,000 x 128: faiss 12 ms, tiles 57 ms; 200 queries: 1 s and 0.13 s.
FEW_QUERIES = 32
# 30,000 x 128 among themselves, 20 neighbors: faiss 4.5 s, tiles 4.1 s; 12,000 x 512, 1,000 neighbors: 5.2 and 7.3 s.
MANY_NEIGHBORS = 32


@dataclass(frozen=True)
class Ranking:
    """How a PML distance (None: plain Euclid) orders references.

    "euclidean" and "inner product" are what faiss and a matrix product can rank by, of rows scaled to length 1 with
    `normalize`; "distance" calls the PML distance block by block. `power` is what Euclid is raised to in its values;
    `prepared` rows are taken as they are.
    """

    kind: Literal["euclidean", "inner product", "distance"]
    normalize: bool = False
    distance: BaseDistance | None = None
    power: float = 1
    prepared: bool = False

    @staticmethod
    def of(distance: BaseDistance | None) -> "Ranking":
        """The simplest ranking with the order of `distance`, Euclid when None."""
        if distance is None:
            return Ranking("euclidean")
        normalize = distance.normalize_embeddings
        # a power above 0 does not change the order; rows are normalized by the distance's own p
        if type(distance) is LpDistance and distance.p == 2 and distance.power > 0:
            return Ranking("euclidean", normalize, distance, distance.power)
        if type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.p == 2 and distance.power == 1:
            return Ranking("inner product", normalize, distance)
        return Ranking("distance", False, distance)

    def prepare(self, rows: Tensor, center: Tensor | None = None) -> Tensor:
        """Rows (N, D) as float32, normalized where the ranking wants it, less a center (D,); copies only if it must.

        A UsageError where a squared length overflows float32: products would be NaN, which has no order.
        """
        rows = rows.detach().float()
        if self.normalize and not self.prepared:
            rows = rows / _lengths(rows).clamp_(min=1e-12)
        rows = rows if center is None else rows - center
        if self.kind != "distance" and not self.normalize and not self.prepared:
            _lengths(rows)
        return rows

    def center(self, reference: Tensor) -> Tensor | None:
        """A point (D,) amid the references for Euclid: the median of a sample, which no outlier moves.

        |q - r|^2 = |q|^2 - 2 qr + |r|^2 cancels badly far from the origin, so the center is subtracted first.
        """
        sample = reference[:: max(1, len(reference) // 1000)]
        return self.prepare(sample).median(dim=0).values if self.kind == "euclidean" else None

    def similarity(self, query: Tensor, reference: Tensor) -> Tensor:
        """(N, M) of prepared rows, larger is nearer; for Euclid the product qr alone."""
        if self.kind != "distance" or self.distance is None:
            return product(query, reference)
        values = self.distance(query, reference)
        check_finite(values, f"distances by {self}")  # NaN has no place in an order
        return values if self.distance.is_inverted else -values

    def of_pairs(self, query: Tensor, reference: Tensor, index: Tensor) -> Tensor:
        """(N, k) values of Euclid or inner product of prepared queries and the references of `index` (N, k).

        Pair by pair, for the difference of two large numbers would be left of products.
        """
        size = max(1, PAIR_NUMBERS // (index.shape[1] * query.shape[1]))
        values = []
        for rows, places in zip(query.unsqueeze(1).split(size), index.split(size), strict=True):
            if self.kind == "euclidean":
                values.append(torch.linalg.vector_norm(reference[places] - rows, dim=2) ** self.power)
            else:
                values.append((reference[places] * rows).sum(dim=2))
        return torch.cat(values)

    def __str__(self) -> str:
        if self.distance is None:
            return self.kind + (", normalized" if self.normalize else "")
        if isinstance(self.distance, EpisodicDistance):
            return f"{type(self.distance).__name__}({self.distance.extra_repr()})"
        normalized = ", normalized" if self.distance.normalize_embeddings else ""
        return f"{type(self.distance).__name__}(p={self.distance.p}, power={self.distance.power}{normalized})"


def exact_search(query: Tensor, reference: Tensor | None, k: int, ranking: Ranking) -> Tensor:
    """Finds the k nearest references of each query, nearest first; equally near ones in the order of their index.

    Args:
        query: (N, D).
        reference: (M, D), in memory, memory-mapped or on a GPU; read block by block. None: the queries themselves, each
            of which then finds itself too; Euclid and inner product compute each pair once, which halves the time.
        k: neighbors, at most M.
        ranking: the order, in float32.

    Returns:
        (N, k) int64 indices, on the references' device. Memory besides: a tile, up to four times as large for a large
        k, or faiss's k + 1 distances and indices a query.
    """
    references = query if reference is None else reference
    queries = query.to(references.device)
    products = ranking.kind != "distance"
    few_or_many = len(queries) <= FEW_QUERIES or k > MANY_NEIGHBORS
    with torch.no_grad(), torch.autocast(references.device.type, enabled=False):  # which would use 16 bits
        if products and few_or_many and k < len(references) and not references.is_cuda:
            return _by_faiss(queries, references, k, ranking)
        return _by_tiles(queries, references, k, ranking, symmetric=products and reference is None)[1]


def exact_neighbors(query: Tensor, reference: Tensor, k: int, ranking: Ranking) -> tuple[Tensor, Tensor]:
    """The indices (N, k) of `exact_search`, and the values (N, k) of the PML distance, in whose order they stand.

    Both sides are prepared rows.
    """
    ranking = replace(ranking, prepared=True)
    if ranking.distance is not None and ranking.kind == "distance":
        with torch.no_grad(), torch.autocast(reference.device.type, enabled=False):
            similarity, index = _by_tiles(query.to(reference.device), reference, k, ranking)
        return index, similarity if ranking.distance.is_inverted else -similarity
    index = exact_search(query, reference, k, ranking).sort(dim=1).values
    values = ranking.of_pairs(query, reference, index)
    values, order = values.sort(dim=1, descending=ranking.kind == "inner product", stable=True)
    return index.gather(1, order), values


def _by_faiss(query: Tensor, reference: Tensor, k: int, ranking: Ranking) -> Tensor:
    """For few queries or many neighbors on a CPU: faiss goes through the references once and keeps heaps."""
    import faiss

    metric = faiss.METRIC_L2 if ranking.kind == "euclidean" else faiss.METRIC_INNER_PRODUCT
    center = ranking.center(reference) if len(query) >= 20 else None  # from there on faiss takes products for Euclid
    rows = ranking.prepare(query, center).contiguous().numpy()
    far, index = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)
    for start in range(0, len(reference), FAISS_BLOCK):
        block = ranking.prepare(reference[start : start + FAISS_BLOCK], center).contiguous().numpy()
        # one more than wanted shows whether the last place is tied
        found = [torch.from_numpy(array) for array in faiss.knn(rows, block, min(k + 1, len(block)), metric)]
        far = torch.cat([far, found[0] if metric == faiss.METRIC_L2 else -found[0]], dim=1)
        index = torch.cat([index, found[1] + start], dim=1)
        if start > 0:
            far, order = far.sort(dim=1, stable=True)
            far, index = far[:, : k + 1], index.gather(1, order[:, : k + 1])
    same = far[:, 1:] == far[:, :-1]  # faiss takes any of equally near ones, in any order
    tied, cut = same[:, :-1].any(dim=1), same[:, -1]
    order = torch.from_numpy(np.lexsort((index[tied].numpy(), far[tied].numpy())))
    index[tied] = index[tied].gather(1, order)
    if cut.any():
        index[cut, :k] = _by_tiles(query[cut], reference, k, ranking)[1]
    return index[:, :k]


def _by_tiles(
    query: Tensor, reference: Tensor, k: int, ranking: Ranking, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Similarities and indices, for many queries, any device and any distance: a tile of similarities at a time."""
    tile, step = CUDA_TILE if reference.is_cuda else CPU_TILE, STEP
    if ranking.kind == "distance":  # some (SNR) hold all differences of a tile, D numbers a pair
        tile, step = max(1, int(tile / reference.shape[1] ** 0.5)), GROUP
    # All tiles have one shape, or copies of an item would not be equally near: products differ by a last bit. So a set
    # is divided evenly, and its last block filled up by copies of its first row.
    wide = min(16 * tile, tile * tile // max(1, len(query)))  # for few queries
    columns = _even_part(len(reference), max(tile, 4 * GROUP * k, wide), step)
    rows = _even_part(len(query), max(1, min(tile, 4 * tile * tile // columns)), step)
    rows = min(rows, max(1, len(query)))
    center = ranking.center(reference)

    def block(source: Tensor, start: int, size: int) -> Tensor:
        part = ranking.prepare(source[start : start + size], center)
        return torch.cat([part, part[:1].expand(size - len(part), -1)]) if len(part) < size else part

    def offset(part: Tensor, start: int) -> Tensor:
        """What is added for each reference: -|r|^2 / 2 for Euclid, whose order is that of qr - |r|^2 / 2."""
        lengths = part.square().sum(dim=1) if ranking.kind == "euclidean" else part.new_zeros(len(part))
        lengths[len(reference) - start :] = torch.inf
        return lengths.div_(-2)

    symmetric = symmetric and rows == columns
    best = torch.full((-(-len(query) // rows) * rows, k), -torch.inf, device=reference.device)
    index = torch.full_like(best, -1, dtype=torch.int64)
    for i in range(0, len(query), rows):
        row_block = block(query, i, rows)
        for j in range(i if symmetric else 0, len(reference), columns):
            column_block = block(reference, j, columns)
            both = ranking.similarity(row_block, column_block)
            if symmetric and j > i:
                _offer(both + offset(row_block, i)[:, None], i, best[j : j + rows], index[j : j + rows], dim=0)
            _offer(both.add_(offset(column_block, j)), j, best[i : i + rows], index[i : i + rows])
    return best[: len(query)], index[: len(query)]


def _even_part(count: int, largest: int, step: int) -> int:
    """Size of the parts, a multiple of `step`, when `count` is divided evenly into parts of about `largest` at most."""
    parts = max(1, -(-count // largest))
    return max(1, -(-count // (step * parts))) * step


def _offer(tile: Tensor, first: int, best: Tensor, index: Tensor, dim: int = 1) -> None:
    """Takes similarities (R, C) of queries to the references from `first` on into their `best` and its `index` (R, k).

    References come in the order of their index, so of equally similar ones the earlier stand first. `dim` is their
    axis, 0 for a tile (C, R), and C a multiple of GROUP.
    """
    similarities, k = tile if dim == 1 else tile.T, best.shape[1]
    if first == 0 and GROUP * k > similarities.shape[1]:
        values, order = similarities.sort(dim=1, descending=True, stable=True)
        best[:], index[:] = values[:, :k], order[:, :k]
        return
    floor = best[:, -1]
    if first == 0:  # k groups hold k items at least as large as the k-th of their largest
        largest = tile.unflatten(dim, (GROUP, -1)).amax(dim)
        floor = largest.topk(k, dim=dim).values.select(dim, -1).nextafter(floor)
    floor = floor.unsqueeze(dim)
    if tile.is_cuda:
        flat = (tile > floor).flatten().nonzero().squeeze(1)
    else:  # numpy finds the few of many in half the time
        flat = torch.from_numpy(np.flatnonzero(tile.numpy() > floor.numpy()))
    if len(flat) == 0:
        return
    query, column = flat // tile.shape[1], flat % tile.shape[1]
    if dim == 0:
        (query, order), column = column.sort(stable=True), query
        column = column[order]
    # a row for each query: the best so far, then those above in the order of their index
    counts = query.bincount(minlength=len(best))
    place = k + torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    values = torch.cat([best, best.new_full((len(best), int(counts.max())), -torch.inf)], dim=1)
    indices = torch.full_like(values, -1, dtype=torch.int64)
    indices[:, :k] = index
    values[query, place], indices[query, place] = similarities[query, column], column + first
    values, order = values.sort(dim=1, descending=True, stable=True)
    best[:], index[:] = values[:, :k], indices.gather(1, order[:, :k])


def _lengths(rows: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    check_finite(lengths, "lengths of the embeddings in float32")
    return lengths


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, D) times b (M, D) transposed, (N, M).

    On a CPU as a 1 x 1 convolution: oneDNN uses AVX-512 wherever the processor has it, the MKL of torch's product only
    on Intel's (AMD EPYC, 2,048 x 2,048 x 512: 430 GFLOPS to 190).
    """
    if a.is_cuda or not torch.backends.mkldnn.is_available():
        return a @ b.T
    pixels = a.reshape(1, len(a), 1, -1).permute(0, 3, 1, 2)  # channels last: no copy
    return F.conv2d(pixels, b.reshape(len(b), -1, 1, 1)).permute(0, 2, 3, 1).reshape(len(a), len(b))
