"""The history of a training so far (History) and everything it needs to resume exactly (TrainingState)."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pml_fewshot.checks import UsageError
from pml_fewshot.distributed import check_same, lazy_parts, told_by_all, world
from pml_fewshot.io.checkpoint import check_weights, load_checkpoint, save_checkpoint
from pml_fewshot.io.tensors import checksum_of
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import Batch
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.sampling.randomness import global_state, set_global_state
from pml_fewshot.training.early_stopping import EarlyStopping
from pml_fewshot.training.interruption import TrainingDiverged
from pml_fewshot.training.schedule import adopt_schedule, check_kinds, kinds_of, schedule_of

FORMAT_VERSION = 4  # of state_dict: increase it when the entries change
KEYS = {"trainer", "optimizer", "early_stopping", "best", "pending", "history", "kinds", "schedule"}
ALL_STEPS = "all steps"  # the reason why a training ended that was not stopped early
RECORDED = ("train", "validation")  # groups of records
NAMED_CLASSES = 10  # at most, in the message about a NaN


@dataclass
class History:
    """Record of a training over all its sessions.

    Args:
        losses: (step, mean loss of the steps since the previous entry).
        validations: (step, mean accuracy, half of its 95 % confidence interval).
        best_step: step of the weights that the trainer holds at the end.
        stopped: why training ended: "all steps", "no improvement", "loss no longer falling" or "learning rate at its
            lowest".
        steps: steps taken.
        skipped: steps among them whose batch held nothing to learn from (no pair for the miner or the loss).
        retries: how often training diverged and returned to a checkpoint with a lower learning rate.
        processes: largest number of processes that took steps together.
        seconds: time in training and validation.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    best_step: int = 0
    stopped: str = ALL_STEPS
    steps: int = 0
    skipped: int = 0
    retries: int = 0
    processes: int = 1
    seconds: float = 0.0


@runtime_checkable
class Stateful(Protocol):
    """A trainer, an optimizer, a scheduler, a stream of batches: anything whose state can be saved and restored."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class Recorder(Protocol):
    """Where losses, rates and accuracies are recorded, by group and step."""

    def record(self, group: str, step: int, **values: float) -> None: ...

    def save(self) -> None: ...

    def forget_after(self, step: int, groups: Sequence[str]) -> None: ...


@runtime_checkable
class Reporting(Protocol):
    """What a trainer may report besides its loss; every FewShotTrainer does."""

    divergence_hint: str

    def accuracy(self, batch: Any) -> Tensor | None: ...


class StepRecord(NamedTuple):
    """A step that learned something, kept until the next log step, because reading its loss waits for the GPU."""

    step: int
    loss: Tensor
    rates: dict[str, float]  # of each optimizer group
    classes: Tensor | None  # labels in its batch, where known


class TrainingState:
    """The trainer, optimizer, scheduler and batches of a training, its history, and the best weights so far."""

    def __init__(
        self,
        trainer: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        batches: Iterable[Any],
        stopper: EarlyStopping,
        ema: float | None = None,
    ) -> None:
        self.trainer = trainer
        self.optimizer, self.scheduler = optimizer, scheduler
        self.batches = batches
        self.stopper = stopper
        self.parts: dict[str, Stateful] = {"trainer": trainer, "optimizer": optimizer, "early_stopping": stopper}
        if scheduler is not None:
            self.parts["scheduler"] = scheduler
        if isinstance(batches, Stateful):
            self.parts["batches"] = batches
        self.ema, self.average = ema, None if ema is None else _average(trainer, ema)
        if self.average is not None:
            self.parts["average"] = self.average
        self.schedule = schedule_of(optimizer, scheduler)  # as set by the caller
        self.history = History()
        self.best: dict[str, Any] | None = None  # weights of the best validation, or of the lowest loss
        self.pending: list[StepRecord] = []

    def start_alike(self) -> None:
        """Gives all processes the generator states of the first, and checks that they begin with the same weights."""
        self.history.processes = max(self.history.processes, world().size)
        if world().size > 1:
            if lazy := lazy_parts(self.trainer):  # which would draw its weights from a process's own generator
                do = "embed a few items before, from the same seed in all processes"
                raise UsageError(f"expected weights of known shape in several processes, got a lazy {lazy[0]}; {do}")
            set_global_state(told_by_all(global_state())[0])
            state = {name: each for name, each in self.trainer.state_dict().items() if isinstance(each, Tensor)}
            known = {name: each.cpu().contiguous() for name, each in state.items() if not is_lazy(each)}
            weights = {name: checksum_of({name: each}) for name, each in known.items()}
            do = "make the trainer from the same seed in all processes, and let all see the same checkpoint"
            check_same({"step": self.history.steps, **weights}, do)

    def remaining_batches(self) -> Iterator[Any]:
        """The batches that follow the steps taken."""
        source = map(_as_batch, self.batches)
        if "batches" not in self.parts and not isinstance(self.batches, Iterator):
            return islice(source, self.history.steps, None)  # a list starts from its beginning again
        return source

    def note(self, loss: Tensor | None, rates: dict[str, float], batch: Any) -> None:
        """Counts a step; its loss, None if nothing was learned, is read at the next log step."""
        self.history.steps += 1
        if loss is None:
            self.history.skipped += 1
            return
        if self.average is not None and self.ema is not None:
            _update(self.average, self.trainer, self.ema)
        classes = batch.classes if hasattr(batch, "classes") and torch.is_tensor(batch.classes) else None
        self.pending.append(StepRecord(self.history.steps, loss, rates, classes))

    @property
    def stopped_early(self) -> bool:
        return self.history.stopped != ALL_STEPS

    def log(self, batch: Any, recorder: Recorder | None) -> dict[str, str]:
        """Reads, records and returns the mean loss since the last log step and the accuracy; each waits for a GPU."""
        step = self.history.steps
        values: dict[str, float] = {}
        if self.pending:
            values["loss"] = torch.stack([record.loss for record in self.pending]).double().mean().item()
            accuracy = self.trainer.accuracy(batch) if isinstance(self.trainer, Reporting) else None
            values |= {} if accuracy is None else {"accuracy": accuracy.item()}
            self.history.losses.append((step, values["loss"]))
            if self.stopper.is_best_loss(values["loss"], step):
                self.keep_weights()
            if recorder is not None:
                recorder.record("train", step, **values, **self.pending[-1].rates, skipped=self.history.skipped)
            self.pending.clear()
        self.history.stopped = self.stopper.reason_after_log(step) or ALL_STEPS
        return {name: f"{value:.4f}" for name, value in values.items()}

    def log_validation(self, mean: float, ci95: float, recorder: Recorder | None) -> None:
        """Records a validation, keeps the weights if it is the best, and ends training if early stopping says so."""
        self.history.validations.append((self.history.steps, mean, ci95))
        if self.stopper.accuracy.offer(mean, self.history.steps):
            self.keep_weights()
        if recorder is not None:
            recorder.record("validation", self.history.steps, accuracy=mean, ci95=ci95)
        reason = self.stopper.reason_after_validation(mean)
        if reason and not self.stopped_early:
            self.history.stopped = reason

    def raise_if_diverged(self, checkpoint: str | Path | None) -> None:
        """Raises TrainingDiverged, with the best weights restored, where a loss or weight became NaN or infinite."""
        if not self.pending:
            return
        losses = torch.stack([record.loss for record in self.pending])
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if not bad and torch.stack([p.isfinite().all() for p in self.trainer.parameters()]).all():
            return
        record = self.pending[bad[0] if bad else -1]
        got = f"a loss of {record.loss.item()} at" if bad else "a NaN or infinite weight after"
        exists = checkpoint is not None and Path(checkpoint).exists()
        kept = f"the last good state is in {checkpoint}" if exists else "none was kept"
        hint = self.trainer.divergence_hint if isinstance(self.trainer, Reporting) else ""
        self.restore_best()
        rate = next(iter(record.rates.values()))
        raise TrainingDiverged(
            f"expected a finite loss, got {got} step {record.step} (learning rate {rate:g})"
            f"{self._listed(record.classes)}; {kept}; lower the learning rate, clip the gradient (clip_norm) or let "
            f"`run` retry (retries), and resume; {hint + ' in a new run, ' if hint else ''}or look for NaN in the data"
        )

    def _listed(self, classes: Tensor | None) -> str:
        if classes is None:
            return ""
        names = self.batches.dataset.class_names if isinstance(self.batches, EpisodeStream | BatchStream) else ()
        listed = [f"{label} {names[label]}" if names else str(label) for label in classes.unique().tolist()]
        more = f" and {len(listed) - NAMED_CLASSES} more" if len(listed) > NAMED_CLASSES else ""
        return f" on a batch of classes {', '.join(listed[:NAMED_CLASSES])}{more}"

    def save(self, checkpoint: str | Path, recorder: Recorder | None) -> None:
        if not world().is_first:
            return
        if recorder is not None:
            recorder.save()  # first: what is recorded beyond the checkpoint is dropped on resuming
        first = not Path(checkpoint).exists()
        save_checkpoint(checkpoint, self.state_dict())
        if first:
            load_checkpoint(checkpoint)  # an unreadable checkpoint is reported after one step, not after all

    def keep_weights(self) -> None:
        """Keeps a copy of the weights as the best so far."""
        self.best = copy.deepcopy(self._weights())
        self.history.best_step = self.history.steps

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the trainer has the averaged weights, if there are any."""
        if self.average is None:
            yield
            return
        own = copy.deepcopy(self.trainer.state_dict())
        self.trainer.load_state_dict(self._weights())
        try:
            yield
        finally:
            self.trainer.load_state_dict(own)

    def _weights(self) -> dict[str, Any]:
        """The weights to validate and keep: the averaged ones if there are any, else the trainer's own."""
        own = self.trainer.state_dict()
        return own if self.average is None else own | dict(self.average.module.named_parameters())

    def restore_best(self) -> None:
        """Loads the best weights so far into the trainer; it keeps the last ones if none were kept."""
        if self.best is None:
            self.history.best_step = self.history.steps
        if self.best is not None or self.average is not None:
            self.trainer.load_state_dict(self._weights() if self.best is None else self.best)

    def state_dict(self) -> dict[str, Any]:
        history = asdict(self.history)
        # as tensors: torch.load with weights_only takes seconds for a structure of millions of numbers
        history["losses"] = torch.tensor(self.history.losses, dtype=torch.float64).reshape(-1, 2)
        history["validations"] = torch.tensor(self.history.validations, dtype=torch.float64).reshape(-1, 3)
        return {
            "format_version": FORMAT_VERSION,
            "kinds": kinds_of(self.parts),
            "schedule": self.schedule,
            **{name: part.state_dict() for name, part in self.parts.items()},
            "best": self.best,
            "pending": [list(record) for record in self.pending],
            "history": history,
            "generators": global_state(),  # dropout and PML's miners draw from torch's
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        history = history_of(state)
        check_kinds(state, self.parts)
        check_weights(self.trainer.state_dict(), state["trainer"], "the checkpoint")
        adopt_schedule(state, self.optimizer, self.scheduler)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.best = state["best"]
        device = next(self.trainer.parameters()).device
        self.pending = [
            StepRecord(step, loss.to(device), rates, classes if classes is None else classes.to(device))
            for step, loss, rates, classes in state["pending"]
        ]
        self.history = history
        set_global_state(state["generators"])


def _average(trainer: nn.Module, ema: float) -> AveragedModel:
    if not 0 < ema < 1:
        raise UsageError(f"expected ema between 0 and 1, got {ema}; 0.999 keeps that share of the average in each step")
    if any(map(is_lazy, trainer.parameters())):
        raise UsageError("expected weights of known shape for an average, got a lazy one; give the distance its dim")
    return AveragedModel(trainer, multi_avg_fn=get_ema_multi_avg_fn(ema))


@torch.no_grad()
def _update(average: AveragedModel, trainer: nn.Module, ema: float) -> None:
    """Same as average.update_parameters, which after the first step copies n_averaged to a GPU and waits for that."""
    if average.n_averaged == 0 or not all(weight.is_floating_point() for weight in trainer.parameters()):
        average.update_parameters(trainer)
        return
    torch._foreach_lerp_(list(average.module.parameters()), list(trainer.parameters()), 1 - ema)
    for ours, theirs in zip(average.module.buffers(), trainer.buffers(), strict=True):
        ours.copy_(theirs)
    average.n_averaged += 1


def check_same_batch(batch: Any) -> None:
    """Raises a UsageError if another process has a different batch: each takes its share of the same one."""
    if world().size > 1 and hasattr(batch, "__dict__"):
        tensors = {name: each for name, each in vars(batch).items() if isinstance(each, Tensor)}
        sums = {f"batch ({name})": checksum_of({name: each.cpu().contiguous()}) for name, each in tensors.items()}
        check_same(sums, "draw the same batches in all processes: the same seed, and no DistributedSampler")


def _as_batch(batch: Any) -> Any:
    """Converts a pair of images and labels, as from a DataLoader, to a Batch; returns anything else unchanged."""
    return Batch(*batch) if isinstance(batch, list | tuple) and len(batch) == 2 else batch


def history_of(state: dict[str, Any]) -> History:
    """The history in a training's state_dict.

    Raises:
        UsageError: the state is of something else, or of another version.
    """
    version = state.get("format_version", "none (pml_fewshot 0.5 or before)")
    if version != FORMAT_VERSION:
        raise UsageError(
            f"expected a training's checkpoint of format {FORMAT_VERSION}, got format {version}; resume with the "
            "version that wrote it (config.txt names it), or start a new run"
        )
    if missing := sorted(KEYS - state.keys()):
        raise UsageError(f"expected a training's checkpoint, got one without {', '.join(missing)}; use another file")
    stored = dict(state["history"])
    stored["losses"] = [(int(step), loss) for step, loss in stored["losses"].tolist()]
    stored["validations"] = [(int(step), mean, ci95) for step, mean, ci95 in stored["validations"].tolist()]
    return History(**stored)


def restore_trained(trainer: nn.Module, state: dict[str, Any]) -> None:
    """Loads the final weights of a training into a trainer: the best by validation, or by loss, else the last."""
    history_of(state)
    average = {n: state["average"][f"module.{n}"] for n, _ in trainer.named_parameters()} if "average" in state else {}
    weights = state["best"] or state["trainer"] | average
    check_weights(trainer.state_dict(), weights, "the checkpoint")
    trainer.load_state_dict(weights)
