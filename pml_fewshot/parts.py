"""Parts of an experiment: objects, or zero-argument factories of them."""

from functools import partial
from types import FunctionType
from typing import Any

from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords


def build(part: Any) -> Any:
    """Returns what a part describes: a class, function or `functools.partial` is called, anything else is returned.

    Among a partial's arguments, and in lists and dicts there, partials and classes of PML parts are built first, so
    neither `partial(NTXentLoss, distance=partial(LpDistance, p=1))` nor the class CosineSimilarity as distance needs a
    lambda. Other classes and functions there are passed on as they are (torchvision's `norm_layer` wants a class).
    """
    if isinstance(part, type | FunctionType):
        return part()
    return _build_argument(part) if isinstance(part, partial) else part


def _build_argument(part: Any) -> Any:
    if isinstance(part, type) and issubclass(part, ModuleWithRecords):  # the base of all of PML's parts
        return part()
    if isinstance(part, list):
        return [_build_argument(each) for each in part]
    if isinstance(part, dict):
        return {name: _build_argument(each) for name, each in part.items()}
    if not isinstance(part, partial):
        return part
    arguments = {name: _build_argument(value) for name, value in part.keywords.items()}
    return part.func(*map(_build_argument, part.args), **arguments)
