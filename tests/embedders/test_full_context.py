"""FullContext against the paper's equations written out, one item, one step and one gate at a time."""

import pytest
import torch
from torch import Tensor

from pml_fewshot.embedders.full_context import FullContext

EPISODES, WAYS, SHOTS, QUERIES, DIMS = 3, 4, 2, 5, 6
Weights = dict[str, Tensor]


def episodes(ways: int = WAYS, shots: int = SHOTS, queries: int = QUERIES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(EPISODES, ways, shots, DIMS, generator=generator, dtype=torch.float64)
    return support, torch.randn(EPISODES, queries, DIMS, generator=generator, dtype=torch.float64)


def network(read_steps: int = 3) -> FullContext:
    """All weights and biases drawn large, so that no gate is near a constant and no two biases are alike."""
    context = FullContext(DIMS, read_steps).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in context.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return context


def lstm(x: Tensor, h: Tensor, c: Tensor, from_x: Tensor, from_h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One step for one item: x of any length, h of any length, c and the output (D,); torch's order of the gates."""
    at_input, at_forget, at_new, at_output = (from_x @ x + from_h @ h + bias).split(len(c))
    c = torch.sigmoid(at_forget) * c + torch.sigmoid(at_input) * torch.tanh(at_new)
    return torch.sigmoid(at_output) * torch.tanh(c), c


def slow_support(weights: Weights, support: Tensor) -> Tensor:
    """g(x_i, S) of appendix A.2 for one episode (W, K, D): forward pass plus backward pass plus x_i."""
    items = [support[way, shot] for way in range(support.shape[0]) for shot in range(support.shape[1])]
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
        total = sum(shares)
        r = sum(share / total * item for share, item in zip(shares, items, strict=True))
        h_hat, c = lstm(query, torch.cat([h, r]), c, from_query, from_joined, bias)
        h = h_hat + query
    return h


def slow(weights: Weights, support: Tensor, query: Tensor, read_steps: int) -> tuple[Tensor, Tensor]:
    embedded = [slow_support(weights, episode) for episode in support]
    queries = [
        torch.stack([slow_query(weights, one, s, read_steps) for one in q])
        for q, s in zip(query, embedded, strict=True)
    ]
    return torch.stack(embedded), torch.stack(queries)


@pytest.mark.parametrize("read_steps", [1, 2, 5])
@pytest.mark.parametrize(("ways", "shots", "queries"), [(4, 2, 5), (2, 3, 1), (1, 1, 2)])
def test_embeddings_and_gradients_equal_the_equations_written_out(ways: int, shots: int, queries: int, read_steps: int):
    context = network(read_steps)
    support, query = (part.requires_grad_() for part in episodes(ways, shots, queries))
    own = {name: value.detach().clone().requires_grad_() for name, value in context.named_parameters()}
    out, expected = context(support, query), slow(own, support, query, read_steps)
    assert out[0].shape == (EPISODES, ways, shots, DIMS)
    assert out[1].shape == (EPISODES, queries, DIMS)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(sum(part.sin().sum() for part in out), [support, query, *context.parameters()])
    wanted = torch.autograd.grad(sum(part.sin().sum() for part in expected), [support, query, *own.values()])
    for name, gradient, slow_gradient in zip(["support", "query", *own], gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, slow_gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_forward_is_the_two_methods_one_after_the_other():
    context, (support, query) = network(), episodes()
    embedded = context.embed_support(support)
    torch.testing.assert_close(context(support, query), (embedded, context.embed_query(query, embedded)))


def test_five_readings_are_the_default():
    support, query = episodes()
    default, five = FullContext(DIMS).double(), FullContext(DIMS, read_steps=5).double()
    five.load_state_dict(default.state_dict())
    assert torch.equal(default(support, query)[1], five(support, query)[1])


def test_queries_read_the_embedded_support_as_a_set():
    context, (support, query) = network(), episodes()
    embedded = context.embed_support(support)
    expected = context.embed_query(query, embedded)
    order = torch.randperm(WAYS * SHOTS, generator=torch.Generator().manual_seed(2))
    permuted = embedded.flatten(1, 2)[:, order]
    torch.testing.assert_close(context.embed_query(query, permuted.unflatten(1, (WAYS, SHOTS))), expected)
    torch.testing.assert_close(context.embed_query(query, permuted.unflatten(1, (1, WAYS * SHOTS))), expected)
    assert (context.embed_query(query, embedded + 1) - expected).abs().amax(dim=2).min() > 1e-3  # they do read it


@pytest.mark.parametrize("dim", [1, 2])
def test_the_support_embeddings_depend_on_the_order_of_classes_and_of_shots(dim: int):
    context, (support, query) = network(), episodes()
    embedded, queries = context(support, query)
    other_embedded, other_queries = context(support.flip(dim), query)
    assert (other_embedded.flip(dim) - embedded).abs().amax(dim=3).min() > 1e-3
    assert (other_queries - queries).abs().max() > 1e-3  # through them the queries do too


def test_each_support_item_is_embedded_in_view_of_all_items():
    context, (support, _) = network(), episodes()
    by_input = torch.func.jacrev(lambda one: context.embed_support(one[None])[0])(support[0])
    influence = by_input.abs().amax(dim=(2, 5)).reshape(WAYS * SHOTS, WAYS * SHOTS)
    assert influence.min() > 1e-6


def test_each_query_is_embedded_without_the_others():
    context, (support, query) = network(), episodes()
    embedded, queries = context(support, query)
    for n in range(QUERIES):
        alone_embedded, alone = context(support, query[:, n : n + 1])
        torch.testing.assert_close(alone[:, 0], queries[:, n])
        torch.testing.assert_close(alone_embedded, embedded)
    torch.testing.assert_close(context(support, query.flip(1))[1], queries.flip(1))
    assert context(support, query[:, :0])[1].shape == (EPISODES, 0, DIMS)


def test_a_batch_of_episodes_equals_one_at_a_time():
    context, (support, query) = network(), episodes()
    embedded, queries = context(support, query)
    for e in range(EPISODES):
        torch.testing.assert_close(
            context(support[e : e + 1], query[e : e + 1]), (embedded[e : e + 1], queries[e : e + 1])
        )


@pytest.mark.parametrize(("read_steps", "share"), [(1, 0.74), (2, 0.99), (5, 0.99)])
def test_gradients_of_the_queries_reach_every_parameter(read_steps: int, share: float):
    """After a single reading the cell's forget gate, a quarter of its weights, has had nothing to forget."""
    torch.manual_seed(0)
    context = FullContext(DIMS, read_steps)  # as torch draws the weights
    support, query = (part.float().requires_grad_() for part in episodes())
    context(support, query)[1].square().sum().backward()
    reached = {"support": support.grad, "query": query.grad} | {n: p.grad for n, p in context.named_parameters()}
    assert len(reached) == 2 + 8 + 4
    for name, gradient in reached.items():
        assert gradient is not None, name
        assert (gradient != 0).float().mean() > share, name


def test_training_mode_memory_layout_and_single_precision_change_nothing():
    context, (support, query) = network(), episodes()
    expected = context(support, query)
    torch.testing.assert_close(context.eval()(support, query), expected)
    strided = support.transpose(1, 3).contiguous().transpose(1, 3), query.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(context(*strided), expected)
    single = context.float()(support.float(), query.float())
    torch.testing.assert_close(single, tuple(part.float() for part in expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_sizes_and_readings_below_one_are_refused(count: int):
    with pytest.raises(ValueError, match=r"expected read_steps to be an integer of at least 1, got .*; give"):
        FullContext(DIMS, read_steps=count)
    with pytest.raises(ValueError, match="expected dim to be an integer of at least 1"):
        FullContext(count)


def test_embeddings_of_other_shapes_are_refused():
    context, (support, query) = network(), episodes()
    with pytest.raises(ValueError, match=r"expected a support of shape \(E, W, K, 6\), got shape \(3, 4, 2, 5\); set"):
        context(support[..., :5], query[..., :5])
    with pytest.raises(ValueError, match=r"got shape \(3, 8, 6\)"):
        context.embed_query(query, support.flatten(1, 2))
    with pytest.raises(ValueError, match=r"expected queries of shape \(3, N, 6\), .* got shape \(3, 5, 5\); embed"):
        context(support, query[..., :5])
    with pytest.raises(ValueError, match=r"got shape \(15, 6\)"):
        context(support, query.flatten(0, 1))
    with pytest.raises(ValueError, match=r"got shape \(3, 5, 6, 1\)"):
        context(support, query[..., None])
    with pytest.raises(ValueError, match=r"expected queries of shape \(1, N, 6\), .* got shape \(3, 5, 6\)"):
        context(support[:1], query)  # which would broadcast
