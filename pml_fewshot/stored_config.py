"""A config as plain data (for config.json in a run folder) and back, without running what a stranger's file names.

Factories are stored by name and arguments, so `partial(Conv4, in_channels=1)` is {"partial":
"pml_fewshot.embedders.conv4:Conv4", "keywords": {"in_channels": 1}}.
"""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from pml_fewshot.checks import require
from pml_fewshot.sizes import checksum

# Of other packages only classes of these kinds are built: they compute, and touch no file.
KINDS = (nn.Module, Optimizer, LRScheduler, Sampler)
PACKAGES = ("torch.nn.", "torch.optim.", "pytorch_metric_learning.", "torchvision.models.", "pml_fewshot.")
# Classes of data, and what else of ours a config names.
DATA = {
    *("pml_fewshot.episodes:EpisodeSpec", "pml_fewshot.batches:BatchSpec"),
    *("pml_fewshot.experiment_config:ExperimentConfig", "pml_fewshot.data.augmentation:RandomAffine"),
}
LOADERS = {
    *("pml_fewshot.data.omniglot:load_omniglot", "pml_fewshot.data.mini_imagenet:load_mini_imagenet"),
    *("pml_fewshot.data.image_folder:load_image_folder", "pml_fewshot.data.glyphs:load_glyphs"),
}
NAMED = {"pml_fewshot.evaluation.retrieval:RetrievalTester", *LOADERS, *DATA}
HEADS = ("pml_fewshot.evaluation.heads", "pml_fewshot.evaluation.linear_heads")  # functions of tensors
# What a loader may be told but not by a stranger: where to write.
WRITES = ("download", "cache_dir")
# Attributes that say nothing of what an object was told: torch's own, and what PML's parts note while they are used.
NOTED = {
    *(*vars(nn.Module()), "_record_these", "_record_these_stats", "queue_idx", "has_been_filled", "divisor"),
    *("num_pairs", "num_pos_pairs", "num_neg_pairs", "num_triplets"),
}
LONGEST = 200  # characters of an attribute that is stored as it is


def to_data(value: Any) -> Any:
    """Returns numbers, texts, lists and dicts that `from_data` makes the value from.

    Objects cannot be made again: of them the repr, and their plain attributes, so that two configs can be compared.
    """
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
    shown = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address says nothing
    return {"only_shown": shown, "attributes": _attributes(value)}


def from_data(data: Any, trusted: Sequence[str] = (), place: str = "config") -> Any:
    """Returns what `to_data` was given, without `download` and `cache_dir` of loaders.

    Nothing is called but the classes of data (EpisodeSpec, RandomAffine). What the factories may call when they are
    built is limited too: modules, optimizers, schedulers and samplers of torch, torchvision and PML, builders of
    torchvision's models, our own loaders, heads and testers, and of `experiments` modules and functions judge_* and
    load_*.

    Args:
        data: what `to_data` returned.
        trusted: modules of your own, all of whose classes and functions may be named too.
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
            called = _named(name, trusted, place)
            if name in LOADERS:
                require(not args, f"the loader's arguments by name at {place}", args, "restore the file from a copy")
                keywords = {key: each for key, each in keywords.items() if key not in WRITES}
            _check_downloads_nothing(called, args, keywords, trusted, place)
            given = {key: inner(each, key) for key, each in keywords.items()}
            return partial(called, *(inner(each, number) for number, each in enumerate(args)), **given)
        case {"name": str(name)}:
            called = _named(name, trusted, place)
            _check_downloads_nothing(called, [], {}, trusted, place)
            return called
        case {"object": str(name), "fields": dict(values)}:
            kind = _named(name, trusted, place)
            data_class = isinstance(kind, type) and is_dataclass(kind) and (name in DATA or _trusts(name, trusted))
            require(data_class, f"a class of data at {place}", name, "restore the file from a copy")
            try:
                return kind(**{key: inner(each, key) for key, each in values.items()})
            except TypeError as error:  # a field too many or too few
                raise ValueError(
                    f"expected the fields of {name} at {place}, got {error}; use its own version"
                ) from error
        case {"only_shown": str(shown)}:
            raise ValueError(
                f"expected parts that can be built anew at {place}, got {shown}, of which only this is stored; give "
                "parts as factories, partial(Class, ...) of importable classes, and run again"
            )
    raise ValueError(
        f"expected a stored config at {place}, got {str(data)[:100]!r}; it was changed or is of another kind"
    )


def _attributes(value: object) -> dict[str, Any]:
    """What an object, and a module's submodules, were told: PML's parts leave their numbers out of their repr.

    Without parameters and buffers: on resuming they come from the checkpoint, and begin otherwise in each process.
    """
    if isinstance(value, partial):  # of something without a name
        return {"args": to_data(value.args), "keywords": to_data(value.keywords)}
    found: dict[str, Any] = {}
    for path, part in value.named_modules() if isinstance(value, nn.Module) else [("", value)]:
        noted = {*NOTED, *getattr(part, "_record_these_stats", ())}
        for name, each in getattr(part, "__dict__", {}).items():
            if name in noted or not (_is_plain(each) or isinstance(each, nn.Module)):
                continue
            long = _is_plain(each) and len(repr(each)) > LONGEST
            found[f"{path}.{name}" if path else name] = checksum([repr(each).encode()]) if long else to_data(each)
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _name(named: object) -> str:
    """module:name of a class or function at the top of a module; empty for all others, as lambdas and methods."""
    if not isinstance(named, type | FunctionType) or not named.__qualname__.isidentifier():
        return ""
    module = named.__module__
    if module == "__main__":  # python -m experiments.mine
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec is not None else ""
    return f"{module}:{named.__qualname__}" if module else ""


def _trusts(name: str, trusted: Sequence[str]) -> bool:
    return name.partition(":")[0].startswith(tuple(f"{each}." for each in trusted)) or name.split(":")[0] in trusted


def _named(name: str, trusted: Sequence[str], place: str) -> Any:
    """The class or function of a name that `_name` gave, if it may be called by whom nobody knows."""
    module, _, own = name.partition(":")
    theirs = _trusts(name, trusted)
    known = name in NAMED or module in HEADS or module.startswith((*PACKAGES, "experiments."))
    require(
        (theirs or known) and own.isidentifier() and not own.startswith("_") and "._" not in module,
        f"a part of pml_fewshot, experiments, torch, torchvision or PML at {place}",
        name or "nothing",
        "name its module as trusted (--trust) if you know what it does",
    )
    try:
        if module.startswith("experiments.") and not theirs:
            _check_beside_us(place)
        found: Any = vars(importlib.import_module(module))[own]
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"expected {name} at {place}, got {error}; install or check out what the run was made with"
        ) from error
    defined = isinstance(found, type | FunctionType) and found.__module__ == module
    require(
        defined and (theirs or _may_be_called(found, name)), f"a part of an experiment at {place}", name, "trust it"
    )
    return found


def _may_be_called(found: Any, name: str) -> bool:
    module, _, own = name.partition(":")
    if name in NAMED or (isinstance(found, type) and issubclass(found, KINDS)):
        return True
    if isinstance(found, FunctionType):
        if module.startswith("torchvision.models."):
            from torchvision.models import list_models

            return own in list_models()
        return module in HEADS or (module.startswith("experiments.") and own.startswith(("judge_", "load_")))
    return False


def _check_downloads_nothing(
    called: Any, args: list[Any], keywords: dict[str, Any], trusted: Sequence[str], place: str
) -> None:
    """Raises a ValueError when a builder of torchvision's models would fetch weights, asked or by a default."""
    name = _name(called)
    if not isinstance(called, FunctionType) or not name.startswith("torchvision.models.") or _trusts(name, trusted):
        return
    asked = [key for key, each in keywords.items() if key.startswith(("weights", "pretrained")) and each]
    # segmentation and detection fetch their backbone's weights unless told not to
    by_default = {"weights_backbone"} & (inspect.signature(called).parameters.keys() - keywords.keys())
    fetched = [*asked, *by_default]
    require(
        not args and not fetched,
        f"a model of torchvision without weights to download at {place}",
        f"arguments {args}" if args else ", ".join(fetched),
        "name torchvision.models as trusted (--trust) if they may be fetched",
    )


def _check_beside_us(place: str) -> None:
    """Python looks for modules in the working folder first, which may be a stranger's."""
    found = importlib.util.find_spec("experiments")
    folders = [Path(each).resolve() for each in (found.submodule_search_locations or ())] if found else []
    ours = Path(__file__).resolve().parent.parent / "experiments"
    require(
        folders == [ours],
        f"the package experiments at {ours}, for what is named at {place}",
        ", ".join(map(str, folders)) or "none",
        "work in the checkout, or trust the other (--trust experiments)",
    )
