"""gallery_votes: a head for a support of a million items, which finds neighbors with a faiss index."""

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import check_at_least_one
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.gallery import INDEXES, Gallery
from pml_fewshot.evaluation.heads import Scores, count_votes, fitted_by
from pml_fewshot.evaluation.support import Support

SMALL = 10_000  # items; fewer are searched exactly in a millisecond, and are too few to train an index on


def fit_gallery_votes(
    support: Support,
    distance: BaseDistance | None = None,
    k: int = 5,
    index: str = "ivfpq",
    parameters: str = "",
    seed: int = 0,
) -> Scores:
    check_at_least_one("k", k)
    if sum(support.sizes) < SMALL and index in INDEXES:
        index = "flat"
    banks = [EmbeddingBank(items, support.labels) for items in support.items]
    galleries = [Gallery(bank, index, parameters, distance, seed) for bank in banks]

    def votes(query: Tensor) -> Tensor:
        found = [gallery.search(rows, min(k, len(gallery))) for gallery, rows in zip(galleries, query, strict=True)]
        labels = torch.stack([each.labels.where(each.indices >= 0, -1) for each in found])
        return count_votes(labels, len(support.sizes)).to(query.device)

    return votes


@fitted_by(fit_gallery_votes)
def gallery_votes(
    support: Tensor,
    query: Tensor,
    distance: BaseDistance | None = None,
    k: int = 5,
    index: str = "ivfpq",
    parameters: str = "",
    seed: int = 0,
) -> Tensor:
    """Scores each class by how many of a query's k nearest support items belong to it, as k_nearest_neighbours does.

    The neighbors are found by a Gallery. This pays off when a support is fitted once and queried often, as in
    FewShotClassifier; it would not with an index for every episode.

    Args:
        support: (E, W, K, D).
        query: (E, N, D), for logits (E, N, W).
        distance, index, parameters, seed: as in Gallery; below 10,000 items "ivf", "ivfpq" and "hnsw" become "flat".
        k: number of neighbors that vote.
    """
    return fit_gallery_votes(Support.of(support), distance, k, index, parameters, seed)(query)
