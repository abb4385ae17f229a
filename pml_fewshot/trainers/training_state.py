"""What a training has done so far (History) and all that it goes on from (TrainingState)."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pml_fewshot.checkpoint import check_weights
from pml_fewshot.checks import require
from pml_fewshot.trainers.divergence import Trained

LAYOUT = 2  # of what state_dict holds: raise it when that changes
ENTRIES = ("kinds", "trainer", "optimizer", "best", "best_score", "lowest_loss", "go_back_to", "recent", "history")
GENERATORS = ("torch_generator", "cuda_generators")


@dataclass
class History:
    """What happened in a training.

    Args:
        losses: (step, mean loss of the steps since the entry before).
        validations: (step, mean accuracy, half its 95 % interval).
        best_step: step of the weights that the trainer holds at the end.
        stopped: why it ended: "all steps", "no improvement", "loss no longer falling" or "learning rate at its
            lowest".
        steps: steps taken, over all sittings.
        retries: times that it diverged and went back to a checkpoint, with half the learning rate from there on.
        skipped: steps among them whose batch held nothing to learn from (no pair for the miner or the loss); the
            weights stayed as they were.
        seconds: time in training and validation, over all sittings.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    best_step: int = 0
    stopped: str = "all steps"
    steps: int = 0
    retries: int = 0
    skipped: int = 0
    seconds: float = 0.0


class Stateful(Protocol):
    """A trainer, an optimizer, a scheduler, a stream of batches: anything whose state can be taken and given back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class TrainingState:
    """The trainer, optimizer, scheduler and stream of a training, its history, and the best weights so far."""

    def __init__(
        self, trainer: nn.Module, optimizer: Stateful, scheduler: Stateful | None, batches: Iterable[Any]
    ) -> None:
        self.trainer = trainer
        self.batches = batches
        self.parts: dict[str, Stateful] = {"trainer": trainer, "optimizer": optimizer}
        if scheduler is not None:
            self.parts["scheduler"] = scheduler
        if hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict"):
            self.parts["batches"] = batches  # type: ignore[assignment]
        self.history = History()
        self.best: dict[str, Any] | None = None  # weights of the best validation, or of the lowest loss
        self.best_score = float("-inf")  # validation accuracy, or minus the loss
        self.lowest_loss, self.lowest_loss_step = float("inf"), 0
        # state of the last checkpoint that was due, when the one on disk is of an interruption after it
        self.go_back_to: dict[str, Any] | None = None
        self.recent: list[Trained] = []  # since the losses were last looked at: each look waits for the GPU

    def batches_to_come(self) -> Iterator[Any]:
        """The batches that come after the steps taken."""
        source = iter(self.batches)
        if "batches" not in self.parts and not isinstance(self.batches, Iterator):
            return islice(source, self.history.steps, None)  # a list begins anew: leave out what was trained on
        return source

    def note_step(self, loss: Tensor, rate: float, batch: object) -> None:
        """Notes a step that was learned from, before it is counted; `batch.classes` is kept for messages."""
        classes = getattr(batch, "classes", None)
        self.recent.append((self.history.steps + 1, loss.detach(), rate, classes if torch.is_tensor(classes) else None))

    def keep_if_best(self, score: float) -> None:
        """Keeps a copy of the weights when `score` is above all before."""
        if score > self.best_score:
            self.best_score = score
            now = self.trainer.state_dict()
            if self.best is None or self.best.keys() != now.keys():
                self.best = copy.deepcopy(now)
            else:
                for name, value in now.items():
                    if _same_shape(self.best[name], value):
                        # in its place: new tensors at new places, each time, would break up the memory that steps use
                        self.best[name].copy_(value)
                    else:  # a lazy weight that has its shape now, or what get_extra_state gave
                        self.best[name] = copy.deepcopy(value)
            self.history.best_step = self.history.steps

    def note_loss(self, loss: float) -> None:
        """Notes the mean loss of the latest steps."""
        if loss < self.lowest_loss:
            self.lowest_loss, self.lowest_loss_step = loss, self.history.steps

    def validations_since_best(self) -> int:
        return sum(step > self.history.best_step for step, _, _ in self.history.validations)

    def restore_best(self) -> None:
        """Gives the trainer the best weights seen; the last ones stay where nothing was validated."""
        if self.best is None:
            self.history.best_step = self.history.steps
        else:
            self.trainer.load_state_dict(self.best)

    def state_dict(self) -> dict[str, Any]:
        return {
            "layout": LAYOUT,
            "kinds": self._kinds(),
            **{name: part.state_dict() for name, part in self.parts.items()},
            "best": self.best,
            "best_score": self.best_score,
            "lowest_loss": [self.lowest_loss, self.lowest_loss_step],
            "go_back_to": self.go_back_to,
            "recent": [list(each) for each in self.recent],
            "history": _history_data(self.history),
            "torch_generator": torch.get_rng_state(),  # dropout and PML's miners draw from it
            "cuda_generators": torch.cuda.get_rng_state_all(),  # empty where there is no GPU
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_layout(state)
        missing = [name for name in (*self.parts, *GENERATORS) if name not in state]
        require(
            not missing, f"{', '.join(self.parts)} in the checkpoint", f"no {', '.join(missing)}", "resume what ran"
        )
        unused = "scheduler" in state and "scheduler" not in self.parts
        require(not unused, "a scheduler, as the checkpoint has one", "none", "give the one that it was trained with")
        for name, own in self._kinds().items():
            kind = state["kinds"].get(name)
            require(own == kind, f"a {kind} as {name}, of which the checkpoint is", own, "resume with what it ran with")
        history = history_of(state)
        check_weights(self.trainer.state_dict(), state["trainer"], "the checkpoint")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.best, self.best_score = state["best"], state["best_score"]
        self.go_back_to = state["go_back_to"]
        self.lowest_loss, self.lowest_loss_step = state["lowest_loss"]
        device = next(self.trainer.parameters()).device
        self.recent = [
            (step, loss.to(device), rate, classes if classes is None else classes.to(device))
            for step, loss, rate, classes in state["recent"]
        ]
        vars(self.history).update(vars(history))  # the same object: the loop holds it too
        torch.set_rng_state(state["torch_generator"])
        if state["cuda_generators"] and torch.cuda.is_available():  # a GPU's run may go on on a CPU, and vice versa
            present = state["cuda_generators"][: torch.cuda.device_count()]
            torch.cuda.set_rng_state_all(present)

    def _kinds(self) -> dict[str, str]:
        """Of what would take another's state, or fail over it in the first step."""
        return {
            name: type(part).__qualname__ for name, part in self.parts.items() if name in ("optimizer", "scheduler")
        }


def _same_shape(kept: Any, now: Any) -> bool:
    if not torch.is_tensor(kept) or not torch.is_tensor(now):
        return False
    return not is_lazy(kept) and not is_lazy(now) and kept.shape == now.shape


def load_trained(trainer: nn.Module, state: dict[str, Any]) -> None:
    """Gives a trainer the weights that a finished training's state ends with: the best validated, else the last."""
    check_layout(state)
    weights = state["trainer"] if state["best"] is None else state["best"]
    check_weights(trainer.state_dict(), weights, "the checkpoint")
    trainer.load_state_dict(weights)


def history_of(state: dict[str, Any]) -> History:
    """The history in a training's state."""
    check_layout(state)
    stored = state["history"]
    kinds = {name: type(value) for name, value in vars(History()).items()} | {"losses": Tensor, "validations": Tensor}
    require(isinstance(stored, dict), "a history in the checkpoint", type(stored).__name__, "use another checkpoint")
    wrong = sorted(str(name) for name in kinds.keys() | stored.keys() if type(stored.get(name)) is not kinds.get(name))
    require(
        not wrong, f"a history of {', '.join(kinds)}", f"none or another {', '.join(wrong)}", "use another checkpoint"
    )
    shapes = [tuple(stored[name].shape[1:]) for name in ("losses", "validations")]
    require(shapes == [(2,), (3,)], "losses (n, 2) and validations (n, 3)", shapes, "use another checkpoint")
    losses, validations = (stored[name].tolist() for name in ("losses", "validations"))
    rows = {
        "losses": [(int(step), loss) for step, loss in losses],
        "validations": [(int(step), mean, ci95) for step, mean, ci95 in validations],
    }
    return History(**{**stored, **rows})


def _history_data(history: History) -> dict[str, Any]:
    """As tensors: a checkpoint's reader does not take a structure of millions of numbers."""
    losses = torch.tensor(history.losses, dtype=torch.float64).reshape(-1, 2)
    validations = torch.tensor(history.validations, dtype=torch.float64).reshape(-1, 3)
    return {**vars(history), "losses": losses, "validations": validations}


def check_layout(state: dict[str, Any]) -> None:
    """Raises a ValueError unless this version wrote the state of a training."""
    layout = state.get("layout") if isinstance(state, dict) else None
    require(
        layout == LAYOUT,
        f"a training's state of layout {LAYOUT}",
        f"layout {layout}" if layout else "another state, or one of pml_fewshot 0.4 or before",
        "go on with the version that it was made with (config.txt names it), or begin anew",
    )
    missing = [name for name in ENTRIES if name not in state]
    require(not missing, f"{', '.join(ENTRIES)} in a training's state", f"no {', '.join(missing)}", "use another one")
