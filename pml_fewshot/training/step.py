"""train_step: one update of the weights, and its requirements for a trainer and an optimizer."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from pml_fewshot.checks import UsageError
from pml_fewshot.distributed import average_step, world
from pml_fewshot.embedders.synced_batch_norm import synced


def train_step(
    trainer: nn.Module, batch: Any, optimizer: Optimizer, clip_norm: float | None, autocast: torch.autocast
) -> Tensor | None:
    """Updates the weights once; returns the loss, or None if the batch held nothing to learn from.

    With several processes, all make the same update, using the average of their gradients.

    Raises:
        UsageError: a loss other than 0 that depends on no weight.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        loss: Tensor = trainer(batch)
    learned = loss.requires_grad
    if learned:
        with synced():
            loss.backward()
    elif loss.detach() != 0:
        raise UsageError(
            f"expected a loss that depends on weights to train, got {loss.item():g} without a gradient; look for "
            "torch.no_grad() or .detach() on the way from the images to the loss, and for frozen weights"
        )
    if world().size > 1:
        loss, learned = average_step(trainer, loss)
    if not learned:
        return None
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(trainer.parameters(), clip_norm)
    optimizer.step()
    return loss.detach()


def warn_of_unreached(trainer: nn.Module) -> None:
    """Warns about parts of a trainer none of whose weights received a gradient, though others did: a lost graph?"""
    for name, part in trainer.named_children():
        weights = [weight for weight in part.parameters() if weight.requires_grad]
        if weights and all(weight.grad is None for weight in weights):
            warnings.warn(
                f"no gradient reached {name} in the first step: it is not trained; freeze it if that is meant, else "
                "look for torch.no_grad() or .detach() on its way to the loss",
                stacklevel=3,
            )


def check_trainable(trainer: nn.Module) -> None:
    """Raises a UsageError unless some of the weights can be trained."""
    weights = list(trainer.parameters())
    if not any(weight.requires_grad for weight in weights):
        raise UsageError("expected a parameter to train, got none that requires a gradient; unfreeze some, or evaluate")
    if any(not is_lazy(weight) and weight.is_inference() for weight in weights):
        raise UsageError("expected weights that can be trained, got some made in inference mode; make them outside")


def check_optimizer(optimizer: Any) -> None:
    """Raises a UsageError for an optimizer, or optimizer class, that evaluates the loss itself (LBFGS)."""
    needed = [p for p in inspect.signature(optimizer.step).parameters.values() if p.name == "closure"]
    if needed and needed[0].default is inspect.Parameter.empty:
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        do = "take one that steps by the gradient alone, such as Adam or SGD"
        raise UsageError(f"expected an optimizer whose step needs no closure, got {name}; {do}")


def check_holds(optimizer: Optimizer, trainer: nn.Module) -> None:
    """Raises a UsageError for an optimizer without any parameter of the trainer, which would train nothing."""
    own = {id(parameter) for parameter in trainer.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        do = "make it from trainer.parameters() after the trainer"
        raise UsageError(f"expected an optimizer of the trainer's parameters, got one that has none of them; {do}")


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The rate of each group by its recorded name: "learning_rate", or "learning_rate_embedder_trunk" for a part."""
    rates = {}
    for number, group in enumerate(optimizer.param_groups):
        name = str(group.get("name") or number or "").replace(".", "_")
        rates[f"learning_rate_{name}" if name else "learning_rate"] = float(group["lr"])
    return rates
