"""Embeddings as local features: a feature map of C channels at each of its nodes, flattened channels first."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one

AT_84 = "pool=False gives maps: Conv4(pool=False) and ResNet12(pool=False) end in 25 nodes at 84 x 84"
BLOCK = 2**21  # floats that pairs of maps hold at a time: 8 MiB


def check_nodes(nodes: int) -> None:
    """Raises a UsageError unless there are at least 2 nodes: positions of the feature map, 25 for 5 x 5."""
    check_at_least_one("nodes", nodes)
    if nodes < 2:
        raise UsageError(
            f"expected at least 2 nodes, got {nodes}; with one the distance would be plain cosine: use "
            "CosineSimilarity, or a trunk with larger maps (56 x 56 images, or three blocks)"
        )


def as_maps(embeddings: Tensor, nodes: int) -> Tensor:
    """Splits embeddings (..., C * nodes), channels first as `Conv4` flattens its map, into (..., nodes, C): a view.

    Raises:
        UsageError: nodes that do not divide D, or leave fewer than 2 channels (a cosine of single numbers is a sign).
    """
    dim = embeddings.shape[-1]
    if dim % nodes or dim < 2 * nodes:
        wanted = f"expected embeddings of {nodes} nodes with 2 channels or more, so of a multiple of {nodes} dimensions"
        raise UsageError(f"{wanted}, got {dim}; set nodes to the trunk's: {AT_84}")
    return embeddings.unflatten(-1, (dim // nodes, nodes)).mT


def unit_nodes(maps: Tensor) -> Tensor:
    """L2-normalizes each node of maps (..., nodes, C) over its channels; a zero node stays zero.

    F.normalize would divide a zero node by 1e-12, and multiply its gradient by 1e12.
    """
    lengths = torch.linalg.vector_norm(maps, dim=-1, keepdim=True)
    return maps / lengths.masked_fill(lengths == 0, 1)


def in_blocks(
    compare: Callable[[Tensor, Tensor], Tensor], query: Tensor, reference: Tensor, floats_of_pair: int
) -> Tensor:
    """Applies `compare` to queries (E, N, ...) and references (E, R, ...), some pairs at a time: (E, N, R).

    These pairs hold about BLOCK floats: several episodes at once if these are small, else a part of one.
    """
    (episodes, queries), references = query.shape[:2], reference.shape[1]
    at_once = max(BLOCK // floats_of_pair, 1)
    width = min(references, at_once) or 1
    rows = min(queries, at_once // width) or 1
    depth = at_once // (width * rows)
    # written into one tensor: small ones kept among the freed blocks would leave holes too small for the next block
    out = query.new_empty(episodes, queries, references)
    for e, n, r in product(range(0, episodes, depth), range(0, queries, rows), range(0, references, width)):
        part = compare(query[e : e + depth, n : n + rows], reference[e : e + depth, r : r + width])
        out[e : e + depth, n : n + rows, r : r + width] = part
    return out
