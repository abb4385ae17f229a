"""RunningBest: the k most similar references of every query, kept while tiles of similarities come in."""

import torch
from torch import Tensor

GROUP = 16  # of that many similarities first the largest is looked at


class RunningBest:
    """The k most similar references found so far for each of N queries, best first.

    References are offered in the order of their index, so of equally similar ones the earlier stand first.
    """

    def __init__(self, queries: int, references: int, k: int, device: torch.device) -> None:
        self.references = references
        self.k = k
        self.value = torch.full((queries, k), -torch.inf, device=device)
        self.index = torch.full((queries, k), -1, device=device)

    def offer(self, start: int, similarities: Tensor, first: int) -> None:
        """Takes in similarities (R, C) of the queries from `start` on to the references from `first` on."""
        rows = slice(start, start + len(similarities))
        width = similarities.shape[1] // GROUP
        whole = similarities.shape[1] >= self.references
        if first == 0 and (whole or width < self.k):  # nothing found yet, and nothing that could be passed over
            values, indices = largest(similarities, min(self.k, similarities.shape[1]))
            self.value[rows, : values.shape[1]], self.index[rows, : values.shape[1]] = values, indices
            return
        # Tiles hold few of the best: look at the largest of each group of columns, and only where it beats the k-th
        # best so far at the group. Groups run across the tile (c, c + C / 16, ...), for reductions over a strided axis
        # are what vectorises. What is left over of the last tile is a group of its own.
        floor = self.value[rows, -1]
        of_groups = _largest_of_groups(similarities[:, : width * GROUP], width)
        if first == 0:  # k groups hold k items at least as large as the k-th of their largest
            floor = of_groups.topk(self.k, dim=1).values[:, -1].nextafter(floor)
        query, group = (of_groups > floor.unsqueeze(1)).nonzero().unbind(1)
        column = group.unsqueeze(1) + torch.arange(GROUP, device=group.device) * width
        value = similarities[query.unsqueeze(1), column]
        place, member = (value > floor[query].unsqueeze(1)).nonzero().unbind(1)
        query, column, value = query[place], column[place, member], value[place, member]
        if width * GROUP < similarities.shape[1]:
            rest = similarities[:, width * GROUP :]
            more, place = (rest > floor.unsqueeze(1)).nonzero().unbind(1)
            query, column = torch.cat([query, more]), torch.cat([column, place + width * GROUP])
            value = torch.cat([value, rest[more, place]])
        if len(query):
            self._merge_few(start, query, column, value, first)

    def _merge_few(self, start: int, query: Tensor, column: Tensor, value: Tensor, first: int) -> None:
        """Merges a list of (query, column, value) by padding it to a table with a row a query."""
        order = (query * (int(column.max()) + 1) + column).argsort()
        query, column, value = query[order], column[order], value[order]
        touched, row, counts = torch.unique_consecutive(query, return_inverse=True, return_counts=True)
        place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[row]
        values = self.value.new_full((len(touched), int(counts.max())), -torch.inf)
        indices = torch.full_like(values, -1, dtype=torch.int64)
        values[row, place], indices[row, place] = value, column
        self._merge(touched + start, values, indices, first)

    def _merge(self, rows: slice | Tensor, values: Tensor, indices: Tensor, first: int) -> None:
        """Merges tables (R, m), of which equal values of a row stand in the order of their index."""
        values = torch.cat([self.value[rows], values], dim=1)
        indices = torch.cat([self.index[rows], indices + first], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.value[rows] = values[:, : self.k]
        self.index[rows] = indices.gather(1, order[:, : self.k])


def _largest_of_groups(similarities: Tensor, width: int) -> Tensor:
    """(R, width) largest of the columns c, c + width, c + 2 width, ... of (R, GROUP * width)."""
    if similarities.stride(1) == 1:
        return similarities.unflatten(1, (GROUP, width)).amax(dim=1)
    # a transposed tile: reduced as it lies in memory, or this takes 30 times as long
    return similarities.T.unflatten(0, (GROUP, width)).amax(dim=0).T


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (R, C), largest first and of equal ones the first: values and columns (R, k)."""
    if 4 * k > values.shape[1]:  # a whole sort is faster
        found, column = values.sort(dim=1, descending=True, stable=True)
        return found[:, :k], column[:, :k]
    # one more than wanted shows whether the last place is tied; of equal values topk takes any, in any order
    found, column = values.topk(k + 1, dim=1)
    tied = (found[:, 1:] == found[:, :-1]).any(dim=1)
    found, column = found[:, :k], column[:, :k]
    if tied.any():
        whole, order = values[tied].sort(dim=1, descending=True, stable=True)
        found[tied], column[tied] = whole[:, :k], order[:, :k]
    return found, column
