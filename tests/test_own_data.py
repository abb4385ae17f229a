"""Data as people have them become an evaluated table in at most five lines, and an experiment takes them."""

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning.losses import ArcFaceLoss
from torch import nn

from pml_fewshot import (
    ColorJitter,
    EmbeddingBank,
    EpisodeSpec,
    FewShotDataset,
    MetricTrainer,
    ProtoNetTrainer,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RetrievalTester,
    Splits,
    benchmark,
    load_bank,
    load_image_folder,
    load_image_table,
    load_images,
    load_mini_imagenet,
    load_omniglot,
    load_trained,
    run,
)
from pml_fewshot.checks import UsageError
from pml_fewshot.data import omniglot
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.reproduction import reproduce
from pml_fewshot.experiment.trained import evaluate_again
from pml_fewshot.io.checkpoint import load_checkpoint
from tests.tiny_experiments import EMBEDDER as SMALL
from tests.tiny_experiments import TINY_EXPERIMENTS, tiny_set

CLASSES = [f"class{number}" for number in range(9)]
EACH = 8
SPECS = (EpisodeSpec(ways=3, shots=1, queries=3),)


class Mean(nn.Module):
    """Embeds an image by the means of its quarters: of the made-up classes all are told apart."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


EMBEDDER = Embedder(Mean())


def photo(label: int, number: int) -> Image.Image:
    pixels = np.random.default_rng(100 * label + number).integers(0, 9, (16, 20, 3), dtype=np.uint8)
    pixels += np.array([27 * label, 240 - 27 * label, 50 * (label % 3)], np.uint8)
    return Image.fromarray(pixels)


def folder(root: Path, split: Any = lambda label, number: "", ending: str = "jpg", top: str = "") -> Path:
    for label, number in np.ndindex(len(CLASSES), EACH):
        path = root / top / split(label, number) / CLASSES[label] / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(label, number).save(path, quality=95)
    return root


def figures(table: ResultTable, accuracy: float = 0.99) -> None:
    assert {row.figure for row in table.rows} >= {"accuracy", "precision_at_1"}
    assert all(row.value > accuracy for row in table.rows if row.figure in ("accuracy", "precision_at_1"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PML_FEWSHOT_CACHE", str(tmp_path / "cache"))


def table(data: Any, method: Any = EMBEDDER, **options: Any) -> ResultTable:
    return benchmark(method, data, SPECS, num_episodes=50, **options)


def test_a_cifar_like_object():
    class Cifar:
        classes = CLASSES

        def __len__(self) -> int:
            return len(CLASSES) * EACH

        def __getitem__(self, item: int) -> tuple[Image.Image, int]:
            return photo(item // EACH, item % EACH), item // EACH

    data = FewShotDataset.from_dataset(Cifar())
    figures(table(data))
    figures(table(data.split(val_fraction=0.34, test_fraction=0.34)))


def test_a_hugging_face_data_set():
    datasets = pytest.importorskip("datasets")
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    images = [photo(label, number) for label in range(9) for number in range(EACH)]
    rows = {"image": images, "label": np.repeat(np.arange(9), EACH)}
    figures(table(FewShotDataset.from_dataset(datasets.Dataset.from_dict(rows, features=columns))))


def test_a_csv_of_paths_labels_and_splits(tmp_path: Path):
    folder(tmp_path)
    split = ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    rows = [f"{c}/{number}.jpg,{c},{split[label]}" for label, c in enumerate(CLASSES) for number in range(EACH)]
    (tmp_path / "photos.csv").write_text("\n".join(["path,label,split", *rows]))
    figures(table(load_image_table(tmp_path / "photos.csv", image_size=12)))


def test_a_folder_with_train_and_val_only(tmp_path: Path):
    root = folder(tmp_path / "set", lambda label, number: "train" if label < 4 else "val")
    found = table(load_image_folder(root, 12))
    figures(found)
    assert {row.split for row in found.rows} == {"val"}


def test_one_with_the_same_classes_in_train_and_test(tmp_path: Path):
    root = folder(tmp_path / "set", lambda label, number: "train" if number < 4 else "test")
    splits = load_image_folder(root, 12, shared_classes=True)
    found = table(splits, reference=splits.train, support=splits.train)
    figures(found)
    assert {row.protocol for row in found.rows} == {"inductive", "gallery", "fixed support"}


def test_the_layout_of_cub_with_lists_of_classes(tmp_path: Path):
    root = folder(tmp_path / "CUB_200_2011", top="images")
    lists = {"train": CLASSES[:3], "val": CLASSES[3:6], "test": CLASSES[6:]}
    figures(table(load_image_folder(root, 12, splits=lists)))


def test_the_pickles_of_mini_imagenet(tmp_path: Path):
    for split, own in (("train", range(3)), ("val", range(3, 6)), ("test", range(6, 9))):
        images = np.stack([np.asarray(photo(label, n).resize((84, 84))) for label in own for n in range(EACH)])
        index = {f"n0000000{label}": list(range(EACH * i, EACH * (i + 1))) for i, label in enumerate(own)}
        content = {"image_data": images, "class_dict": index}
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    splits = load_mini_imagenet(tmp_path)
    figures(table(splits))
    assert "8 of 600 images a class" in splits.test.note


def test_what_torchvision_has_fetched_of_omniglot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = {
        "images_background": [f"A/character{n:02d}" for n in range(3)],
        "images_evaluation": ["Kannada/character01"],
    }
    parts["images_evaluation"] += ["Keble/character01", "ULOG/character01"]
    monkeypatch.setattr(omniglot, "PARTS", {part: len(names) for part, names in parts.items()})
    monkeypatch.setattr(omniglot, "DRAWINGS", EACH)
    for part, names in parts.items():
        for label, name in enumerate(names):
            (tmp_path / "omniglot-py" / part / name).mkdir(parents=True)
            for number in range(EACH):
                image = photo(3 * label, number).convert("L").resize((105, 105))
                image.save(tmp_path / "omniglot-py" / part / name / f"{number}.png")
    figures(table(load_omniglot(tmp_path, split="official", rotations=False)))


def features() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(9 * generator.normal(size=4), size=(EACH, 4)) for name in CLASSES}


def test_a_dict_of_features_by_class():
    figures(table(None, EmbeddingBank.from_features(features())), 0.9)


def test_a_parquet_of_features_with_names(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = [(*row, name) for name, rows in features().items() for row in rows.tolist()]
    pandas.DataFrame(rows, columns=["f0", "f1", "f2", "f3", "label"]).to_parquet(tmp_path / "features.parquet")
    bank = load_bank(tmp_path / "features.parquet")
    assert bank.class_names == tuple(CLASSES)
    figures(table(None, bank), 0.9)


def test_one_set_of_a_folder(tmp_path: Path):
    figures(table(load_images(folder(tmp_path / "set"), 12)))


def banks() -> Splits:
    """Features of which two directions of twelve tell the classes apart: a projection can learn it."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for names in ("abcdefghijklmnop", "qrstu", "ABCDEF"):
        labels = torch.arange(len(names)).repeat_interleave(12)
        rows = 3 * torch.randn(len(labels), 12, generator=generator)
        rows[:, :2] = 4 * torch.randn(len(names), 2, generator=generator)[labels]
        sets.append(EmbeddingBank(rows, labels, class_names=tuple(names)))
    return Splits(*sets)


def test_a_projection_is_trained_on_frozen_features(tmp_path: Path):
    embedder = partial(Embedder, partial(nn.Identity), partial(nn.Linear, 12, 2))
    config = replace(
        TINY_EXPERIMENTS["protonet"],
        data=banks,
        trainer=partial(ProtoNetTrainer, embedder),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        scheduler=None,
        train_spec=EpisodeSpec(8, 3, 5),
        eval_specs=(EpisodeSpec(4, 3, 5),),
        steps=80,
        validate_every=80,
        checkpoint_every=80,
        num_episodes=300,
        augment=None,
        run_dir=tmp_path / "run",
    )
    trained = run(config).rows[0]
    test = banks().test
    bank = EmbeddingBank(test.images, test.labels, test.fingerprint())
    raw = benchmark(bank, specs=config.eval_specs, num_episodes=300).rows[0]
    assert trained.value > raw.value + 0.1
    assert trained.episodes_hash == raw.episodes_hash


class Flat(nn.Module):
    """Takes images of 8 x 8 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1))


@pytest.mark.parametrize("batched", [False, True])
def test_images_are_cropped_at_random_in_training_and_in_the_middle_for_evaluation(tmp_path: Path, batched: bool):
    from torchvision.transforms import v2

    each = v2.Compose([v2.RandomCrop(8), v2.RandomHorizontalFlip()])
    root = folder(tmp_path / "set")
    config = replace(
        TINY_EXPERIMENTS["protonet"],
        data=partial(load_image_folder, root, 12, val_fraction=0.34, test_fraction=0.34),
        augment=[RandomResizedCrop(8), RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1)] if batched else each,
        eval_transform=v2.CenterCrop(8),
        trainer=partial(ProtoNetTrainer, partial(Embedder, partial(Flat))),
        train_spec=EpisodeSpec(3, 1, 3),
        eval_specs=SPECS,
        steps=6,
        validate_every=3,
        val_episodes=20,
        num_episodes=20,
    )
    whole = run(replace(config, run_dir=tmp_path / "whole"))
    run(replace(config, steps=3, run_dir=tmp_path / "parts"))
    assert run(replace(config, run_dir=tmp_path / "parts"), resume=True).csv() == whole.csv()
    trained = load_trained(tmp_path / "whole", config)
    cropped = config.data().test.transformed(v2.CenterCrop(8))
    again = benchmark({config.name: trained}, cropped, SPECS, num_episodes=20, retrieval=None)
    assert again.rows[0].value == whole.rows[0].value
    assert evaluate_again(tmp_path / "whole", config).rows[0].value == whole.rows[0].value
    expected = benchmark(trained, cropped, SPECS, num_episodes=21, retrieval=None).rows[0].value
    for photos in (config.data(), cropped):  # in the form of the run, whoever crops them
        again = evaluate_again(tmp_path / "whole", config, data=photos, num_episodes=21)
        assert again.rows[0].value == expected
    for file in root.rglob("*.jpg"):  # what the crop does not show is of the data, too
        pixels = np.asarray(Image.open(file)).copy()
        pixels[0] ^= 255
        Image.fromarray(pixels).save(file, quality=95)
    with pytest.raises(UsageError, match="got other images, labels or classes in train"):
        evaluate_again(tmp_path / "whole", config)


def test_an_evaluation_transform_alone_must_fit_the_network(tmp_path: Path):
    config = replace(
        TINY_EXPERIMENTS["protonet"],
        data=partial(load_image_folder, folder(tmp_path / "set"), 12, val_fraction=0.34, test_fraction=0.34),
        trainer=partial(ProtoNetTrainer, partial(Embedder, partial(Flat))),
        train_spec=EpisodeSpec(3, 1, 3),
        eval_specs=SPECS,
        run_dir=tmp_path / "run",
    )
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_where_val_takes_the_place_of_test_it_chooses_no_checkpoint(tmp_path: Path):
    splits = Splits.of({"train": tiny_set("a", 8, 0), "val": tiny_set("b", 6, 1)})
    config = replace(TINY_EXPERIMENTS["protonet"], data=lambda: splits, run_dir=tmp_path / "run", steps=4)
    assert {row.split for row in run(config).rows} == {"val"}
    assert load_checkpoint(tmp_path / "run" / "last.pt")["history"]["steps"] == 4
    with pytest.raises(UsageError, match="test classes beside val to train on val too, got none; leave that out"):
        run(replace(config, train_on_validation=True, run_dir=tmp_path / "other"))


def test_a_run_of_features_names_what_its_evaluation_wants(tmp_path: Path):
    config = replace(
        TINY_EXPERIMENTS["protonet"],
        data=banks,
        trainer=partial(ProtoNetTrainer, partial(Embedder, partial(nn.Identity), partial(nn.Linear, 12, 2))),
        eval_specs=(EpisodeSpec(4, 3, 5),),
        augment=None,
        steps=2,
        retrieval=RetrievalTester(("precision_at_1", "NMI")),
        run_dir=tmp_path / "run",
    )
    run(config)
    assert reproduce(tmp_path / "run", config).differences == []  # though NMI has no interval
    with pytest.raises(UsageError, match="a bank as data, got a folder of images for a run of features of 12 numbers"):
        evaluate_again(tmp_path / "run", config, data=folder(tmp_path / "set"))


def test_classes_that_train_and_val_share_are_trained_on_once(tmp_path: Path):
    splits = Splits(tiny_set("a", 8, 0), tiny_set("a", 8, 1), tiny_set("a", 8, 2), shared_classes=True)
    config = replace(
        TINY_EXPERIMENTS["metric"],
        data=lambda: splits,
        trainer=lambda num_classes: MetricTrainer(SMALL(), ArcFaceLoss(num_classes, 8)),
        train_on_validation=True,
        sampler=None,
        loss_lr=None,
        steps=2,
        run_dir=tmp_path / "run",
    )
    run(config)
    assert load_trained(tmp_path / "run", config).loss.W.shape == (8, 8)
