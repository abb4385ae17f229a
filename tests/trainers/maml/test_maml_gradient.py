"""The meta-gradient of MAML: finite differences, another library, explicit formulas; the same in every mode."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, SupConLoss, TripletMarginLoss
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pml_fewshot.trainers.maml.autograd import DoubleBackward
from pml_fewshot.trainers.maml.trainer import MAMLTrainer
from tests.trainers.maml import small_maml as small
from tests.trainers.maml.small_maml import close, episodes, gradient, labels_of, trainer, vector


def smooth() -> nn.Module:
    """42 weights, and no kink that a finite difference could step over."""
    blocks = [nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten()]
    return nn.Sequential(*blocks, nn.Linear(8, small.WAYS))


def is_derivative(maml: MAMLTrainer, directions: int = 4, step: float = 1e-5) -> bool:
    """Whether the gradient is the loss's slope, a central difference, in some random directions of all parameters."""
    found = gradient(maml, episodes())
    parameters = [p for p in maml.parameters() if p.requires_grad]
    start = parameters_to_vector(parameters).detach()
    random = torch.randn(directions, len(start), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    random = random / random.norm(dim=1, keepdim=True)

    def loss(point: Tensor) -> Tensor:
        vector_to_parameters(point, parameters)
        return maml(episodes()).detach()

    slopes = torch.stack([(loss(start + step * each) - loss(start - step * each)) / (2 * step) for each in random])
    return close(random @ found, slopes, 1e-6)


class Attention(nn.Module):
    """Rows of an image attend to each other; and the distance to learned points is taken by `torch.cdist`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(small.SIZE // 4, num_heads=2, batch_first=True)
        self.points = nn.Parameter(torch.rand(small.WAYS, small.SIZE // 4))

    def forward(self, images: Tensor) -> Tensor:
        rows = F.avg_pool2d(images, 4).squeeze(1)
        return -torch.cdist(self.attention(rows, rows, rows, need_weights=False)[0].mean(dim=1), self.points)


MANHATTAN, SMOOTHED = ContrastiveLoss(distance=LpDistance(p=1)), nn.CrossEntropyLoss(label_smoothing=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"parallel": "loop"},
        {"parallel": "threads"},
        {"parallel": "vmap"},
        {"inner_steps": 1, "checkpoint_steps": True, "parallel": "vmap"},
        {"batch_norm": "inductive"},
        {"learn_inner_lr": "per_layer"},
        {"learn_inner_lr": "per_layer_per_step", "checkpoint_steps": True},
        {"step_weights": [0.2, 0.0, 1.0]},
        {"adapt": ["5."]},
        {"inner_loss": small.Tempered(), "learn_inner_lr": "per_layer"},
        {"inner_loss": small.Tempered(), "checkpoint_steps": True, "adapt": ["5."]},
        {"inner_loss": TripletMarginLoss()},  # its distance is torch.cdist
        {"make": Attention, "inner_steps": 2},
        pytest.param({"inner_loss": MANHATTAN, "checkpoint_steps": True}, marks=pytest.mark.slow),
        pytest.param({"inner_loss": SupConLoss(), "loss": SMOOTHED}, marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_the_gradient_is_the_derivative_of_the_loss(options: dict[str, Any]) -> None:
    assert is_derivative(trainer(**{"make": smooth, "inner_steps": 3, **options}))


def test_threads_differentiate_attention_twice_and_leave_torchs_switches_as_they_were() -> None:
    def switches() -> list[bool]:
        kinds = torch.backends.cuda
        return [kinds.flash_sdp_enabled(), kinds.math_sdp_enabled(), kinds.mem_efficient_sdp_enabled()]

    before, threads = switches(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            trainer(Attention, parallel="threads")(episodes(tasks=8)).backward()
    finally:
        torch.set_num_threads(threads)
    assert switches() == before


def test_first_order_is_not_the_derivative() -> None:
    """Else the test above would not notice a gradient that left out the second derivatives."""
    assert not is_derivative(trainer(smooth, inner_steps=3, first_order=True))


@pytest.mark.parametrize(("inner_steps", "first_order"), [(1, False), (3, False), (3, True)])
def test_the_loss_and_its_gradient_are_those_of_an_unrolled_inner_loop(inner_steps: int, first_order: bool) -> None:
    maml, batch = trainer(smooth, inner_steps=inner_steps, first_order=first_order), episodes()
    network, losses = copy.deepcopy(maml.network), []

    def loss(weights: dict[str, Tensor], items: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, weights, (items.flatten(0, 1),)), labels_of(items))

    for support, query in zip(batch.support, batch.query, strict=True):
        weights = dict(network.named_parameters())
        for _ in range(inner_steps):
            slopes = torch.autograd.grad(loss(weights, support), list(weights.values()), create_graph=True)
            if first_order:  # Finn et al. 2017, section 5.2: the slopes count as constants
                slopes = [slope.detach() for slope in slopes]
            weights = {name: w - small.INNER_LR * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        losses.append(loss(weights, query))
    torch.stack(losses).mean().backward()
    assert close(gradient(maml, batch), gradient(network), 1e-10)
    torch.testing.assert_close(maml(batch).detach(), torch.stack(losses).mean().detach())


def test_step_weights_weigh_the_losses_after_each_step() -> None:
    one, two = (trainer(inner_steps=steps)(episodes()) for steps in (1, 2))
    torch.testing.assert_close(trainer(inner_steps=2, step_weights=[0.3, 0.7])(episodes()), 0.3 * one + 0.7 * two)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_distances_that_can_be_differentiated_twice_are_those_of_torch(p: float) -> None:
    points = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(points, points[:2], p=p)
    with DoubleBackward():
        torch.testing.assert_close(torch.cdist(points, points[:2], p=p), expected)


def test_higher_has_the_same_gradient() -> None:
    """`higher` (Grefenstette et al. 2019) makes a functional copy of the network for each task."""
    higher = pytest.importorskip("higher")
    maml, batch = trainer(inner_steps=3), episodes()
    network = copy.deepcopy(maml.network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=small.INNER_LR)
    for support, query in zip(batch.support, batch.query, strict=True):
        with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (own, steps):
            for _ in range(3):
                steps.step(F.cross_entropy(own(support.flatten(0, 1)), labels_of(support)))
            (F.cross_entropy(own(query.flatten(0, 1)), labels_of(query)) / small.TASKS).backward()
    assert close(gradient(maml, batch), gradient(network), 1e-8)


@pytest.mark.parametrize("other", [{"batch_norm": "inductive"}, {"first_order": True}], ids=", ".join)
def test_every_mode_has_the_same_gradient(other: dict[str, Any]) -> None:
    options = {"inner_steps": 2, "step_weights": [0.5, 1], "learn_inner_lr": "per_layer_per_step", **other}
    expected = gradient(trainer(parallel="loop", task_chunk=1, **options), episodes())
    for mode in (
        {"parallel": "loop", "task_chunk": 2, "checkpoint_steps": True},
        {"parallel": "threads"},
        {"parallel": "vmap"},
        {"parallel": "auto", "task_chunk": 2, "checkpoint_steps": True},
    ):
        assert close(gradient(trainer(**options, **mode), episodes()), expected, 1e-10), mode


@pytest.mark.parametrize("parallel", ["loop", "threads", "vmap"])
def test_recomputed_steps_drop_the_same_numbers(parallel: str) -> None:
    def dropping() -> nn.Module:
        blocks = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Tanh(), nn.Conv2d(4, 2, 3)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.5), nn.Linear(50, small.WAYS))

    results = []
    for recompute in (False, True):
        maml = trainer(dropping, inner_steps=3, checkpoint_steps=recompute, task_chunk=2, parallel=parallel)
        torch.manual_seed(5)
        results.append((gradient(maml, episodes()), torch.rand(1)))
    assert close(results[1][0], results[0][0], 1e-10)
    assert torch.equal(results[1][1], results[0][1])  # and the generator is where it would be


def test_a_scaled_loss_has_a_scaled_gradient() -> None:
    maml = trainer(smooth)
    once = gradient(maml, episodes())
    maml.zero_grad()
    (3 * maml(episodes())).backward()
    assert close(gradient(maml), 3 * once, 1e-12)


def test_reptile_moves_towards_the_weights_that_plain_training_on_each_task_ends_at() -> None:
    maml, batch = trainer(inner_steps=3, reptile=True, task_chunk=2), episodes()
    ends = [small.trained_copy(maml.network, items, 3) for items in torch.cat([batch.support, batch.query], dim=2)]
    expected = torch.stack([vector(maml.network.parameters()) - vector(end.parameters()) for end in ends]).mean(dim=0)
    assert close(gradient(maml, batch), expected.detach(), 1e-10)
