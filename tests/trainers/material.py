"""What the trainers' tests train on, and the episodes of a batch written out image by image."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.sampling.batches import Batch
from pml_fewshot.sampling.episodes import Episode
from pml_fewshot.trainers.base import EpisodicTrainer
from pml_fewshot.training.fit import fit

WAYS, SHOTS, QUERIES, SIZE, DIMS, CLASSES = 3, 2, 4, 5, 6, 4
LABELS = torch.tensor([3, 0, 3, 1, 0, 3, 2, 0])  # 1 and 2 stand alone


def embedder(seed: int = 0) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS)))


def images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)


def batch(labels: Tensor = LABELS, seed: int = 0, views: int = 1) -> Batch:
    other_view = images(len(labels), seed=seed + 100) if views == 2 else None
    return Batch(images(len(labels), seed=seed), labels, other_view)


def episode(episodes: int = 1, seed: int = 0) -> Episode:
    every = images(episodes, WAYS, SHOTS + QUERIES, seed=seed)
    return Episode(every[:, :, :SHOTS], every[:, :, SHOTS:])


def floats(given: Any) -> Any:
    """A Batch or an Episode in float32."""
    parts = {name: part.float() if part is not None else None for name, part in vars(given).items() if name != "labels"}
    return type(given)(**parts, **({"labels": given.labels} if isinstance(given, Batch) else {}))


def rotations(trainer: EpisodicTrainer, given: Episode, count: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Support (W, K, D) and query (W, Q, D) of each rotation of each episode, embedded image by image."""
    parts = []
    for rotation in range(count):
        inside = list(range(rotation * SHOTS, (rotation + 1) * SHOTS))
        outside = [i for i in range(SHOTS + QUERIES) if i not in inside]
        outside = [i for i in outside if i > inside[0]] + [i for i in outside if i < inside[0]]
        for every in torch.cat([given.support, given.query], dim=2):
            rows = torch.stack([torch.stack([trainer.embedder(image[None])[0] for image in way]) for way in every])
            parts.append((rows[:, inside].detach(), rows[:, outside].detach()))
    return parts


def tiny_set(classes: int = CLASSES, prefix: str = "") -> FewShotDataset:
    """Ten items a class: a pattern of its own with noise upon it."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(40, 216, (classes, 1, 1, SIZE, SIZE), generator=generator)
    noisy = (pattern + torch.randint(-60, 61, (classes, 10, 1, SIZE, SIZE), generator=generator)).clamp(0, 255)
    names = [f"{prefix}{c}" for c in range(classes)]
    return FewShotDataset(noisy.byte().flatten(0, 1), torch.arange(classes).repeat_interleave(10), names)


def splits() -> Splits:
    return Splits(tiny_set(prefix="train"), None, tiny_set(prefix="test"))


def mean(values: Sequence[float]) -> float:
    assert values, "nothing is tested"
    return sum(values) / len(values)


def dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def far(first: Sequence[float], second: Sequence[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)))


def unit_rows(embeddings: Tensor) -> list[list[float]]:
    """Embeddings (B, D) scaled to length 1."""
    return [[x / math.sqrt(dot(row, row)) for x in row] for row in embeddings.tolist()]


def assert_skipped(trainer: EpisodicTrainer, nothing: Batch | Episode, useful: Batch | Episode) -> None:
    """Two steps before have given Adam a momentum, which must not move the weights any further."""
    optimizer = Adam(trainer.parameters(), lr=0.005)
    assert fit(trainer, [useful, useful], optimizer, 2, progress=False).skipped == 0
    weights = {name: weight.clone() for name, weight in trainer.named_parameters()}
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    assert moments
    history = fit(trainer, [nothing, nothing], optimizer, 2, progress=False)
    assert (history.steps, history.skipped, history.losses) == (2, 2, [])
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.named_parameters())
    for number, moment in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][name]) for name, value in moment.items())
