"""Exact search of the k nearest references, by any PML distance, on a CPU or a GPU.

Letters: N queries, M references, D dimensions, k neighbors.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from typing import Literal

import numpy as np
import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from threadpoolctl import threadpool_limits
from torch import Tensor

from pml_fewshot.checks import check_finite
from pml_fewshot.distances.episodic_distance import EpisodicDistance
from pml_fewshot.environment import one_thread_each

CPU_TILE = 1536  # on a side, 9 MiB for each thread: large enough for the matrix product, small enough for its cache
CUDA_TILE = 16384  # 1 GiB
# matrix products are fastest if a tile's sides are multiples of it; also the rows scanned at a time
STEP = 64
GROUP = 8  # similarities, of which only the largest bounds the k-th best
COLUMNS = 4  # tiles for which a thread prepares a block of rows once
FAISS_BLOCK = 2**17  # references at a time
PAIR_NUMBERS = 2**22  # at a time where pairs are compared one by one: 16 MiB
# 1 query into 100,000 x 128 on one core: faiss 12 ms, tiles 57 ms. For more queries than this, faiss uses matrix
# products, which may not treat copies of a row alike.
FEW_QUERIES = 19


@dataclass(frozen=True)
class Ranking:
    """How a PML distance (None: plain Euclidean) orders references.

    "euclidean" and "inner product" are the ones faiss and a matrix product can rank by, with rows normalized if
    `normalize`; "distance" calls the PML distance block by block. Euclidean values are raised to `power`; `prepared`
    rows are used as they are.
    """

    kind: Literal["euclidean", "inner product", "distance"]
    normalize: bool = False
    distance: BaseDistance | None = None
    power: float = 1
    prepared: bool = False

    @staticmethod
    def of(distance: BaseDistance | None) -> "Ranking":
        """Returns the simplest ranking with the same order as `distance`, Euclidean if None."""
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
        """Returns float32 rows (N, D), normalized if the ranking needs it, less a center (D,); copies only if it must.

        Raises a UsageError if a squared length overflows float32: products would be NaN, which has no order.
        """
        rows = rows.detach().float()
        if self.normalize and not self.prepared:
            rows = rows / _lengths(rows).clamp_(min=1e-12)
        rows = rows if center is None else rows - center
        if self.kind != "distance" and not self.normalize and not self.prepared:
            _lengths(rows)
        return rows

    def center(self, reference: Tensor) -> Tensor | None:
        """Returns a point (D,) amid the references if Euclidean: the median of a sample, which no outlier moves.

        |q - r|^2 = |q|^2 - 2 qr + |r|^2 cancels badly far from the origin, so the center is subtracted first.
        """
        sample = reference[:: max(1, len(reference) // 1000)]
        return self.prepare(sample).median(dim=0).values if self.kind == "euclidean" else None

    def similarity(self, query: Tensor, reference: Tensor) -> Tensor:
        """Returns similarities (N, M) of prepared rows, larger is nearer; for Euclidean only the product qr."""
        if self.kind != "distance" or self.distance is None:
            return product(query, reference)
        values = self.distance(query, reference).float()
        check_finite(values, f"distances by {self}")  # NaN has no place in an order
        return values if self.distance.is_inverted else -values

    def of_pairs(self, query: Tensor, reference: Tensor, index: Tensor) -> Tensor:
        """Returns Euclidean or inner-product values (N, k) of prepared queries and the references at `index` (N, k).

        Computed pair by pair: products would leave the difference of two large numbers.
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
    """Finds the k nearest references of each query, nearest first; ties in the order of their index.

    Args:
        query: (N, D).
        reference: (M, D), in memory, memory-mapped or on a GPU; read block by block. If None, the queries themselves,
            each of which also finds itself; Euclidean and inner product compute each pair once, which halves the time.
        k: neighbors, at most M.
        ranking: the order, in float32.

    Returns:
        (N, k) int64 indices, on the references' device. Additional memory: a tile per thread, up to four times as large
        for a large k.
    """
    references = query if reference is None else reference
    queries = query.to(references.device)
    products, few = ranking.kind != "distance", len(queries) <= FEW_QUERIES
    with torch.no_grad(), torch.autocast(references.device.type, enabled=False):  # autocast would use 16 bits
        if products and few and k < len(references) and not references.is_cuda:
            return _by_faiss(queries, references, k, ranking)
        return _by_tiles(queries, references, k, ranking, symmetric=products and reference is None)[1]


def exact_neighbors(query: Tensor, reference: Tensor, k: int, ranking: Ranking) -> tuple[Tensor, Tensor]:
    """Returns the indices (N, k) of `exact_search` and the values (N, k) of the PML distance, in the values' order.

    Both sides must be prepared rows.
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
    """Searches for few queries on a CPU: faiss scans the references once, pair by pair, and keeps heaps."""
    import faiss

    metric = faiss.METRIC_L2 if ranking.kind == "euclidean" else faiss.METRIC_INNER_PRODUCT
    rows = ranking.prepare(query).contiguous().numpy()
    far, index = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)
    for start in range(0, len(reference), FAISS_BLOCK):
        block = ranking.prepare(reference[start : start + FAISS_BLOCK]).contiguous().numpy()
        # one more than wanted shows whether the last place is tied
        found = [torch.from_numpy(array) for array in faiss.knn(rows, block, min(k + 1, len(block)), metric)]
        far = torch.cat([far, found[0] if metric == faiss.METRIC_L2 else -found[0]], dim=1)
        index = torch.cat([index, found[1] + start], dim=1)
        if start > 0:
            far, order = far.sort(dim=1, stable=True)
            far, index = far[:, : k + 1], index.gather(1, order[:, : k + 1])
    same = far[:, 1:] == far[:, :-1]  # faiss returns any of those that tie, in any order
    tied, cut = same[:, :-1].any(dim=1), same[:, -1]
    order = torch.from_numpy(np.lexsort((index[tied].numpy(), far[tied].numpy())))
    index[tied] = index[tied].gather(1, order)
    if cut.any():
        index[cut, :k] = _by_tiles(query[cut], reference, k, ranking)[1]
    return index[:, :k]


def _by_tiles(
    query: Tensor, reference: Tensor, k: int, ranking: Ranking, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns similarities and indices for many queries, any device and any distance, a tile of similarities at a time.

    On a CPU each thread works on its own tiles (except for PML distances, which may keep state), in any order.
    """
    tile, step = CUDA_TILE if reference.is_cuda else CPU_TILE, STEP
    if ranking.kind == "distance":  # some (SNR) hold all differences of a tile, D numbers a pair
        tile, step = max(1, int(tile / reference.shape[1] ** 0.5)), GROUP
    # All tiles have the same shape, or copies of an item would not be equally near: products differ in the last bit. So
    # a set is divided evenly, and its last block is padded with copies of its first row.
    wide = min(16 * tile, tile * tile // max(1, len(query)))  # for few queries
    columns = _even_part(len(reference), max(tile, 4 * GROUP * k, wide), step)
    rows = _even_part(len(query), max(1, min(tile, 4 * tile * tile // columns)), step)
    rows = min(rows, max(1, len(query)))
    center, inference = ranking.center(reference), torch.is_inference_mode_enabled()
    symmetric = symmetric and rows == columns
    best = torch.full((len(query), k), NONE, device=reference.device)
    locks, started = [Lock() for _ in range(0, len(query), rows)], set[int]()
    halves = [
        _half_squares((ranking.prepare(part, center) for part in source.split(rows)), ranking.kind == "euclidean")
        for source in ((reference,) if symmetric else (reference, query))
    ]
    checked = replace(ranking, prepared=ranking.prepared or not ranking.normalize)

    def block(source: Tensor, start: int, size: int) -> Tensor:
        part = checked.prepare(source[start : start + size], center)
        return torch.cat([part, part[:1].expand(size - len(part), -1)]) if len(part) < size else part

    def take(i: int, starts: Sequence[int]) -> None:
        row_block = block(query, i, rows)
        for j in starts:
            column_block = block(reference, j, columns)
            tile = ranking.similarity(row_block, column_block)[: len(query) - i, : len(reference) - j]
            both = halves[-1][i : i + rows], halves[0][j : j + columns]
            sides = [(i, j, 1), (j, i, 0)][: 2 if symmetric and j > i else 1]  # of queries, of references, whose axis
            if any(start not in started for start, _, _ in sides):
                _above(tile, both, [])
                both = both[0][:0], both[1]
            bests = [best[start : start + tile.shape[1 - dim]] for start, _, dim in sides]
            floors = [
                _floor(tile, each, first, dim, start not in started)
                for each, (start, first, dim) in zip(bests, sides, strict=True)
            ]
            found = _above(tile, both, [floor for floor in floors if floor is not None])
            for each, (start, first, dim), floor in zip(bests, sides, floors, strict=True):
                with locks[start // rows]:
                    _offer(tile, first, each, dim, None if floor is None else found.pop(0))
                started.add(start)

    parts: list[tuple[int, Sequence[int]]] = [(i, [i]) for i in range(0, len(query), rows) if symmetric]
    for i in range(0, len(query), rows):  # compared with itself, a block has k neighbors a query, which bound the rest
        starts = range(i + columns if symmetric else 0, len(reference), columns)
        parts += [(i, starts[at : at + COLUMNS]) for at in range(0, len(starts), COLUMNS)]

    def in_thread(part: tuple[int, Sequence[int]]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are per thread
            take(*part)

    threads = torch.get_num_threads()
    if threads == 1 or len(parts) < 2 or reference.is_cuda or ranking.kind == "distance":
        list(map(in_thread, parts))
    else:  # single-threaded operations: threads that wait for each other are slow where others use the cores too
        with one_thread_each(), ThreadPoolExecutor(min(threads, len(parts))) as pool, threadpool_limits(1, "blas"):
            list(pool.map(in_thread, parts))
    best = best.flip(1)
    return _values(best), _places(best)


def _even_part(count: int, largest: int, step: int) -> int:
    """Returns the part size, a multiple of `step`, that splits `count` evenly into parts of about `largest` at most."""
    parts = max(1, -(-count // largest))
    return max(1, -(-count // (step * parts))) * step


def _half_squares(blocks: Iterable[Tensor], euclid: bool) -> Tensor:
    """Returns half the squared lengths (N,) of blocks of rows for Euclidean ranking, else an empty tensor."""
    return torch.cat([part.square().sum(dim=1).div_(2) if euclid else part.flatten()[:0] for part in blocks])


def _floor(tile: Tensor, best: Tensor, first: int, dim: int, is_first: bool) -> Tensor | None:
    """Returns the bounds, along the other axis, that a tile's similarities must exceed to join `best` (R, k), or None.

    `dim` is the axis of the references, from `first` on: 0 for a tile (C, R), else 1. `is_first` where `best` is empty.
    """
    size, k, floor = tile.shape[dim], best.shape[1], _values(best[:, 0])
    if is_first and GROUP * k > size:
        return None
    if is_first:  # k groups contain k items at least as large as the k-th group maximum
        largest = tile.narrow(dim, 0, size // GROUP * GROUP).unflatten(dim, (GROUP, -1)).amax(dim)
        floor = largest.topk(k, dim=dim).values.select(dim, -1)
    # among ties, the earlier is better
    return floor.nextafter(floor.new_tensor(-torch.inf)).where(_places(best[:, 0]) > first, floor).unsqueeze(dim)


def _above(tile: Tensor, halves: tuple[Tensor, Tensor], floors: Sequence[Tensor]) -> list[Tensor]:
    """Turns products qr of a tile (R, C) into -|q - r|^2 / 2, the same both ways, with half squares (R,) and (C,).

    Returns, for each floor (R, 1) or (1, C), the places in the flattened tile of the values above it. A CPU works strip
    by strip, so that each stays in its second-level cache; numpy finds the few among many in half of torch's time.
    """
    own, others = halves
    if tile.is_cuda:
        if len(own):
            tile.sub_(own[:, None] + others)
        return [(tile > floor).flatten().nonzero().squeeze(1) for floor in floors]
    found: list[list[np.ndarray]] = [[] for _ in floors]
    numbers, below = tile.numpy(), [floor.expand(len(tile), -1).numpy() for floor in floors]
    for i in range(0, len(tile), STEP):
        strip = numbers[i : i + STEP]
        if len(own):
            strip -= np.add.outer(own.numpy()[i : i + STEP], others.numpy())
        for places, floor in zip(found, below, strict=True):
            places.append(np.flatnonzero(strip > floor[i : i + STEP]) + i * tile.shape[1])
    return [torch.from_numpy(np.concatenate(places)) for places in found]


def _offer(tile: Tensor, first: int, best: Tensor, dim: int, above: Tensor | None) -> None:
    """Merges similarities of a tile, those at the places `above` or all, into the `best` (R, k), in any order."""
    if above is None:
        place = torch.arange(first, first + tile.shape[dim], device=tile.device)
        best[:] = _sorted(torch.cat([best, _keys(tile if dim == 1 else tile.T, place)], dim=1))[:, -best.shape[1] :]
        return
    if len(above) == 0:
        return
    width = tile.shape[1]
    if dim == 0:  # in the order of the queries
        tile, above, width = tile.T, _sorted((above % width * len(tile) + above // width)[None])[0], len(tile)
    query, place = above // width, above % width
    keys = _keys(tile[query, place], first + place)
    # a row for each query that has some: the best so far, then those above
    counts = query.bincount(minlength=len(best))
    some = counts.nonzero().squeeze(1)
    place = best.shape[1] + torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    rows = torch.cat([best[some], best.new_full((len(some), int(counts.max())), NONE)], dim=1)
    rows[((counts > 0).cumsum(0) - 1)[query], place] = keys
    best[some] = _sorted(rows)[:, -best.shape[1] :]


# A neighbor as one integer, so that sorting integers finds the nearest: float32's bits, in an order of integers, above
# those of its index, where smaller is better. Places are of fewer than 2**32 references.
LOW = 2**32 - 1
NONE = -0x7F800001 << 32  # of -infinity and the last place


def _keys(similarity: Tensor, place: Tensor) -> Tensor:
    bits = (similarity + 0.0).contiguous().view(torch.int32).long()  # -0.0 becomes 0.0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) + (LOW - place)


def _values(keys: Tensor) -> Tensor:
    bits = keys >> 32
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).int().view(torch.float32)


def _places(keys: Tensor) -> Tensor:
    return LOW - (keys & LOW)


def _sorted(keys: Tensor) -> Tensor:
    """Each row in ascending order."""
    return keys.sort(dim=1).values if keys.is_cuda else torch.from_numpy(np.sort(keys.numpy(), axis=1))


def _lengths(rows: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    check_finite(lengths, "lengths of the embeddings in float32")
    return lengths


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a (N, D) times b (M, D) transposed, (N, M); on a CPU equal rows of b give a row of a equal products."""
    return a @ b.T if a.is_cuda else _cpu_product()(a, b)


def _by_numpy(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(np.dot(a.numpy(), b.numpy().T))


def _by_torch(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _rounded(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T).float()


@cache
def _cpu_product() -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the first product found to treat copies of a row alike, tested once per process, in about 0.1 s.

    A BLAS may sum in a different order at the edges of its blocks. numpy's, usually an OpenBLAS, does so with its AVX2
    kernels, but not with its AVX-512 kernels, where it is fastest: on one core of an AMD EPYC, 1,024 x 1,024 x 512 runs
    at 86 GFLOPS, with torch's MKL at 67. Rounding from float64 takes twice as long.
    """
    return next((multiply for multiply in (_by_numpy, _by_torch) if _treats_copies_alike(multiply)), _rounded)


def _treats_copies_alike(multiply: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Tests square tiles, as of a set with itself, in both orders, and a flat one of a few queries."""
    pair = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    a, b = (row.expand(1536, -1).contiguous() for row in pair)
    squares = torch.cat([multiply(a, b).flatten(), multiply(b[:832], a[:832]).flatten()])
    flat = multiply(a[:25], b)
    return bool((squares == squares[0]).all() and (flat == flat[:, :1]).all())
