"""fit: the only training loop."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from pml_fewshot.checks import ExistingFileError, UsageError, check_at_least_one
from pml_fewshot.distributed import any_process, begin_step, world
from pml_fewshot.embedders.modes import eval_mode, train_mode
from pml_fewshot.environment import keep_memory
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.training.early_stopping import EarlyStopping
from pml_fewshot.training.freezing import frozen_parts
from pml_fewshot.training.interruption import StopOnSignal, TrainingInterrupted
from pml_fewshot.training.state import RECORDED, History, Recorder, TrainingState, check_same_batch
from pml_fewshot.training.step import (
    check_holds,
    check_optimizer,
    check_trainable,
    learning_rates,
    train_step,
    warn_of_unreached,
)

LOG_EVERY = 20  # steps between readings of the loss, each of which waits for the GPU


def fit(
    trainer: nn.Module,
    batches: Iterable[Any],
    optimizer: Optimizer,
    steps: int,
    *,
    scheduler: LRScheduler | None = None,
    validate: Callable[[], EpisodicResult] | None = None,
    validate_every: int = 1000,
    patience: int | None = None,
    loss_patience: int | None = None,
    clip_norm: float | None = None,
    bf16: bool = False,
    frozen: Mapping[str, int] | None = None,
    ema: float | None = None,
    recorder: Recorder | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    progress: bool = True,
) -> History:
    """Trains for `steps` steps; with validation, the trainer ends with the best weights seen, else with the last.

    Args:
        trainer: `trainer(batch)` returns the scalar loss. If it requires no gradient, the step is skipped and counted.
        batches: as many batches as steps, or an endless stream; each has a method `to(device)`, or is a pair of images
            (floats in [0, 1]) and labels, as from a DataLoader.
        steps: total number of steps, including those of earlier sessions.
        scheduler: stepped after every step; ReduceLROnPlateau after every validation, with its error (its accuracy in
            mode "max"): it ends training when all rates should fall below their `min_lr`.
        validate: returns the accuracy on validation episodes; called every `validate_every` steps and after the last.
        patience, loss_patience: end training early; see EarlyStopping.
        clip_norm: maximum L2 norm of the gradient.
        bf16: autocast to bfloat16 on CUDA; on a CPU it does not pay off.
        frozen: parts to freeze for the first steps, `{"embedder.trunk": 500}`; see frozen_parts.
        ema: validate, keep and end with an exponential moving average of the weights, with this decay per step (0.999
            looks back about 1,000 steps); buffers are those of the last step.
        recorder: receives losses, rates and accuracies as "train" and "validation".
        checkpoint: file for the state to resume from, written after the first step, every `checkpoint_every` steps,
            after each validation, at the end and when interrupted.
        resume: continue from `checkpoint` if that file exists. Batches with a `state_dict` continue exactly, a list
            after the batches already used; any other endless iterator must already be at that point. If optimizer or
            scheduler differ from those that the checkpoint began with (more steps, a lower rate), their rates apply.

    A part in eval mode, in a trainer in train mode, stays frozen, in later calls too.
    Ctrl-C or SIGTERM ends training after the current step (and validation); a second one ends it immediately.

    Within `processes()`, all processes make the same call and share the work; the first one records and writes.
    Memories, statistics and weights are the same in all, so a checkpoint can be resumed by any number of processes.

    Raises:
        TrainingDiverged: NaN or infinity; names step, learning rate and classes. The checkpoint is of an earlier step.
        TrainingInterrupted: (a KeyboardInterrupt) Ctrl-C or SIGTERM; `checkpoint` holds the last step.
        CannotWriteError: (an OSError) the disk is full or the folder read-only; `checkpoint` is unchanged.
        UsageError: a wrong option, too few batches, another training's checkpoint, an existing one (FileExistsError)
            without resume, an optimizer that needs a closure (LBFGS), or a loss that depends on no weight.
    """
    plateau = scheduler if isinstance(scheduler, ReduceLROnPlateau) else None
    stopper = EarlyStopping(validate is not None, patience, loss_patience, plateau)
    for name, count in {"steps": steps, "validate_every": validate_every, "checkpoint_every": checkpoint_every}.items():
        check_at_least_one(name, count)
    if clip_norm is not None and not clip_norm > 0:
        raise UsageError(f"expected clip_norm above 0, got {clip_norm}; use None not to clip")
    check_trainable(trainer)
    check_optimizer(optimizer)
    check_holds(optimizer, trainer)
    if resume and checkpoint is None:
        raise UsageError("expected a checkpoint to resume from, got none; pass checkpoint=...")
    found = checkpoint is not None and Path(checkpoint).exists()
    if found and not resume:
        raise ExistingFileError(f"expected no file at {checkpoint}, got one; pass resume=True, or name another file")
    device = next(trainer.parameters()).device
    keep_memory(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")
    state = TrainingState(trainer, optimizer, scheduler, batches, stopper, ema)
    recorder = recorder if world().is_first else None
    if checkpoint is not None and found:
        state.load_state_dict(load_checkpoint(checkpoint))
        if recorder is not None:  # a killed process may have recorded more than it saved
            recorder.forget_after(state.history.steps, RECORDED)
    state.start_alike()
    history = state.history
    started = time.perf_counter() - history.seconds
    source = state.remaining_batches()
    shown = progress and world().is_first
    bar = tqdm(total=steps, initial=history.steps, desc="training", unit="step", disable=not shown, mininterval=1)
    with bar, train_mode(trainer), frozen_parts(trainer, frozen or {}) as thaw, StopOnSignal() as signal:
        stopping, first = False, True
        while history.steps < steps and not state.stopped_early and not stopping:
            batch = next(source, None)
            if batch is None:
                raise UsageError(f"expected {steps} batches, got {history.steps}; lower steps, or pass a stream")
            thaw(history.steps)
            begin_step(history.steps)
            if first:
                check_same_batch(batch)
                first = False
            rates = learning_rates(optimizer)
            loss = train_step(trainer, batch.to(device), optimizer, clip_norm, autocast)
            state.note(loss, rates, batch)
            if loss is not None and history.steps - history.skipped == 1:
                warn_of_unreached(trainer)
            if scheduler is not None and plateau is None:
                scheduler.step()
            bar.update()
            stopping = any_process(signal.received is not None)  # asked once, so that the final step is saved
            validation_due = validate is not None and due(history.steps, validate_every, steps)
            checkpoint_due = validation_due or history.steps == 1 or due(history.steps, checkpoint_every, steps)
            log_due = checkpoint_due or due(history.steps, LOG_EVERY, steps)

            if log_due or stopping:
                state.raise_if_diverged(checkpoint)
            if log_due:
                bar.set_postfix(state.log(batch, recorder))
            if validate is not None and (validation_due or state.stopped_early):
                with eval_mode(trainer), state.averaged():
                    result = validate()
                state.log_validation(result.mean, result.ci95, recorder)
                stopping = any_process(signal.received is not None)
            if checkpoint is not None and (checkpoint_due or stopping or state.stopped_early):
                history.seconds = time.perf_counter() - started
                state.save(checkpoint, recorder)
    history.seconds = time.perf_counter() - started
    state.restore_best()
    if any_process(signal.received is not None):
        where = f", saved in {checkpoint}" if checkpoint else ""
        by = signal.received.name if signal.received else "a signal to another process"
        raise TrainingInterrupted(f"interrupted by {by} after step {history.steps}{where}")
    return history


def due(step: int, every: int, steps: int) -> bool:
    return step == steps or step % every == 0
