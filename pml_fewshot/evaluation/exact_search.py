"""Exact search of the k nearest references: a tile of similarities at a time, with a running best k of every query."""

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import check_finite
from pml_fewshot.evaluation.blas import OLD_CORES, faiss_blas_core
from pml_fewshot.evaluation.ranking import FAISS_METRICS, Ranking
from pml_fewshot.evaluation.running_best import GROUP, RunningBest

# A tile of 2,048 x 2,048 similarities is 16 MiB, large enough for the matrix product and small enough for a third-level
# cache. On a GPU 16,384 x 16,384 are 1 GiB.
CPU_TILE = 2048
CUDA_TILE = 16384
STEP = 64  # of a tile's sides: matrix products are fastest in multiples of it
FAISS_BLOCK = 2**17  # references at a time
# Where faiss is faster, on 2 cores. 1 query into 100,000 x 128: faiss 4 ms, tiles 57 ms; 200 queries: 160 and 50 ms.
FEW_QUERIES = 32
# 30,000 x 128 among themselves: 20 neighbours 1.5 and 1.3 s, 100 neighbours 1.9 and 4.4 s; x 512: 5.0 and 6.4 s.
MANY_NEIGHBOURS = 32
WIDE = 512
GROUPS_PER_NEIGHBOUR = 4  # in a tile, so that three of four groups can be passed over


def exact_search(query: Tensor, reference: Tensor, k: int, ranking: Ranking) -> Tensor:
    """Finds the k nearest references of each query, nearest first; equally near ones in the order of their index.

    Args:
        query: (N, D). The same tensor as `reference` says that a set is searched for its own neighbours: then, for
            Euclid and inner product, each pair is computed once, which halves the time.
        reference: (M, D), in memory, memory-mapped or on a GPU; read block by block.
        k: neighbours, at most M.
        ranking: the order; similarities are computed in float32.

    Returns:
        (N, k) int64 indices into the references, on the references' device. Memory beside it: a tile, wider and up to
        eight times as large for a k above 32, or k + 1 columns at the least.
    """
    query = query.to(reference.device)
    faiss_can = not reference.is_cuda and ranking.kind != "distance" and k < len(reference)
    many_neighbours = k > MANY_NEIGHBOURS and query.shape[1] < WIDE and faiss_blas_core() not in OLD_CORES
    if faiss_can and (len(query) <= FEW_QUERIES or many_neighbours):
        return _by_faiss(query, reference, k, ranking)
    with torch.autocast(reference.device.type, enabled=False):  # which would take the products in 16 bits
        return _by_tiles(query, reference, k, ranking)


def _by_faiss(query: Tensor, reference: Tensor, k: int, ranking: Ranking) -> Tensor:
    """For few queries or many neighbours on a CPU: faiss goes through the references once and keeps heaps."""
    # from 20 queries on faiss takes distances from products too, which need the centre off
    centre = _centre(ranking, reference) if len(query) >= 20 else None
    q = ranking.prepare(query)
    q = (q if centre is None else q - centre).contiguous()
    _check_lengths(q)
    sign = -1 if ranking.kind == "inner product" else 1
    far, index = torch.empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(reference), FAISS_BLOCK):
        block = ranking.prepare(reference[start : start + FAISS_BLOCK])
        block = (block if centre is None else block - centre).contiguous()
        _check_lengths(block)
        # one more than wanted shows whether the last place is tied
        found = faiss.knn(q.numpy(), block.numpy(), min(k + 1, len(block)), FAISS_METRICS[ranking.kind])
        far = torch.cat([far, sign * torch.from_numpy(found[0])], dim=1)
        index = torch.cat([index, torch.from_numpy(found[1]) + start], dim=1)
        far, order = far.sort(dim=1, stable=True)
        far, index = far[:, : k + 1], index.gather(1, order[:, : k + 1])
    tied = (far[:, 1:] == far[:, :-1]).any(dim=1) | ~torch.isfinite(far).all(dim=1)
    index = index[:, :k]
    if tied.any():  # faiss takes equally near ones in any order
        index[tied] = _by_tiles(query[tied], reference, k, ranking)
    return index


def _by_tiles(query: Tensor, reference: Tensor, k: int, ranking: Ranking) -> Tensor:
    """For many queries, any device and any distance."""
    tile = CUDA_TILE if reference.is_cuda else CPU_TILE
    if ranking.kind == "distance":  # some (SNR) hold all differences of a tile, D numbers a pair
        tile = max(1, int(tile / reference.shape[1] ** 0.5))
    columns = max(tile, GROUP * GROUPS_PER_NEIGHBOUR * k, min(16 * tile, tile * tile // max(1, min(len(query), tile))))
    columns = min(columns, len(reference))
    rows = max(1, min(tile, 8 * tile * tile // columns))
    # All tiles of one shape: products may differ in the last bit from shape to shape, and copies of an item would not
    # be equally near. So a set is parted evenly, and what its last block lacks is filled up.
    columns, rows = _even_part(len(reference), columns), _even_part(len(query), rows)
    similarity = _Similarity(ranking, reference, max(columns, rows))
    best = RunningBest(len(query), len(reference), k, reference.device)
    symmetric = query is reference and columns == rows and ranking.kind != "distance"
    for i in range(0, len(query), rows):
        row_block = similarity.prepare(query[i : i + rows], rows)
        _check_lengths(row_block)
        queries = min(rows, len(query) - i)
        for j in range(i if symmetric else 0, len(reference), columns):
            column_block = similarity.prepare(reference[j : j + columns], columns)
            both = similarity.of(row_block, column_block)
            offset = similarity.offset(column_block, j)
            if symmetric and j > i:
                best.offer(i, (both + offset)[:queries], j)
                transposed = both.add_(similarity.offset(row_block, i).unsqueeze(1)).T
                best.offer(j, transposed[: len(reference) - j], i)
            else:
                best.offer(i, both.add_(offset)[:queries], j)
    return best.index


def _even_part(count: int, largest: int) -> int:
    """Size of the parts when `count` is parted evenly into parts of at most about `largest`, in whole steps."""
    parts = -(-count // largest)
    return min(count, -(-count // (STEP * parts)) * STEP)


class _Similarity:
    """Similarities of blocks of prepared rows, larger is nearer, in two parts: of the pair, and of the reference."""

    def __init__(self, ranking: Ranking, reference: Tensor, largest: int) -> None:
        self.ranking = ranking
        self.count = len(reference)
        # in one tensor: small ones that are kept, each at the place of a large one that was freed, leave holes in a
        # heap whose freed memory glibc is told to keep (1 GiB for a bank of 1 GiB)
        self.offsets = torch.empty(self.count + largest, device=reference.device)
        self.known: set[int] = set()
        self.centre = _centre(ranking, reference)

    def prepare(self, rows: Tensor, count: int) -> Tensor:
        """Rows as the ranking wants them, filled up to `count` with zeros (a PML distance might not stand these)."""
        rows = self.ranking.prepare(rows)
        if self.ranking.kind == "distance":
            return rows
        rows = rows if self.centre is None else rows - self.centre
        return F.pad(rows, (0, 0, 0, count - len(rows))) if len(rows) < count else rows

    def of(self, query: Tensor, reference: Tensor) -> Tensor:
        if self.ranking.kind != "distance":
            return product(query, reference)
        assert self.ranking.distance is not None
        with torch.no_grad():
            values = self.ranking.distance(query, reference)
        check_finite(values, f"distances by {self.ranking}")  # NaN has no place in an order
        return values if self.ranking.distance.is_inverted else -values

    def offset(self, reference: Tensor, first: int) -> Tensor:
        """What is added for each reference of the block from `first` on; minus infinity for what fills it up.

        For Euclid -|r|^2 / 2, for the order is that of qr - |r|^2 / 2. It is kept, for blocks come many times.
        """
        offset = self.offsets[first : first + len(reference)]
        if first not in self.known:
            _check_lengths(reference)
            offset.copy_(reference.square().sum(1).div_(-2) if self.ranking.kind == "Euclid" else torch.zeros(()))
            offset[self.count - first :] = -torch.inf
            self.known.add(first)
        return offset


def _centre(ranking: Ranking, reference: Tensor) -> Tensor | None:
    """A point (D,) amid the references for Euclid: the median of a sample, which no outlier moves.

    |q - r|^2 = |q|^2 - 2 qr + |r|^2 cancels badly where embeddings lie far from the origin and near each other, so it
    is taken off first.
    """
    sample = reference[:: max(1, len(reference) // 1000)]
    return ranking.prepare(sample).median(dim=0).values if ranking.kind == "Euclid" else None


def _check_lengths(rows: Tensor) -> None:
    """Raises where a squared length overflows float32: a product of two such rows would be NaN, which has no order."""
    check_finite(torch.linalg.vector_norm(rows, dim=1), "lengths of the embeddings in float32")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, D) times b (M, D) transposed, (N, M).

    On a CPU as a 1 x 1 convolution: oneDNN uses AVX-512 on every processor that has it, while the MKL in torch's
    matrix product keeps to AVX2 where the processor is not Intel's (AMD EPYC, 2,048 x 2,048 x 512: 430 GFLOPS to 190).
    """
    if a.is_cuda or not torch.backends.mkldnn.is_available():
        return a @ b.T
    pixels = a.reshape(1, len(a), 1, -1).permute(0, 3, 1, 2)  # channels last: no copy
    return F.conv2d(pixels, b.reshape(len(b), -1, 1, 1)).permute(0, 2, 3, 1).reshape(len(a), len(b))
