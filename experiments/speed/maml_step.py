"""Times a MAML step against learn2learn's algorithm and `higher`, and measures its memory. One command, two tables.

    python -m experiments.speed.maml_step

A figure is one meta-step: inner steps, query loss and backward pass of all tasks. The contenders' gradients must agree
in float64; then, in float32, they take turns for `rounds` rounds with the same allocator settings, and figures are
medians. Nothing else should run on the machine.

learn2learn does not install on current Python. Its `MAML` (Arnold et al. 2020) is measured as its published algorithm:
one task after another, the network called with the weights that result from the inner steps, `backward()` for each
task. Peers run the network as their users write it (convolution, batch norm, ReLU, pooling), and also our Conv4, which
pools before the ReLU.

Memory is torch's peak allocation within a step, from its profiler (on a GPU, from its allocator).
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from experiments.speed.side_by_side import Row, conditions, median_seconds
from pml_fewshot import Conv4, Episode, MAMLTrainer
from pml_fewshot.environment import keep_freed_memory

INNER_LR = 0.4
PEERS = ("learn2learn's algorithm", "higher")
SAME_GRADIENT = 1e-8  # relative, in float64: in float32 rounding alone makes them differ by 1e-3 and more

SETTINGS = ((1, False, 1.4), (1, True, 1.6), (5, False, 1.4))  # inner steps, first order, wanted ratio
MEMORY_SETTINGS = ((5, 5, 1), (10, 5, 1), (5, 1, 15))  # inner steps, shots, queries

Step = Callable[[], Tensor]  # one meta-step; returns the gradient as a vector


def ours() -> nn.Module:
    return nn.Sequential(Conv4(), nn.Linear(64, 5))


def usual() -> nn.Module:
    """Returns the same network as most code writes it, with its parameters in the same order."""
    blocks: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        convolution = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        blocks += [convolution, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 5))


def labels_of(items: Tensor) -> Tensor:
    return torch.arange(items.shape[0], device=items.device).repeat_interleave(items.shape[1])


def flat_gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def step_by_step(
    network: nn.Module, support: Tensor, query: Tensor, inner_steps: int, first_order: bool
) -> tuple[Tensor, Tensor]:
    """Logits (W*Q, W) of a task's queries (W, Q, *item) after inner steps on its support (W, K, *item), and labels."""
    weights = {name: p.clone() for name, p in network.named_parameters()}
    for _ in range(inner_steps):
        loss = F.cross_entropy(functional_call(network, weights, (support.flatten(0, 1),)), labels_of(support))
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=not first_order)
        weights = {name: w - INNER_LR * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    return functional_call(network, weights, (query.flatten(0, 1),)), labels_of(query)


def learn2learn(network: nn.Module, batch: Episode, inner_steps: int, first_order: bool) -> Tensor:
    """Runs a meta-step of learn2learn's algorithm."""
    network.zero_grad()
    for support, query in zip(batch.support, batch.query, strict=True):
        loss = F.cross_entropy(*step_by_step(network, support, query, inner_steps, first_order))
        (loss / len(batch.support)).backward()
    return flat_gradient(network)


def by_higher(network: nn.Module, batch: Episode, inner_steps: int, first_order: bool) -> Tensor:
    """Runs a meta-step of `higher`."""
    import higher  # only this contender needs it

    network.zero_grad()
    optimizer = torch.optim.SGD(network.parameters(), lr=INNER_LR)
    for support, query in zip(batch.support, batch.query, strict=True):
        context = higher.innerloop_ctx(
            network, optimizer, copy_initial_weights=False, track_higher_grads=not first_order
        )
        with context as (copy, inner):
            for _ in range(inner_steps):
                inner.step(F.cross_entropy(copy(support.flatten(0, 1)), labels_of(support)))
            loss = F.cross_entropy(copy(query.flatten(0, 1)), labels_of(query)) / len(batch.support)
            if not first_order:
                loss.backward()
                continue
            # without the graph of its steps, the last weights are leaves, whose gradient is the first-order one
            for parameter, gradient in zip(
                network.parameters(), torch.autograd.grad(loss, copy.parameters()), strict=True
            ):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return flat_gradient(network)


def by_us(trainer: MAMLTrainer, batch: Episode) -> Tensor:
    """Runs a meta-step of MAMLTrainer."""
    trainer.zero_grad()
    trainer(batch).backward()
    return flat_gradient(trainer.network)


def contenders(networks: dict[str, nn.Module], batch: Episode, inner_steps: int, first_order: bool) -> dict[str, Step]:
    """Returns all contenders by name."""
    peers = dict(zip(PEERS, (learn2learn, by_higher), strict=True))
    trainer = MAMLTrainer(networks["Conv4"], INNER_LR, inner_steps, first_order=first_order)
    steps: dict[str, Step] = {"MAMLTrainer": partial(by_us, trainer, batch)}
    for (peer, step), (name, network) in product(peers.items(), networks.items()):
        steps[f"{peer}, {name}"] = partial(step, network, batch, inner_steps, first_order)
    return steps


def episodes(tasks: int, shots: int, queries: int, device: str) -> Episode:
    images = torch.rand(tasks, 5, shots + queries, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return Episode(images[:, :, :shots], images[:, :, shots:]).to(device)


def both_networks(device: str) -> dict[str, nn.Module]:
    """Returns Conv4 and its usual form with the same weights."""
    torch.manual_seed(0)
    networks = {"Conv4": ours().to(device), "usual network": usual().to(device)}
    for own, same in zip(networks["Conv4"].parameters(), networks["usual network"].parameters(), strict=True):
        same.data.copy_(own.data)
    return networks


def check_gradients(batch: Episode, inner_steps: int, first_order: bool, peers: tuple[str, ...] = PEERS) -> None:
    """Raises if the meta-gradient of one of the `peers` differs from ours."""
    device = batch.support.device.type
    networks = {name: network.double() for name, network in both_networks(device).items()}
    doubles = Episode(batch.support.double(), batch.query.double())
    steps = contenders(networks, doubles, inner_steps, first_order)
    gradients = {name: step() for name, step in steps.items() if name.startswith(("MAMLTrainer", *peers))}
    expected = gradients["MAMLTrainer"]
    for name, gradient in gradients.items():
        error = ((gradient - expected).norm() / expected.norm()).item()
        if error > SAME_GRADIENT:
            raise AssertionError(f"{name}: its gradient is {error:.1e} off ours, so the two do not do the same")


def compare(what: str, steps: dict[str, Step], rounds: int, wanted: float) -> None:
    """Prints the lines for one setting."""
    if torch.cuda.is_available():
        steps = {name: partial(finished, step) for name, step in steps.items()}
    for step in steps.values():  # the first run of each is slower
        step()
    seconds = median_seconds(steps, rounds)
    for name in list(steps)[1:]:
        print(Row(what, seconds["MAMLTrainer"], name, seconds[name], f"{wanted:.1f}", unit="s"), flush=True)


def finished(step: Step) -> Tensor:
    """Runs a step and waits until the GPU has finished it."""
    gradient = step()
    torch.cuda.synchronize()
    return gradient


def peak_memory(step: Step, device: str) -> float:
    """Returns the MiB of a step's tensors at its peak, beyond those that existed before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return changes.cumsum(0).max().item() / 2**20


def main(rounds: int = 7, threads: int = 2, tasks: int = 32, queries: int = 15, device: str = "cpu") -> None:
    """Prints the tables.

    Args:
        rounds: rounds in which the contenders take turns.
        threads: torch's number of threads.
        tasks: tasks per meta-step.
        queries: queries for each of the five classes.
        device: cpu or cuda.
    """
    torch.set_num_threads(threads)
    print("\n".join(f"- {line}" for line in conditions(("torch", "higher"))))
    kept = keep_freed_memory()
    print(
        f"- {device}; medians of {rounds} rounds; {tasks} tasks of 5 ways, 1 shot, {queries} queries of 28 x 28, Conv4"
    )
    print(f"- freed memory is {'kept' if kept else 'given back'} for all contenders alike\n")
    print("| meta-step | MAMLTrainer | peer | peer's | times as fast | wanted |\n|---|---|---|---|---|---|")
    networks = both_networks(device)
    for inner_steps, first_order, wanted in SETTINGS:
        what = f"{'first' if first_order else 'second'} order, {inner_steps} inner step{'s' * (inner_steps > 1)}"
        check_gradients(episodes(2, 1, queries, device), inner_steps, first_order)
        steps = contenders(networks, episodes(tasks, 1, queries, device), inner_steps, first_order)
        compare(what, steps, rounds, wanted if device == "cpu" else 5.0)
    print_memory(device)


def print_memory(device: str) -> None:
    """Prints the second table."""
    columns = [f"{steps} steps, {shots} shots, {queries} queries" for steps, shots, queries in MEMORY_SETTINGS]
    print(f"\n| peak of a second-order step, MiB | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    peaks: dict[str, list[float]] = {}
    for inner_steps, shots, queries in MEMORY_SETTINGS:
        batch, networks = episodes(2, shots, queries, device), both_networks(device)
        steps: dict[str, Step] = {
            "learn2learn's algorithm": partial(learn2learn, networks["usual network"], batch, inner_steps, False)
        }
        for name, recompute in (("task_chunk=1", False), ("task_chunk=1, checkpoint_steps=True", True)):
            trainer = MAMLTrainer(networks["Conv4"], INNER_LR, inner_steps, task_chunk=1, checkpoint_steps=recompute)
            steps[name] = partial(by_us, trainer, batch)
        for name, step in steps.items():
            step()  # the first run has more to do
            peaks.setdefault(name, []).append(peak_memory(step, device))
    for name, figures in peaks.items():
        print(f"| {name} | " + " | ".join(f"{figure:,.0f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
