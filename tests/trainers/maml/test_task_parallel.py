"""Loop, vmap and threads: one result and one gradient, for every network that they take."""

import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.resnet12 import ResNet12
from pml_fewshot.trainers.maml import inner_loop
from pml_fewshot.trainers.maml.batch_statistics import BatchStatistics
from pml_fewshot.trainers.maml.task_parallel import (
    copies_for,
    fastest,
    in_threads,
    loop,
    max_tasks_per_chunk,
    normalizes,
    sharing_copy,
    swapped,
    vmap,
)
from tests.trainers.maml.small_maml import SIZE, TASKS, close, convolutions, episodes, trainer, vector

ITEMS = 4


def loop_of_a_copy(network: nn.Module, *arguments: Any) -> Tensor:
    return loop(sharing_copy(network), *arguments)


RUNS = {"vmap": vmap, "copy": loop_of_a_copy}


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


def strided() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, stride=2, dilation=2), nn.BatchNorm2d(4, affine=False), nn.ELU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))


def normalized_perceptron() -> nn.Module:
    layers = [nn.Linear(SIZE * SIZE, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3)]
    return nn.Sequential(nn.Flatten(), *layers)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Other weights for each task, as leaves of a graph."""
    torch.manual_seed(1)
    stacked = {n: p.detach() + 0.1 * torch.randn(TASKS, *p.shape, dtype=p.dtype) for n, p in network.named_parameters()}
    return {name: weight.requires_grad_() for name, weight in stacked.items()}


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def images() -> Tensor:
    return rand(TASKS, ITEMS, 1, SIZE, SIZE)


def gradients_twice(outputs: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """First and second derivatives of a function of the outputs, each as one vector."""
    first = torch.autograd.grad(outputs.square().sum(), list(weights.values()), create_graph=True)
    second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), list(weights.values()))
    return vector(first), vector(second)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(
    ("make", "num_stat_items"),
    [
        (convolutions, None),
        (convolutions, 3),
        (partial(Embedder, trunk=convolutions()), None),
        (partial(ResNet12, in_channels=1, widths=(2, 3, 4, 5)), None),
        (Residual, 3),
        (strided, None),
        (normalized_perceptron, None),
        (normalized_perceptron, 3),
    ],
)
def test_every_way_to_run_gives_the_loops_outputs_and_gradients(
    run: Callable[..., Tensor], make: Callable[[], nn.Module], num_stat_items: int | None
) -> None:
    torch.manual_seed(0)
    network = make().double().train()
    weights = weights_of(network)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    expected = loop(network, weights, images(), num_stat_items)
    outputs = run(network, weights, images(), num_stat_items)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients_twice(outputs, weights), gradients_twice(expected, weights), strict=True):
        assert close(one, other, 1e-9)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())


def test_the_stock_batch_norm_under_vmap_would_be_wrong() -> None:
    """The reason to decompose it: with a gradient within vmap and one outside, the second derivative is off."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten())
    network = network.append(nn.Linear(4 * 14 * 14, 3)).double()
    weights = dict(network.named_parameters())

    def meta_gradient(decomposed: bool, in_parallel: bool) -> Tensor:
        def loss(weights: dict[str, Tensor], own_images: Tensor) -> Tensor:
            with BatchStatistics(ITEMS, decomposed=decomposed):
                return F.cross_entropy(functional_call(network, weights, (own_images,)), torch.tensor([0, 1, 2, 0]))

        def after_a_step(own_images: Tensor) -> Tensor:
            slopes = torch.func.grad(loss)(weights, own_images)
            return loss({name: weights[name] - 0.4 * slopes[name] for name in weights}, own_images)

        run = (
            torch.func.vmap(after_a_step) if in_parallel else lambda tasks: torch.stack(list(map(after_a_step, tasks)))
        )
        return vector(torch.autograd.grad(run(images()).sum(), list(weights.values())))

    right = meta_gradient(decomposed=False, in_parallel=False)
    assert not close(meta_gradient(decomposed=False, in_parallel=True), right, 1e-4)
    assert close(meta_gradient(decomposed=True, in_parallel=True), right, 1e-9)


class Calling(nn.Module):
    """A convolution, and then what is asked for."""

    def __init__(self, call: Callable[["Calling", Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(ITEMS, TASKS, 14, 14))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        self.conv = nn.Conv2d(1, 1, 3)
        self.call, self.calls = call, count()

    def forward(self, images: Tensor) -> Tensor:
        return self.call(self, self.conv(images))


class TheSame(nn.Module):
    """Keeps a layer where a copy does not look for it: in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE * SIZE, 3)
        layer = self.layer
        self.call = lambda images: layer(images.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.call(images)


class Locked(nn.Flatten):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(("threads", "chunks", "each"), [(2, 7, 1), (5, 2, 2)])
def test_threads_take_turns_at_as_many_copies_and_results_come_in_order(threads: int, chunks: int, each: int) -> None:
    network, before = nn.Linear(2, 2), torch.get_num_threads()
    seen, both = [], threading.Barrier(2)

    def work(own: nn.Linear, number: int) -> int:
        if number < 2:
            both.wait(timeout=60)  # the first two are under way at a time
        seen.append((id(own), own.weight is network.weight, torch.get_num_threads()))
        return number

    torch.set_num_threads(threads)
    try:
        assert list(in_threads(copies_for(network, chunks), work, [[number] for number in range(chunks)])) == list(
            range(chunks)
        )
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    copies, shared, of_operations = zip(*seen, strict=True)
    assert len(set(copies)) == 2
    assert id(network) not in copies
    assert all(shared)
    assert set(of_operations) == {each}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_what_cannot_be_copied_or_draws_numbers_is_run_by_the_loop() -> None:
    class Holds(nn.Module):
        """A loss that holds a lock, that draws, or neither."""

        def __init__(self, lock: bool = False, draws: bool = False) -> None:
            super().__init__()
            self.lock, self.draws, self.calls = threading.Lock() if lock else None, draws, 0

        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(outputs * (1 + torch.rand(()) if self.draws else 1), labels)

    losses, found = [Holds(), Holds(lock=True), Holds(draws=True)], []
    for loss in losses:
        maml = trainer(loss=loss)
        torch.manual_seed(1)
        found.append([maml(episodes()).item() for _ in range(2)])
    assert [loss.calls for loss in losses] == [0, 12, 10]  # of its own: none; 2 steps of 3 tasks; less a first task
    assert found[0] == pytest.approx(found[1], rel=1e-12)  # which threads share operations is rounding
    expected = trainer(loss=Holds(draws=True), parallel="loop", task_chunk=1)
    torch.manual_seed(1)
    assert [expected(episodes()).item() for _ in range(2)] == pytest.approx(found[2], rel=1e-12)


@pytest.mark.usefixtures("two_threads")
def test_an_inner_loss_is_seen_to_learn_once_whatever_its_copies_see_later() -> None:
    maml = trainer(inner_loss=lambda outputs, labels: F.relu(1 - outputs.square().sum()))
    maml(episodes(shots=1))
    with torch.no_grad():
        for parameter in maml.network[-1].parameters():
            parameter.mul_(1000)  # and the loss is 0
    maml(episodes(shots=1))


def test_an_error_in_a_thread_is_the_users_own() -> None:
    def work(own: nn.Module, number: int) -> None:
        raise ZeroDivisionError(f"in {number}")

    with pytest.raises(ZeroDivisionError, match="in 0"):
        list(in_threads(copies_for(nn.Flatten(), 3), work, [[0], [1], [2]]))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("num_stat_items", [None, 4])
def test_batch_statistics_are_those_of_the_batch_or_of_its_first_items(
    affine: bool, decomposed: bool, num_stat_items: int | None
) -> None:
    norm = nn.BatchNorm2d(3, affine=affine, eps=0.1).double().eval()
    nn.init.constant_(norm.running_mean, 7)  # never used
    if affine:
        norm.weight.data, norm.bias.data = rand(2, 3)
    items = rand(6, 3, 2, 2)
    seen = items[:num_stat_items]
    mean, variance = seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=0)
    with BatchStatistics(6, num_stat_items, decomposed):
        normalized = norm(items)
    torch.testing.assert_close(normalized, F.batch_norm(items, mean, variance, norm.weight, norm.bias, eps=0.1))


def test_statistics_of_the_first_items_are_those_of_their_patches() -> None:
    """A batch norm's input may have several rows for each item."""
    norm, patches = nn.BatchNorm1d(3).double(), rand(6, 5, 3)  # 6 items
    with BatchStatistics(6, 4):
        rows = norm(patches.flatten(0, 1)).unflatten(0, (6, 5))
        torch.testing.assert_close(rows, norm(patches.transpose(1, 2)).transpose(1, 2))
        with pytest.raises(UsageError, match="as many rows of batch norm for each item, got 7 rows for 6 items"):
            norm(rand(7, 3))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (convolutions, "threads"),
        (normalized_perceptron, "threads"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=None), nn.Flatten()), "threads"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(SIZE * SIZE)), "threads"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), "loop"),  # whose draws would come in any order
        (lambda: Calling(lambda net, x: (x + torch.rand_like(x) if net.training else x).flatten(1)), "loop"),
        (Locked, "loop"),
        (TheSame, "loop"),
    ],
)
def test_the_fastest_way_that_a_network_allows(make: Callable[[], nn.Module], expected: str) -> None:
    torch.manual_seed(0)
    network = make().double().train()
    state, buffers = torch.get_rng_state(), {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert fastest(network, images()[0]) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())


def test_the_fastest_way_is_decided_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once and for all by the first images, which may have been on a CPU before the trainer moved to a GPU."""
    answers = {"cpu": ["threads"], "meta": ["vmap"]}  # to one question each
    monkeypatch.setattr(inner_loop, "fastest", lambda network, images: answers[images.device.type].pop())
    monkeypatch.setattr(inner_loop, "normalizes", lambda network, images: True)
    inner = trainer().inner
    modes = [inner.mode(images()[0].to(device)) for device in ("cpu", "meta", "cpu", "meta")]
    assert modes == ["threads", "vmap", "threads", "vmap"]
    ran = []
    for name in ("loop", "vmap"):
        monkeypatch.setattr(inner_loop, name, lambda *_, name=name, **__: ran.append(name) or torch.ones(3, 4, 2))
    for name in ("loop", "vmap", "threads"):
        trainer(parallel=name).inner.outputs({}, images(), 2)
    assert ran == ["loop", "vmap", "loop"]  # a thread loops over its own


@pytest.mark.parametrize(
    ("shape", "queries", "tasks"),
    [((1, 28, 28), 15, 64), ((3, 84, 84), 5, 18), ((3, 224, 224), 15, 1), ((64,), 15, 64)],
)
def test_fewer_tasks_of_large_images_are_run_at_a_time(shape: tuple[int, ...], queries: int, tasks: int) -> None:
    support, query = torch.empty(20, 5, 1, *shape), torch.empty(20, 5, queries, *shape)
    for each in (query, query.flatten(1, 2)):
        assert max_tasks_per_chunk(support, each, "vmap") == tasks
        assert max_tasks_per_chunk(support, each, "threads") == max_tasks_per_chunk(support, each, "loop") == 1


def test_batch_norm_is_seen_wherever_it_is_called() -> None:
    maml = trainer(lambda: Calling(lambda net, x: F.batch_norm(x, None, None, training=True).flatten(1)))
    assert not maml.transductive  # as far as can be told from the outside
    maml.inner.mode(images()[0])
    assert maml.transductive
    assert not normalizes(nn.Flatten(), images()[0])


@pytest.mark.parametrize("run", [loop, vmap])
def test_dropout_differs_between_tasks(run: Callable[..., Tensor]) -> None:
    outputs = run(nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), {}, torch.ones(2, 1, 1, 8, 8))
    assert outputs.shape == (2, 1, 64)
    assert not torch.equal(outputs[0], outputs[1])


class TwoNames(nn.Module):
    """A layer under two names, twice in the network, and a buffer that the network replaces."""

    def __init__(self, tied: bool, counts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(SIZE * SIZE, SIZE * SIZE), nn.Linear(SIZE * SIZE, 2)
        self.again = nn.Sequential(self.first, self.last) if tied else nn.Identity()
        self.counts, self.calls = counts, nn.Buffer(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.counts:
            self.calls = self.calls + 1
        return self.last(self.first(torch.tanh(self.first(images.flatten(1)))))


@pytest.mark.parametrize("mode", ["loop", "vmap", "threads"])
def test_a_layer_of_two_names_trains_as_with_one_and_stays_the_users_own(mode: str) -> None:
    losses = []
    for tied in (True, False):
        network = TwoNames(tied, counts=True)
        maml = trainer(lambda network=network: network, inner_steps=2, parallel=mode)
        own = [*map(id, network.parameters()), id(network.calls)]
        optimizer = torch.optim.SGD(maml.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            maml(episodes()).backward()
            optimizer.step()
        losses.append(maml(episodes()).item())
        maml.classify(episodes().support, episodes().query.flatten(1, 2))
        assert [*map(id, network.parameters()), id(network.calls)] == own
        assert all(type(parameter) is nn.Parameter for parameter in network.parameters())
        assert network.calls == 0
    assert losses[0] == losses[1] != pytest.approx(math.log(2), abs=1e-3)


def test_a_buffer_that_the_network_fills_is_empty_again_and_a_compiled_network_is_run_by_the_loop() -> None:
    class Fills(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            self.seen = images.mean()
            return super().forward(images)

    network = Fills(3, 2)
    network.register_buffer("seen", None)
    with swapped(network, dict(network.named_parameters())):
        network(torch.ones(1, 3))
        assert network.seen == 1
    assert network.seen is None
    compiled = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), backend="eager")
    assert fastest(compiled, torch.rand(3, 1, 2, 2)) == "loop"


def test_a_network_has_its_own_tensors_back_after_an_error() -> None:
    network = nn.Linear(3, 2)
    own, other = network.weight, {name: parameter + 1 for name, parameter in network.named_parameters()}
    with swapped(network, other):
        assert network.weight is other["weight"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), swapped(network, other):
        network(torch.zeros(1, 4))
    assert network.weight is own
