"""The transport's value and gradient against POT, a linear program, central differences and what is known."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.distances.optimal_transport import transport_value

ot = pytest.importorskip("ot", reason="POT is not installed: pip install -c constraints.txt -e '.[emd]'")


def problems(count: int, n: int = 25, m: int = 25, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Costs (count, n, m) from 0 to 2, and masses of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    costs = 2 * torch.rand(count, n, m, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(count, size, generator=generator, dtype=torch.float64) ** 3 + 1e-3 for size in (n, m))
    return costs.to(dtype), a.to(dtype), b.to(dtype)


def test_exact_is_what_pot_finds() -> None:
    costs, a, b = problems(1000)
    expected = [
        ot.emd2((x / x.sum()).numpy(), (y / y.sum()).numpy(), c.numpy()) for c, x, y in zip(costs, a, b, strict=True)
    ]
    assert transport_value(costs, a, b, "exact").numpy() == pytest.approx(np.array(expected), abs=1e-12)
    narrow = transport_value(*(each.float() for each in (costs, a, b)), "exact")
    assert narrow.dtype == torch.float32
    assert narrow.numpy() == pytest.approx(np.array(expected), abs=1e-6)


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_both_solve_the_linear_program(solver: str) -> None:
    costs, a, b = problems(4, n=4, m=6)
    b[0, 2] = a[1, 3] = 0  # empty nodes
    values = transport_value(costs, a, b, solver, epsilon=0.0005)
    rows = np.kron(np.eye(4), np.ones(6))
    columns = np.kron(np.ones(4), np.eye(6))
    for value, c, x, y in zip(values, costs, a, b, strict=True):
        sums = torch.cat([x / x.sum(), y / y.sum()]).numpy()
        expected = linprog(c.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=sums).fun
        assert value.item() == pytest.approx(expected, rel=1e-6 if solver == "exact" else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("epsilon", "worst", "mean"), [(0.003, 1e-2, 2e-3), (0.0005, 2e-3, 1e-4)])
def test_sinkhorn_is_near_the_exact_value(dtype: torch.dtype, epsilon: float, worst: float, mean: float) -> None:
    costs, a, b = problems(100 if epsilon > 0.001 else 40)
    exact = transport_value(costs, a, b, "exact")
    found = transport_value(costs.to(dtype), a.to(dtype), b.to(dtype), "sinkhorn", epsilon).double()
    error = (found - exact).abs() / exact
    assert error.max() < worst
    assert error.mean() < mean


def test_gradients_are_those_of_central_differences() -> None:
    inputs = tuple(each.requires_grad_() for each in problems(3, n=5, m=7))
    assert torch.autograd.gradcheck(lambda *given: transport_value(*given, "exact"), inputs, atol=1e-5)


def test_gradients_of_sinkhorn_are_near_the_exact_ones() -> None:
    costs, a, b = problems(20, n=6, m=6)
    found = []
    for solver in ("exact", "sinkhorn"):
        given = [each.clone().requires_grad_() for each in (costs, a, b)]
        transport_value(*given, solver, epsilon=0.001).sum().backward()
        found.append([each.grad for each in given])
    for exact, near in zip(*found, strict=True):
        assert (exact - near).abs().mean() < 0.03 * exact.abs().mean()


def test_potentials_of_empty_nodes_are_the_derivative_of_a_first_grain() -> None:
    costs, a, b = problems(1, n=4, m=4)
    a[0, 1] = b[0, 2] = 0
    given = [each.clone().requires_grad_() for each in (a, b)]
    transport_value(costs, *given, "exact").sum().backward()
    for side, other, place in ((0, 1, 1), (1, 0, 2)):
        moved = [a.clone(), b.clone()]
        moved[side][0, place] = step = 1e-6
        difference = transport_value(costs, *moved, "exact") - transport_value(costs, a, b, "exact")
        assert difference.item() / step == pytest.approx(given[side].grad[0, place].item(), abs=1e-4)
        assert given[other].grad.isfinite().all()


def test_swapping_the_sides_changes_nothing() -> None:
    costs, a, b = problems(10, n=5, m=8)
    for solver in ("exact", "sinkhorn"):
        one, other = transport_value(costs, a, b, solver), transport_value(costs.mT, b, a, solver)
        assert torch.allclose(one, other, rtol=1e-9 if solver == "exact" else 1e-2)


@pytest.mark.parametrize("cost", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_a_cost_that_is_not_finite_gives_nan_and_leaves_the_others_alone(solver: str, cost: float) -> None:
    costs, a, b = problems(3, n=4, m=4)
    alone = transport_value(costs, a, b, solver)
    costs[1, 2, 2] = cost
    assert transport_value(costs, a, b, solver).isnan().tolist() == [False, True, False]
    assert torch.equal(transport_value(costs, a, b, solver)[::2], alone[::2])


def test_what_cannot_be_solved_is_refused() -> None:
    costs, a, b = problems(2, n=3, m=3, dtype=torch.float32)
    for masses in (-a, 0 * a):
        with pytest.raises(UsageError, match="masses of at least 0"):
            transport_value(costs, masses, b)
    with pytest.raises(UsageError, match=r"at least 1.2e-04 with torch.float32, got 1e-05"):
        transport_value(costs, a, b, "sinkhorn", epsilon=1e-5)
    assert transport_value(costs.double(), a.double(), b.double(), "sinkhorn", epsilon=1e-4).isfinite().all()
