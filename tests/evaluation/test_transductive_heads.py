"""Transductive and tuned heads: against loops over one episode by autograd and numpy, and what all of them promise."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.support import Support
from pml_fewshot.evaluation.transductive_heads import alpha_tim, bd_cspn, laplacian_shot, pt_map
from pml_fewshot.evaluation.tuned_heads import fine_tuning, transductive_fine_tuning

Head = Callable[..., Tensor]
TUNED = [
    partial(fine_tuning, steps=30, learning_rate=0.01),
    partial(fine_tuning, similarity="cosine", temperature=4.0, steps=30, learning_rate=0.01),
    partial(transductive_fine_tuning, steps=25, learning_rate=1e-3),
    partial(transductive_fine_tuning, similarity="euclidean", temperature=2.0, steps=25, learning_rate=1e-3),
    partial(alpha_tim, steps=30, learning_rate=3e-3),
    partial(alpha_tim, alpha=1.0, support_weight=0.1, conditional_weight=0.3, steps=30, learning_rate=3e-3),
    partial(alpha_tim, alpha=1.5, marginal_weight=2.0, similarity="cosine", steps=30, learning_rate=3e-3),
]
CLOSED = [
    bd_cspn,
    partial(bd_cspn, scale=3.0, top=4),
    laplacian_shot,
    partial(laplacian_shot, neighbors=4, smoothness=1.5, steps=7, rectify=False),
    pt_map,
    partial(pt_map, center=False, power=None, sharpness=4.0, steps=3, learning_rate=0.5),
]
HEADS: list[Head] = [*TUNED, *CLOSED]
TRANSDUCTIVE = HEADS[2:]


def episodes(ways: int = 4, shots: int = 2, queries: int = 17, dims: int = 12, count: int = 3) -> tuple[Tensor, Tensor]:
    """Overlapping classes of unit length in float64, as many queries of each as come."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(ways + shots), dtype=torch.float64)
    middle = 0.3 + randn(count, ways, 1, dims)
    support = middle + randn(count, ways, shots, dims)
    query = (middle + randn(count, ways, -(-queries // ways), dims)).flatten(1, 2)[:, :queries]
    return F.normalize(support, dim=3), F.normalize(query, dim=2)


def tuned(head: partial[Tensor], support: Tensor, query: Tensor) -> Tensor:
    """One episode's logits by torch.optim.Adam and autograd, from the papers' losses."""
    ways, shots, _ = support.shape
    options = {"similarity": "squared", "temperature": 15.0, **head.keywords}
    labels = torch.arange(ways).repeat_interleave(shots)
    weights = support.mean(dim=1).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=options["learning_rate"])
    alpha = options.get("alpha") or {1: 2.0, 2: 5.0, 3: 5.0, 5: 7.0}[shots]
    alpha = alpha if head.func is alpha_tim else 1.0

    def logits(items: Tensor) -> Tensor:
        distances = (items[:, None] - weights).norm(dim=2)
        cosines = F.cosine_similarity(items[:, None], weights, dim=2)
        by = {"squared": -(distances**2) / 2, "euclidean": -distances, "cosine": cosines}
        return options["temperature"] * by[options["similarity"]]

    def entropy(shares: Tensor) -> Tensor:
        if alpha == 1:
            return -(shares * shares.log()).sum(dim=-1)
        return (1 - (shares**alpha).sum(dim=-1)) / (alpha - 1)

    for _ in range(options["steps"]):
        loss = options.get("support_weight", 1.0) * F.cross_entropy(logits(support.flatten(0, 1)), labels)
        shares = logits(query).softmax(dim=1)
        if head.func is not fine_tuning:
            loss = loss + options.get("conditional_weight", 1.0) * entropy(shares).mean()
        if head.func is alpha_tim:
            loss = loss - options.get("marginal_weight", 1.0) * entropy(shares.mean(dim=0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits(query).detach()


@pytest.mark.parametrize("head", TUNED)
@pytest.mark.parametrize("shots", [1, 5])
def test_gradient_steps_are_those_of_adam_and_autograd_one_episode_at_a_time(head: partial[Tensor], shots: int):
    support, query = episodes(shots=shots)
    logits = head(support, query)
    for e in range(len(support)):
        if shots == 1 and head.keywords.get("similarity") == "euclidean":
            support[e] += 1e-9  # (no direction at a distance of 0)
        expected = tuned(head, support[e], query[e])
        shares, theirs = logits[e].softmax(dim=1), expected.softmax(dim=1)  # (up to a constant a query)
        torch.testing.assert_close(shares, theirs, rtol=1e-6, atol=1e-6)
        assert (
            shares - head.func(support[e : e + 1], query[e : e + 1], **head.keywords | {"steps": 1})[0].softmax(1)
        ).abs().max() > 1e-4


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def rectified(support: np.ndarray, query: np.ndarray, scale: float, top: int | None) -> np.ndarray:
    """Prototypes of Liu et al. 2020 for one episode (W, K, D), (N, D)."""
    query = query + support.mean(axis=(0, 1)) - query.mean(axis=0)
    prototypes = support.mean(axis=1)
    cosines = unit(query) @ unit(prototypes).T
    result = []
    for c, prototype in enumerate(prototypes):
        own = [n for n in range(len(query)) if cosines[n].argmax() == c]
        own = sorted(own, key=lambda n: -cosines[n, c])[: top or len(query)]
        members = np.concatenate([support[c], query[own]])
        weights = np.exp(scale * unit(members) @ unit(prototype))
        result.append((weights[:, None] * members).sum(axis=0) / weights.sum())
    return np.stack(result)


@pytest.mark.parametrize(("scale", "top"), [(10.0, None), (1.0, None), (3.0, 2)])
@pytest.mark.parametrize("shots", [1, 3])
def test_bd_cspn_is_the_papers_formula(scale: float, top: int | None, shots: int):
    support, query = episodes(shots=shots)
    support = support * torch.linspace(0.5, 2, shots, dtype=torch.float64)[:, None]  # the lengths count in the mean
    logits = bd_cspn(support, query, scale=scale, top=top)
    for e in range(len(support)):
        expected = unit(query[e].numpy()) @ unit(rectified(support[e].numpy(), query[e].numpy(), scale, top)).T
        np.testing.assert_allclose(logits[e].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize(("neighbors", "smoothness", "steps"), [(2, 0.7, 20), (5, 2.0, 3), (1, 0.3, 1)])
def test_laplacian_shot_is_the_papers_bound_update(rectify: bool, neighbors: int, smoothness: float, steps: int):
    support, query = episodes(shots=3)
    options = {"neighbors": neighbors, "smoothness": smoothness, "steps": steps, "rectify": rectify}
    logits = laplacian_shot(support, query, **options)
    for e in range(len(support)):
        items, rows = support[e].numpy(), query[e].numpy()
        prototypes = rectified(items, rows, 10.0, None) if rectify else items.mean(axis=1)
        cost = ((rows[:, None] - prototypes) ** 2).sum(axis=2)
        kernel = np.zeros((len(rows), len(rows)))
        for n, row in enumerate(rows):
            order = np.argsort(((rows - row) ** 2).sum(axis=1))
            kernel[n, [m for m in order if m != n][:neighbors]] = 1
        shares = np.exp(-cost) / np.exp(-cost).sum(axis=1, keepdims=True)
        for _ in range(steps):
            shares = np.exp(-cost + smoothness * kernel @ shares)
            shares /= shares.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(logits[e].softmax(dim=1).numpy(), shares, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("power", "sharpness", "steps"), [(0.5, 10.0, 20), (None, 3.0, 2), (1.5, 5.0, 1)])
def test_pt_map_is_the_papers_algorithm(center: bool, power: float | None, sharpness: float, steps: int):
    support, query = (each.abs() for each in episodes(shots=3, queries=18))
    logits = pt_map(support, query, power=power, sharpness=sharpness, steps=steps, center=center)
    for e in range(len(support)):
        items, rows = support[e].flatten(0, 1).numpy(), query[e].numpy()
        if power is not None:
            items, rows = (items + 1e-6) ** power, (rows + 1e-6) ** power
        if center:
            items, rows = (unit(unit(each) - unit(each).mean(axis=0)) for each in (items, rows))
        classes, known = items.reshape(4, 3, -1).mean(axis=1), np.repeat(np.eye(4), 3, axis=0)
        for step in range(steps + 1):
            plan = np.exp(-sharpness * ((rows[:, None] - classes) ** 2).sum(axis=2))
            for _ in range(500):
                plan *= 1 / plan.sum(axis=1, keepdims=True)
                plan *= len(rows) / 4 / plan.sum(axis=0)
            if step < steps:
                shares = np.concatenate([known, plan])
                means = shares.T @ np.concatenate([items, rows]) / shares.sum(axis=0)[:, None]
                classes = classes + 0.2 * (means - classes)
        np.testing.assert_allclose(logits[e].exp().numpy(), plan, atol=2e-3)


def test_pt_map_shares_out_evenly_wherever_the_queries_lie():
    support, query = (each.float() for each in episodes(queries=20))
    for far in (1.0, 1e3, 1e6):
        plan = pt_map(support, query * far + far, center=False, power=None, steps=2).exp()
        assert plan.isfinite().all()
        torch.testing.assert_close(plan.sum(dim=2), torch.ones(3, 20))
    torch.testing.assert_close(pt_map(support, query).exp().sum(dim=1), torch.full((3, 4), 5.0), rtol=1e-3, atol=0)


def named(head: Head) -> str:
    return f"{head.func.__name__}-{head.keywords}" if isinstance(head, partial) else head.__name__


@pytest.mark.parametrize("head", HEADS, ids=named)
def test_episodes_are_on_their_own_and_classes_and_queries_have_no_order(head: Head):
    support, query = episodes(queries=18, count=5)
    logits = head(support, query)
    assert logits.shape == (5, 18, 4)
    for e in range(5):
        torch.testing.assert_close(head(support[e : e + 1], query[e : e + 1])[0], logits[e], rtol=1e-7, atol=1e-7)
    order, classes = torch.randperm(18, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(head(support, query[:, order]), logits[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(support[:, classes], query), logits[:, :, classes], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS, ids=named)
def test_threads_modes_and_types_change_nothing(head: Head):
    support, query = episodes(queries=18)
    logits = head(support, query)
    assert logits.dtype == torch.float64
    with torch.inference_mode():
        torch.testing.assert_close(head(support.clone(), query.clone()), logits, rtol=0, atol=0)
    with torch.enable_grad(), torch.autocast("cpu"):
        torch.testing.assert_close(head(support, query), logits, rtol=0, atol=0)
    single = head(support.float(), query.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.softmax(dim=2).double(), logits.softmax(dim=2), rtol=0, atol=5e-3)
    half = head(support.half(), query.half())
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    before = support.clone()
    head(support, query)
    assert torch.equal(support, before)
    generator = torch.get_rng_state()
    assert torch.equal(head(support, query), logits)
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("head", HEADS, ids=named)
def test_classes_of_different_sizes(head: Head):
    support, query = episodes(shots=2)
    function, options = (head.func, dict(head.keywords)) if isinstance(head, partial) else (head, {})
    options |= {"alpha": 2.0} if function is alpha_tim and "alpha" not in options else {}
    even = function.fit(Support(support.flatten(1, 2), [2, 2, 2, 2]), **options)(query)
    torch.testing.assert_close(even, function(support, query, **options))
    rows = support.flatten(1, 2)[:, [0, 1, 2, 3, 4, 6, 7]]
    uneven = function.fit(Support(rows, [2, 2, 1, 2]), **options)(query)
    assert uneven.shape == even.shape
    assert uneven.isfinite().all()
    assert not torch.allclose(uneven, even)


@pytest.mark.parametrize("head", HEADS, ids=named)
def test_nan_is_seen(head: Head):
    support, query = episodes()
    query[1, 3, 2] = math.nan
    logits = head(support, query)
    assert logits[1].isnan().any()
    assert logits[[0, 2]].isfinite().all()
    support[2, 0, 0, 0] = math.nan
    assert head(support, query)[2].isnan().any()


@pytest.mark.parametrize("head", HEADS, ids=named)
def test_one_query(head: Head):
    support, query = episodes(queries=1)
    function = head.func if isinstance(head, partial) else head
    if function in (laplacian_shot, pt_map):
        with pytest.raises(UsageError, match="queries"):
            head(support, query)
    else:
        assert head(support, query).isfinite().all()


@pytest.mark.parametrize("head", HEADS, ids=named)
def test_equal_items_and_zeros_give_numbers(head: Head):
    support, query = episodes(queries=18)
    assert head(torch.zeros_like(support), query).isfinite().all()
    assert head(support, torch.zeros_like(query)).isfinite().all()
    assert head(support[:, :1].expand(-1, 4, -1, -1), query[:, :1].expand(-1, 18, -1)).isfinite().all()


@pytest.mark.parametrize("head", TRANSDUCTIVE, ids=named)
def test_transductive_ones_are_marked_and_their_queries_inform_each_other(head: Head):
    support, query = episodes(queries=18)
    function = head.func if isinstance(head, partial) else head
    assert function.transductive
    changed = query.clone()
    changed[:, 9:] = changed[:, 9:].flip(2)
    assert not torch.allclose(head(support, changed)[:, :9], head(support, query)[:, :9], atol=1e-6)


def test_fine_tuning_is_inductive_and_fits_its_support():
    support, query = episodes(shots=5)
    assert not getattr(fine_tuning, "transductive", False)
    torch.testing.assert_close(fine_tuning(support, query)[:, :3], fine_tuning(support, query[:, :3]))
    own = fine_tuning(support, support.flatten(1, 2), steps=300, learning_rate=0.05).argmax(dim=2)
    assert torch.equal(own, torch.arange(4).repeat_interleave(5).expand(3, -1))


@pytest.mark.parametrize(
    ("head", "options"),
    [
        *((head, {"steps": 0}) for head in (fine_tuning, transductive_fine_tuning, alpha_tim, laplacian_shot, pt_map)),
        *((head, {"temperature": 0.0}) for head in (fine_tuning, transductive_fine_tuning, alpha_tim)),
        *((head, {"learning_rate": -1.0}) for head in (fine_tuning, transductive_fine_tuning, alpha_tim, pt_map)),
        *((head, {"similarity": "dot"}) for head in (fine_tuning, transductive_fine_tuning, alpha_tim)),
        (fine_tuning, {"similarity": "euclidean"}),
        (alpha_tim, {"alpha": 0.0}),
        (alpha_tim, {"alpha": math.nan}),
        (alpha_tim, {"conditional_weight": -0.1}),
        (bd_cspn, {"scale": 0.0}),
        (bd_cspn, {"top": 0}),
        (laplacian_shot, {"neighbors": 0}),
        (laplacian_shot, {"neighbors": 17}),
        (laplacian_shot, {"smoothness": math.inf}),
        (pt_map, {"power": 0.0}),
        (pt_map, {"sharpness": 0.0}),
        (pt_map, {"iterations": 0}),
    ],
)
def test_options_that_cannot_be_are_one_error(head: Head, options: dict[str, float]):
    with pytest.raises(UsageError, match=f"expected .*{next(iter(options))}"):
        head(*episodes(), **options)
