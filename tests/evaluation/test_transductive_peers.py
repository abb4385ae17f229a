"""Transductive heads against easyfsl's: the same features and hyper-parameters give the same predictions."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pml_fewshot  # noqa: F401  (torchvision, which easyfsl imports, needs it beside a CPU build of torch)
from pml_fewshot.evaluation.transductive_heads import alpha_tim, bd_cspn, laplacian_shot, pt_map
from pml_fewshot.evaluation.tuned_heads import fine_tuning, transductive_fine_tuning

methods = pytest.importorskip("easyfsl.methods", reason="easyfsl is not installed")

# theirs, ours at their setting, how many episodes in the default ring: a second in all
PAIRS = {
    "BDCSPN": (bd_cspn, {"scale": 1.0}, 30),
    "LaplacianShot": (laplacian_shot, {"scale": 1.0}, 20),
    "TIM": (
        alpha_tim,
        {"alpha": 1.0, "conditional_weight": 0.1, "similarity": "cosine", "temperature": 10.0, "steps": 50},
        4,
    ),
    "TransductiveFinetuning": (transductive_fine_tuning, {"similarity": "euclidean", "temperature": 1.0}, 6),
    "Finetune": (
        fine_tuning,
        {"similarity": "cosine", "temperature": 1.0, "steps": 200, "learning_rate": 1e-4},
        2,
    ),
    "PTMAP": (pt_map, {"center": False, "steps": 10}, 4),
}


def episodes(count: int, shots: int, dims: int = 64) -> tuple[Tensor, Tensor]:
    """5-way 15-query, overlapping classes, of length 1."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(shots))
    items = F.normalize(randn(count, 5, 1, dims) + 2 * randn(count, 5, shots + 15, dims), dim=3)
    return items[:, :, :shots], items[:, :, shots:].flatten(1, 2)


def theirs(name: str, support: Tensor, query: Tensor) -> Tensor:
    """(E, N, W), an episode at a time."""
    labels = torch.arange(support.shape[1]).repeat_interleave(support.shape[2])
    scores = []
    for own, rows in zip(support, query, strict=True):
        method = getattr(methods, name)()
        with torch.no_grad():
            method.process_support_set(own.flatten(0, 1), labels)
            scores.append(method(rows))
    return torch.stack(scores)


def compared(name: str, ours: Callable[..., Tensor], options: dict[str, float], count: int, shots: int) -> float:
    """Share of the queries that are predicted differently."""
    support, query = episodes(count, shots)
    if name == "PTMAP":  # which takes away what is negative before its power
        support, query = support.relu(), query.relu()
    expected, logits = theirs(name, support, query), ours(support, query, **options)
    assert expected.isfinite().all()
    own = torch.arange(5).repeat_interleave(15)
    assert (expected.argmax(dim=2) == own).double().mean() > 0.5  # chance is 0.2
    return (expected.argmax(dim=2) != logits.argmax(dim=2)).double().mean().item()


@pytest.mark.parametrize("shots", [1])
@pytest.mark.parametrize("name", PAIRS)
def test_predictions_are_easyfsls(name: str, shots: int):
    ours, options, count = PAIRS[name]
    assert compared(name, ours, options, count, shots) <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("name", PAIRS)
def test_predictions_are_easyfsls_over_200_episodes(name: str, shots: int):
    ours, options, _ = PAIRS[name]
    assert compared(name, ours, options, 200, shots) <= 0.005


def test_easyfsls_pt_map_underflows_on_features_of_many_dimensions():
    """It takes exp(-10 d^2) of powers that are not scaled, adds 1e-10 to sums, and so loses queries; ours does not."""
    support, query = episodes(1, 1, dims=640)
    support, query = 5 * support.relu(), 5 * query.relu()
    plan = theirs("PTMAP", support, query)
    assert not torch.allclose(plan.sum(dim=2), torch.ones(1, 75), atol=0.5)  # each query should be shared out: NaN
    own = pt_map(support, query, center=False, steps=10)
    torch.testing.assert_close(own.exp().sum(dim=2), torch.ones(1, 75))
