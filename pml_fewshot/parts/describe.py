"""describe: a config, or a part of one, as plain data to compare and show."""

import re
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from pml_fewshot.io.tensors import checksum
from pml_fewshot.parts.arguments import arguments_of


def describe(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Returns a config, or a part of one, as JSON data for comparison only: nothing is ever built from it.

    Objects are described by their class and attributes, because PML's reprs leave out numbers, but not by weights,
    which differ in each process. `above` holds the ids of the objects that contain this one.
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(each, above) for each in value]
    if isinstance(value, dict):
        return {str(key): describe(each, above) for key, each in value.items()}
    if isinstance(value, partial):
        return {"call": describe(value.func, above), "with": describe(arguments_of(value), above)}
    if isinstance(value, type | FunctionType):
        return f"{module_name(value.__module__)}.{value.__qualname__}"
    if isinstance(value, MethodType):
        return {"method": value.__name__, "of": describe(value.__self__, above)}
    if isinstance(value, np.ndarray):
        return describe(torch.from_numpy(value) if value.dtype.kind in "biuf" else value.tolist(), above)
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {checksum([value.detach().cpu().numpy().tobytes()])}"
    attributes = dict(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, Enum | Path) else {}
    if isinstance(value, nn.Module):
        if "_orig_mod" in value._modules:  # compiled, which has its own id
            return describe(value._modules["_orig_mod"], above)
        attributes = {name: each for name, each in attributes.items() if name not in vars(nn.Module())}
        attributes |= dict(value.named_children())
        ours = any(kind.__module__.startswith("pml_fewshot.") for kind in type(value).__mro__)
        remembered = "_" if ours else "_pml_fewshot"  # the prefix of names that belong to the last use, not to the part
        attributes = {name: each for name, each in attributes.items() if not name.startswith(remembered)}
    if not attributes or id(value) in above:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # addresses differ in each process
    return {"object": describe(type(value)), **describe(attributes, (*above, id(value)))}


def module_name(name: str) -> str:
    """Returns a module's name as others import it, also for `__main__`, the one that was started as a program."""
    main = sys.modules["__main__"]
    if name != "__main__":
        return name
    return main.__spec__.name if main.__spec__ is not None else Path(getattr(main, "__file__", None) or name).stem
