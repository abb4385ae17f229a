"""Parts of an experiment: objects, or zero-argument factories of them."""

from functools import partial
from typing import Any


def build(part: Any) -> Any:
    """Returns the object that a part describes: a `functools.partial` is called, anything else is returned as it is.

    Partials among a partial's arguments are built first, so `partial(NTXentLoss, distance=partial(LpDistance, p=1))`
    needs no lambda. An argument that must stay a factory (`norm_layer` of a torchvision model) is given as a plain
    function or class.
    """
    if not isinstance(part, partial):
        return part
    return part.func(*map(build, part.args), **{name: build(value) for name, value in part.keywords.items()})
