"""Loop, vmap and grouped convolutions: one result and one gradient, for every network that they take."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pml_fewshot.adaptation.batch_statistics import BatchStatistics
from pml_fewshot.adaptation.grouped_tasks import NotGroupable
from pml_fewshot.adaptation.run_tasks import fastest, fitting_tasks, grouped, loop, uses_batch_norm, vmap
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.resnet12 import ResNet12

TASKS, ITEMS, SIZE = 3, 4, 16


class Residual(nn.Module):
    """What users write: a sum of two paths, a mean over the image, view(size(0), -1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        out = F.leaky_relu(self.first(images))
        out = out + self.norm(self.second(out))
        return self.head(out.mean(dim=(2, 3)).view(out.size(0), -1))


def convolutions() -> nn.Module:
    return nn.Sequential(Conv4(channels=4), nn.Linear(4, 3))


def strided() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, stride=2, dilation=2), nn.BatchNorm2d(4, affine=False), nn.ELU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIZE * SIZE, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    )


NETWORKS = [
    convolutions,
    partial(Embedder, trunk=convolutions),
    partial(ResNet12, in_channels=1, widths=(2, 3, 4, 5)),
    Residual,
    strided,
    perceptron,
]
RUNS = {"vmap": vmap, "grouped": grouped, "grouped, channels last": partial(grouped, channels_last=True)}


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Other weights for each task, as leaves of a graph."""
    generator = torch.Generator().manual_seed(1)
    stacked = {n: p.detach().expand(TASKS, *p.shape) for n, p in network.named_parameters()}
    return {
        n: (w + 0.1 * torch.randn(w.shape, generator=generator, dtype=w.dtype)).requires_grad_()
        for n, w in stacked.items()
    }


def images() -> Tensor:
    return torch.rand(TASKS, ITEMS, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradients_twice(outputs: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """First and second derivatives of a function of the outputs, each as one vector."""
    first = torch.autograd.grad(outputs.square().sum(), weights.values(), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), weights.values())
    return tuple(torch.cat([g.flatten() for g in gradients]) for gradients in (first, second))


@pytest.mark.parametrize("of_first", [None, 3])
@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_way_to_run_gives_the_loops_outputs_and_gradients(run, make, of_first):
    torch.manual_seed(0)
    network = make().double()
    weights = weights_of(network)
    expected = loop(network, weights, images(), of_first)
    outputs = run(network, weights, images(), of_first)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients_twice(outputs, weights), gradients_twice(expected, weights), strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


def test_the_loop_runs_each_task_as_if_it_were_alone():
    torch.manual_seed(0)
    network = Residual().double()
    weights = weights_of(network)
    outputs = loop(network, weights, images())
    for task in range(TASKS):
        alone = Residual().double()
        alone.load_state_dict({name: weight[task].detach() for name, weight in weights.items()})
        torch.testing.assert_close(outputs[task], alone.train()(images()[task]))


def test_the_stock_batch_norm_under_vmap_would_be_wrong():
    """The reason for writing it by hand: with a gradient within vmap and one outside, the second derivative is off."""
    torch.manual_seed(0)
    blocks = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*blocks, nn.Linear(4 * 14 * 14, 3)).double()
    labels = torch.tensor([0, 1, 2, 0])

    def task_loss(weights: dict[str, Tensor], own_images: Tensor, by_hand: bool) -> Tensor:
        """The loss after one inner step."""

        def loss(weights: dict[str, Tensor]) -> Tensor:
            with BatchStatistics(4, by_hand=by_hand):
                return F.cross_entropy(functional_call(network, weights, (own_images,)), labels)

        gradient = torch.func.grad(loss)(weights)
        return loss({name: weights[name] - 0.4 * gradient[name] for name in weights})

    def meta_gradient(by_hand: bool, in_parallel: bool) -> Tensor:
        weights = dict(network.named_parameters())
        of_task = partial(task_loss, weights, by_hand=by_hand)
        losses = (
            torch.func.vmap(of_task)(images()) if in_parallel else torch.stack([of_task(each) for each in images()])
        )
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), weights.values())])

    right = meta_gradient(by_hand=False, in_parallel=False)
    assert (meta_gradient(by_hand=False, in_parallel=True) - right).norm() > 1e-4 * right.norm()
    assert (meta_gradient(by_hand=True, in_parallel=True) - right).norm() < 1e-9 * right.norm()


class Softmax(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).softmax(dim=1)


class ScaledByWeight(nn.Module):
    """Not of a layer: a weight that takes part in arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.scale).flatten(1)


class Flat(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        return {"all": lambda: images.flatten(), "view": lambda: images.view(-1, 7), "mean": lambda: images.mean(1)}[
            self.how
        ]()


class OddCalls(nn.Module):
    """Calls that are right for one task, and not foreseen for several."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("offset", torch.ones(4, TASKS, 14, 14))
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        return {
            "axis": lambda: x.mean(axis=(2, 3)),
            "rows": lambda: F.max_pool2d(x.flatten(1).view(x.size(0), -1), 2),  # (B, D) is (C, H, W) without a C to it
            "buffer": lambda: F.relu(self.offset),
            "sum": lambda: x + self.offset,
        }[self.how]()


@pytest.mark.parametrize(
    "network",
    [
        Softmax(),
        ScaledByWeight(),
        Flat("all"),
        Flat("view"),
        Flat("mean"),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)),
        nn.Linear(SIZE, 2),
        OddCalls("axis"),
        OddCalls("rows"),
        OddCalls("buffer"),
        OddCalls("sum"),
        nn.Embedding(3, 2),
    ],
)
def test_what_may_mix_tasks_is_refused(network):
    with pytest.raises(NotGroupable, match="known to work on tasks side by side"):
        grouped(network, {n: p.expand(TASKS, *p.shape) for n, p in network.named_parameters()}, images().float())


def test_buffers_of_the_network_stay_as_they_are():
    network = convolutions().double().train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert any("running_mean" in name for name in before)
    for run in (loop, vmap, grouped):
        run(network, weights_of(network), images())
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_statistics_are_those_of_the_batch_or_of_its_first_items(affine, by_hand):
    norm = nn.BatchNorm2d(3, affine=affine, eps=0.1).double().eval()
    norm.running_mean.fill_(7)  # never looked at
    if affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    items = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for of_first in (None, 4):
        with BatchStatistics(6, of_first, by_hand):
            normalised = norm(items)
        for channel in range(3):
            seen = items[:of_first, channel]
            expected = (items[:, channel] - seen.mean()) / (seen.var(correction=0) + 0.1).sqrt()
            if affine:
                expected = expected * norm.weight[channel] + norm.bias[channel]
            torch.testing.assert_close(normalised[:, channel], expected)


def test_statistics_of_the_first_items_are_those_of_their_patches():
    """Rows of a batch norm may be several for each item."""
    norm = nn.BatchNorm1d(3).double()
    patches = torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # 6 items
    with BatchStatistics(6, 4):
        of_rows = norm(patches.flatten(0, 1)).unflatten(0, (6, 5))
        expected = norm(patches.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(of_rows, expected)
        with pytest.raises(ValueError, match="as many rows for each of 6 items, got 7 rows"):
            norm(torch.rand(7, 3, dtype=torch.float64))


class Permuting(nn.Module):
    """As some of torchvision's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        channels_last = images.contiguous(memory_format=torch.channels_last)
        return self.conv(channels_last).permute(0, 2, 3, 1).contiguous().view(len(images), -1)


class Noisy(nn.Module):
    """Draws in training, and does then what cannot be grouped."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) + (torch.randn_like(images.flatten(1)) if self.training else 0)


class Sneaky(nn.Module):
    """Built of known calls, and yet another network side by side: it looks at how many channels there truly are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return (self.conv(images).flatten(1)).relu() if images.stride(0) == SIZE * SIZE else images.flatten(1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (convolutions, "grouped"),
        (perceptron, "grouped"),
        (Permuting, "loop"),
        (Noisy, "loop"),
        (Sneaky, "loop"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), "grouped"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=None), nn.Flatten()), "grouped"),
    ],
)
def test_the_fastest_that_a_network_allows(make, expected):
    torch.manual_seed(0)
    network = make().double().train()
    state = torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert fastest(network, images()[0]) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    {"loop": loop, "grouped": grouped}[expected](network, weights_of(network), images())


@pytest.mark.parametrize(
    ("shape", "queries", "tasks"),
    [((1, 28, 28), 15, 4), ((1, 28, 28), 1, 8), ((3, 84, 84), 5, 1), ((3, 224, 224), 15, 1), ((64,), 15, 8)],
)
def test_fewer_tasks_of_large_images_are_run_at_a_time(shape, queries, tasks):
    support, query = torch.empty(20, 5, 1, *shape), torch.empty(20, 5, queries, *shape)
    assert fitting_tasks(support, query) == fitting_tasks(support, query.flatten(1, 2)) == tasks


def test_batch_norm_is_seen_wherever_it_is_called():
    class Functional(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.batch_norm(images, None, None, training=True).flatten(1)

    assert uses_batch_norm(Functional(), images()[0])
    assert uses_batch_norm(convolutions().double(), images()[0])
    assert not uses_batch_norm(nn.Flatten(), images()[0])


def test_dropout_differs_between_tasks():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    same = torch.ones(2, 1, 1, 8, 8)
    for run in (loop, vmap, grouped):
        torch.manual_seed(0)
        outputs = run(network, {}, same)
        assert outputs.shape == (2, 1, 64)
        assert not torch.equal(outputs[0], outputs[1])
