"""Parts of an experiment: objects, or zero-argument factories of them."""

from functools import partial
from typing import Any


def build(part: Any) -> Any:
    """Returns the object that a part describes: a class or a `functools.partial` is called, anything else is returned.

    Partials among a partial's arguments are built first, so `partial(NTXentLoss, distance=partial(LpDistance, p=1))`
    needs no lambda. Classes among them are passed on as they are (`norm_layer` of a torchvision model wants a class).
    """
    return part() if isinstance(part, type) else _build_partial(part)


def _build_partial(part: Any) -> Any:
    if not isinstance(part, partial):
        return part
    arguments = {name: _build_partial(value) for name, value in part.keywords.items()}
    return part.func(*map(_build_partial, part.args), **arguments)
