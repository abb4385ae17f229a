"""frozen_parts: parts of a trainer that are not trained in its first steps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from pml_fewshot.checks import UsageError, check_at_least_one, check_choice


@contextmanager
def frozen_parts(trainer: nn.Module, steps: Mapping[str, int]) -> Iterator[Callable[[int], None]]:
    """Freezes parts and yields a function that, told how many steps were taken, thaws those whose time has come.

    A frozen part is in eval mode, batch norm too, and no gradient is computed for it, nor through it where nothing
    before it is trained. In the end every part has its own modes and `requires_grad` again.

    Args:
        steps: how many steps to freeze each part for, by the module's name in the trainer: `{"embedder.trunk": 500}`.

    Raises:
        UsageError: no such part.
    """
    check_parts(trainer, steps)
    frozen = {name: _Frozen(trainer.get_submodule(name)) for name in steps}

    def thaw(taken: int) -> None:
        for name in [name for name in frozen if steps[name] <= taken]:
            frozen.pop(name).thaw()

    try:
        yield thaw
    finally:
        for part in frozen.values():
            part.thaw()


def check_parts(trainer: nn.Module, steps: Mapping[str, int]) -> None:
    """Raises a UsageError, with the nearest name, for a part that the trainer does not have, or no number of steps."""
    names = [name for name, _ in trainer.named_modules() if name]
    for name, count in steps.items():
        check_choice("a part to freeze", name, names)
        check_at_least_one(f"the steps that {name} is frozen for", count)
        if next(trainer.get_submodule(name).parameters(), None) is None:
            raise UsageError(f"expected a part with weights to freeze, got {name}, which has none; leave it out")


class _Frozen:
    def __init__(self, part: nn.Module) -> None:
        self.modes = [(module, module.training) for module in part.modules()]
        self.weights = [weight for weight in part.parameters() if weight.requires_grad]
        part.eval().requires_grad_(False)

    def thaw(self) -> None:
        for module, training in self.modes:
            module.training = training
        for weight in self.weights:
            weight.requires_grad_()
