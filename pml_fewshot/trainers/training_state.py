"""What a training has done so far (History) and all that it goes on from (TrainingState)."""

import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pml_fewshot.checks import require


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
        skipped: steps among them whose batch held nothing to learn from (no pair for the miner or the loss); the
            weights stayed as they were.
        seconds: time in training and validation, over all sittings.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    best_step: int = 0
    stopped: str = "all steps"
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0


class Stateful(Protocol):
    """A trainer, an optimizer, a scheduler, a stream of batches: anything whose state can be taken and given back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class TrainingState:
    """The trainer, optimizer, scheduler and stream of a training, its history, and the best weights so far."""

    def __init__(self, trainer: nn.Module, optimizer: Stateful, scheduler: Stateful | None, batches: object) -> None:
        self.trainer = trainer
        self.parts: dict[str, Stateful] = {"trainer": trainer, "optimizer": optimizer}
        if scheduler is not None:
            self.parts["scheduler"] = scheduler
        if hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict"):
            self.parts["batches"] = batches
        self.history = History()
        self.best: dict[str, Tensor] | None = None  # weights of the best validation, or of the lowest loss
        self.best_score = float("-inf")  # validation accuracy, or minus the loss
        self.lowest_loss, self.lowest_loss_step = float("inf"), 0

    def keep_if_best(self, score: float) -> None:
        """Keeps a copy of the weights when `score` is above all before."""
        if score > self.best_score:
            self.best_score = score
            self.best = copy.deepcopy(self.trainer.state_dict())
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
            **{name: part.state_dict() for name, part in self.parts.items()},
            "best": self.best,
            "best_score": self.best_score,
            "lowest_loss": [self.lowest_loss, self.lowest_loss_step],
            "history": vars(self.history),
            "torch_generator": torch.get_rng_state(),  # dropout and PML's miners draw from it
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = self.parts.keys() - state.keys()
        require(
            not missing, f"{', '.join(self.parts)} in the checkpoint", f"no {', '.join(missing)}", "resume what ran"
        )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.best, self.best_score = state["best"], state["best_score"]
        self.lowest_loss, self.lowest_loss_step = state["lowest_loss"]
        self.history = History(**state["history"])
        torch.set_rng_state(state["torch_generator"])
