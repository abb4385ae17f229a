"""fit: the only training loop."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from pml_fewshot.checkpoint import load_checkpoint, save_checkpoint
from pml_fewshot.checks import check_at_least_one, require
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.modes import eval_mode
from pml_fewshot.recording import Recorder
from pml_fewshot.trainers.divergence import diverged, what_diverged
from pml_fewshot.trainers.interruption import StopRequest, TrainingInterrupted
from pml_fewshot.trainers.plateau import cannot_fall_further
from pml_fewshot.trainers.training_state import History, TrainingState
from pml_fewshot.trainers.weight_penalty import weight_penalty

SHOWN = ("loss", "accuracy")
LOG_EVERY = 20  # steps between two looks at the losses: each look waits for the GPU
RATE_AFTER_RETRY = 0.5  # of the learning rate before
RECORDED = ("train", "validation")  # groups of records


def fit(
    trainer: nn.Module,
    batches: Iterable[Any],
    optimizer: Optimizer,
    steps: int,
    *,
    scheduler: LRScheduler | ReduceLROnPlateau | None = None,
    validate: Callable[[], EpisodicResult] | None = None,
    validate_every: int = 1000,
    patience: int | None = None,
    loss_patience: int | None = None,
    clip_norm: float | None = None,
    l2: float = 0.0,
    l1: float = 0.0,
    bf16: bool = False,
    recorder: Recorder | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    retries: int = 0,
    progress: bool = True,
) -> History:
    """Trains `trainer` by `steps` steps; with a validation it ends with the best weights seen, else with the last.

    Args:
        trainer: `trainer(batch)` gives the scalar loss; its attribute `batch_accuracy`, if any, is shown. A loss that
            has no gradient says that the batch held nothing to learn from: the step is skipped and counted.
        batches: as many batches as steps, or an endless stream; each has a method `to(device)`.
        optimizer: over the trainer's parameters.
        steps: training steps in all.
        scheduler: stepped after every training step; ReduceLROnPlateau is stepped after every validation with its
            error (its accuracy in mode "max"), and ends the training when the rate should fall below its `min_lr`.
        validate: gives the accuracy on validation episodes.
        validate_every: steps between two validations; the last step is always validated.
        patience: validations without a new best after which the training ends; never when None.
        loss_patience: steps without a new lowest loss (of LOG_EVERY steps' mean) after which the training ends; never
            when None. Without a validation the weights of the lowest loss are kept then.
        clip_norm: the gradient's largest L2 norm.
        l2: adds l2 * (sum of squares) of the embedder's weights to the loss. Biases and norms are left out.
        l1: adds l1 * (sum of magnitudes) of them.
        bf16: autocast to bfloat16 on CUDA; nothing changes on a CPU, where it does not pay.
        recorder: gets losses, rates, accuracies and validations, as "train" and "validation". When a training goes on
            from a checkpoint, or back to it, their rows of later steps are taken away first.
        checkpoint: file of the state to go on from, written after the first step, every `checkpoint_every` steps, after
            each validation and at the end.
        checkpoint_every: steps between two checkpoints.
        resume: go on from `checkpoint` where that file exists. `batches` with a `state_dict` go on where they were, a
            list behind what was trained on; any other endless iterator must stand there already.
        retries: times that a training whose loss became NaN or infinite goes back to `checkpoint`, with half the
            learning rate each time; then, or with 0, that is an error. Batches with a `state_dict`, and lists, go back
            too; a generator goes on with what comes next.
        progress: show a bar with loss, accuracy and the time left.

    Ctrl-C and SIGTERM end it after the step (and the validation) that is under way; a second one ends it at once.

    Raises:
        TrainingDiverged: the loss or a weight became NaN or infinite; names the step, the learning rate and the batch's
            classes. The checkpoint on disk is of a step before it, and the trainer has the best weights validated, if
            any were.
        TrainingInterrupted: (a KeyboardInterrupt) by Ctrl-C or SIGTERM; `checkpoint` holds the last step.
        CannotWriteError: (an OSError) the disk is full or the folder read-only; `checkpoint` is as it was.
        ValueError: an option out of range, ReduceLROnPlateau or patience without validation, resume or retries without
            checkpoint, too few batches.
        FileExistsError: `checkpoint` exists and is not to be resumed.
    """
    for name, count in (("steps", steps), ("validate_every", validate_every), ("checkpoint_every", checkpoint_every)):
        check_at_least_one(name, count)
    for name, limit in (("patience", patience), ("loss_patience", loss_patience)):
        if limit is not None:
            check_at_least_one(name, limit)
    plateau = scheduler if isinstance(scheduler, ReduceLROnPlateau) else None
    require(
        validate is not None or (plateau is None and patience is None),
        "a validation for ReduceLROnPlateau and for patience",
        "none",
        "pass validate=..., or use a scheduler that counts steps",
    )
    for name, amount in (("l2", l2), ("l1", l1)):
        require(amount >= 0, f"{name} of at least 0", str(amount), "a negative penalty would grow the weights")
    require(clip_norm is None or clip_norm > 0, "clip_norm above 0", str(clip_norm), "use None not to clip")
    require(retries >= 0, "retries of at least 0", str(retries), "0 makes a NaN an error at once")
    if checkpoint is None:
        require(not resume and not retries, "a checkpoint to go back to", "none", "pass checkpoint=...")
    elif Path(checkpoint).exists() and not resume:
        raise FileExistsError(
            f"expected no file at {checkpoint}, got the checkpoint of another training; pass resume=True to go on from "
            "it, or name another file"
        )
    require(
        any(parameter.requires_grad for parameter in trainer.parameters()),
        "at least one parameter to train",
        "none that requires a gradient",
        "unfreeze some, or judge the trainer as it is",
    )
    device = next(trainer.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")
    state = TrainingState(trainer, optimizer, scheduler, batches)
    history = state.history
    if resume and checkpoint is not None and Path(checkpoint).exists():
        state.load_state_dict(load_checkpoint(checkpoint))
        if recorder is not None:  # a process that was killed may have recorded more than it saved
            recorder.forget_after(history.steps, RECORDED)
    started = time.perf_counter() - history.seconds
    source = state.batches_to_come()
    bar = tqdm(total=steps, initial=history.steps, desc="training", unit="step", disable=not progress, mininterval=1)
    if not trainer.training:  # else modes stay as they are: batch norm may be frozen by hand
        trainer.train()
    with bar, StopRequest() as stop:
        stopping = False
        while history.steps < steps and history.stopped == "all steps" and not stopping:
            batch = next(source, None)
            if batch is None:
                raise ValueError(
                    f"expected {steps} batches, got {history.steps}; lower steps or give an endless stream"
                )
            optimizer.zero_grad(set_to_none=True)
            with autocast:
                loss = trainer(batch.to(device))
            rate_factor = RATE_AFTER_RETRY**history.retries
            rate = float(optimizer.param_groups[0]["lr"]) * rate_factor
            if loss.requires_grad:
                if l2 or l1:
                    loss = loss + weight_penalty(trainer, l2, l1)
                loss.backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(trainer.parameters(), clip_norm)
                with _scaled_rates(optimizer, rate_factor):
                    optimizer.step()
                state.note_step(loss, rate, batch)
            else:
                history.skipped += 1
            if scheduler is not None and plateau is None:
                scheduler.step()
            history.steps += 1
            bar.update()

            stopping = stop.received is not None  # asked once a step, so that the step it ends with is saved
            last = history.steps == steps
            validation_due = validate is not None and (last or history.steps % validate_every == 0)
            checkpoint_due = last or history.steps == 1 or history.steps % checkpoint_every == 0 or validation_due
            look = checkpoint_due or history.steps % LOG_EVERY == 0
            if (look or stopping) and state.recent:
                class_names = getattr(getattr(batches, "dataset", None), "class_names", ())
                wrong = what_diverged(state.recent, trainer, class_names)
                if wrong and history.retries < retries and checkpoint is not None and Path(checkpoint).exists():
                    _go_back(state, checkpoint, recorder)
                    source = state.batches_to_come()
                    bar.n = history.steps
                    bar.write(f"{wrong}: back to step {history.steps} with half the learning rate")
                    continue
                if wrong:
                    state.restore_best()
                    raise diverged(wrong, trainer, checkpoint)
            if look and state.recent:
                values = _look_at(state, rate)
                bar.set_postfix({name: f"{value:.4f}" for name, value in values.items() if name in SHOWN})
                if recorder is not None:
                    recorder.record("train", history.steps, **values)
                state.note_loss(values["loss"])
                if loss_patience is not None and validate is None:
                    state.keep_if_best(-values["loss"])
            if look and loss_patience is not None and history.steps - state.lowest_loss_step >= loss_patience:
                history.stopped = "loss no longer falling"
                validation_due, checkpoint_due = validate is not None, True
            if validation_due and validate is not None:
                with eval_mode(trainer):
                    result = validate()
                history.validations.append((history.steps, result.mean, result.ci95))
                state.keep_if_best(result.mean)
                if recorder is not None:
                    recorder.record("validation", history.steps, accuracy=result.mean, ci95=result.ci95)
                if plateau is not None and cannot_fall_further(plateau, result.mean):
                    history.stopped = "learning rate at its lowest"
                elif patience is not None and state.validations_since_best() >= patience:
                    history.stopped = "no improvement"
                stopping = stop.received is not None
            if checkpoint is not None and (checkpoint_due or stopping):
                history.seconds = time.perf_counter() - started
                if recorder is not None:
                    recorder.save()  # first: what is recorded and not in the checkpoint is forgotten on resuming
                if retries and not checkpoint_due:  # going back is to the step that it would have been to
                    state.go_back_to = state.go_back_to or load_checkpoint(checkpoint)
                else:
                    state.go_back_to = None
                save_checkpoint(checkpoint, state.state_dict())
    history.seconds = time.perf_counter() - started
    state.restore_best()
    trainer.eval()
    if stop.received:
        where = f", saved in {checkpoint}" if checkpoint is not None else ""
        raise TrainingInterrupted(f"interrupted by {stop.received.name} after step {history.steps}{where}")
    return history


def _go_back(state: TrainingState, checkpoint: str | Path, recorder: Recorder | None) -> None:
    """Returns to the checkpoint and notes in it that this was done, so that a killed process counts it too."""
    retries = state.history.retries + 1
    state.load_state_dict(state.go_back_to or load_checkpoint(checkpoint))
    state.history.retries = retries
    if recorder is not None:
        recorder.forget_after(state.history.steps, RECORDED)
    save_checkpoint(checkpoint, state.state_dict())


@contextmanager
def _scaled_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Learning rates times a factor, for the step alone: a scheduler goes on from the rates that it knows."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _look_at(state: TrainingState, rate: float) -> dict[str, float]:
    """Returns what to record of the steps since the last look."""
    history = state.history
    mean = torch.stack([loss for _, loss, *_ in state.recent]).double().mean().item()
    state.recent.clear()
    history.losses.append((history.steps, mean))
    values = {"loss": mean, "learning_rate": rate, "skipped": history.skipped}
    if getattr(state.trainer, "batch_accuracy", None) is not None:
        values["accuracy"] = float(state.trainer.batch_accuracy)  # type: ignore[arg-type]
    return values
