"""frozen_parts: freezes parts of a trainer for its first steps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from pml_fewshot.checks import UsageError, check_at_least_one, check_choice


@contextmanager
def frozen_parts(trainer: nn.Module, steps: Mapping[str, int]) -> Iterator[Callable[[int], None]]:
    """Freezes parts and yields a function that, given the number of steps taken, thaws those whose time has come.

    A frozen part is in eval mode, including batch norm, and no gradient is computed for it, nor through it if nothing
    before it is trained. For a part within a part, the longer time counts. At the end, the modes and `requires_grad` of
    every part are restored.

    Args:
        steps: how many steps to freeze each part for, by the module's name in the trainer: `{"embedder.trunk": 500}`.

    Raises:
        UsageError: a part does not exist, or nothing else is left to train.
    """
    check_parts(trainer, steps)
    parts = sorted(((trainer.get_submodule(name), count) for name, count in steps.items()), key=lambda part: -part[1])
    modes = {module: module.training for part, _ in parts for module in part.modules()}
    weights = {weight for part, _ in parts for weight in part.parameters() if weight.requires_grad}

    def thaw(taken: int) -> None:
        """Restores whatever is not in a part that is still frozen."""
        held = [part for part, count in parts if count > taken]
        held_modules = {module for part in held for module in part.modules()}
        held_weights = {weight for part in held for weight in part.parameters()}
        for module in modes:
            module.training = modes[module] and module not in held_modules
        for weight in weights:
            weight.requires_grad_(weight not in held_weights)
        while parts and parts[-1][1] <= taken:
            parts.pop()

    def thaw_what_is_due(taken: int) -> None:
        if parts and parts[-1][1] <= taken:
            thaw(taken)

    try:
        thaw(0)
        yield thaw_what_is_due
    finally:
        thaw(max(steps.values(), default=0))


def check_parts(trainer: nn.Module, steps: Mapping[str, int]) -> None:
    """Raises a UsageError for an unknown part (with the nearest name), an invalid step count, or no weight left."""
    names = [name for name, _ in trainer.named_modules(remove_duplicate=False) if name]
    for name, count in steps.items():
        check_choice("a part to freeze", name, names)
        check_at_least_one(f"the steps that {name} is frozen for", count)
        if next(trainer.get_submodule(name).parameters(), None) is None:
            raise UsageError(f"expected a part with weights to freeze, got {name}, which has none; leave it out")
    frozen = {weight for name in steps for weight in trainer.get_submodule(name).parameters()}
    if steps and all(weight in frozen for weight in trainer.parameters() if weight.requires_grad):
        got = f"got {', '.join(steps)}, which is all; freeze less"
        raise UsageError(f"expected a weight to train in the first steps, {got}")
