"""What the trainers' tests train on, and the episodes of a batch written out image by image."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.sampling.batches import Batch
from pml_fewshot.sampling.episodes import Episode
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.training.fit import fit

Make = Callable[..., FewShotTrainer]
Rows = list[list[float]]
WAYS, SHOTS, QUERIES, SIZE, DIMS, CLASSES = 3, 2, 4, 5, 6, 4
LABELS = torch.tensor([3, 0, 3, 1, 0, 3, 2, 0])  # 1 and 2 stand alone
MARGIN = 0.2


def embedder(seed: int = 0, *more: nn.Module) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS), *more))


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
    parts = {name: part for name, part in vars(given).items() if part is not None and part.is_floating_point()}
    return replace(given, **{name: part.float() for name, part in parts.items()})


def ways_of(count: int) -> Tensor:
    """Labels of `count` items a class, class by class."""
    return torch.arange(WAYS).repeat_interleave(count)


def embedded(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Support and queries of two episodes."""
    generator = torch.Generator().manual_seed(3)
    shapes = (2, WAYS, SHOTS, DIMS), (2, 7, DIMS)
    support, query = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return support, query


def rotations(trainer: FewShotTrainer, given: Episode, count: int = 1) -> list[tuple[Tensor, Tensor]]:
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


def unit_rows(embeddings: Tensor) -> Rows:
    """Embeddings (B, D) scaled to length 1."""
    return [[x / math.sqrt(dot(row, row)) for x in row] for row in embeddings.tolist()]


def triplets(
    anchors: Rows,
    labels: list[int],
    others: Rows | None = None,
    other_labels: list[int] | None = None,
    own: int | None = 0,
    above: float = 0.0,
    hardest: bool = False,
) -> float:
    """Mean over the violated triplets, or the hardest of each anchor, of anchors with others.

    Among these the anchors themselves begin at `own`; None: they are not.
    """
    others, other_labels = others or anchors, other_labels or labels
    losses = []
    for a, anchor in enumerate(anchors):
        pairs = [(far(anchor, o), labels[a] == other_labels[i], i) for i, o in enumerate(others)]
        positives = sorted(d for d, same, i in pairs if same and (own is None or i != a + own))
        negatives = sorted(d for d, same, i in pairs if not same)
        chosen = product(positives[-1:], negatives[:1]) if hardest else product(positives, negatives)
        losses += [p - n + MARGIN for p, n in chosen]
    return mean([loss for loss in losses if loss > above])


def assert_skipped(trainer: FewShotTrainer, nothing: Batch | Episode, useful: Batch | Episode) -> None:
    """Two steps before have given Adam a momentum, which must not move the weights any further."""
    optimizer = Adam(trainer.parameters(), lr=0.005)
    assert fit(trainer, [useful, useful], optimizer, 2, progress=False).skipped == 0
    before = copy.deepcopy((trainer.state_dict(), optimizer.state_dict()["state"]))
    history = fit(trainer, [nothing, nothing], optimizer, 2, progress=False)
    assert (history.steps, history.skipped, history.losses) == (2, 2, [])
    assert all(torch.equal(weight, before[0][name]) for name, weight in trainer.named_parameters())
    assert before[1]
    for number, moment in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][number][name]) for name, value in moment.items())
