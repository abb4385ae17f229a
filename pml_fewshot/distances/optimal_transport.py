"""The value of optimal transport between two sets of masses, for thousands of small problems at once.

    min of sum(P * costs) over plans P >= 0 of n x m, whose rows sum to the masses a and whose columns sum to b

By the envelope theorem its gradient is the plan for the costs, and the dual potentials for the masses, up to a constant
that has no effect if the masses are scaled to a sum of 1. Sinkhorn's gradients are those of its entropic problem: with
the default epsilon, a plan's entries are off by 6e-4 on average and 0.03 at most.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, check_choice, import_extra

Solver = Literal["auto", "exact", "sinkhorn"]
Solution = tuple[Tensor, Tensor, Tensor, Tensor]  # value (P,), plan (P, n, m), potentials f (P, n) and g (P, m)

EPSILON = 0.003  # Sinkhorn's value is then within 1 % of the exact one, except for maps that are 1 to 2 % active
MOST_PIVOTS = 10**6  # of the network simplex, which takes about 100 for 25 x 25 masses
OPTIMAL = 1  # its status for a solution
FEW = 64  # problems for which a second thread does not pay off
RELAXATION = 1.5  # longer steps, so fewer (Thibault et al. 2021); 1.7 overflows float32 with very uneven masses
STEPS = 20  # of Sinkhorn before the potentials move into the kernel, so that no factor grows without bound
LEAST_MASS = 1e-12  # in place of 0, which has no logarithm
LEAST_EXPONENT = -80.0  # exp of less is denormal in float32, which takes ten times as long


def check_solver(solver: str, epsilon: float) -> None:
    """Raises up front the errors that `transport_value` would raise at its first problem."""
    check_choice("solver", solver, ("auto", "exact", "sinkhorn"))
    if not (isinstance(epsilon, int | float) and 0 < epsilon < float("inf")):
        raise UsageError(f"expected an epsilon above 0, got {epsilon!r}; {EPSILON} is the default")
    if solver == "exact" or (solver == "auto" and not torch.cuda.is_available()):
        _network_simplex()


def transport_value(costs: Tensor, a: Tensor, b: Tensor, solver: Solver = "auto", epsilon: float = EPSILON) -> Tensor:
    """The least total cost (P,) of moving the masses a (P, n) to b (P, m), at costs (P, n, m) per unit of mass.

    Args:
        costs: floats; a problem with NaN or infinity among its numbers has the value NaN.
        a, b: masses of at least 0, which are scaled to a sum of 1.
        solver: "exact": POT's network simplex, in float64 on the CPU, in as many threads as torch uses. "sinkhorn":
            entropic, in torch on the costs' own device. "auto": exact on a CPU, where it is also faster (9 times for
            25 x 25: 45 us per problem on two cores), sinkhorn on a GPU.
        epsilon: weight of Sinkhorn's entropy. A smaller one comes closer to the exact value; the time grows in
            inverse proportion.

    Raises:
        UsageError: masses below 0 or all 0 (which give NaN on a GPU), an epsilon too small for the costs' type.
        MissingPackageError: exact without POT.
    """
    if a.is_cpu:  # (the check would wait for a GPU)
        for masses in (a.detach(), b.detach()):
            if (masses < 0).any() or (masses.sum(dim=1) == 0).any():
                raise UsageError("expected masses of at least 0 that are not all 0, got others; clamp them to above 0")
    a, b = (masses / masses.sum(dim=1, keepdim=True) for masses in (a, b))
    if solver == "exact" or (solver == "auto" and costs.is_cpu):
        return _Value.apply(costs, a, b, _exact)[0]
    least = 1000 * torch.finfo(costs.dtype).eps  # rounding of potentials near 1 is then 0.1 % of a mass
    if epsilon < least:
        do = "raise it, give float64, or take the exact solver"
        raise UsageError(f"expected an epsilon of at least {least:.1e} with {costs.dtype}, got {epsilon}; {do}")
    value = _Value.apply(costs, a, b, partial(_sinkhorn, epsilon=epsilon))[0]
    return value.masked_fill(~costs.isfinite().all(dim=2).all(dim=1), torch.nan)


class _Value(torch.autograd.Function):
    """A solution whose value has its gradient by the envelope theorem."""

    @staticmethod
    def forward(costs: Tensor, a: Tensor, b: Tensor, solve: Callable[[Tensor, Tensor, Tensor], Solution]) -> Solution:
        return solve(costs, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Solution) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        plan, f, g = ctx.saved_tensors
        return grad[:, None, None] * plan, grad[:, None] * f, grad[:, None] * g, None


def _network_simplex() -> Any:
    return import_extra("emd", "(POT) for exact optimal transport", "ot.lp.emd_wrap").emd_c


def _exact(costs: Tensor, a: Tensor, b: Tensor) -> Solution:
    solve_one = _network_simplex()
    unit, from_, to = (each.double().cpu().contiguous().numpy() for each in (costs, a, b))
    finite = np.isfinite(unit).all(axis=(1, 2)) & np.isfinite(from_).all(axis=1) & np.isfinite(to).all(axis=1)
    # float32's sums are off by 1e-7, which the solver would take for an infeasible problem
    from_, to = (masses / masses.sum(axis=1, keepdims=True) for masses in (from_, to))
    plan, f, g = np.zeros_like(unit), np.zeros_like(from_), np.zeros_like(to)

    def solve(problems: np.ndarray) -> None:
        for i in problems:
            plan[i], _, f[i], g[i], status = solve_one(from_[i], to[i], unit[i], MOST_PIVOTS, 1)
            if status != OPTIMAL:
                raise RuntimeError(f"the network simplex found no optimum in {MOST_PIVOTS} pivots (status {status})")

    problems = np.flatnonzero(finite)
    threads = torch.get_num_threads() if len(problems) > FEW else 1
    with ThreadPoolExecutor(threads) as pool:  # the solver releases Python's lock
        list((pool.map if threads > 1 else map)(solve, np.array_split(problems, threads)))
    if not (from_.all() and to.all()):  # the solver leaves out empty nodes; a first grain there costs the least of
        no_from, no_to = from_ == 0, to == 0  # the ways to a node that is not empty
        f_of_grain = np.where(no_to[:, None, :], np.inf, unit - g[:, None, :]).min(axis=2)
        g_of_grain = np.where(no_from[:, :, None], np.inf, unit - f[:, :, None]).min(axis=1)
        f, g = np.where(no_from, f_of_grain, f), np.where(no_to, g_of_grain, g)
    value = np.where(finite, (plan * np.where(plan > 0, unit, 0)).sum(axis=(1, 2)), np.nan)
    return tuple(torch.from_numpy(each).to(costs) for each in (value, plan, f, g))  # type: ignore[return-value]


def _sinkhorn(costs: Tensor, a: Tensor, b: Tensor, epsilon: float) -> Solution:
    """Sinkhorn's algorithm with an epsilon that is halved from 1, each time starting at the last one's potentials.

    The value is the plan's own cost without the entropy, plus what the masses that it misses would cost at the
    potentials: an order more accurate than the cost alone (Schmitzer 2019 for the scaling of epsilon and the stabilized
    kernel).
    """
    a, b = (masses.clamp(min=LEAST_MASS) for masses in (a, b))
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    halvings = max(0, int(np.ceil(-np.log2(epsilon))))
    for scale in (epsilon * 2.0**power for power in range(halvings, -1, -1)):
        for _ in range(max(1, round(0.5 / (scale * STEPS)))):
            kernel = ((f.unsqueeze(2) + g.unsqueeze(1) - costs) / scale).clamp(min=LEAST_EXPONENT).exp()
            u, v = torch.ones_like(a).unsqueeze(2), torch.ones_like(b).unsqueeze(2)
            for step in range(STEPS):
                whole = a.unsqueeze(2) / (kernel @ v)
                u = whole * (whole / u) ** (RELAXATION - 1)
                whole = b.unsqueeze(2) / (kernel.mT @ u)
                v = whole if step == STEPS - 1 else whole * (whole / v) ** (RELAXATION - 1)
            f, g = f + scale * u.squeeze(2).log(), g + scale * v.squeeze(2).log()
    plan = kernel * u * v.mT
    missing = a - plan.sum(dim=2)  # (the columns are right after the last step)
    return (plan * costs).sum(dim=(1, 2)) + (f * missing).sum(dim=1), plan, f, g
