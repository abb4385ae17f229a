"""run(config): an experiment from images to the result table."""

import inspect
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pml_fewshot.allocator import keep_freed_memory
from pml_fewshot.batches import BatchSpec
from pml_fewshot.checkpoint import check_exportable, export_embedder
from pml_fewshot.checks import check_at_least_one, require
from pml_fewshot.data.batch_stream import BatchStream
from pml_fewshot.data.episode_stream import EpisodeStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits, join
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment_config import Device, ExperimentConfig
from pml_fewshot.parts import build
from pml_fewshot.provenance import changes, check_data, note_sitting, read_provenance, write_provenance
from pml_fewshot.recording import Recorder
from pml_fewshot.run_folder import choose_run_folder, sole_writer
from pml_fewshot.trainers.fit import RECORDED, History, fit
from pml_fewshot.trainers.interruption import TrainingInterrupted
from pml_fewshot.trainers.loss_checks import check_batch
from pml_fewshot.trainers.maml import MAMLTrainer


def run(config: ExperimentConfig, resume: bool = False) -> ResultTable:
    """Trains, judges and stores: returns the table that is also in the run folder as results.csv and results.md.

    With `resume` a run in `config.run_dir` that was interrupted goes on from its last checkpoint, one that has its
    table gives it, and one that is not there begins.

    The run folder holds config.txt and config.json (the config, data, versions, git commit), logs.db and CSV files of
    the training, last.pt (the state to go on from), embedder.safetensors (network.safetensors of MAML), results.csv,
    results.md, results.tex and figures.csv.

    Raises:
        ValueError: bad options, or data that cannot give the episodes asked for, both before any training; a run to
            resume of another config.
        FileExistsError: the run folder holds another run.
        BlockingIOError: another process writes the run folder.
        TrainingDiverged: NaN; what was recorded and the last good checkpoint stay in the run folder.
        TrainingInterrupted: (a KeyboardInterrupt) by Ctrl-C or SIGTERM; to be resumed.
        CannotWriteError: (an OSError) the disk is full or the folder read-only; what was there is whole, to be resumed.
    """
    _check(config)
    device = device_of(config.device)
    folder = choose_run_folder(config, resume)
    if resume and (folder / "figures.csv").exists():  # the last file of a table to be written
        return ResultTable.read(folder)
    try:
        return _run(config, resume, folder, device)
    except KeyboardInterrupt as stop:
        if not (folder / "last.pt").exists():  # not one step was made
            raise
        what = stop.what if isinstance(stop, TrainingInterrupted) else "interrupted"
        raise TrainingInterrupted(what, f"go on with --run-dir {folder} --resume") from stop


def _run(config: ExperimentConfig, resume: bool, folder: Path, device: torch.device) -> ResultTable:
    kept = keep_freed_memory() if device.type == "cpu" else False
    splits = load_splits(config)
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
    for part in exported(trainer).values():
        check_exportable(part)
    if isinstance(trainer, MAMLTrainer):  # its network is made for so many ways; the other trainers take any
        for spec in config.eval_specs:
            trainer.check(spec.ways, splits.test.item_shape)
    if isinstance(config.train_spec, BatchSpec) and isinstance(getattr(trainer, "loss", None), nn.Module):
        check_batch(trainer.loss, train.labels[train.labels.argmax()].expand(config.train_spec.size))
    stream = _stream(config, train.to(device), trainer)
    optimizer = config.optimizer(_parameters(trainer, config.loss_lr))
    scheduler = _scheduler(config, optimizer)
    tester = build(config.retrieval)

    if kept:
        print("memory: glibc is told to keep freed blocks for reuse (mallopt), or training steps take twice the time")
    with sole_writer(folder, config, resume):
        if (folder / "config.txt").exists():
            about = read_provenance(folder)
            check_data(splits, about, folder)
            changed = changes(about, device)
            for change in changed:
                print(f"note: {change}; the figures may differ in their last digits")
            if changed:
                note_sitting(folder, about, device)
        else:
            write_provenance(folder, config, splits, device)
        print(f"{config.name}: {train} on {device}, run folder {folder}")
        with closing(Recorder(folder)) as recorder:
            if not (folder / "last.pt").exists():  # what a process recorded that was killed before its first checkpoint
                recorder.forget_after(0, RECORDED)
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
                checkpoint_every=config.checkpoint_every,
                resume=resume,
                retries=config.retries,
            )
        print(
            f"trained {history.steps} steps in {history.seconds / 60:.1f} minutes ({history.stopped}), "
            f"weights of step {history.best_step}"
            + (f", {history.skipped} steps skipped: nothing to learn from in their batches" if history.skipped else "")
        )
        for name, part in exported(trainer).items():
            export_embedder(folder / name, part)
        table = judge(config, trainer, tester, splits.to(device), history)
        table.write(folder)  # last: figures.csv says that the run is finished
        print(f"\n{table}\nwritten to {folder / 'results.csv'} and results.md")
    return table


def exported(trainer: nn.Module) -> dict[str, nn.Module]:
    """The parts of a trainer that a run folder holds as files of their own, by file name."""
    parts = {f"{name}.safetensors": getattr(trainer, name, None) for name in ("embedder", "network")}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _check(config: ExperimentConfig) -> None:
    check_at_least_one("steps", config.steps)
    check_at_least_one("tasks", config.tasks)
    check_at_least_one("validate_every", config.validate_every)
    require(len(config.eval_specs) > 0, "at least one spec in eval_specs", "none", "say by which episodes to judge")
    rate = config.loss_lr
    require(rate is None or rate >= 0, "a learning rate of at least 0 as loss_lr", str(rate), "0 keeps them")
    EpisodicEvaluator(config.eval_specs[0], config.num_episodes)


def judge(
    config: ExperimentConfig, trainer: Any, tester: RetrievalTester | None, splits: Splits, history: History
) -> ResultTable:
    """The table of a trained trainer: all that the config says to judge it by, on the test classes and any others."""
    notes = ["trained on train and val classes"] if config.train_on_validation else []
    if history.skipped:
        notes.append(f"{history.skipped:,} of {history.steps:,} training steps skipped")
    table = benchmark(
        {config.name: trainer},
        splits.test,
        config.eval_specs,
        tester,
        config.num_episodes,
        config.seed,
        timed=False,  # a run that is repeated gives the same files
        note="; ".join(notes),
    )
    if config.judge_more is not None:
        table.rows += config.judge_more(trainer, splits, config).rows
    return table


def device_of(wanted: Device) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for on this machine."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device for device='cuda', got none; use device='cpu' or 'auto'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_splits(config: ExperimentConfig) -> Splits:
    """The data of an experiment, looked for in its data root."""
    if not _needs(config.data, "root"):
        return config.data()
    return config.data(root=config.data_root or Path(os.environ.get("PML_FEWSHOT_DATA", "data")))


def _scheduler(config: ExperimentConfig, optimizer: Optimizer) -> Any:
    if config.scheduler is None:
        return None
    return config.scheduler(optimizer, **({"T_max": config.steps} if _needs(config.scheduler, "T_max") else {}))


def _stream(config: ExperimentConfig, train: FewShotDataset, trainer: nn.Module) -> EpisodeStream | BatchStream:
    spec = str(config.train_spec)
    if isinstance(config.train_spec, BatchSpec):
        require(config.tasks == 1, f"one task in a training batch for train_spec={spec}", str(config.tasks), "drop it")
        embedder = getattr(trainer, "embedder", None)
        return BatchStream(train, config.train_spec, config.seed, config.augment, config.sampler, embedder)
    require(config.sampler is None, "train_spec=BatchSpec(...) with a sampler", spec, "or drop the sampler")
    return EpisodeStream(train, config.train_spec, config.seed, config.augment, config.tasks)


def _parameters(trainer: nn.Module, loss_lr: float | None) -> list[dict[str, Any]]:
    """The trainer's parameters as an optimizer takes them, those of its loss in a group of their own where asked."""
    loss = getattr(trainer, "loss", None)  # MAML's may be a function
    own = {id(p) for p in loss.parameters()} if loss_lr is not None and isinstance(loss, nn.Module) else set()
    groups: list[dict[str, Any]] = [{"params": [p for p in trainer.parameters() if id(p) not in own]}]
    if own:
        groups.append({"params": [p for p in trainer.parameters() if id(p) in own], "lr": loss_lr})
    return groups


def _needs(factory: Callable[..., Any], argument: str) -> bool:
    """Whether a factory has an argument of this name that has no value yet."""
    parameter = inspect.signature(factory).parameters.get(argument)
    return parameter is not None and parameter.default is inspect.Parameter.empty
