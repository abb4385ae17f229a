"""FullContext against the paper's equations written out, one item, one step and one gate at a time."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.full_context import FullContext
from tests.embedders.formulas import Weights

EPISODES, WAYS, SHOTS, QUERIES, DIMS = 3, 4, 2, 5, 6


def episodes(ways: int = WAYS, shots: int = SHOTS, queries: int = QUERIES) -> tuple[Tensor, Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return draw(EPISODES, ways, shots, DIMS), draw(EPISODES, queries, DIMS)


def network(read_steps: int = 3) -> FullContext:
    """All weights and biases drawn large, so that no gate is near a constant and no two biases are alike."""
    context, generator = FullContext(DIMS, read_steps).double(), torch.Generator().manual_seed(1)
    for parameter in context.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return context


def lstm(x: Tensor, h: Tensor, c: Tensor, from_x: Tensor, from_h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One step for one item: x of any length, h of any length, c and the output (D,); torch's order of the gates."""
    at_input, at_forget, at_new, at_output = (from_x @ x + from_h @ h + bias).split(len(c))
    c = torch.sigmoid(at_forget) * c + torch.sigmoid(at_input) * torch.tanh(at_new)
    return torch.sigmoid(at_output) * torch.tanh(c), c


def slow_support(weights: Weights, support: Tensor) -> Tensor:
    """g(x_i, S) of appendix A.2 for one episode (W, K, D): forward pass plus backward pass plus x_i."""
    items = [item for way in support for item in way]
    out = list(items)
    for suffix, order in (("", range(len(items))), ("_reverse", reversed(range(len(items))))):
        of = {name: weights[f"support_lstm.{name}_l0{suffix}"] for name in ("weight_ih", "weight_hh")}
        bias = weights[f"support_lstm.bias_ih_l0{suffix}"] + weights[f"support_lstm.bias_hh_l0{suffix}"]
        h = c = torch.zeros(DIMS, dtype=support.dtype)
        for i in order:
            h, c = lstm(items[i], h, c, of["weight_ih"], of["weight_hh"], bias)
            out[i] = out[i] + h
    return torch.stack(out).reshape(support.shape)


def slow_query(weights: Weights, query: Tensor, support: Tensor, read_steps: int) -> Tensor:
    """attLSTM(f'(x), g(S), steps) of appendix A.1 for one query (D,), with state and reading joined as in the paper."""
    items = [item for way in support for item in way]
    from_query, from_reading = weights["query_cell.weight_ih"].split(DIMS, dim=1)
    from_joined = torch.cat([weights["query_cell.weight_hh"], from_reading], dim=1)
    bias = weights["query_cell.bias_ih"] + weights["query_cell.bias_hh"]
    h, c = query, torch.zeros(DIMS, dtype=query.dtype)
    for _ in range(read_steps):
        shares = [(h * item).sum().exp() for item in items]
        r = sum(share / sum(shares) * item for share, item in zip(shares, items, strict=True))
        h_hat, c = lstm(query, torch.cat([h, r]), c, from_query, from_joined, bias)
        h = h_hat + query
    return h


@pytest.mark.parametrize(
    ("ways", "shots", "queries", "read_steps"), [(4, 2, 5, 1), (4, 2, 5, 2), (2, 3, 1, 5), (1, 1, 2, 2)]
)
def test_embeddings_and_gradients_equal_the_equations_written_out(ways: int, shots: int, queries: int, read_steps: int):
    """Each episode and each query by itself, so this also shows that none depends on another."""
    context = network(read_steps)
    support, query = (part.requires_grad_() for part in episodes(ways, shots, queries))
    own = {name: value.detach().clone().requires_grad_() for name, value in context.named_parameters()}
    embedded = torch.stack([slow_support(own, episode) for episode in support])
    queries_by_hand = [slow_query(own, one, s, read_steps) for q, s in zip(query, embedded, strict=True) for one in q]
    expected, out = (embedded, torch.stack(queries_by_hand).view_as(query)), context(support, query)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(sum(part.sin().sum() for part in out), [support, query, *context.parameters()])
    wanted = torch.autograd.grad(sum(part.sin().sum() for part in expected), [support, query, *own.values()])
    for name, gradient, slow_gradient in zip(["support", "query", *own], gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, slow_gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_queries_read_the_embedded_support_as_a_set_which_itself_depends_on_its_order():
    context, (support, query) = network(), episodes()
    embedded, queries = context(support, query)
    order = torch.randperm(WAYS * SHOTS, generator=torch.Generator().manual_seed(2))
    permuted = embedded.flatten(1, 2)[:, order].unflatten(1, (WAYS, SHOTS))
    torch.testing.assert_close(context.embed_query(query, permuted), queries)
    for dim in (1, 2):  # of classes, and of shots
        other_embedded, other_queries = context(support.flip(dim), query)
        assert (other_embedded.flip(dim) - embedded).abs().amax(dim=3).min() > 1e-3
        assert (other_queries - queries).abs().max() > 1e-3


def test_five_readings_are_the_default_and_wrong_sizes_and_shapes_are_refused():
    assert FullContext(DIMS).read_steps == 5
    for wrong in ({"dim": 0}, {"dim": DIMS, "read_steps": 0}):
        with pytest.raises(UsageError, match=list(wrong)[-1]):
            FullContext(**wrong)
    context, (support, query) = network(), episodes()
    with pytest.raises(UsageError, match=r"expected a support of shape \(E, W, K, 6\), got shape \(3, 4, 2, 5\); set"):
        context(support[..., :5], query[..., :5])
    with pytest.raises(UsageError, match=r"expected queries of shape \(3, N, 6\), .* got shape \(3, 5, 5\); embed"):
        context(support, query[..., :5])
    with pytest.raises(UsageError, match=r"expected queries of shape \(1, N, 6\), .* got shape \(3, 5, 6\)"):
        context(support[:1], query)  # which would broadcast
