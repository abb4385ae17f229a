"""The meta-gradient of MAML: finite differences, another library, explicit formulas; the same in every mode."""

from functools import partial
from itertools import product

import higher
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, SupConLoss, TripletMarginLoss
from torch import Tensor, nn

from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.episodes import Episode
from pml_fewshot.trainers.maml import MAMLTrainer

TASKS, WAYS, SHOTS, QUERIES, SIZE = 3, 2, 2, 3, 16
INNER_LR = 0.3


def smooth() -> nn.Module:
    """64 weights, and no kink that a finite difference could step over."""
    blocks = [nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten()]
    return nn.Sequential(*blocks, nn.Linear(8, WAYS)).double()


def convolutions() -> nn.Module:
    return nn.Sequential(Conv4(channels=4), nn.Linear(4, WAYS)).double()


class Tempered(nn.Module):
    """A loss with a parameter, which only the outer loop trains."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs / self.temperature, labels)


def episodes(tasks: int = TASKS) -> Episode:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(tasks, WAYS, SHOTS + QUERIES, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return Episode(images[:, :, :SHOTS], images[:, :, SHOTS:])


def trainer(make=convolutions, seed: int = 0, **options) -> MAMLTrainer:
    torch.manual_seed(seed)
    return MAMLTrainer(make, **{"inner_lr": INNER_LR, **options}).double()


def gradient(maml: MAMLTrainer, batch: Episode) -> Tensor:
    """Of all that is trained, as one vector."""
    maml.zero_grad()
    maml(batch).backward()
    return torch.cat([p.grad.flatten() for p in maml.parameters() if p.requires_grad])


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def finite_differences(maml: MAMLTrainer, batch: Episode, step: float = 1e-5) -> Tensor:
    """Central differences of the loss by each number that is trained."""
    slopes = []
    with torch.no_grad():
        for parameter in (p for p in maml.parameters() if p.requires_grad):
            for number in parameter.view(-1):
                kept = number.item()
                losses = []
                for sign in (1, -1):
                    number.fill_(kept + sign * step)
                    losses.append(maml(batch).detach())
                number.fill_(kept)
                slopes.append((losses[0] - losses[1]) / (2 * step))
    return torch.stack(slopes)


@pytest.mark.parametrize("inner_steps", [1, 3, 5])
@pytest.mark.parametrize("parallel", ["grouped", "vmap"])
def test_finite_differences(inner_steps, parallel):
    maml = trainer(smooth, inner_steps=inner_steps, parallel=parallel)
    assert close(gradient(maml, episodes()), finite_differences(maml, episodes()), 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_norm": "inductive"},
        {"learn_inner_lr": "per_layer"},
        {"learn_inner_lr": "per_layer_per_step", "checkpoint_steps": True},
        {"step_weights": [0.2, 0.0, 1.0]},
        {"adapt": ["5."]},
        {"inner_loss": Tempered, "learn_inner_lr": "per_layer"},
        {"inner_loss": Tempered, "checkpoint_steps": True, "adapt": ["5."]},
        {"inner_loss": TripletMarginLoss},  # its distance is torch.cdist
        {"inner_loss": partial(ContrastiveLoss, distance=LpDistance(p=1)), "checkpoint_steps": True},
        {"inner_loss": SupConLoss, "loss": partial(nn.CrossEntropyLoss, label_smoothing=0.1)},
    ],
    ids=str,
)
def test_finite_differences_of_every_variant(options):
    maml = trainer(smooth, inner_steps=3, **options)
    assert close(gradient(maml, episodes()), finite_differences(maml, episodes()), 1e-6)


class Attention(nn.Module):
    """Rows of an image look at each other; and the distance to learned points is taken by `torch.cdist`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE // 4, num_heads=2, batch_first=True)
        self.points = nn.Parameter(torch.rand(WAYS, SIZE // 4))

    def forward(self, images: Tensor) -> Tensor:
        rows = F.avg_pool2d(images, 4).squeeze(1)
        return -torch.cdist(self.attention(rows, rows, rows)[0].mean(dim=1), self.points)


def test_finite_differences_of_attention_and_distances():
    maml = trainer(Attention, inner_steps=2)
    assert close(gradient(maml, episodes()), finite_differences(maml, episodes()), 1e-6)
    assert maml.inner.parallel == "loop"


def test_a_loss_that_is_scaled_has_a_gradient_that_is_scaled():
    maml = trainer(smooth)
    once = gradient(maml, episodes())
    maml.zero_grad()
    (3 * maml(episodes())).backward()
    assert close(torch.cat([p.grad.flatten() for p in maml.parameters()]), 3 * once, 1e-12)


def test_first_order_is_not_the_derivative():
    """Else the tests above would not notice a gradient that left out the second derivatives."""
    maml = trainer(smooth, inner_steps=3, first_order=True)
    assert not close(gradient(maml, episodes()), finite_differences(maml, episodes()), 1e-2)


def labels_of(items: Tensor) -> Tensor:
    return torch.arange(items.shape[0]).repeat_interleave(items.shape[1])


@pytest.mark.parametrize("inner_steps", [1, 3, 5])
def test_higher_has_the_same_gradient(inner_steps):
    """`higher` (Grefenstette et al. 2019) makes a functional copy of the network for each task."""
    maml, batch = trainer(inner_steps=inner_steps), episodes()
    network = convolutions()
    network.load_state_dict(maml.network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=INNER_LR)
    for support, query in zip(batch.support, batch.query, strict=True):
        with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (copy, steps):
            for _ in range(inner_steps):
                steps.step(F.cross_entropy(copy(support.flatten(0, 1)), labels_of(support)))
            (F.cross_entropy(copy(query.flatten(0, 1)), labels_of(query)) / TASKS).backward()
    theirs = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert close(gradient(maml, batch), theirs, 1e-8)


def explicit(network: nn.Module, images: Tensor, weights: list[Tensor]) -> Tensor:
    """The network of `smooth` written out."""
    kernel, bias, scale, shift, matrix, offset = weights
    x = F.conv2d(images, kernel, bias, stride=2)
    x = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / (x.var(dim=(0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    x = F.avg_pool2d((x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).tanh(), 3)
    return x.flatten(1) @ matrix.T + offset


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_unrolled_by_hand(inner_steps, first_order):
    maml, batch = trainer(smooth, inner_steps=inner_steps, first_order=first_order), episodes()
    start = [p.detach().clone().requires_grad_() for p in maml.network.parameters()]
    expected = [torch.zeros_like(p) for p in start]
    for support, query in zip(batch.support, batch.query, strict=True):
        weights = start
        for _ in range(inner_steps):
            loss = F.cross_entropy(explicit(maml.network, support.flatten(0, 1), weights), labels_of(support))
            steps = torch.autograd.grad(loss, weights, create_graph=not first_order)
            weights = [w - INNER_LR * g for w, g in zip(weights, steps, strict=True)]
        if (
            first_order
        ):  # Finn et al. 2017, section 5.2: the gradient at the adapted weights is taken for that at the start
            weights = [w.detach().requires_grad_() for w in weights]
        loss = F.cross_entropy(explicit(maml.network, query.flatten(0, 1), weights), labels_of(query))
        for total, g in zip(expected, torch.autograd.grad(loss, weights if first_order else start), strict=True):
            total += g / TASKS
    assert close(gradient(maml, batch), torch.cat([g.flatten() for g in expected]), 1e-10)


@pytest.mark.parametrize("batch_norm", ["transductive", "inductive"])
@pytest.mark.parametrize("first_order", [False, True])
def test_every_mode_has_the_same_gradient(batch_norm, first_order):
    options = {"inner_steps": 2, "batch_norm": batch_norm, "first_order": first_order, "step_weights": [0.5, 1]}
    options["learn_inner_lr"] = "per_layer_per_step"
    expected = gradient(trainer(parallel="loop", task_chunk=1, **options), episodes(5))
    for parallel, chunk, recompute in product(("loop", "vmap", "grouped", "auto"), (1, 2, None), (False, True)):
        maml = trainer(parallel=parallel, task_chunk=chunk, checkpoint_steps=recompute, **options)
        assert close(gradient(maml, episodes(5)), expected, 1e-10), (parallel, chunk, recompute)


@pytest.mark.parametrize("parallel", ["loop", "grouped", "vmap"])
def test_steps_done_again_drop_the_same_numbers(parallel):
    def dropping() -> nn.Module:
        blocks = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Tanh(), nn.Conv2d(4, 2, 3)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.5), nn.Linear(50, WAYS))

    gradients = []
    for recompute in (False, True):
        maml = trainer(dropping, inner_steps=3, checkpoint_steps=recompute, task_chunk=2, parallel=parallel)
        torch.manual_seed(5)
        gradients.append(gradient(maml, episodes()))
        drawn_after = torch.rand(1)
        gradients.append(drawn_after)
    assert close(gradients[2], gradients[0], 1e-10)
    assert torch.equal(gradients[3], gradients[1])  # and the generator is where it would be


def test_the_two_protocols_and_orders_differ():
    gradients = [
        gradient(trainer(inner_steps=2, batch_norm=batch_norm, first_order=first_order), episodes())
        for batch_norm, first_order in product(("transductive", "inductive"), (False, True))
    ]
    for number, one in enumerate(gradients):
        for other in gradients[number + 1 :]:
            assert not close(one, other, 1e-2)


def test_reptile_moves_towards_what_plain_training_on_each_task_ends_at():
    maml, batch = trainer(inner_steps=3, reptile=True), episodes()
    expected = torch.zeros_like(flat(maml.network))
    for support, query in zip(batch.support, batch.query, strict=True):
        network = convolutions().train()
        network.load_state_dict(maml.network.state_dict())
        items = torch.cat([support, query], dim=1)
        optimizer = torch.optim.SGD(network.parameters(), lr=INNER_LR)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(items.flatten(0, 1)), labels_of(items)).backward()
            optimizer.step()
        expected += (flat(maml.network) - flat(network)) / TASKS
    assert close(gradient(maml, batch), expected, 1e-10)
