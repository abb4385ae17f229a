"""ExperimentConfig: mistakes are found when it is made; swap exchanges parts; describe tells two configs apart."""

import inspect
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, NTXentLoss, ProxyAnchorLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import nn
from torch.optim import Adam

from pml_fewshot import BatchSpec, Embedder, EpisodeSpec, ProtoNetTrainer, PrototypicalLoss, RetrievalTester
from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.experiment.config import swap
from pml_fewshot.parts.arguments import check_arguments
from pml_fewshot.parts.describe import describe
from tests.tiny_experiments import EMBEDDER, TINY_EXPERIMENTS, tiny_splits

TINY = TINY_EXPERIMENTS["protonet"]
SAMPLER = partial(MPerClassSampler, m=3)
NESTED = partial(Embedder, partial(nn.Sequential, partial(Conv4, 1, chanels=3)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trainer": partial(ProtoNetTrainer, EMBEDDER, partial(NTXentLoss, temprature=0.1))}, "'temperature'"),
        ({"trainer": partial(ProtoNetTrainer, los=NTXentLoss)}, r"ProtoNetTrainer \(trainer\).*did you mean 'loss'"),
        ({"trainer": partial(ProtoNetTrainer, NESTED)}, r"Conv4 \(trainer\.0\.0\.0\).*did you mean 'channels'"),
        ({"optimizer": partial(Adam, lrr=3)}, r"\(optimizer\).*did you mean 'lr'"),
        ({"retrieval": partial(RetrievalTester, metrcs=())}, "did you mean 'metrics'"),
        ({"trainer": partial(ProtoNetTrainer, partial(nn.Linear, 1, 2, True, "cpu", None, 6))}, "too many positional"),
        ({"data": tiny_splits()}, "data as something to call, got Splits.*; give a function, a class or a partial"),
        ({"steps": 0}, "steps to be an integer of at least 1"),
        ({"validate_every": 0}, "validate_every"),
        ({"num_episodes": 1}, "num_episodes of at least 2"),
        ({"num_episodes": 1e2}, "num_episodes as an integer, got 100.0; write 10_000, not 1e4"),
        ({"seed": 1.5}, "seed as an integer"),
        ({"eval_seed": True}, "eval_seed as an integer"),
        ({"name": None}, "a text as name, got None"),
        ({"part_lr": 5}, "part_lr by the name of a part, got 5"),
        ({"frozen": ("embedder",)}, "frozen by the name of a part"),
        ({"train_spec": (5, 1, 5)}, "train_spec as the size of an episode or a batch"),
        ({"retries": -1}, "retries of at least 0"),
        ({"loss_lr": -0.1}, "loss_lr of at least 0"),
        ({"eval_specs": ()}, "eval_specs as a tuple of EpisodeSpec"),
        ({"eval_specs": EpisodeSpec(5, 1, 5)}, r"eval_specs as a tuple of EpisodeSpec.* write \(EpisodeSpec"),
        ({"published": {"5-way 1-shot": "98.8"}}, "published as figures by column by source"),
        ({"device": "gpu"}, "device as one of"),
        ({"train_spec": BatchSpec(4, 3), "episodes_per_batch": 2}, "episodes_per_batch=1"),
        ({"sampler": SAMPLER}, r"train_spec=BatchSpec\(\.\.\.\) with a sampler"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_found_when_the_config_is_made(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^expected .*{message}"):
        replace(TINY, **wrong)


WRAPPERS = ("BaseLossWrapper", "SelfSupervisedLoss", "MultipleLosses", "BatchedDistance")  # are no parts themselves


def parts_of_pml() -> list[type]:
    found = [value for package in (losses, miners, distances, reducers) for value in vars(package).values()]
    found = [value for value in found if inspect.isclass(value) and issubclass(value, ModuleWithRecords)]
    return [value for value in found if value.__name__ not in WRAPPERS]


@pytest.mark.parametrize("part", parts_of_pml(), ids=lambda part: part.__name__)
def test_every_part_of_pml_has_its_keywords_checked_to_the_base_class(part: type) -> None:
    check_arguments(partial(part, collect_stats=True), "part")  # of the last class in line
    with pytest.raises(UsageError, match="did you mean 'collect_stats'"):
        check_arguments(partial(part, colect_stats=True), "part")


def test_functions_and_classes_that_take_any_keyword_are_left_alone() -> None:
    class Mine(nn.Module):
        def __init__(self, **sizes: int) -> None:
            super().__init__()

    for function in (Mine, lambda **options: options, dict):
        check_arguments([partial(function, anything=1)], "part")


class Strength:
    def __init__(self, strength: float) -> None:
        self._strength = strength

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return images * self._strength


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ContrastiveLoss(pos_margin=0.0), ContrastiveLoss(pos_margin=0.5)),  # PML's reprs say ContrastiveLoss(...)
        (ContrastiveLoss(distance=LpDistance(power=1)), ContrastiveLoss(distance=LpDistance(power=2))),
        (partial(ContrastiveLoss, distance=LpDistance()), partial(ContrastiveLoss, distance=CosineSimilarity())),
        (RetrievalTester(k=3), RetrievalTester(k=4)),
        (Strength(0.5), Strength(0.25)),
        (partial(Conv4, 1), partial(Conv4, 3)),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])),
        ([1, (2.0, "a")], [1, (2.0, "b")]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_differs_is_described_otherwise(one: object, other: object) -> None:
    assert describe(one) != describe(other)
    assert json.loads(json.dumps(describe(one))) == describe(one)


def test_weights_are_not_described_and_circles_end() -> None:
    first, second = ProxyAnchorLoss(4, 8), ProxyAnchorLoss(4, 8)
    assert not torch.equal(first.proxies, second.proxies)
    assert describe(first) == describe(second)
    first.circle = [first]
    assert "ProxyAnchorLoss" in json.dumps(describe(first))


def test_swap_changes_parts_of_the_trainer_alone() -> None:
    miner = partial(MultiSimilarityMiner, epsilon=0.2)
    swapped = swap(TINY, name="mined", loss=PrototypicalLoss, miner=miner)
    then, now = describe(TINY), describe(swapped)
    assert {name for name in now if now[name] != then[name]} == {"name", "trainer"}
    assert now["trainer"]["with"] == then["trainer"]["with"] | {
        "loss": "pml_fewshot.losses.prototypical.PrototypicalLoss",
        "miner": describe(miner),
    }
    assert swap(TINY, miner=miner).name == TINY.name
    with pytest.raises(UsageError, match="did you mean 'miner'"):
        swap(TINY, minor=miner)
    with pytest.raises(UsageError, match="got steps, of the experiment; use dataclasses"):
        swap(TINY, steps=3)


def test_numbers_of_numpy_and_folders_as_texts_are_taken() -> None:
    config = replace(TINY, seed=np.int64(3), run_dir="runs/x", data_root="data")
    assert (config.seed, type(config.seed)) == (3, int)
    assert (config.run_dir, config.data_root) == (Path("runs/x"), Path("data"))
