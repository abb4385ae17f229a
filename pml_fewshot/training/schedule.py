"""Learning rates over a training: as the caller made them, changed on resuming, and lowered after a NaN."""

import copy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

RETRY_FACTOR = 0.5  # of the learning rate, each time that a training diverged; a power of 2 leaves the digits alone


def schedule_of(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """All that is set of the optimizer's groups and of the scheduler."""
    groups = [{name: each for name, each in g.items() if name != "params"} for g in optimizer.param_groups]
    return copy.deepcopy({"groups": groups, "scheduler": {} if scheduler is None else scheduler.state_dict()})


def adopt_schedule(state: dict[str, Any], optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Gives a training's state_dict the rates of a new optimizer and scheduler, where it began with others.

    The new rates are those that the steps taken would have led to: a cosine of 10 steps that is resumed for 20
    continues on the curve of 20; by the state alone it would rise again. Objects that have made steps already go on
    by the state.
    """
    now, then = schedule_of(optimizer, scheduler), state["schedule"]
    is_new = not optimizer.state and getattr(scheduler, "last_epoch", 0) == 0  # (ChainedScheduler has none)
    if not is_new or repr(now) == repr(then):
        return
    replayed = scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau)
    if scheduler is not None and replayed:
        optimizer.zero_grad()
        optimizer.step()  # which moves nothing: schedulers want it to come first
        for _ in range(state["history"]["steps"]):
            scheduler.step()
        state["scheduler"] = scheduler.state_dict()
    elif scheduler is not None:  # what a plateau has seen is the state's, what it was told is the caller's
        own = now["scheduler"]
        state["scheduler"] |= {name: own[name] for name in own if own[name] != then["scheduler"].get(name)}
    reached = schedule_of(optimizer, scheduler)["groups"]
    for stored, group, before in zip(state["optimizer"]["param_groups"], reached, then["groups"], strict=False):
        stored |= {name: each for name, each in group.items() if replayed or each != before.get(name)}
    if replayed and now["groups"] == then["groups"]:  # else the caller has chosen the rate
        retries, state["history"]["retries"] = state["history"]["retries"], 0
        for _ in range(retries):
            lower_learning_rate(state)


def lower_learning_rate(state: dict[str, Any]) -> None:
    """Halves the learning rates in a training's state_dict, of optimizer and scheduler, and counts a retry."""
    for group in state["optimizer"]["param_groups"]:
        group |= {name: group[name] * RETRY_FACTOR for name in ("lr", "initial_lr") if name in group}
    schedulers = [state.get("scheduler", {})]
    for scheduler in schedulers:
        rates = scheduler.keys() & {"base_lrs", "_last_lr"}
        scheduler |= {name: [rate * RETRY_FACTOR for rate in scheduler[name]] for name in rates}
        schedulers += scheduler.get("_schedulers", [])  # of SequentialLR and ChainedScheduler
    state["history"]["retries"] += 1
