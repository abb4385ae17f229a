"""ExperimentConfig: an experiment as data; swap: the same experiment with other parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from tyro.conf import Fixed

from pml_fewshot.checks import UsageError, UsageTypeError, check_at_least_one, check_choice
from pml_fewshot.data.augmentation import Augmentation, as_augmentation
from pml_fewshot.data.dataset import Splits
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.parts.arguments import check_arguments
from pml_fewshot.sampling.batch_stream import SamplerFactory
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episodes import EpisodeSpec, check_balanced
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.training.state import Recorder
from pml_fewshot.training.step import check_optimizer

Device = Literal["auto", "cpu", "cuda"]


CALLED = ("data", "trainer", "optimizer", "scheduler", "sampler", "eval_transform", "extra_evaluations", "recorder")


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that defines an experiment.

    Parts are `functools.partial` objects of real classes, which `run` calls after setting the seed. They may also be
    instances: every run copies them, but the weights they hold do not depend on the seed. `Fixed` fields are edited in
    the file; the command line may change the rest.

    Raises:
        UsageError: a number out of range, or an argument of a partial that its class does not accept.
    """

    name: Fixed[str]
    """name in tables, and of the folder of its runs"""
    data: Fixed[Callable[..., Splits]]
    """loader; receives the data root as `root` if it still needs that argument"""
    trainer: Fixed[Callable[..., FewShotTrainer] | FewShotTrainer]
    """ProtoNetTrainer or the like, with embedder, loss and miner; receives `num_classes`, the number of training
    classes, if it still needs that argument"""
    optimizer: Fixed[Callable[..., Optimizer]]
    """called with the trainer's parameter groups"""
    train_spec: EpisodeSpec | BatchSpec
    """size of a training episode, or of an ordinary batch for MetricTrainer and SiameseTrainer"""
    eval_specs: Fixed[tuple[EpisodeSpec, ...]]
    """sizes of the test episodes; validation uses the first"""
    steps: int
    """training steps"""
    seed: int = 0
    """seed of weights, training episodes, augmentation and validation episodes"""
    eval_seed: int = 0
    """seed of the test episodes: trainings with several seeds are evaluated on the same ones"""
    episodes_per_batch: int = 1
    """episodes per training batch: many for MAML; for the metric methods one large episode is better"""
    sampler: Fixed[SamplerFactory | None] = None
    """factory of a PML sampler that chooses the items of ordinary batches instead of our own; see BatchStream"""
    loss_lr: float | None = None
    """learning rate of the loss's own parameters (proxies, class weights, margins); the optimizer's when None"""
    part_lr: Fixed[Mapping[str, float] | None] = None
    """learning rates of other parts, by name in the trainer: `{"embedder.trunk": 1e-4}`; each is recorded"""
    frozen: Fixed[Mapping[str, int] | None] = None
    """parts to freeze for the first steps, `{"embedder.trunk": 500}`: no gradient, and in eval mode"""
    scheduler: Fixed[Callable[..., Any] | None] = None
    """called with the optimizer; receives the steps as `T_max`, `total_steps` or `total_iters` (CosineAnnealingLR,
    OneCycleLR, PolynomialLR) unless that argument is given"""
    augment: Fixed[Augmentation | None] = None
    """augments the training images: RandomAffine(), RandomResizedCrop(84) and the like, any torchvision transform
    (called for each image), a function `augment(images, generator)`, or several of these in order"""
    eval_transform: Fixed[Callable[[Tensor], Tensor] | None] = None
    """applied once to all evaluated images, for example `v2.CenterCrop(84)` with images loaded at 92 and an
    augmentation that crops 84"""
    train_on_validation: bool = False
    """add the validation classes to the training classes, as Snell et al. do for final figures: nothing is left to
    validate on, and the last weights are kept"""
    validate_every: int = 1000
    """steps between validations"""
    patience: int | None = None
    """number of validations without a new best after which training ends"""
    loss_patience: int | None = None
    """number of steps without a new lowest loss that ends training; without validation, that loss's weights are kept"""
    clip_norm: float | None = None
    """maximum gradient norm"""
    checkpoint_every: int = 500
    """steps between checkpoints: the most that a killed process loses"""
    retries: int = 0
    """how many times a diverged training returns to its last checkpoint, with half the learning rate each time"""
    bf16: bool = False
    """autocast to bfloat16 on CUDA"""
    sync_batch_norm: bool = False
    """with several processes (torchrun), compute batch norm statistics over all of them, not over each share"""
    ema: float | None = None
    """validate and end with an exponential moving average of the weights, with this decay per step (0.999)"""
    num_episodes: int = 10_000
    """test episodes per spec"""
    val_episodes: int = 1000
    """validation episodes: enough to choose a checkpoint"""
    retrieval: Fixed[Callable[[], RetrievalTester] | RetrievalTester | None] = RetrievalTester
    """k-NN figures over the test classes, ranked by the loss's distance; none when None"""
    extra_evaluations: Fixed[Callable[..., ResultTable] | None] = None
    """`extra_evaluations(trainer, splits, config)` returns more rows, for other classes or episode sizes; tested before
    training with an untrained trainer and config.num_episodes=2"""
    recorder: Fixed[Callable[[Path], Recorder] | None] = None
    """called with the run folder; records in addition to its files: `partial(WandbRecorder, project="mine")`"""
    published: Fixed[Mapping[str, Mapping[str, str]] | None] = None
    """published accuracies by source and column, shown below ours in the report: `{"Snell et al. 2017, table 1":
    {"5-way 1-shot": "98.8"}}`"""
    report: bool = True
    """draw report.html in the run folder when the run is finished, which takes up to 20 seconds"""
    device: Device = "auto"
    """auto: CUDA if available"""
    data_root: Path | None = None
    """data folder; `PML_FEWSHOT_DATA`, else `data/`, when None"""
    run_dir: Path | None = None
    """folder of this run; a new one in `runs/<name>/` when None"""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, each.name, value.item())
            elif each.name in ("data_root", "run_dir") and isinstance(value, str):
                object.__setattr__(self, each.name, Path(value))
            elif each.name in CALLED and not callable(value) and value != each.default:
                do = "give a function, a class or a partial that makes it"
                raise UsageError(f"expected {each.name} as something to call, got {repr(value)[:100]}; {do}")
            check_arguments(value, each.name)
        if not isinstance(self.name, str) or not self.name:
            raise UsageTypeError(f"expected a text as name, got {self.name!r}; name the experiment")
        for name in ("seed", "eval_seed", "num_episodes", "val_episodes", "retries"):
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool):
                raise UsageTypeError(f"expected {name} as an integer, got {value!r}; write 10_000, not 1e4")
        for name in ("part_lr", "frozen"):
            if not isinstance(value := getattr(self, name), Mapping | None):
                do = f'write {{"embedder.trunk": {1e-4 if name == "part_lr" else 100}}}'
                raise UsageTypeError(f"expected {name} by the name of a part, got {value!r}; {do}")
        for name in ("steps", "episodes_per_batch", "validate_every", "checkpoint_every"):
            check_at_least_one(name, getattr(self, name))
        for name, least in (("num_episodes", 2), ("val_episodes", 2), ("retries", 0), ("loss_lr", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"expected {name} of at least {least}, got {value}; give {name} >= {least}")
        as_augmentation(self.augment)
        if isinstance(made := getattr(self.optimizer, "func", self.optimizer), type):
            check_optimizer(made)
        if self.loss_lr is not None and "loss" in (self.part_lr or {}):
            raise UsageError(f"expected one rate of the loss, got loss_lr={self.loss_lr} and part_lr; leave one out")
        for name in ("patience", "loss_patience"):
            check_at_least_one(name, 1 if getattr(self, name) is None else getattr(self, name))
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"expected clip_norm above 0, got {self.clip_norm}; use None not to clip")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(f"expected ema between 0 and 1, got {self.ema}; 0.999 looks back about 1,000 steps")
        if not (self.retrieval is None or callable(self.retrieval) or isinstance(self.retrieval, RetrievalTester)):
            raise UsageError(
                f"expected retrieval as a RetrievalTester or its partial, got {self.retrieval!r}; make one"
            )
        papers = self.published or {}
        if not isinstance(papers, Mapping) or not all(isinstance(each, Mapping) for each in papers.values()):
            do = 'write {"Snell et al. 2017": {"5-way 1-shot": "98.8"}}'
            raise UsageError(f"expected published as figures by column by source, got {papers!r}; {do}")
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        specs = self.eval_specs
        if not isinstance(specs, tuple | list) or not specs or not all(isinstance(s, EpisodeSpec) for s in specs):
            raise UsageError(f"expected eval_specs as a tuple of EpisodeSpec, got {specs!r}; write (EpisodeSpec(...),)")
        if not isinstance(self.train_spec, EpisodeSpec | BatchSpec):
            do = "write EpisodeSpec(...) or BatchSpec(...)"
            raise UsageTypeError(
                f"expected train_spec as the size of an episode or a batch, got {self.train_spec!r}; {do}"
            )
        check_balanced(self.train_spec)
        if isinstance(self.train_spec, BatchSpec) and self.episodes_per_batch > 1:
            raise UsageError(f"expected episodes_per_batch=1 for batches, got {self.episodes_per_batch}; leave it out")
        if isinstance(self.train_spec, EpisodeSpec) and self.sampler is not None:
            raise UsageError(
                f"expected train_spec=BatchSpec(...) with a sampler, got {self.train_spec!r}; leave the sampler out"
            )


OPTIONS = [each.name for each in fields(ExperimentConfig) if not hasattr(each.type, "__metadata__")]  # not Fixed


def swap(config: ExperimentConfig, name: str | None = None, **parts: Any) -> ExperimentConfig:
    """Returns the experiment with other parts of its trainer: `swap(CONFIG, name="triplet", loss=TripletMarginLoss())`.

    Its published figures are left out.

    Args:
        config: the experiment; everything else stays the same.
        name: name of the new experiment; the old one's when None.
        parts: trainer arguments: embedder, loss, miner and so on.

    Raises:
        UsageError: a part that the trainer does not accept.
    """
    for own in parts.keys() & {each.name for each in fields(config)}:
        raise UsageError(f"expected parts of the trainer, got {own}, of the experiment; use dataclasses.replace")
    trainer = partial(config.trainer, **parts)
    return replace(config, name=name or config.name, trainer=trainer, published=None)  # those are of other parts
