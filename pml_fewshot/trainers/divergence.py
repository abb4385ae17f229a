"""Trainings whose loss became NaN or infinite: how that is seen and what is said of it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

NAMED = 10  # classes at most in a message


class TrainingDiverged(ArithmeticError):
    """The loss or a weight became NaN or infinite."""


# step, loss, learning rate and classes of a batch that was trained on
Trained = tuple[int, Tensor, float, Tensor | None]


def what_diverged(recent: Sequence[Trained], trainer: nn.Module, class_names: Sequence[str]) -> str:
    """Says where a training went wrong, or "" where it did not.

    Args:
        recent: the batches since the last look; the weights are those after the last one.
        trainer: whose weights are looked at.
        class_names: of the labels that the classes are; empty where unknown.
    """
    losses = torch.stack([loss for _, loss, *_ in recent])
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if not bad and all(p.isfinite().all() for p in trainer.parameters()):
        return ""
    step, loss, rate, classes = recent[bad[0] if bad else -1]
    what = f"a loss of {loss.item()} at" if bad else "a NaN or infinite weight after"
    shown = f" on a batch of {_listed(classes, class_names)}" if classes is not None else ""
    return f"{what} step {step} (learning rate {rate:g}){shown}"


def diverged(what: str, trainer: nn.Module, checkpoint: str | Path | None) -> TrainingDiverged:
    """The error to raise for what `what_diverged` said."""
    kept = f"the last good state is in {checkpoint}" if checkpoint and Path(checkpoint).exists() else "none was kept"
    advice = getattr(trainer, "when_diverged", "")
    return TrainingDiverged(
        f"expected a finite loss, got {what}; {kept}; lower the learning rate, {f'{advice}, ' if advice else ''}clip "
        "the gradient (clip_norm), let it go back by itself (retries), or look for NaN in the data"
    )


def _listed(classes: Tensor, names: Sequence[str]) -> str:
    labels = classes.unique().tolist()
    listed = ", ".join(f"{label} {names[label]}" if label < len(names) else str(label) for label in labels[:NAMED])
    more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
    return f"class{'es' if len(labels) > 1 else ''} {listed}{more}"
