"""The config of a run folder: the reader's own ExperimentConfig with the numbers stored in the folder."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pml_fewshot.checks import UsageError
from pml_fewshot.experiment.config import OPTIONS, ExperimentConfig
from pml_fewshot.experiment.run_folder import PLACE, read_config
from pml_fewshot.parts.describe import module_name


def with_stored_options(config: ExperimentConfig, stored: Mapping[str, Any]) -> ExperimentConfig:
    """The config with the numbers that the command line may have changed, taken from a run's description."""

    def as_stored(spec: Any, then: Mapping[str, Any]) -> Any:
        return replace(spec, **{each.name: then[each.name] for each in fields(spec) if each.name in then})

    options: dict[str, Any] = {name: stored[name] for name in OPTIONS if name in stored and name not in PLACE}
    options["train_spec"] = as_stored(config.train_spec, stored["train_spec"])
    options["eval_specs"] = tuple(as_stored(config.eval_specs[0], each) for each in stored["eval_specs"])
    return replace(config, **options)


def find_config(folder: str | Path, module: str = "") -> ExperimentConfig:
    """Finds the experiment of a run folder in the reader's own module: a config at its top level, or in a list there.

    Args:
        folder: run folder.
        module: module with the config; when empty, the one that the run recorded, if it is one of `experiments`.

    Raises:
        UsageError: the module does not exist or lies in the run folder, or none of its configs has the run's name.
    """
    stored = read_config(Path(folder))
    name, wanted = module or str(stored["module"]), stored["config"].get("name")
    if not module and not re.fullmatch(r"(pml_fewshot\.)?experiments(\.[a-z_]\w*)+", name, re.ASCII):
        raise UsageError(f"expected a run of a module of experiments, got one of {name!r}; name the module to use")
    for end in [match.start() for match in re.finditer(r"\.|$", name)]:  # looking below a package imports it
        _check_outside(name[:end], Path(folder))
    configs = configs_in(importlib.import_module(name))
    if wanted not in configs:
        raise UsageError(f"expected a config named {wanted!r} in {name}, got {sorted(configs)}; name another module")
    return configs[wanted]


def configs_in(module: ModuleType) -> dict[str, ExperimentConfig]:
    """The experiments of a module by name: configs at its top level, or in a list there."""
    values = list(vars(module).values())
    values += [each for value in values if isinstance(value, list | tuple) for each in value]
    return {each.name: each for each in values if isinstance(each, ExperimentConfig)}


def what_is_lost(config: ExperimentConfig) -> str:
    """The reason why a later program will not find this config by itself; empty if it will."""
    main, name = sys.modules["__main__"], module_name("__main__")
    if name != "__main__" and config.name in configs_in(main):
        return ""
    place = f"is not at the top of {name}" if name != "__main__" else "is not in a module"
    return f"the config of {config.name} {place}: keep it, because `reproduce` and `load_trained` will ask for it"


def _check_outside(module: str, folder: Path) -> None:
    """Raises a UsageError if the module does not exist or lies in the run folder, which may be a stranger's."""
    spec = importlib.util.find_spec(module)
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec is not None else []
    if spec is None or any(Path(each).resolve().is_relative_to(folder.resolve()) for each in places if each):
        got = "one in the run folder" if spec is not None else "none"
        raise UsageError(f"expected a module {module} of your own, got {got}; work in the checkout that has it")
