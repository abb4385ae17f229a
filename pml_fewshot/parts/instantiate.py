"""instantiate: the objects that a config's partials describe."""

import inspect
from functools import partial
from typing import Any, TypeAlias, TypeVar

from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords

T = TypeVar("T")
Part: TypeAlias = T | partial[Any]  # what a trainer takes: an object, or a partial that makes it


def instantiate(part: Any) -> Any:
    """Calls a partial, after its own arguments and what lists, tuples and dicts among them hold; returns all else.

    So `partial(NTXentLoss, distance=partial(LpDistance, p=1))` needs no lambda. A bare class of PML, such as
    `distance=CosineSimilarity`, stands for a partial without arguments; other classes and functions are passed on
    (torchvision's `norm_layer` wants a class, MAML's `loss` may be a function), and so is a partial of a function that
    still wants arguments (`head=partial(k_nearest_neighbours, k=5)`).
    """
    if isinstance(part, partial) and not _wants_more(part):
        arguments = {name: instantiate(value) for name, value in part.keywords.items()}
        return part.func(*map(instantiate, part.args), **arguments)
    if isinstance(part, type) and issubclass(part, ModuleWithRecords):  # the base of all of PML's parts
        return part()
    if type(part) in (list, tuple):
        return type(part)(map(instantiate, part))
    if type(part) is dict:
        return {name: instantiate(each) for name, each in part.items()}
    return part


def _wants_more(part: partial[Any]) -> bool:
    """Whether it is of a function that cannot be called yet; a class that lacks an argument is to say so itself."""
    if not inspect.isfunction(part.func):
        return False
    try:
        inspect.signature(part).bind()
    except TypeError:
        return True
    return False
