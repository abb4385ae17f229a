"""A config as plain data (for config.json in a run folder) and back, without running what a stranger's file names.

Factories are stored by name and arguments, so `partial(Conv4, in_channels=1)` is {"partial":
"pml_fewshot.embedders.conv4:Conv4", "keywords": {"in_channels": 1}}.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from pml_fewshot.checks import require

# Where names are looked up. Of torch's and PML's only classes are taken, of ours no function that writes files.
CLASSES_OF = ("torch.nn.", "torch.optim.", "pytorch_metric_learning.")
CLASSES_AND_FUNCTIONS_OF = (
    *("pml_fewshot.data.", "pml_fewshot.distances.", "pml_fewshot.embedders.", "pml_fewshot.evaluation."),
    *("pml_fewshot.losses.", "pml_fewshot.trainers.", "pml_fewshot.episodes", "pml_fewshot.batches"),
    *("pml_fewshot.experiment_config", "torchvision.models.", "experiments."),
)


def to_data(value: Any) -> Any:
    """Returns numbers, texts, lists and dicts that `from_data` makes the value from; of objects only their repr."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [to_data(each) for each in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_data(each) for key, each in value.items()}}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, partial) and _name(value.func):
        keywords = {key: to_data(each) for key, each in value.keywords.items()}
        return {"partial": _name(value.func), "args": [to_data(each) for each in value.args], "keywords": keywords}
    if isinstance(value, type | FunctionType) and _name(value):
        return {"name": _name(value)}
    if is_dataclass(value) and _name(type(value)):
        given = {field.name: to_data(getattr(value, field.name)) for field in fields(value) if field.init}
        return {"object": _name(type(value)), "fields": given}
    return {"only_shown": repr(value)}


def from_data(data: Any, trusted: Sequence[str] = (), place: str = "config") -> Any:
    """Returns what `to_data` was given. Nothing is called but the classes of data (EpisodeSpec, RandomAffine).

    Args:
        data: what `to_data` returned.
        trusted: modules of your own whose classes and functions may be named, beside those of pml_fewshot,
            `experiments`, torch, torchvision's models and PML.
        place: where in the config this stands, for messages.

    Raises:
        ValueError: a name from elsewhere or one that is not there, an object that was given as it is instead of by a
            factory, or no such data.
    """

    def inner(each: Any, name: object) -> Any:
        return from_data(each, trusted, f"{place}.{name}")

    if data is None or isinstance(data, bool | int | float | str):
        return data
    match data:
        case {"list": list(values)}:
            return [inner(each, number) for number, each in enumerate(values)]
        case {"tuple": list(values)}:
            return tuple(inner(each, number) for number, each in enumerate(values))
        case {"dict": dict(values)}:
            return {key: inner(each, key) for key, each in values.items()}
        case {"path": str(path)}:
            return Path(path)
        case {"partial": str(name), "args": list(args), "keywords": dict(keywords)}:
            given = {key: inner(each, key) for key, each in keywords.items()}
            return partial(_named(name, trusted, place), *(inner(each, n) for n, each in enumerate(args)), **given)
        case {"name": str(name)}:
            return _named(name, trusted, place)
        case {"object": str(name), "fields": dict(values)}:
            kind = _named(name, trusted, place)
            known = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
            require(values.keys() <= known, f"the fields of {name} at {place}", sorted(values), "use its own version")
            return kind(**{key: inner(each, key) for key, each in values.items()})
        case {"only_shown": str(shown)}:
            raise ValueError(
                f"expected parts that can be built anew at {place}, got {shown}, of which only this is stored; give "
                "parts as factories, partial(Class, ...) of importable classes, and run again"
            )
    raise ValueError(
        f"expected a stored config at {place}, got {str(data)[:100]!r}; it was changed or is of another kind"
    )


def _name(named: Callable[..., Any]) -> str:
    """module:qualified name, under which it can be found; empty for lambdas and functions within functions."""
    module, name = getattr(named, "__module__", None), getattr(named, "__qualname__", "")
    if module == "__main__":  # python -m experiments.mine
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec is not None else None
    return f"{module}:{name}" if module and name and "<" not in name else ""


def _named(name: str, trusted: Sequence[str], place: str) -> Callable[..., Any]:
    """The class or function of a name that `_name` gave."""
    module, _, qualified = name.partition(":")
    dotted = f"{module}."
    ours = dotted.startswith((*CLASSES_AND_FUNCTIONS_OF, *(f"{each}." for each in trusted)))
    require(
        ours or dotted.startswith(CLASSES_OF),
        f"a name from pml_fewshot, experiments, torch, torchvision or PML at {place}",
        name,
        "name its module as trusted (--trust) if you know what it does",
    )
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"expected {name} at {place}, got {error}; install or check out what the run was made with"
        ) from error
    own = isinstance(found, type | FunctionType) and (found.__module__, found.__qualname__) == (module, qualified)
    public = not any(part.startswith("_") for part in qualified.split("."))
    require(
        own and public and (ours or isinstance(found, type)),
        f"a public class {'or function ' if ours else ''}that {module} defines at {place}",
        qualified,
        "the file was changed",
    )
    return found
