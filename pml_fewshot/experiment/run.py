"""run(config): runs an experiment from images to the result table in three steps: prepare, train, evaluate."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pml_fewshot.distributed import alone, processes, together, told_by_all, world
from pml_fewshot.embedders.modes import ordinary_modes
from pml_fewshot.environment import cpu_quota, limit_threads
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.config import ExperimentConfig
from pml_fewshot.experiment.evaluate import evaluate
from pml_fewshot.experiment.prepare import Prepared, make_optimizer, prepare
from pml_fewshot.experiment.recorder import Recorder, Recorders
from pml_fewshot.experiment.run_folder import RunFolder, open_run
from pml_fewshot.experiment.run_report import draw_report
from pml_fewshot.experiment.stored_config import what_is_lost
from pml_fewshot.io.checkpoint import export_embedder, load_checkpoint, save_checkpoint
from pml_fewshot.sampling.randomness import seeded
from pml_fewshot.training.fit import fit
from pml_fewshot.training.interruption import TrainingDiverged, TrainingInterrupted
from pml_fewshot.training.schedule import check_kinds, lower_learning_rate
from pml_fewshot.training.state import RECORDED, History, history_of


def run(config: ExperimentConfig, resume: bool = False) -> ResultTable:
    """Trains, evaluates and stores an experiment; returns the table that is also in the run folder.

    With `resume`, a run in `config.run_dir` continues from its last checkpoint, a missing one begins, and a finished
    one returns its table. More steps train a finished run longer, and a schedule that is given the steps continues on
    the curve of the new number; other num_episodes, eval_seed, eval_specs after the first, retrieval or
    extra_evaluations evaluate it again; optimizer, scheduler, rates, retries, clip_norm and recorder may change too, as
    after a NaN.

    The run folder holds config.txt and config.json (the config, data, versions, git commit), logs.db and CSV files of
    the training, last.pt (the state to resume from), embedder.safetensors (network.safetensors for MAML), results.csv,
    results.md, figures.csv and values.npz (the accuracy of each episode).

    Processes started by `torchrun` share the work of the run; see `processes`.

    Everything that follows training is tested before it, in about a second. Neither what ran in the process before
    nor autocast or no_grad around the call changes a digit; the caller's global generators are restored at the end.

    Raises:
        UsageError: bad options, or data that cannot provide the requested episodes, both before any training; a folder
            that cannot be resumed with this config.
        ExistingFileError: (a FileExistsError) the run folder is a file, or holds another run and `resume` is not set.
        LockedError: (a BlockingIOError) another process is writing the run folder.
        TrainingDiverged: NaN; the records and the last good checkpoint stay in the run folder.
        TrainingInterrupted: (a KeyboardInterrupt) Ctrl-C or SIGTERM; the run can be resumed.
        CannotWriteError: (an OSError) the disk is full or the folder read-only; what was there is intact and resumable.
    """
    with (
        processes(config.device, config.sync_batch_norm),
        open_run(config, resume) as folder,
        ordinary_modes(),
        seeded(config.seed),
    ):
        if folder.finished:
            table = ResultTable.read(folder.path)
            print(f"{table}\nfinished before, in {folder.path}")
            return table
        try:
            return _run(folder)
        except KeyboardInterrupt as stop:
            if not folder.checkpoint.exists():  # no step was taken
                raise
            event = stop.event if isinstance(stop, TrainingInterrupted) else "interrupted"
            raise TrainingInterrupted(event, f"resume with --run-dir {folder.path} --resume") from stop


def _run(folder: RunFolder) -> ResultTable:
    if limit_threads(cpu_quota()):
        share = "as many as the container's share of the cores"
        print(f"threads: {torch.get_num_threads()}, {share}; OMP_NUM_THREADS sets another number")
    with together(), alone():
        prepared = prepare(folder.config)
        if folder.checkpoint.exists():  # before anything is written
            parts = {"optimizer": prepared.optimizer, "scheduler": prepared.scheduler}
            made = {name: part for name, part in parts.items() if part is not None}
            check_kinds(load_checkpoint(folder.checkpoint), made, names=parts)
    folder.begin(prepared.loaded, prepared.device, len(prepared.stream.dataset.class_names))
    if lost := what_is_lost(folder.config):
        print(f"note: {lost}")
    print(f"{folder.config.name}: {prepared.stream.dataset} on {prepared.device}, run folder {folder.path}")
    history = train(prepared, folder)
    skipped = f", {history.skipped} steps skipped: nothing to learn from in their batches" if history.skipped else ""
    done = f"trained {history.steps} steps in {history.seconds / 60:.1f} minutes ({history.stopped})"
    print(f"{done}, weights of step {history.best_step}{skipped}")
    if world().is_first:
        for name, part in prepared.trainer.exports().items():
            export_embedder(folder.path / name, part)
    table = evaluate(prepared.config, prepared.trainer, prepared.splits, prepared.tester, history)
    folder.finish(table)
    print(f"\n{table}\nwritten to {folder.path / 'results.csv'} and results.md")
    if prepared.config.report and world().is_first:
        with alone():
            draw_report(folder.path, prepared.trainer, prepared.splits, prepared.config)
    return table


def train(prepared: Prepared, folder: RunFolder) -> History:
    """Trains from the folder's checkpoint, if any; returns to it after a NaN as often as the config allows."""
    config, checkpoint = prepared.config, folder.checkpoint
    with ExitStack() as stack:
        makers: list[Callable[[Path], Any]] = [Recorder] if config.recorder is None else [Recorder, config.recorder]
        recorder = Recorders([make(folder.path) for make in makers if world().is_first])
        for each in recorder.recorders:
            stack.callback(getattr(each, "close", each.save))
        if not checkpoint.exists():  # rows of a process that was killed before its first checkpoint
            recorder.forget_after(0, RECORDED)
        while True:
            try:
                return fit(
                    prepared.trainer,
                    prepared.stream,
                    prepared.optimizer,
                    config.steps,
                    scheduler=prepared.scheduler,
                    validate=prepared.validate,
                    validate_every=config.validate_every,
                    patience=config.patience,
                    loss_patience=config.loss_patience,
                    clip_norm=config.clip_norm,
                    bf16=config.bf16,
                    frozen=config.frozen,
                    ema=config.ema,
                    recorder=recorder,
                    checkpoint=checkpoint,
                    checkpoint_every=config.checkpoint_every,
                    resume=True,
                )
            except TrainingDiverged as error:
                state = load_checkpoint(checkpoint) if checkpoint.exists() else None
                if state is None or history_of(state).retries >= config.retries:
                    raise
                lower_learning_rate(state)
                told_by_all(None)  # all processes have read it
                with together():
                    if world().is_first:
                        save_checkpoint(checkpoint, state)
                step = state["history"]["steps"]
                # new ones, because the current ones have moved on
                prepared.optimizer, prepared.scheduler = make_optimizer(config, prepared.trainer)
                print(f"{str(error).partition(';')[0]}; back to step {step} with half the learning rate")
