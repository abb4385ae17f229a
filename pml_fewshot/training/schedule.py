"""Learning rates during training: as set by the caller, changed on resuming, and lowered after a NaN."""

import copy
from collections.abc import Container, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pml_fewshot.checks import UsageError

RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of an optimizer's group, some of them from OneCycleLR
RETRY_FACTOR = 0.5  # of the learning rate, each time training diverges; a power of 2 leaves the digits alone


def schedule_of(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """All settings of the optimizer's groups and of the scheduler."""
    groups = [{name: each for name, each in g.items() if name != "params"} for g in optimizer.param_groups]
    return copy.deepcopy({"groups": groups, "scheduler": {} if scheduler is None else scheduler.state_dict()})


def adopt_schedule(state: dict[str, Any], optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Writes the rates of a new optimizer and scheduler into a training's state_dict, if it began with others.

    The new rates are those that the steps taken would have led to: a cosine of 10 steps that is resumed for 20
    continues on the curve of 20; by the state alone it would rise again. Objects that have already taken steps follow
    the state.
    """
    if optimizer.state or getattr(scheduler, "last_epoch", 0) != 0:  # (ChainedScheduler has no last_epoch)
        return
    now, then = schedule_of(optimizer, scheduler), state["schedule"]
    same, retries = repr(now) == repr(then), state["history"]["retries"]
    replayed = scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau)
    if same and (retries or not replayed):
        return
    if scheduler is not None and replayed:  # always, because the functions of a LambdaLR are not in any state
        optimizer.zero_grad()
        optimizer.step()  # which changes nothing: schedulers expect it to come first
        for _ in range(state["history"]["steps"]):
            scheduler.step()
        state["scheduler"] = scheduler.state_dict()
    elif scheduler is not None:  # a plateau's observations come from the state, its settings from the caller
        own = now["scheduler"]
        state["scheduler"] |= {name: own[name] for name in own if own[name] != then["scheduler"].get(name)}
    reached = schedule_of(optimizer, scheduler)["groups"]
    for stored, group, before in zip(state["optimizer"]["param_groups"], reached, then["groups"], strict=True):
        stored |= {name: each for name, each in group.items() if replayed or each != before.get(name)}
    if replayed and now["groups"] == then["groups"]:  # else the caller has chosen the rate
        state["history"]["retries"] = 0
        for _ in range(retries):
            lower_learning_rate(state)


def kinds_of(parts: Mapping[str, Any]) -> dict[str, str]:
    """Classes of a training's parts except the trainer, and the number of its optimizer's groups.

    Parts of other classes would accept a state silently, or fail because of it in a step.
    """
    kinds = {name: type(part).__qualname__ for name, part in parts.items() if name != "trainer"}
    groups = len(parts["optimizer"].param_groups)
    return kinds | ({"optimizer": f"{kinds['optimizer']} of {groups} groups"} if groups > 1 else {})


def check_kinds(state: dict[str, Any], parts: Mapping[str, Any], names: Container[str] | None = None) -> None:
    """Raises a UsageError if parts (those in `names`, if given) have other classes than in a training's state."""
    then = {name: kind for name, kind in state["kinds"].items() if names is None or name in names}
    now = kinds_of(parts)
    if then != now:
        raise UsageError(f"expected the checkpoint's {then}, got {now}; pass what the run had, with other numbers")


def lower_learning_rate(state: dict[str, Any]) -> None:
    """Halves the learning rates of optimizer and scheduler in a training's state_dict, and counts a retry."""
    for group in state["optimizer"]["param_groups"]:
        group |= {name: group[name] * RETRY_FACTOR for name in RATES if name in group}
    schedulers = [state.get("scheduler", {})]
    for scheduler in schedulers:
        rates = scheduler.keys() & {"base_lrs", "max_lrs", "_last_lr"}
        scheduler |= {name: [rate * RETRY_FACTOR for rate in scheduler[name]] for name in rates}
        schedulers += scheduler.get("_schedulers", [])  # of SequentialLR and ChainedScheduler
    state["history"]["retries"] += 1
