"""ExperimentConfig: an experiment as data; the same with other parts (swap), and as plain data (describe)."""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import numpy as np
import torch
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import nn
from torch.optim import Optimizer
from tyro.conf import Fixed

from pml_fewshot.checks import UsageError, check_at_least_one, check_choice
from pml_fewshot.data.dataset import Splits
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.io.tensors import checksum
from pml_fewshot.sampling.batch_stream import SamplerFactory
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episode_stream import Augmentation
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.trainers.base import FewShotTrainer

Device = Literal["auto", "cpu", "cuda"]

COOPERATIVE = ("pytorch_metric_learning.", "pml_fewshot.")  # parts of PML there pass **kwargs on to their base classes


@dataclass(frozen=True)
class ExperimentConfig:
    """All that defines an experiment.

    Parts are `functools.partial` of real classes, which `run` calls after it has set the seed. They may be instances
    too: every run copies them, but weights that they hold do not depend on the seed. What is `Fixed` is edited in the
    file; the command line may change the rest.

    Raises:
        UsageError: a number out of range, or an argument of a partial that its class does not have.
    """

    name: Fixed[str]
    """folder of its runs, and its name in tables"""
    data: Fixed[Callable[..., Splits]]
    """loader; gets the data root as `root` where it still needs that argument"""
    trainer: Fixed[Callable[..., FewShotTrainer] | FewShotTrainer]
    """ProtoNetTrainer and the like, with embedder, loss and miner; gets `num_classes`, the number of training classes,
    where it still needs that argument"""
    optimizer: Fixed[Callable[..., Optimizer]]
    """called with the trainer's parameter groups"""
    train_spec: EpisodeSpec | BatchSpec
    """size of a training episode, or of an ordinary batch for MetricTrainer and SiameseTrainer"""
    eval_specs: Fixed[tuple[EpisodeSpec, ...]]
    """sizes of the test episodes; validation uses the first"""
    steps: int
    """training steps"""
    seed: int = 0
    """of weights, training episodes, augmentation and test episodes"""
    episodes_per_batch: int = 1
    """episodes in a training batch: MAML wants many, for the metric methods one large one is better"""
    sampler: Fixed[SamplerFactory | None] = None
    """factory of a PML sampler that chooses the items of ordinary batches in place of our own; see BatchStream"""
    loss_lr: float | None = None
    """learning rate of the loss's own parameters (proxies, class weights, margins); the optimizer's when None"""
    scheduler: Fixed[Callable[..., Any] | None] = None
    """called with the optimizer; gets the steps as `T_max` (CosineAnnealingLR) where it still needs that argument"""
    augment: Fixed[Augmentation | None] = None
    """`augment(images, generator)`, an object like RandomAffine(), distorts the training images"""
    train_on_validation: bool = False
    """join the validation classes to the training classes, as Snell et al. do for final figures: nothing is left to
    validate on, and the last weights are kept"""
    validate_every: int = 1000
    """steps between two validations"""
    patience: int | None = None
    """validations without a new best after which training ends"""
    loss_patience: int | None = None
    """steps without a new lowest loss after which training ends; without validation the weights there are kept"""
    clip_norm: float | None = None
    """largest norm of the gradient"""
    checkpoint_every: int = 500
    """steps between two checkpoints: the most that a killed process loses"""
    retries: int = 0
    """times that a training that diverged returns to its last checkpoint, with half the learning rate each time"""
    bf16: bool = False
    """autocast to bfloat16 on CUDA"""
    num_episodes: int = 10_000
    """test episodes of each spec"""
    val_episodes: int = 1000
    """validation episodes: enough to choose a checkpoint by"""
    retrieval: Fixed[Callable[[], RetrievalTester] | RetrievalTester | None] = RetrievalTester
    """k-NN figures over the test classes, ranked by the loss's distance; none when None"""
    extra_evaluations: Fixed[Callable[..., ResultTable] | None] = None
    """`extra_evaluations(trainer, splits, config)` gives more rows, from other classes or sizes of episodes"""
    device: Device = "auto"
    """auto: CUDA where there is one"""
    data_root: Path | None = None
    """folder of the data; `PML_FEWSHOT_DATA`, else `data/`, when None"""
    run_dir: Path | None = None
    """folder of this run; a new one below `runs/<name>/` when None"""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, np.integer):
                object.__setattr__(self, each.name, int(value))
            elif each.name in ("data_root", "run_dir") and isinstance(value, str):
                object.__setattr__(self, each.name, Path(value))
            elif each.name in ("data", "trainer", "optimizer") and not callable(value):
                raise UsageError(f"expected {each.name} as something to call, got {value!r}; give a class or a partial")
            check_arguments(value, each.name)
        for name in ("steps", "episodes_per_batch", "validate_every", "checkpoint_every"):
            check_at_least_one(name, getattr(self, name))
        for name, least in (("num_episodes", 2), ("val_episodes", 2), ("retries", 0), ("loss_lr", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"expected {name} of at least {least}, got {value}; give {name} >= {least}")
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        specs = self.eval_specs
        if not isinstance(specs, tuple | list) or not specs or not all(isinstance(s, EpisodeSpec) for s in specs):
            raise UsageError(f"expected eval_specs as a tuple of EpisodeSpec, got {specs!r}; write (EpisodeSpec(...),)")
        if isinstance(self.train_spec, BatchSpec) and self.episodes_per_batch > 1:
            raise UsageError(f"expected episodes_per_batch=1 for batches, got {self.episodes_per_batch}; leave it out")
        if isinstance(self.train_spec, EpisodeSpec) and self.sampler is not None:
            raise UsageError(
                f"expected train_spec=BatchSpec(...) with a sampler, got {self.train_spec!r}; leave the sampler out"
            )


OPTIONS = [each.name for each in fields(ExperimentConfig) if not hasattr(each.type, "__metadata__")]  # not Fixed


def swap(config: ExperimentConfig, name: str | None = None, **parts: Any) -> ExperimentConfig:
    """Returns the experiment with other parts of its trainer: `swap(CONFIG, name="triplet", loss=TripletMarginLoss())`.

    Args:
        config: everything else stays as it is here.
        name: of the new experiment; the old one's when None.
        parts: arguments of the trainer: embedder, loss, miner and so on.

    Raises:
        UsageError: a part that the trainer does not take.
    """
    for own in parts.keys() & {each.name for each in fields(config)}:
        raise UsageError(f"expected parts of the trainer, got {own}, of the experiment; use dataclasses.replace")
    return replace(config, name=name or config.name, trainer=partial(config.trainer, **parts))


def check_arguments(part: Any, place: str) -> None:
    """Raises a UsageError when a partial, itself or within `part`, has an argument that its function does not take."""
    inner = part if isinstance(part, dict) else dict(enumerate(part)) if isinstance(part, list | tuple) else {}
    if isinstance(part, partial):
        inner = arguments_of(part)
        called, wrong = getattr(part.func, "__qualname__", repr(part.func)), None
        try:
            names = _keywords(part.func)
            wrong = next((name for name in part.keywords if names is not None and name not in names), None)
            if wrong is None:
                inspect.signature(part.func).bind_partial(*part.args, **part.keywords)
        except TypeError as error:
            raise UsageError(f"expected arguments that {called} takes ({place}), got {error}; see its docs") from error
        except ValueError:  # a function in C, which has no signature
            pass
        if wrong is not None:
            check_choice(f"an argument of {called} ({place})", wrong, sorted(names or ()))
    for name, each in inner.items():
        check_arguments(each, f"{place}.{name}")


def arguments_of(part: partial[Any]) -> dict[str, Any]:
    """A partial's arguments by name, those without one by number."""
    return {**{str(number): each for number, each in enumerate(part.args)}, **part.keywords}


def _keywords(function: Any) -> set[str] | None:
    """What a function or class takes by name; None where it takes any name."""
    classes = [each for each in getattr(function, "__mro__", ()) if each not in (nn.Module, object)]
    initializers = [vars(each)["__init__"] for each in classes if "__init__" in vars(each)]
    cooperative = ModuleWithRecords in classes
    names: set[str] = set()
    for each in initializers or [function]:
        parameters = inspect.signature(each).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names
        if not cooperative or not each.__module__.startswith(COOPERATIVE):
            return None
    return names


def describe(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Returns a config, or a part of one, as data for JSON that is only compared: nothing is ever built from it.

    Of objects it is the class and attributes, because PML's reprs leave out numbers, and not weights, which are others
    in each process. `above` are the ids of the objects that hold this one.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(each, above) for each in value]
    if isinstance(value, dict):
        return {str(key): describe(each, above) for key, each in value.items()}
    if isinstance(value, partial):
        return {"call": describe(value.func, above), "with": describe(arguments_of(value), above)}
    if isinstance(value, type | FunctionType):
        return f"{module_name(value.__module__)}.{value.__qualname__}"
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {checksum([value.detach().cpu().numpy().tobytes()])}"
    attributes = dict(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, Enum | Path) else {}
    if isinstance(value, nn.Module):
        attributes = {name: each for name, each in attributes.items() if name not in vars(nn.Module())}
        attributes |= dict(value.named_children())
    if not attributes or id(value) in above:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is another in each process
    return {"object": describe(type(value)), **describe(attributes, (*above, id(value)))}


def module_name(name: str) -> str:
    """A module's name for others: `__main__`, the one that was started as a program, has its own there."""
    main = sys.modules["__main__"]
    if name != "__main__":
        return name
    return main.__spec__.name if main.__spec__ is not None else Path(getattr(main, "__file__", None) or name).stem
