"""ExperimentConfig: an experiment as data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from pml_fewshot.batches import BatchSpec
from pml_fewshot.data.batch_stream import SamplerFactory
from pml_fewshot.data.episode_stream import Augmentation
from pml_fewshot.data.fewshot_dataset import Splits
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ExperimentConfig:
    """All that defines an experiment.

    Parts are given as factories (`functools.partial` of real classes), for parts hold parameters and statistics, which
    must come to be after the seed is set and must not be shared by two runs.
    """

    name: str
    """folder of its runs, and its name in tables"""
    data: Callable[..., Splits]
    """loader; one whose `root` is not given yet gets the data root"""
    trainer: Callable[[], nn.Module]
    """ProtoNetTrainer and the like, with embedder, loss and miner"""
    optimizer: Callable[..., Optimizer]
    """called with the trainer's parameters"""
    train_spec: EpisodeSpec | BatchSpec
    """size of a training episode, or of an ordinary batch for MetricTrainer and SiameseTrainer"""
    eval_specs: tuple[EpisodeSpec, ...]
    """sizes of the episodes to judge by; validation uses the first"""
    steps: int
    """training steps"""
    seed: int = 0
    """of weights, training episodes, augmentation and test episodes"""
    tasks: int = 1
    """episodes in a training batch: MAML wants many, for the metric methods one large one is better"""
    sampler: SamplerFactory | None = None
    """PML sampler (factory) that chooses the items of batches in place of our own; see BatchStream"""
    loss_lr: float | None = None
    """learning rate of the loss's own parameters (proxies, class weights, margins); the optimizer's when None"""
    scheduler: Callable[..., Any] | None = None
    """called with the optimizer; one that still needs `T_max` (CosineAnnealingLR) is given the steps"""
    augment: Augmentation | None = None
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
    l2: float = 0.0
    """penalty on the squares of the embedder's weights"""
    l1: float = 0.0
    """penalty on the magnitudes of the embedder's weights"""
    checkpoint_every: int = 500
    """steps between two checkpoints, what a killed process loses at most"""
    retries: int = 0
    """times that a diverged training goes back to its last checkpoint, with half the learning rate"""
    bf16: bool = False
    """autocast to bfloat16 on CUDA"""
    num_episodes: int = 10_000
    """test episodes of each spec"""
    val_episodes: int = 1000
    """validation episodes: enough to choose a checkpoint by"""
    retrieval: Callable[[], RetrievalTester] | None = RetrievalTester
    """k-NN figures over the test classes, ranked by the loss's distance; none when None"""
    judge_more: Callable[..., ResultTable] | None = None
    """`judge_more(trainer, splits, config)` gives more rows, from other classes or sizes of episodes"""
    device: Device = "auto"
    """auto: CUDA where there is one"""
    data_root: Path | None = None
    """folder of the data; `PML_FEWSHOT_DATA`, else `data/`, when None"""
    run_dir: Path | None = None
    """folder of this run; a new one below `runs/<name>/` when None"""
