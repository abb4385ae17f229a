"""Full-context embeddings: each embedding of an episode is revised given the episode's whole support."""

import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, check_at_least_one


class FullContext(nn.Module):
    """Revises the embeddings of an episode, computed one by one by any network, given its support.

    Support: a bidirectional LSTM reads the W * K items as one sequence, class by class; each item becomes the sum of
    its embedding and the outputs of the forward and backward passes at that item. So the order of classes and shots
    matters, and episodes should have both in random order.

    Queries: an LSTM takes `read_steps` steps for each query separately. Each step reads the embedded support as a set
    (its mean, weighted by a softmax over the dot products of the state with the items; without a temperature, as in the
    paper, so embeddings of large norm pick a single item), feeds query and reading to the cell, and adds the query to
    the cell's output to get the next state; the last state is the result. The first state is the query, with a zero
    cell: the paper leaves this open, but then the query guides its first reading too, and most implementations do so.

    Args:
        dim: dimensions D of the embeddings; the LSTMs have the same width, as their outputs are added to them.
        read_steps: readings of the support for each query. With several, one reading guides the next; the cost of a
            query grows in proportion. At 1 the forget gate of the cell is never trained.

    Shapes: support (E, W, K, D) and query (E, N, D) -> the same.

    Source: Vinyals et al. 2016, appendix A.1 (queries) and A.2 (support).
    """

    def __init__(self, dim: int, read_steps: int = 5) -> None:
        super().__init__()
        check_at_least_one("dim", dim)
        check_at_least_one("read_steps", read_steps)
        self.dim, self.read_steps = dim, read_steps
        self.support_lstm = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
        # The paper concatenates the reading to the state. Here it is concatenated to the query, the cell's input: the
        # gates see input and state only through one sum of linear maps, so this is the same function.
        self.query_cell = nn.LSTMCell(2 * dim, dim)

    def forward(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        support = self.embed_support(support)
        return support, self.embed_query(query, support)

    def embed_support(self, support: Tensor) -> Tensor:
        """(E, W, K, D) -> (E, W, K, D), each item given all the items before and after it (g in the paper)."""
        self._check_support(support)
        passes, _ = self.support_lstm(support.flatten(1, 2))  # (E, W * K, 2 D), forward and backward concatenated
        return support + passes.unflatten(2, (2, self.dim)).sum(dim=2).unflatten(1, support.shape[1:3])

    def embed_query(self, query: Tensor, support: Tensor) -> Tensor:
        """(E, N, D) -> (E, N, D), each query given a support from `embed_support` (f in the paper)."""
        self._check_support(support)
        if query.ndim != 3 or query.shape[::2] != (len(support), self.dim):
            wanted, got = f"({len(support)}, N, {self.dim}), as in the support", f"shape {tuple(query.shape)}"
            raise UsageError(f"expected queries of shape {wanted}, got {got}; embed both alike, from the same episodes")
        episodes_queries = query.shape[:2]
        items = support.flatten(1, 2)
        query = query.flatten(0, 1)  # an LSTM cell takes one batch dimension
        state, cell = query, torch.zeros_like(query)
        for _ in range(self.read_steps):
            attention = (state.unflatten(0, episodes_queries) @ items.mT).softmax(dim=2)  # (E, N, W * K)
            reading = (attention @ items).flatten(0, 1)
            output, cell = self.query_cell(torch.cat([query, reading], dim=1), (state, cell))
            state = output + query
        return state.unflatten(0, episodes_queries)

    def _check_support(self, support: Tensor) -> None:
        if support.ndim != 4 or support.shape[3] != self.dim:
            got = f"shape {tuple(support.shape)}"
            raise UsageError(f"expected a support of shape (E, W, K, {self.dim}), got {got}; set dim to theirs")
