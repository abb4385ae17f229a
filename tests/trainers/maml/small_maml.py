"""What the tests of MAML share: small networks, episodes, and the plain training that an inner loop must equal."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.sampling.episodes import Episode
from pml_fewshot.trainers.maml.trainer import MAMLTrainer

TASKS, WAYS, SHOTS, QUERIES, SIZE = 3, 2, 2, 3, 16
INNER_LR = 0.3


def convolutions(outputs: int = WAYS) -> nn.Module:
    return nn.Sequential(Conv4(channels=4), nn.Linear(4, outputs))


def perceptron(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 4), *between, nn.Linear(4, WAYS))


class Tempered(nn.Module):
    """A loss with a parameter, which only the outer loop trains."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs / self.temperature, labels)


def trainer(make: Callable[[], nn.Module] = convolutions, **options: Any) -> MAMLTrainer:
    torch.manual_seed(0)
    return MAMLTrainer(make(), **{"inner_lr": INNER_LR, **options}).double()


def episodes(tasks: int = TASKS, shots: int = SHOTS) -> Episode:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(tasks, WAYS, shots + QUERIES, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return Episode(images[:, :, :shots], images[:, :, shots:])


def labels_of(items: Tensor) -> Tensor:
    """Labels of (W, K, *item), flattened."""
    return torch.tensor([way for way in range(items.shape[0]) for _ in range(items.shape[1])])


def trained_copy(network: nn.Module, items: Tensor, steps: int) -> nn.Module:
    """Plain gradient descent on (W, K, *item), in training mode: batch norm uses the statistics of the batch."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=INNER_LR)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(items.flatten(0, 1)), labels_of(items)).backward()
        optimizer.step()
    return network


def gradient(module: nn.Module, batch: Episode | None = None) -> Tensor:
    """The gradient by all that is trained, as one vector: of a trainer's loss of a batch, or the one that is there."""
    if batch is not None:
        module.zero_grad()
        module(batch).backward()
    return vector(p.grad for p in module.parameters() if p.grad is not None)


def vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())
