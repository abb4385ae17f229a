"""Every file in experiments/: an honest record that names its command and runs from end to end."""

import importlib
import inspect
import json
import os
import pkgutil
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import experiments
from pml_fewshot import BatchSpec, ExperimentConfig, FewShotDataset, Splits, run
from pml_fewshot.checks import MissingFileError
from pml_fewshot.parts.describe import describe

ROOT = Path(__file__).parents[2]
COMMANDS = [module.name for module in pkgutil.iter_modules(experiments.__path__) if not module.ispkg]
WITHOUT_CONFIG = {
    "benchmark_embeddings",
    "drawn_classes",
    "evaluate_trunks",
    "head_penalties",
    "local_feature_heads",
    "search_losses",
    "transductive_heads",
}  # which train nothing, or configs that a search makes
MODULES = [name for name in COMMANDS if name not in WITHOUT_CONFIG]
DATA_ROOT = Path(os.environ.get("PML_FEWSHOT_DATA", ROOT / ".." / "shared" / "data")).resolve()


def parts(value: Any) -> list[Any]:
    """A part and all in it: functions, arguments and keywords of partials, members of tuples."""
    inner = (value.func, *value.args, *value.keywords.values()) if isinstance(value, partial) else value
    inner = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list | tuple) else ()
    return [value, *(part for each in inner for part in parts(each))]


def configs_of(module: str) -> list[ExperimentConfig]:
    loaded = vars(importlib.import_module(f"experiments.{module}"))
    return [loaded["CONFIG"], *loaded.get("CONFIGS", ())]


def test_every_experiment_has_a_description_of_its_own_without_addresses() -> None:
    texts = [json.dumps(describe(config)) for module in MODULES for config in configs_of(module)]
    assert len(set(texts)) == len(texts) > 60
    assert not any(" at 0x" in text for text in texts)


@pytest.mark.parametrize("module", COMMANDS)
def test_experiment_is_an_honest_record_and_names_its_command(module: str) -> None:
    assert f"python -m experiments.{module}" in (importlib.import_module(f"experiments.{module}").__doc__ or "")
    configs = configs_of(module) if module in MODULES else []
    assert module not in MODULES or configs[0].name == module
    for config in configs:
        found = [part for field in fields(config) for part in parts(getattr(config, field.name))]
        assert not any(getattr(part, "__name__", "") == "<lambda>" for part in found), "its description says nothing"
        assert not any(isinstance(part, nn.Module) for part in found), "made before the seed is set: use a partial"


def few(splits: Splits) -> Splits:
    """20 classes and 20 items of each: enough for two steps of anything."""

    def cut(dataset: FewShotDataset) -> FewShotDataset:
        some = dataset.select_classes(range(min(20, len(dataset.class_names))))
        keep = torch.cat([(some.labels == label).nonzero().flatten()[:20] for label in range(len(some.class_names))])
        return FewShotDataset(some.images[keep], some.labels[keep], some.class_names, some.note)

    return Splits(cut(splits.train), cut(splits.val) if splits.val else None, cut(splits.test))


@pytest.mark.parametrize(
    "module", [name if name == "quickstart" else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]
)
def test_experiment_runs_for_two_steps(module: str, tmp_path: Path) -> None:
    config = configs_of(module)[0]
    needs_root = "root" in inspect.signature(config.data).parameters
    try:
        splits = few(config.data(root=DATA_ROOT) if needs_root else config.data())
    except MissingFileError as error:
        pytest.skip(f"its data is not in {DATA_ROOT}: {error}")
    # fewer classes than in the file, which only cost time; shots, queries and support_rotations are those of the file
    spec = config.train_spec
    if isinstance(spec, BatchSpec):
        spec = replace(spec, classes=5)
    elif "maml" not in module:  # its network has as many outputs as the file's ways
        spec = replace(spec, ways=min(spec.ways, 5))
    small = replace(config, train_spec=spec, steps=2, num_episodes=10, val_episodes=10, device="cpu", report=False)
    table = run(replace(small, data=lambda: splits, run_dir=tmp_path / "run"))
    own = [row for row in table.rows if row.method == config.name and row.figure == "accuracy"]
    assert len(own) == len(config.eval_specs)
    assert all(0 <= row.value <= 1 for row in table.rows)
    part = "network" if "maml" in module else "embedder"
    assert (tmp_path / "run" / f"{part}.safetensors").is_file()
