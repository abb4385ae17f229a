"""When a ReduceLROnPlateau ends a training."""

from torch.optim.lr_scheduler import ReduceLROnPlateau


def cannot_fall_further(plateau: ReduceLROnPlateau, accuracy: float) -> bool:
    """Steps the scheduler; True when it wanted to lower rates that were at their lowest already."""
    rates = [(group["lr"], low) for group, low in zip(plateau.optimizer.param_groups, plateau.min_lrs, strict=True)]
    # torch leaves a rate as it is when the change would be no larger than eps
    lowest = all(rate - max(rate * plateau.factor, low) <= plateau.eps for rate, low in rates)
    best, cooling = plateau.best, plateau.in_cooldown
    plateau.step(accuracy if plateau.mode == "max" else 1 - accuracy)
    # num_bad_epochs returns to 0 on a new best and on an attempt to lower the rate
    return lowest and not cooling and plateau.num_bad_epochs == 0 and plateau.best == best
