"""Neighbors: the result of a search in a Gallery, and the class that most of the neighbors vote for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.embedders.bank import ClassName, names_of


@dataclass(frozen=True)
class Votes:
    """The class that the neighbors of each of N queries voted for.

    Args:
        labels: (N,) its label; -1 where there was no neighbor.
        shares: (N,) its share of the votes, 0 where there was no neighbor.
        class_names: that the labels are indices into, where the gallery has names.
    """

    labels: Tensor
    shares: Tensor
    class_names: tuple[str, ...] = ()

    @property
    def names(self) -> list[ClassName | None]:
        """The classes' names, or labels where there are no names; None where there was no neighbor."""
        return _names(self.labels, self.shares > 0, self.class_names)


@dataclass(frozen=True)
class Neighbors:
    """The k references nearest to each of N queries, nearest first.

    Args:
        indices: (N, k) their indices in the gallery; -1 for none, where the lists that were searched hold fewer.
        distances: (N, k) the value of the gallery's PML distance for query and reference: for `LpDistance()` the
            distance of normalized rows, for a power of 2 its square, for `CosineSimilarity()` the similarity, where
            larger is nearer; plain Euclidean without a distance. NaN where there is none.
        labels: (N, k) their labels, 0 where there is none.
        class_names: that the labels are indices into, where the gallery has names.
    """

    indices: Tensor
    distances: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    @property
    def names(self) -> list[list[ClassName | None]]:
        """Their classes' names, or labels where there are no names; None where there is no reference."""
        rows = zip(self.labels, self.indices >= 0, strict=True)
        return [_names(labels, found, self.class_names) for labels, found in rows]

    def vote(self, k: int | None = None) -> Votes:
        """Returns the most common class of the k nearest (all if None); ties go to the one with the nearest neighbor.

        Entries without a reference have no vote.
        """
        width = self.indices.shape[1]
        k = width if k is None else k
        check_at_least_one("k", k)
        if k > width:
            raise UsageError(
                f"expected k of at most {width}, the neighbors found, got {k}; search for more, or lower k"
            )
        labels, valid = self.labels[:, :k], self.indices[:, :k] >= 0
        # for each neighbor, how many share its class; the first of the largest counts is the nearest such neighbor
        counts = torch.stack([((labels == each[:, None]) & valid).sum(dim=1) for each in labels.T], dim=1) * valid
        most, place = counts.max(dim=1, keepdim=True)
        winners = labels.gather(1, place).masked_fill(most == 0, -1).squeeze(1)
        return Votes(winners, most.squeeze(1) / valid.sum(dim=1).clamp(min=1), self.class_names)


def _names(labels: Tensor, found: Tensor, class_names: tuple[str, ...]) -> list[ClassName | None]:
    names = names_of(labels.where(found, 0), class_names)
    return [name if each else None for name, each in zip(names, found.tolist(), strict=True)]
