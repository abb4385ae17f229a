"""describe: a config, or a part of one, as plain data that is compared and shown."""

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
    """Returns a config, or a part of one, as data for JSON that is only compared: nothing is ever built from it.

    Of objects it is the class and attributes, because PML's reprs leave out numbers, and not weights, which are others
    in each process. `above` are the ids of the objects that hold this one.
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
        if "_orig_mod" in value._modules:  # compiled, which has an id of its own
            return describe(value._modules["_orig_mod"], above)
        attributes = {name: each for name, each in attributes.items() if name not in vars(nn.Module())}
        attributes |= dict(value.named_children())
        ours = any(kind.__module__.startswith("pml_fewshot.") for kind in type(value).__mro__)
        remembered = "_" if ours else "_pml_fewshot"  # how names begin that are of the last use, not of the part
        attributes = {name: each for name, each in attributes.items() if not name.startswith(remembered)}
    if not attributes or id(value) in above:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is another in each process
    return {"object": describe(type(value)), **describe(attributes, (*above, id(value)))}


def module_name(name: str) -> str:
    """A module's name for others: `__main__`, the one that was started as a program, has its own there."""
    main = sys.modules["__main__"]
    if name != "__main__":
        return name
    return main.__spec__.name if main.__spec__ is not None else Path(getattr(main, "__file__", None) or name).stem
