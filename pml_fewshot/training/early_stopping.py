"""EarlyStopping: when training ends before its last step, and which weights are the best."""

from dataclasses import asdict, dataclass
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from pml_fewshot.checks import UsageError, check_at_least_one


@dataclass
class BestScore:
    """The best score so far (larger is better), its training step, and the number of scores since."""

    score: float = float("-inf")
    step: int = 0
    since: int = 0

    def offer(self, score: float, step: int) -> bool:
        """Records the score of a step; returns whether it is the best so far."""
        self.since += 1
        if score > self.score:
            self.score, self.step, self.since = score, step, 0
        return self.since == 0


class EarlyStopping:
    """Tracks the losses and validations of a training.

    Args:
        validated: whether the training has a validation; if so, its accuracy decides which weights are best.
        patience: number of validations without a new best after which training ends; never when None.
        loss_patience: number of steps without a new lowest loss after which training ends; never when None. Without
            validation, the weights of the lowest loss are the best.
        plateau: stepped with each validation; ends training when it asks for less than its lowest learning rate.
    """

    def __init__(
        self, validated: bool, patience: int | None, loss_patience: int | None, plateau: ReduceLROnPlateau | None
    ) -> None:
        for name, limit in (("patience", patience), ("loss_patience", loss_patience)):
            check_at_least_one(name, 1 if limit is None else limit)
        if not validated and (plateau is not None or patience is not None):
            raise UsageError("expected validate=... for ReduceLROnPlateau and patience, got none; pass it or drop them")
        self.validated = validated
        self.patience = patience
        self.loss_patience = loss_patience
        self.plateau = plateau
        self.loss = BestScore()
        self.accuracy = BestScore()

    def is_best_loss(self, loss: float, step: int) -> bool:
        """Records the loss of a step; returns whether its weights are the best so far."""
        return self.loss.offer(-loss, step) and self.loss_patience is not None and not self.validated

    def reason_after_log(self, step: int) -> str:
        """The reason to end training after a log step; empty to continue."""
        exhausted = self.loss_patience is not None and step - self.loss.step >= self.loss_patience
        return "loss no longer falling" if exhausted else ""

    def reason_after_validation(self, accuracy: float) -> str:
        """Steps the plateau, and returns the reason to end training after a validation; empty to continue."""
        if self.plateau is not None and step_plateau(self.plateau, accuracy):
            return "learning rate at its lowest"
        exhausted = self.patience is not None and self.accuracy.since >= self.patience
        return "no improvement" if exhausted else ""

    def state_dict(self) -> dict[str, Any]:
        return {"loss": asdict(self.loss), "accuracy": asdict(self.accuracy)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.accuracy = BestScore(**state["loss"]), BestScore(**state["accuracy"])


def step_plateau(plateau: ReduceLROnPlateau, accuracy: float) -> bool:
    """Steps the scheduler with a validation's error; returns whether it asked for rates that cannot fall further."""
    groups = zip(plateau.optimizer.param_groups, plateau.min_lrs, strict=True)
    # torch leaves a rate as it is when the change would be no larger than eps
    at_lowest = all(g["lr"] - max(g["lr"] * plateau.factor, lowest) <= plateau.eps for g, lowest in groups)
    best, cooling = plateau.best, plateau.in_cooldown
    plateau.step(accuracy if plateau.mode == "max" else 1 - accuracy)
    # num_bad_epochs returns to 0 on a new best and on an attempt to lower the rates
    return at_lowest and not cooling and plateau.num_bad_epochs == 0 and plateau.best == best
