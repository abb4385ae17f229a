"""Checks the arguments of a config's partials: a misspelled one is an error before anything is built."""

import inspect
from functools import partial
from typing import Any

from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import nn

from pml_fewshot.checks import UsageError, check_choice

COOPERATIVE = ("pytorch_metric_learning.", "pml_fewshot.")  # PML parts in these pass **kwargs on to their base classes


def check_arguments(part: Any, place: str) -> None:
    """Raises a UsageError if `part`, or a partial in it, has an argument that its function does not accept."""
    inner = part if isinstance(part, dict) else dict(enumerate(part)) if isinstance(part, list | tuple) else {}
    if isinstance(part, partial):
        inner = arguments_of(part)
        called, wrong = getattr(part.func, "__qualname__", repr(part.func)), None
        try:
            names = _keywords(part.func)
            wrong = next((name for name in part.keywords if names is not None and name not in names), None)
            if wrong is None:
                inspect.signature(part.func).bind_partial(*part.args, **part.keywords)
        except TypeError as error:
            raise UsageError(f"expected arguments that {called} takes ({place}), got {error}; see its docs") from error
        except ValueError:  # a function in C, which has no signature
            pass
        if wrong is not None:
            check_choice(f"an argument of {called} ({place})", wrong, sorted(names or ()))
    for name, each in inner.items():
        check_arguments(each, f"{place}.{name}")


def arguments_of(part: partial[Any]) -> dict[str, Any]:
    """Returns a partial's arguments by name, positional ones by number."""
    return {**{str(number): each for number, each in enumerate(part.args)}, **part.keywords}


def _keywords(function: Any) -> set[str] | None:
    """Returns the names of a function's or class's keyword arguments; None if it accepts any name."""
    classes = [each for each in getattr(function, "__mro__", ()) if each not in (nn.Module, object)]
    initializers = [vars(each)["__init__"] for each in classes if "__init__" in vars(each)]
    cooperative = ModuleWithRecords in classes
    names: set[str] = set()
    for each in initializers or [function]:
        parameters = inspect.signature(each).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names
        if not cooperative or not each.__module__.startswith(COOPERATIVE):
            return None
    return names
