"""Configs as plain data: every experiment comes back as it was, and a stranger's file names nothing that could harm."""

import importlib
import json
import pkgutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, MultiSimilarityLoss, ProxyAnchorLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import experiments
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.glyphs import load_glyphs
from pml_fewshot.data.omniglot import load_omniglot
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.torchvision_trunk import TorchvisionTrunk
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.experiment_config import ExperimentConfig
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.provenance import check_config
from pml_fewshot.stored_config import from_data, to_data
from pml_fewshot.trainers.metric import MetricTrainer
from tests.tiny_experiments import TINY_EXPERIMENTS


def shown(value: Any) -> Any:
    """A value so that two of them can be compared: partials of the same are not equal."""
    if isinstance(value, partial):
        return "partial", value.func, shown(value.args), shown(value.keywords)
    if isinstance(value, ExperimentConfig):
        return {name: shown(each) for name, each in vars(value).items()}
    if isinstance(value, list | tuple):
        return type(value), [shown(each) for each in value]
    return {name: shown(each) for name, each in value.items()} if isinstance(value, dict) else value


def configs() -> dict[str, ExperimentConfig]:
    found: dict[str, ExperimentConfig] = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        loaded = importlib.import_module(f"experiments.{module.name}")
        mine = [each for each in vars(loaded).values() if isinstance(each, ExperimentConfig)]
        for each in vars(loaded).values():
            if isinstance(each, list | tuple):
                mine += [one for one in each if isinstance(one, ExperimentConfig)]
        found |= {f"{module.name}.{config.name}": config for config in mine}
    return found


CONFIGS = configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_experiment_comes_back_from_its_text(name: str) -> None:
    text = json.dumps(to_data(CONFIGS[name]))
    again = from_data(json.loads(text))
    assert shown(again) == shown(CONFIGS[name])
    assert repr(again) == repr(CONFIGS[name])


def test_experiments_were_found() -> None:
    assert {"quickstart.quickstart", "omniglot_maml_20way.omniglot_maml_20way"} <= CONFIGS.keys()
    assert len(CONFIGS) > 40  # with those of the sweeps


VALUES = [
    *(None, True, 3, 0.1, float("inf"), "text", [1, [2]], (1, (2,)), {"a": (1,)}, Path("some/where")),
    *(LpDistance, load_glyphs, partial(Adam, lr=1e-3), partial(nn.Sequential, partial(nn.Linear, 2, 3))),
    *(EpisodeSpec(5, 1, 15), RandomAffine(degrees=3), CosineAnnealingLR, partial(Conv4, in_channels=1)),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back(value: Any) -> None:
    assert shown(from_data(json.loads(json.dumps(to_data(value))))) == shown(value)


def test_objects_and_functions_without_a_name_are_shown_and_not_built() -> None:
    for value, place in ((CosineSimilarity(), "loss.distance"), (lambda: 1, "loss.distance")):
        data = {"dict": {"loss": to_data(partial(PrototypicalLoss, distance=value))}}
        with pytest.raises(ValueError, match=rf"at config\.{place}, got .*(CosineSimilarity|lambda).*as\s+factories"):
            from_data(data)


def of_ones_own(**options: object) -> object:
    return partial(lambda **given: given, **options)


TOLD_OTHERWISE = [
    (ContrastiveLoss(pos_margin=0.0), ContrastiveLoss(pos_margin=0.5), "pos_margin"),
    (LpDistance(p=1), LpDistance(p=2), "p"),
    (MultiSimilarityMiner(epsilon=0.1), MultiSimilarityMiner(epsilon=0.3), "epsilon"),
    (ContrastiveLoss(distance=LpDistance(power=1)), ContrastiveLoss(distance=LpDistance(power=2)), "distance.power"),
    (RetrievalTester(k=3), RetrievalTester(k=4), "k"),
    (of_ones_own(distance=LpDistance(p=1)), of_ones_own(distance=LpDistance(p=2)), "keywords"),
]


@pytest.mark.parametrize(("one", "other", "where"), TOLD_OTHERWISE, ids=lambda value: type(value).__name__)
def test_objects_told_otherwise_are_other_data(one: object, other: object, where: str) -> None:
    """PML's repr has no numbers: of ContrastiveLoss(pos_margin=0.5) it says ContrastiveLoss(...)."""
    first, second = to_data(one), to_data(other)
    assert first["only_shown"] == second["only_shown"] or where == "keywords"
    assert {key for key in first["attributes"] if first["attributes"][key] != second["attributes"][key]} == {where}
    assert json.loads(json.dumps(first)) == first
    begun, resumed = (replace(TINY_EXPERIMENTS["metric"], trainer=partial(MetricTrainer, loss=e)) for e in (one, other))
    stored = {"config": json.loads(json.dumps(to_data(begun)))}
    check_config(begun, stored, Path("run"))
    with pytest.raises(ValueError, match="to go on with, got another trainer; "):
        check_config(resumed, stored, Path("run"))


def test_long_attributes_are_stored_by_their_checksum() -> None:
    loss = ContrastiveLoss()
    loss.weights = [0.5] * 1000
    before = to_data(loss)
    loss.weights[-1] = 0.25
    assert to_data(loss) != before
    assert len(json.dumps(before)) < 3000


@pytest.mark.parametrize(
    "part",
    [
        ContrastiveLoss(distance=LpDistance(collect_stats=True)),
        CrossBatchMemory(MultiSimilarityLoss(), 8, 40),
        ProxyAnchorLoss(4, 8),
        MultiSimilarityMiner(),
        MultiSimilarityMiner(collect_stats=True),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_training_changes_is_not_of_the_config(part: nn.Module) -> None:
    """A process may train twice with one object, and the weights of a loss begin otherwise in each."""
    embeddings = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    part(embeddings, torch.arange(12) // 3)  # some modules are only made at the first call
    before = to_data(part)
    for parameter in part.parameters():
        parameter.data.add_(1)
    part(2 * embeddings[:9], torch.arange(9) // 3)
    assert to_data(part.eval()) == before


HOSTILE = [
    "os:system",
    "builtins:eval",
    "subprocess:Popen",
    "torch:load",
    "torch.hub:load",
    "torch.utils.cpp_extension:load",
    "torch.nn.functional:boolean_dispatch",  # a function of torch, not a class
    "torch.nn.modules.module:torch.load",
    "pml_fewshot.data.omniglot:Path",  # imported there, not defined
    "pml_fewshot.data.omniglot:_download",
    "pml_fewshot.data.cache:shutil.rmtree",
    "pml_fewshot.run_folder:sole_writer",
    "pml_fewshot.recording:Recorder",
    "pml_fewshot.checkpoint:save_checkpoint",
    "experiments_of_a_stranger:CONFIG",
    "experiments.omniglot_maml:CONFIG",
    "experiments.nowhere:CONFIG",
    "pml_fewshot.data.omniglot:load_omniglot.__globals__",
    "pml_fewshot.data.omniglot:load_omniglot.__class__",
    "torchvision.models._api:WeightsEnum.get_state_dict",
    "torchvision.models._api:WeightsEnum",
    "torchvision.models._api:Weights",
    "torchvision.models._utils:IntermediateLayerGetter.forward",
    "torchvision.models.resnet:_resnet",
    "pml_fewshot.evaluation.table:ResultTable.write",
    "pml_fewshot.evaluation.table:ResultTable",
    "pml_fewshot.embedders.bank_file:save_bank",
    "pml_fewshot.trainers.fit:fit",
    "pml_fewshot.data.cache:cached_images",
    "pml_fewshot.data.zip_archive:open_zip",
    "pml_fewshot.evaluation.gallery:Gallery.save",
    "experiments.benchmarks.main_path:main",
    "experiments.omniglot_maml:main",
    "pml_fewshot.data.omniglot",
    "",
    ":",
    "pml_fewshot.data.omniglot:",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["name", "partial", "object"])
def test_hostile_names_are_refused(name: str, kind: str) -> None:
    data = {"name": {"name": name}, "partial": {"partial": name, "args": ["touch here"], "keywords": {}}}
    data["object"] = {"object": name, "fields": {}}
    with pytest.raises(ValueError, match=r"^expected "):
        from_data(data[kind])


@pytest.mark.parametrize("name", ["pml_fewshot.data.glyphs:load_glyphs", "torch.nn.modules.linear:Identity"])
def test_only_classes_of_data_are_called_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="expected a class of data"):
        from_data({"object": name, "fields": {}})


def test_loaders_are_not_told_where_to_write() -> None:
    loader = partial(load_omniglot, root=Path("here"), split="official", download=True, cache_dir="/anywhere")
    again = from_data(to_data(loader))
    assert again.keywords == {"root": Path("here"), "split": "official"}
    with pytest.raises(ValueError, match="arguments by name"):
        from_data(to_data(partial(load_omniglot, Path("here"), 28, "official", False, True)))


def test_methods_have_no_name() -> None:
    for method in (PrototypicalLoss().forward, RandomAffine.__call__, Path.cwd):
        assert "only_shown" in to_data(method)
        assert "only_shown" in to_data(partial(method))


def test_experiments_of_another_place_must_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("")
    (tmp_path / "experiments" / "evil.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(tmp_path)
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "experiments"}
    try:
        with pytest.raises(ValueError, match=r"expected the package experiments at .*, got .*, .*"):
            from_data({"name": "experiments.evil:judge_all"})
    finally:
        sys.modules.update(saved)


def test_models_of_torchvision_are_built_by_name() -> None:
    from torchvision.models import googlenet, resnet18
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    models = (
        *(resnet18, partial(resnet18, weights=None), partial(googlenet, init_weights=False)),
        partial(fasterrcnn_resnet50_fpn, weights_backbone=None),
    )
    for model in models:
        trunk = partial(TorchvisionTrunk, model=model)
        assert shown(from_data(to_data(trunk))) == shown(trunk)


@pytest.mark.parametrize(
    ("model", "args", "keywords", "asked"),
    [
        ("resnet18", (), {"weights": "DEFAULT"}, "weights"),
        ("resnet18", (), {"pretrained": True}, "pretrained"),
        ("resnet18", ("DEFAULT",), {}, "arguments"),
        ("fasterrcnn_resnet50_fpn", (), {"weights_backbone": "DEFAULT"}, "weights_backbone"),
        ("fasterrcnn_resnet50_fpn", (), {"weights": None}, "weights_backbone"),  # its default
        ("fasterrcnn_resnet50_fpn", None, None, "weights_backbone"),
    ],
)
def test_a_stranger_downloads_no_weights(
    model: str, args: tuple[Any, ...] | None, keywords: dict[str, Any] | None, asked: str
) -> None:
    from torchvision.models import get_model_builder

    builder = get_model_builder(model)
    trunk = partial(TorchvisionTrunk, model=builder if args is None else partial(builder, *args, **(keywords or {})))
    data = to_data(trunk)
    said = rf"^expected a model of torchvision without weights to download at config\.model, got {asked}.*--trust"
    with pytest.raises(ValueError, match=said):
        from_data(data)
    assert shown(from_data(data, trusted=["torchvision.models"])) == shown(trunk)


def test_a_module_of_ones_own_must_be_trusted() -> None:
    data = to_data(TINY_EXPERIMENTS["protonet"])
    with pytest.raises(ValueError, match=r"got tests\.tiny_experiments:tiny_splits; .*--trust"):
        from_data(data)
    assert shown(from_data(data, trusted=["tests"])) == shown(TINY_EXPERIMENTS["protonet"])
    with pytest.raises(ValueError, match="tests"):
        from_data(data, trusted=["tests.tiny"])  # a module's name, not its beginning


@pytest.mark.parametrize(
    "data",
    [
        *([], [1], {}, {"list": 3}, {"partial": "torch.nn:Linear"}, {"dict": {"a": []}}, {"tuple": {"a": 1}}),
        {"object": "pml_fewshot.episodes:EpisodeSpec", "fields": {"ways": 5, "shot": 1}},
        {"object": "pml_fewshot.embedders.conv4:Conv4", "fields": {"in_channels": 1}},
        {"object": "pml_fewshot.episodes:EpisodeSpec", "fields": {"ways": -5, "shots": 1, "queries": 1}},
    ],
    ids=str,
)
def test_what_is_no_stored_config_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        from_data(data)
