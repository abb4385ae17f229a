"""Evaluation of an embedder by other libraries, each as an action that evaluation_speed times.

easyfsl and pytorch-metric-learning are called as their docs say. The code of Snell et al. 2017 and learn2learn do not
run on current torch and Python, so what they do for each episode is written here from the paper and from
learn2learn's docs. Every peer gets its images as floats in memory, the embedder in eval mode and no gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

# isort: off
import pml_fewshot  # noqa: F401  before anything that imports torchvision, which easyfsl does
# isort: on

import torch
import torch.nn.functional as F
from easyfsl.datasets import FeaturesDataset, FewShotDataset
from easyfsl.methods import PrototypicalNetworks
from easyfsl.samplers import TaskSampler
from easyfsl.utils import evaluate, predict_embeddings
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, default_collate

from pml_fewshot import Embedder, EpisodeSpec

BATCH = 128  # images that a peer embeds at a time, as many as ours does on a CPU
METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")

# Printed with every table, so that a reader knows what was measured.
NOTES = (
    "easyfsl's TaskSampler calls `super().__init__(data_source=None)`, which torch's Sampler no longer takes "
    "(TypeError); fixed without touching the installed package by one more base class that takes the argument and "
    "drops it: `class FixedTaskSampler(TaskSampler, TakesDataSource)`.",
    "easyfsl draws its episodes from Python's global `random`, which torch's seed does not reach: they differ from run "
    "to run.",
    "Snell's way and learn2learn's way are written in experiments/speed/peers.py: the paper's code is of "
    "2017's torch, and learn2learn 0.2 does not build on Python 3.11 or later (its C sources want longintrepr.h).",
    "Every peer has its images as float tensors in memory, the same weights in eval mode, no gradients, no progress "
    "bars, the same threads and this library's allocator setting (which serves all in the process alike).",
    "Peers bring the Conv4 that their users write: convolution, batch norm, ReLU, max pooling, four times. Lines that "
    "say `given our Conv4` give them this library's faster module of the same weights instead.",
)


def plain_conv4(embedder: Embedder) -> nn.Module:
    """The usual Conv4 (Vinyals et al. 2016) with the weights of ours, in eval mode.

    Args:
        embedder: embedder with a Conv4 trunk and no projection.
    """
    state = embedder.trunk.state_dict()
    widths = [value.shape for name, value in state.items() if value.ndim == 4]  # of each convolution (out, in, 3, 3)
    layers: list[nn.Module] = []
    for out, channels, *_ in widths:
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    plain = nn.Sequential(*layers, nn.Flatten())
    plain.load_state_dict(dict(zip(plain.state_dict(), state.values(), strict=True)))
    return plain.eval()


# --- easyfsl ----------------------------------------------------------------------------------------------------------


class InMemory(FewShotDataset):
    """Images and labels as easyfsl expects them, at the lowest cost: an item is looked up in a list."""

    def __init__(self, images: Tensor, labels: Sequence[int]) -> None:
        self.labels = list(labels)
        self.items = list(zip(images.unbind(), self.labels, strict=True))

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return self.items[item]

    def __len__(self) -> int:
        return len(self.items)

    def get_labels(self) -> list[int]:
        return self.labels


class TakesDataSource(Sampler):
    """A Sampler whose `__init__` still accepts `data_source`, as torch's did up to 2.12."""

    def __init__(self, data_source: object = None) -> None:
        super().__init__()


class FixedTaskSampler(TaskSampler, TakesDataSource):
    """easyfsl's TaskSampler, whose `super().__init__(data_source=None)` now finds a base class that accepts it."""


def easyfsl_episodes(
    dataset: FewShotDataset, backbone: nn.Module, spec: EpisodeSpec, episodes: int, workers: int = 0
) -> Callable[[], float]:
    """easyfsl's `evaluate` over a loader of `episodes` tasks, from images or (with nn.Identity) from features."""
    sampler = FixedTaskSampler(dataset, spec.ways, spec.shots, spec.queries, episodes)  # type: ignore[call-arg]
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=sampler.episodic_collate_fn)
    model = PrototypicalNetworks(backbone).eval()
    return lambda: evaluate(model, loader, device="cpu", use_tqdm=False)


def easyfsl_features(bank: Tensor, labels: Sequence[int], class_names: Sequence[str]) -> FeaturesDataset:
    """Returns a ready bank in the form of easyfsl's features path."""
    return FeaturesDataset(list(labels), bank, list(class_names))


def easyfsl_embedding(embedder: nn.Module, images: Tensor, names: Sequence[str]) -> Callable[[], FeaturesDataset]:
    """easyfsl's `predict_embeddings` and the FeaturesDataset made from its data frame, as in its notebook.

    Args:
        embedder: in eval mode.
        images: (M, C, H, W) floats.
        names: class name of each image.
    """
    items: Any = list(zip(images.unbind(), names, strict=True))  # a list works as a map-style dataset
    loader: DataLoader = DataLoader(items, batch_size=BATCH)
    return lambda: FeaturesDataset.from_dataframe(predict_embeddings(loader, embedder, device="cpu"))


# --- Snell et al. 2017 ------------------------------------------------------------------------------------------------


@torch.no_grad()
def snell_way(
    embedder: nn.Module, by_class: Sequence[Tensor], spec: EpisodeSpec, episodes: int, generator: torch.Generator
) -> float:
    """Mean accuracy, one episode at a time: support and query are encoded together, loss and accuracy are read off.

    Args:
        embedder: in eval mode.
        by_class: (items, C, H, W) images of each class.
        spec: size of the episodes.
        episodes: number of episodes.
        generator: draws the episodes.
    """
    accuracies = []
    for _ in range(episodes):
        images = _snell_images(by_class, spec, generator)
        support, query = images[:, : spec.shots].flatten(0, 1), images[:, spec.shots :].flatten(0, 1)
        embedded = embedder(torch.cat([support, query]))
        prototypes = embedded[: len(support)].unflatten(0, (spec.ways, spec.shots)).mean(dim=1)
        squared = (embedded[len(support) :].unsqueeze(1) - prototypes).square().sum(dim=2)
        log_probability = F.log_softmax(-squared, dim=1)
        target = torch.arange(spec.ways).repeat_interleave(spec.queries)
        F.nll_loss(log_probability, target).item()  # that code reports each episode's loss with its accuracy
        accuracies.append((log_probability.argmax(dim=1) == target).float().mean().item())
    return sum(accuracies) / episodes


def _snell_images(by_class: Sequence[Tensor], spec: EpisodeSpec, generator: torch.Generator) -> Tensor:
    """(W, K+Q, C, H, W) images of one episode."""
    classes = torch.randperm(len(by_class), generator=generator)[: spec.ways].tolist()
    per_class = spec.shots + spec.queries
    return torch.stack(
        [by_class[c][torch.randperm(len(by_class[c]), generator=generator)[:per_class]] for c in classes]
    )


# --- learn2learn ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """One item of a task: its index in the dataset and, once loaded, its image and label."""

    index: int
    image: Tensor | None = None
    label: int = -1


Transform = Callable[[list[Described]], list[Described]]


def _indices_by_label(indices: Sequence[int], labels: Sequence[int]) -> dict[int, list[int]]:
    by_label: dict[int, list[int]] = {}
    for index in indices:
        by_label.setdefault(labels[index], []).append(index)
    return by_label


def n_ways(labels: Sequence[int], ways: int, generator: torch.Generator) -> Transform:
    """Describes all items of `ways` random classes."""
    classes = list(_indices_by_label(range(len(labels)), labels).values())

    def transform(_: list[Described]) -> list[Described]:
        chosen = torch.randperm(len(classes), generator=generator)[:ways].tolist()
        return [Described(index) for c in chosen for index in classes[c]]

    return transform


def k_shots(labels: Sequence[int], count: int, generator: torch.Generator) -> Transform:
    """Keeps `count` random items of each class."""

    def transform(items: list[Described]) -> list[Described]:
        classes = _indices_by_label([item.index for item in items], labels).values()
        drawn = (torch.randperm(len(c), generator=generator)[:count].tolist() for c in classes)
        return [Described(c[i]) for c, order in zip(classes, drawn, strict=True) for i in order]

    return transform


def load_data(dataset: InMemory) -> Transform:
    """Loads one image after another."""

    def transform(items: list[Described]) -> list[Described]:
        loaded = ((item, *dataset[item.index]) for item in items)
        return [replace(item, image=image, label=label) for item, image, label in loaded]

    return transform


def relabel(items: list[Described]) -> list[Described]:
    """Numbers the classes of a task from 0."""
    numbers: dict[int, int] = {}
    return [replace(item, label=numbers.setdefault(item.label, len(numbers))) for item in items]


@torch.no_grad()
def learn2learn_way(
    embedder: nn.Module, dataset: InMemory, spec: EpisodeSpec, episodes: int, generator: torch.Generator
) -> float:
    """Mean accuracy, one task at a time: transforms make it, and a mask separates support and query embeddings."""
    per_class = spec.shots + spec.queries
    make_ways = n_ways(dataset.labels, spec.ways, generator)
    transforms = (make_ways, k_shots(dataset.labels, per_class, generator), load_data(dataset), relabel)
    is_support = (torch.arange(spec.ways * per_class) % per_class) < spec.shots
    accuracies = []
    for _ in range(episodes):
        items: list[Described] = []
        for transform in transforms:
            items = transform(items)
        images, labels = default_collate([(item.image, item.label) for item in items])
        order = labels.argsort(stable=True)
        embedded, labels = embedder(images[order]), labels[order]
        prototypes = embedded[is_support].unflatten(0, (spec.ways, spec.shots)).mean(dim=1)
        logits = -(embedded[~is_support].unsqueeze(1) - prototypes).square().sum(dim=2)
        accuracies.append((logits.argmax(dim=1) == labels[~is_support]).float().mean().item())
    return sum(accuracies) / episodes


# --- pytorch-metric-learning ------------------------------------------------------------------------------------------


def pml_retrieval(embedder: nn.Module, dataset: InMemory) -> Callable[[], dict[str, float]]:
    """PML's tester from images to retrieval figures, with neighbors, batches and unnormalized embeddings as in ours."""
    cpu = torch.device("cpu")
    tester = GlobalEmbeddingSpaceTester(
        normalize_embeddings=False,
        batch_size=BATCH,
        dataloader_num_workers=0,
        data_device=cpu,
        accuracy_calculator=AccuracyCalculator(include=METRICS, k="max_bin_count", device=cpu),
    )

    def test() -> dict[str, float]:
        figures = tester.test({"test": dataset}, 0, embedder)["test"]
        return {metric: figures[f"{metric}_level0"] for metric in METRICS}

    return test
