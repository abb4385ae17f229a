"""instantiate: builds the objects that a config's partials describe."""

import inspect
from functools import partial
from typing import Any, TypeAlias, TypeVar

from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords

T = TypeVar("T")
Part: TypeAlias = T | partial[Any]  # what a trainer accepts: an object, or a partial that builds it


def instantiate(part: Any) -> Any:
    """Calls a partial, after those in its arguments and in lists, tuples and dicts among them; returns all else.

    So `partial(NTXentLoss, distance=partial(LpDistance, p=1))` needs no lambda. A bare PML class, such as
    `distance=CosineSimilarity`, is treated as a partial without arguments; other classes and functions are passed on
    (torchvision's `norm_layer` expects a class, MAML's `loss` may be a function), and so is a partial of a function
    that still needs arguments (`head=partial(k_nearest_neighbours, k=5)`).
    """
    if isinstance(part, partial) and not _wants_more(part):
        arguments = {name: instantiate(value) for name, value in part.keywords.items()}
        return part.func(*map(instantiate, part.args), **arguments)
    if isinstance(part, type) and issubclass(part, ModuleWithRecords):  # the base of all PML parts
        return part()
    if type(part) in (list, tuple):
        return type(part)(map(instantiate, part))
    if type(part) is dict:
        return {name: instantiate(each) for name, each in part.items()}
    return part


def _wants_more(part: partial[Any]) -> bool:
    """Whether its function still needs arguments; a class that lacks one should raise the error itself."""
    if not inspect.isfunction(part.func):
        return False
    try:
        inspect.signature(part).bind()
    except TypeError:
        return True
    return False
