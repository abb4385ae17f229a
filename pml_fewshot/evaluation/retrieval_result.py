"""RetrievalResult: retrieval figures by name, with what they are means of."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from pml_fewshot.evaluation.index_recall import IndexRecall


class RetrievalResult(Mapping[str, float]):
    """Retrieval figures by name, each a mean over the queries (NMI and AMI: of all) and a fraction of 1.

    Args:
        per_query: name -> (N,) value of each judged query.
        labels: (N,) class of each judged query.
        num_left_out: queries without any other item of their class among the references, for which no neighbour
            could be right; they are left out of every mean.
        k: neighbours that were searched.
        protocol: "leave-one-out": each query searched the other queries; "gallery": a set of references.
        ranking: the index and the distance that the neighbours were found by, and its recall where it is approximate.
        index_recall: of an approximate index against exact search; None where the search was exact, or where a Gallery
            was searched, which holds no embeddings to compare with.
        clustering: NMI and AMI where asked for.
    """

    def __init__(
        self,
        per_query: dict[str, Tensor],
        labels: Tensor,
        num_left_out: int,
        k: int,
        protocol: Literal["leave-one-out", "gallery"] = "leave-one-out",
        ranking: str = "",
        index_recall: IndexRecall | None = None,
        clustering: Mapping[str, float] | None = None,
    ) -> None:
        self.per_query = per_query
        self.labels = labels
        self.num_queries = len(labels)
        self.num_left_out = num_left_out
        self.k = k
        self.protocol = protocol
        self.ranking = ranking
        self.index_recall = index_recall
        self.clustering = dict(clustering or {})

    def __getitem__(self, metric: str) -> float:
        if metric in self.clustering:
            return self.clustering[metric]
        return self.per_query[metric].mean().item()

    def __iter__(self) -> Iterator[str]:
        yield from self.per_query
        yield from self.clustering

    def __len__(self) -> int:
        return len(self.per_query) + len(self.clustering)

    def __repr__(self) -> str:
        return f"RetrievalResult({dict(self)}, {self.num_queries} queries, k={self.k})"

    def ci95(self, metric: str) -> float:
        """Half the 95 % interval of a figure over the queries, 1.96 standard errors of the mean; NaN for NMI, AMI."""
        if metric in self.clustering:
            return float("nan")
        values = self.per_query[metric]
        return 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")

    def per_class(self, metric: str) -> tuple[Tensor, Tensor]:
        """Labels (C,) of the judged classes, ascending, and the mean (C,) of a figure over each one's queries."""
        classes, place, counts = torch.unique(self.labels, return_inverse=True, return_counts=True)
        values = self.per_query[metric]
        return classes, torch.zeros(len(classes), dtype=values.dtype).index_add_(0, place, values) / counts
