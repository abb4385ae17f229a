"""Experiments that take a fraction of a second, one for each trainer, with as much state as the trainer can have."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from pml_fewshot import MAMLTrainer, MatchingTrainer, MetricTrainer, ProtoNetTrainer, PrototypicalLoss, SiameseTrainer
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.data.glyphs import load_glyphs
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.config import ExperimentConfig
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episodes import EpisodeSpec


class Finished(NamedTuple):
    """A run and what it returned."""

    config: ExperimentConfig
    folder: Path
    table: ResultTable


def tiny_set(prefix: str, classes: int, seed: int) -> FewShotDataset:
    """Ten noisy copies of a pattern of 4 x 4 for each class."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(40, 216, (classes, 1, 1, 4, 4), generator=generator)
    images = (pattern + torch.randint(-60, 61, (classes, 10, 1, 4, 4), generator=generator)).clamp(0, 255).byte()
    labels = torch.arange(classes).repeat_interleave(10)
    return FewShotDataset(images.flatten(0, 1), labels, [f"{prefix}{c}" for c in range(classes)], "made up")


def tiny_splits() -> Splits:
    return Splits(tiny_set("a", 8, 0), tiny_set("b", 5, 1), tiny_set("c", 6, 2))


def few_glyphs() -> Splits:
    """As many classes as the quickstart's episodes need: all of them would be embedded again and again."""
    glyphs, wanted = load_glyphs(), {"train": 60, "val": 20, "test": 24}
    return Splits(*(getattr(glyphs, part).select_classes(range(count)) for part, count in wanted.items()))


# batch norm keeps running statistics, dropout draws from torch's own generator
TRUNK = partial(
    nn.Sequential, partial(nn.Flatten), partial(nn.Linear, 16, 8), partial(nn.BatchNorm1d, 8), partial(nn.Dropout, 0.2)
)
EMBEDDER: Callable[[], Embedder] = partial(Embedder, trunk=TRUNK)


tiny = partial(
    ExperimentConfig,
    data=tiny_splits,
    optimizer=partial(Adam, lr=0.1),  # so high that validations go up and down
    train_spec=EpisodeSpec(ways=5, shots=1, queries=3),
    eval_specs=(EpisodeSpec(ways=5, shots=1, queries=5),),
    steps=24,
    validate_every=4,
    checkpoint_every=3,
    num_episodes=30,
    val_episodes=10,
    device="cpu",
    augment=RandomAffine(),
    report=False,  # it takes seconds
)
BATCHES = BatchSpec(classes=4, per_class=3)
MEMORY = partial(CrossBatchMemory, MultiSimilarityLoss, embedding_size=8, memory_size=40)

TINY_EXPERIMENTS = {
    config.name: config
    for config in (
        tiny(
            "protonet",
            trainer=partial(ProtoNetTrainer, embedder=EMBEDDER, loss=partial(PrototypicalLoss, learn_scale=True)),
            scheduler=CosineAnnealingLR,
        ),
        tiny(
            "matching",
            trainer=partial(MatchingTrainer, embedder=EMBEDDER, context=partial(FullContext, 8, 2)),
            optimizer=partial(SGD, lr=0.5, momentum=0.9),
            scheduler=partial(ReduceLROnPlateau, factor=0.5, patience=0, min_lr=1e-4),
        ),
        tiny("siamese", trainer=partial(SiameseTrainer, embedder=EMBEDDER), train_spec=BATCHES, patience=4),
        tiny(
            "metric",
            trainer=partial(MetricTrainer, EMBEDDER, partial(MEMORY, miner=partial(MultiSimilarityMiner, epsilon=0.5))),
            train_spec=BATCHES,
            sampler=partial(MPerClassSampler, m=3),
        ),
        tiny(
            "maml",
            trainer=partial(
                MAMLTrainer,
                network=partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, 16, 5)),
                inner_lr=0.1,
                inner_steps=2,
                learn_inner_lr="per_layer",
            ),
            episodes_per_batch=2,
            retrieval=None,
        ),
    )
}


LISTED = list(TINY_EXPERIMENTS.values())  # where a run's folder finds its config


def rows_of(folder: Path, group: str) -> list[dict[str, Any]]:
    """What a run recorded in its database."""
    with closing(sqlite3.connect(folder / "logs.db")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {group}")]
