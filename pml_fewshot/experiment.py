"""ExperimentConfig: an experiment as data; run(config): from images to the result table."""

import inspect
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from pml_fewshot.allocator import keep_freed_memory
from pml_fewshot.batches import BatchSpec
from pml_fewshot.checkpoint import export_embedder
from pml_fewshot.checks import check_at_least_one, require
from pml_fewshot.data.batch_stream import BatchStream, SamplerFactory
from pml_fewshot.data.episode_stream import Augmentation, EpisodeStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits, join
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.parts import build
from pml_fewshot.recording import Recorder
from pml_fewshot.run_folder import describe, folder_to_resume, new_run_folder
from pml_fewshot.trainers.fit import History, fit
from pml_fewshot.trainers.loss_checks import check_batch

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


def run(config: ExperimentConfig, resume: bool = False) -> ResultTable:
    """Trains, judges and stores: returns the table that is also in the run folder as results.csv and results.md.

    With `resume` a run in `config.run_dir` that was interrupted goes on from its last checkpoint, one that has its
    table gives it, and one that is not there begins.

    The run folder holds config.txt (the config, versions, git commit), logs.db and CSV files of the training, last.pt
    (the state to go on from), embedder.safetensors, results.csv, results.md, results.tex and figures.csv.

    Raises:
        ValueError: bad options, or data that cannot give the episodes asked for, both before any training; a run to
            resume of another config.
        FileExistsError: the run folder holds another run.
        TrainingDiverged: NaN; what was recorded and the last good checkpoint stay in the run folder.
    """
    _check(config)
    device = _device(config.device)
    if resume:
        folder = folder_to_resume(config.run_dir, config)
        if (folder / "figures.csv").exists():  # the last file of a table to be written
            return ResultTable.read(folder)
    else:
        folder = new_run_folder(config.run_dir, config.name, config.seed)
    kept = keep_freed_memory() if device.type == "cpu" else False
    splits = _load(config)
    train, val = splits.train, splits.val
    if config.train_on_validation and val is not None:
        train, val = join([train, val]), None
    for spec in config.eval_specs:
        EpisodicEvaluator(spec).check(splits.test)  # raises before hours of training, not after
    validator = EpisodicEvaluator(config.eval_specs[0], config.val_episodes, config.seed)
    if val is not None:
        validator.check(val)
    torch.manual_seed(config.seed)  # initial weights, dropout and PML's miners draw from torch's own generator
    trainer = build(config.trainer).to(device)
    if isinstance(config.train_spec, BatchSpec) and isinstance(getattr(trainer, "loss", None), nn.Module):
        check_batch(trainer.loss, train.labels[train.labels.argmax()].expand(config.train_spec.size))
    stream = _stream(config, train.to(device), trainer)
    optimizer = config.optimizer(_parameters(trainer, config.loss_lr))
    scheduler = _scheduler(config, optimizer)
    tester = build(config.retrieval)

    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.txt").exists():  # it says what a resumed run began with
        (folder / "config.txt").write_text(describe(config, train, splits, device), encoding="utf-8")
    print(f"{config.name}: {train} on {device}, run folder {folder}")
    if kept:
        print("memory: glibc is told to keep freed blocks for reuse (mallopt), or training steps take twice the time")
    try:
        with closing(Recorder(folder)) as recorder:
            history = fit(
                trainer,
                stream,
                optimizer,
                config.steps,
                scheduler=scheduler,
                validate=partial(validator.evaluate, trainer, val.to(device)) if val is not None else None,
                validate_every=config.validate_every,
                patience=config.patience,
                loss_patience=config.loss_patience,
                clip_norm=config.clip_norm,
                l2=config.l2,
                l1=config.l1,
                bf16=config.bf16,
                recorder=recorder,
                checkpoint=folder / "last.pt",
                resume=resume,
            )
    except Exception:
        if is_new and not (folder / "last.pt").exists():  # not one step was made: leave nothing that looks like a run
            shutil.rmtree(folder)
        raise
    print(
        f"trained {history.steps} steps in {history.seconds / 60:.1f} minutes ({history.stopped}), "
        f"weights of step {history.best_step}"
        + (f", {history.skipped} steps skipped: nothing to learn from in their batches" if history.skipped else "")
    )
    splits = splits.to(device)
    if isinstance(getattr(trainer, "embedder", None), nn.Module):
        export_embedder(folder / "embedder.safetensors", trainer.embedder)
    table = _judge(config, trainer, tester, splits.test, history)
    if config.judge_more is not None:
        table.rows += config.judge_more(trainer, splits, config).rows
    table.write(folder)  # last: figures.csv says that the run is finished
    print(f"\n{table}\nwritten to {folder / 'results.csv'} and results.md")
    return table


def _check(config: ExperimentConfig) -> None:
    check_at_least_one("steps", config.steps)
    check_at_least_one("validate_every", config.validate_every)
    require(len(config.eval_specs) > 0, "at least one spec in eval_specs", "none", "say by which episodes to judge")
    rate = config.loss_lr
    require(rate is None or rate >= 0, "a learning rate of at least 0 as loss_lr", str(rate), "0 keeps them")
    EpisodicEvaluator(config.eval_specs[0], config.num_episodes)


def _judge(
    config: ExperimentConfig, trainer: Any, tester: RetrievalTester | None, test: FewShotDataset, history: History
) -> ResultTable:
    notes = ["trained on train and val classes"] if config.train_on_validation else []
    if history.skipped:
        notes.append(f"{history.skipped:,} of {history.steps:,} training steps skipped")
    return benchmark(
        {config.name: trainer},
        test,
        config.eval_specs,
        tester,
        config.num_episodes,
        config.seed,
        timed=False,  # a run that is repeated gives the same files
        note="; ".join(notes),
    )


def _device(wanted: Device) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device for device='cuda', got none; use device='cpu' or 'auto'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _load(config: ExperimentConfig) -> Splits:
    if not _needs(config.data, "root"):
        return config.data()
    return config.data(root=config.data_root or Path(os.environ.get("PML_FEWSHOT_DATA", "data")))


def _scheduler(config: ExperimentConfig, optimizer: Optimizer) -> Any:
    if config.scheduler is None:
        return None
    return config.scheduler(optimizer, **({"T_max": config.steps} if _needs(config.scheduler, "T_max") else {}))


def _stream(config: ExperimentConfig, train: FewShotDataset, trainer: nn.Module) -> EpisodeStream | BatchStream:
    if isinstance(config.train_spec, BatchSpec):
        embedder = getattr(trainer, "embedder", None)
        return BatchStream(train, config.train_spec, config.seed, config.augment, config.sampler, embedder)
    spec = str(config.train_spec)
    require(config.sampler is None, "train_spec=BatchSpec(...) with a sampler", spec, "or drop the sampler")
    return EpisodeStream(train, config.train_spec, config.seed, config.augment)


def _parameters(trainer: nn.Module, loss_lr: float | None) -> list[dict[str, Any]]:
    """The trainer's parameters as an optimizer takes them, those of its loss in a group of their own where asked."""
    own = {id(p) for p in trainer.loss.parameters()} if loss_lr is not None else set()  # type: ignore[union-attr]
    groups: list[dict[str, Any]] = [{"params": [p for p in trainer.parameters() if id(p) not in own]}]
    if own:
        groups.append({"params": [p for p in trainer.parameters() if id(p) in own], "lr": loss_lr})
    return groups


def _needs(factory: Callable[..., Any], argument: str) -> bool:
    """Whether a factory has an argument of this name that has no value yet."""
    parameter = inspect.signature(factory).parameters.get(argument)
    return parameter is not None and parameter.default is inspect.Parameter.empty
