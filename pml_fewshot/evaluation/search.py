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
# of a tile's sides: matrix products are fastest in multiples of it; and rows that are looked through at a time
STEP = 64
GROUP = 8  # similarities of which only the largest bounds the k-th best
COLUMNS = 4  # tiles for which a thread prepares a block of rows once
FAISS_BLOCK = 2**17  # references at a time
PAIR_NUMBERS = 2**22  # at a time where pairs are compared one by one: 16 MiB
# 1 query into 100,000 x 128 on one core: faiss 12 ms, tiles 57 ms. For more than these faiss takes matrix products,
# which may not treat copies of a row alike.
FEW_QUERIES = 19


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
        values = self.distance(query, reference).float()
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
        (N, k) int64 indices, on the references' device. Memory besides: a tile a thread, up to four times as large for
        a large k.
    """
    references = query if reference is None else reference
    queries = query.to(references.device)
    products, few = ranking.kind != "distance", len(queries) <= FEW_QUERIES
    with torch.no_grad(), torch.autocast(references.device.type, enabled=False):  # which would use 16 bits
        if products and few and k < len(references) and not references.is_cuda:
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
    """For few queries on a CPU: faiss goes through the references once, pair by pair, and keeps heaps."""
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
    """Similarities and indices, for many queries, any device and any distance: a tile of similarities at a time.

    On a CPU each thread takes tiles of its own (but of PML distances, which may keep state), in any order.
    """
    tile, step = CUDA_TILE if reference.is_cuda else CPU_TILE, STEP
    if ranking.kind == "distance":  # some (SNR) hold all differences of a tile, D numbers a pair
        tile, step = max(1, int(tile / reference.shape[1] ** 0.5)), GROUP
    # All tiles have one shape, or copies of an item would not be equally near: products differ by a last bit. So a set
    # is divided evenly, and its last block filled up by copies of its first row.
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
    for i in range(0, len(query), rows):  # with a block itself its queries have k neighbors, which bound all others
        starts = range(i + columns if symmetric else 0, len(reference), columns)
        parts += [(i, starts[at : at + COLUMNS]) for at in range(0, len(starts), COLUMNS)]

    def in_thread(part: tuple[int, Sequence[int]]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # which are each thread's own
            take(*part)

    threads = torch.get_num_threads()
    if threads == 1 or len(parts) < 2 or reference.is_cuda or ranking.kind == "distance":
        list(map(in_thread, parts))
    else:  # operations of one thread each: threads that wait for each other are slow where others use the cores too
        with one_thread_each(), ThreadPoolExecutor(min(threads, len(parts))) as pool, threadpool_limits(1, "blas"):
            list(pool.map(in_thread, parts))
    best = best.flip(1)
    return _values(best), _places(best)


def _even_part(count: int, largest: int, step: int) -> int:
    """Size of the parts, a multiple of `step`, when `count` is divided evenly into parts of about `largest` at most."""
    parts = max(1, -(-count // largest))
    return max(1, -(-count // (step * parts))) * step


def _half_squares(blocks: Iterable[Tensor], euclid: bool) -> Tensor:
    """(N,) halves of the squared lengths of blocks of rows for Euclid, else none."""
    return torch.cat([part.square().sum(dim=1).div_(2) if euclid else part.flatten()[:0] for part in blocks])


def _floor(tile: Tensor, best: Tensor, first: int, dim: int, is_first: bool) -> Tensor | None:
    """What similarities of a tile must exceed to be among the `best` (R, k), along the other axis; None: nothing.

    `dim` is the axis of the references, from `first` on: 0 for a tile (C, R), else 1. `is_first` where `best` is empty.
    """
    size, k, floor = tile.shape[dim], best.shape[1], _values(best[:, 0])
    if is_first and GROUP * k > size:
        return None
    if is_first:  # k groups hold k items at least as large as the k-th of their largest
        largest = tile.narrow(dim, 0, size // GROUP * GROUP).unflatten(dim, (GROUP, -1)).amax(dim)
        floor = largest.topk(k, dim=dim).values.select(dim, -1)
    # of equally similar ones the earlier is better
    return floor.nextafter(floor.new_tensor(-torch.inf)).where(_places(best[:, 0]) > first, floor).unsqueeze(dim)


def _above(tile: Tensor, halves: tuple[Tensor, Tensor], floors: Sequence[Tensor]) -> list[Tensor]:
    """Makes products qr of a tile (R, C) to -|q - r|^2 / 2, the same both ways, by halves of squares (R,) and (C,).

    Returns for each floor (R, 1) or (1, C) the places in the flattened tile of what is above it. On a CPU strip by
    strip, which stays in its second-level cache meanwhile; numpy finds the few of many in half of torch's time.
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
    """Takes similarities of a tile, those at the places `above` or all, into the `best` (R, k), in any order."""
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


# A neighbor as one number, so that the nearest are found by sorting numbers alone: float32's bits in an order of
# integers above those of its index, of which the smaller is better. Places are those of fewer than 2**32 references.
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
    """a (N, D) times b (M, D) transposed, (N, M); on a CPU a row of a has equal products with equal rows of b."""
    return a @ b.T if a.is_cuda else _cpu_product()(a, b)


def _by_numpy(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(np.dot(a.numpy(), b.numpy().T))


def _by_torch(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _rounded(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T).float()


@cache
def _cpu_product() -> Callable[[Tensor, Tensor], Tensor]:
    """The first that is found to treat copies of a row alike, tried once a process, in about 0.1 s.

    A BLAS may sum in another order at the edges of its blocks. numpy's, as a rule an OpenBLAS, does so with its kernels
    for AVX2, not with those for AVX-512, where it is fastest: 1,024 x 1,024 x 512 on one core of an AMD EPYC 86
    GFLOPS, torch's MKL 67. Rounding from float64 takes twice as long.
    """
    return next((multiply for multiply in (_by_numpy, _by_torch) if _treats_copies_alike(multiply)), _rounded)


def _treats_copies_alike(multiply: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Tries square tiles, of sets with themselves, both ways, and a flat one of a few queries."""
    pair = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    a, b = (row.expand(1536, -1).contiguous() for row in pair)
    squares = torch.cat([multiply(a, b).flatten(), multiply(b[:832], a[:832]).flatten()])
    flat = multiply(a[:25], b)
    return bool((squares == squares[0]).all() and (flat == flat[:, :1]).all())
