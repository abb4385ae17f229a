"""load_image_folder: both layouts, the drawn split, broken images, and the cache behind it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.image_folder import load_image_folder
from tests.data.loading import by_class, entries, parts


def write(file: Path, shade: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 6), shade).save(file)


def class_folders(root: Path, classes: int = 10, images: int = 3, splits: tuple[str, ...] = ("",) * 10) -> Path:
    """Class c's image i is all of shade 10 c + i."""
    for c, i in np.ndindex(classes, images):
        write(root / splits[c] / f"class{c}" / f"{i}.png", 10 * c + i)
    return root


def split_folders(root: Path, val: str = "val") -> Path:
    return class_folders(root, 4, 2, ("train", "train", val, "test"))


def shades(splits: Splits) -> dict[str, list[int]]:
    """Class name -> the shades of its images, in the order stored."""
    return {name: images[:, 0, 0, 0].tolist() for name, images in by_class(splits).items()}


def load(root: Path, **options: object) -> Splits:
    return load_image_folder(root, **{"image_size": 6, "channels": 1, "cache_dir": root.parent / "cache"} | options)


def sizes(root: Path, **options: object) -> list[int]:
    return [len(part.class_names) for part in parts(load(root, **options)).values()]


@pytest.mark.parametrize("memory_map", [False, True])
def test_every_image_keeps_its_class_in_a_drawn_split(tmp_path: Path, memory_map: bool):
    root = class_folders(tmp_path / "set")
    for _ in range(2):  # read, then cached
        splits = load(root, memory_map=memory_map)
        assert [len(part.class_names) for part in parts(splits).values()] == [6, 2, 2]
        assert shades(splits) == {f"class{c}": [10 * c, 10 * c + 1, 10 * c + 2] for c in range(10)}
        for part in parts(splits).values():
            assert (part.images.dtype, part.item_shape, part.note) == (torch.uint8, (1, 6, 6), "")
            assert list(part.class_names) == sorted(part.class_names)
        storages = {part.images.untyped_storage().data_ptr() for part in parts(splits).values()}
        assert len(storages) == (1 if memory_map else 3)  # slices of one map, or copies


def test_the_seed_alone_decides_the_split_and_the_same_in_every_version(tmp_path: Path):
    root, state = class_folders(tmp_path / "set", images=1), torch.get_rng_state()
    splits = load(root, seed=0)
    assert (splits.val.class_names, splits.test.class_names) == (("class1", "class4"), ("class5", "class7"))
    drawn = {tuple(part.class_names for part in parts(load(root, seed=seed)).values()) for seed in range(5)}
    assert len(drawn) > 1
    assert all(sorted(sum(names, ())) == [f"class{c}" for c in range(10)] for names in drawn)
    assert torch.equal(state, torch.get_rng_state())


def test_fractions_are_rounded_and_no_split_is_empty(tmp_path: Path):
    root = class_folders(tmp_path / "set", images=1)
    assert sizes(root, val_fraction=0.01, test_fraction=0.01) == [8, 1, 1]
    assert sizes(root, val_fraction=0.26, test_fraction=0.44) == [3, 3, 4]
    assert load(root, val_fraction=0).val is None
    assert sizes(root, val_fraction=0) == [8, 2]
    root = class_folders(tmp_path / "small", classes=2, images=1)
    for val, test in ((-0.1, 0.2), (0.2, 0), (0.5, 0.5), (0.2, 0.2)):
        with pytest.raises(UsageError, match=r"leave classes for train, got .* of 2 classes \(class0, class1\); add"):
            load(root, val_fraction=val, test_fraction=test)
    write(root / "class2" / "x.png", 1)
    assert sizes(root, val_fraction=0.2, test_fraction=0.2) == [1, 1, 1]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_given_splits_are_kept(tmp_path: Path, val: str):
    load(split_folders(tmp_path / "set", val))
    splits = load(tmp_path / "set", seed=3)  # which has nothing to draw
    assert len(entries(tmp_path / "cache")) == 1
    assert shades(splits) == {f"class{c}": [10 * c, 10 * c + 1] for c in range(4)}
    names = {split: part.class_names for split, part in parts(splits).items()}
    given = {"test": ("class2", "class3")} if val == "test" else {"val": ("class2",), "test": ("class3",)}
    assert names == {"train": ("class0", "class1")} | given


GIVEN = "train/class1/x.png val/class2/x.png test/class3/x.png"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (f"{GIVEN} train/x.png", "images of .* in class folders, got train/x.png in none; move it"),
        (f"{GIVEN} validation/a/x.png", "train, test and perhaps val only, got them in test, train, val, validation"),
        (f"{GIVEN} x.png", "train, test and perhaps val only, got them in test, train, val, x.png"),
        (f"{GIVEN} test/class1/x.png", "got class 'class1' in train and in test; put each class into one split"),
        ("train/a/x.png val/b/x.png", "train, test and perhaps val only, got them in train, val"),
        ("class0/notes.txt", r"images in class folders in .*set, got none; add files .*\.jpg"),
        ("x.png", r"images of .*set in class folders, got x.png in none"),
    ],
)
def test_other_layouts_are_errors(tmp_path: Path, files: str, message: str):
    for file in files.split():
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / file).touch()
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "set")
    with pytest.raises(MissingFileError, match=r"expected a folder of images at .*nowhere"):
        load(tmp_path / "nowhere")
    assert entries(tmp_path / "cache") == []


def test_names_with_spaces_and_other_letters_and_deeper_folders(tmp_path: Path):
    names = ["Ærøskøbing grün", "日本 語", "it's 100%", "train", "train 2", "a", "a b"]  # a class may be called train
    for shade, name in enumerate(names):
        write(tmp_path / "set" / name / "deep er" / "ü.PNG", shade)
        write(tmp_path / "set" / name / "x.png", shade + 100)
    for _ in range(2):  # read, then cached
        splits = load(tmp_path / "set", val_fraction=0, test_fraction=0.01)
        assert list(splits.train.class_names) == sorted(splits.train.class_names)  # and not as their files' names are
        assert shades(splits) == {name: [shade, shade + 100] for shade, name in enumerate(names)}


def test_three_channels_and_84_pixels_are_the_default(tmp_path: Path):
    splits = load_image_folder(class_folders(tmp_path / "set", classes=3, images=1), cache_dir=tmp_path / "cache")
    assert splits.train.item_shape == (3, 84, 84)
    for wrong in ({"image_size": 0}, {"channels": 2}):
        with pytest.raises(UsageError, match=f"expected {next(iter(wrong))}"):
            load(tmp_path / "set", **wrong)


def test_broken_images_are_named_or_skipped_on_request_and_listed(tmp_path: Path):
    root = class_folders(tmp_path / "set")
    for name in ("class0/0.png", "class4/1.png", "class9/2.png"):
        (root / name).write_bytes((root / name).read_bytes()[:40])
    for _ in range(2):  # read, then cached: both times it says so
        with pytest.warns(UserWarning, match=r"3 broken images skipped in .*set: class\d/\d.png, c") as caught:
            splits = load(root, skip_broken=True)
        assert caught[0].filename == __file__  # it points at the call, not into the library
        assert {part.note for part in parts(splits).values()} == {"3 broken images skipped"}
        found = shades(splits)
        assert [found["class0"], found["class4"], found["class9"]] == [[1, 2], [40, 42], [90, 91]]
        assert sum(map(len, found.values())) == 27
    with pytest.raises(UsageError, match=r"readable image at .*set/class\d/\d\.png, got"):  # the rest is not the whole
        load(root)
    assert len(entries(tmp_path / "cache")) == 1


def test_a_long_list_of_broken_images_is_cut_and_one_is_singular(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=4, images=5)
    (root / "class0" / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 broken image skipped in .*: class0/0\.png$"):
        load(root, skip_broken=True)
    for file in [file for file in root.rglob("*.png") if file.name != "4.png"]:
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"16 broken images skipped .* and 6 more$"):
        load(root, skip_broken=True)
    (root / "class3" / "4.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"an image in every class, got none in 1 of .*'class3'"):
        load(root, skip_broken=True)
    assert len(entries(tmp_path / "cache")) == 1


def test_the_cache_follows_the_files_and_keeps_an_entry_for_each_setting(tmp_path: Path):
    root = split_folders(tmp_path / "set")
    load(root)
    write(root / "train" / "class0" / "2.png", 50)
    assert shades(load(root))["class0"] == [0, 1, 50]
    assert len(entries(tmp_path / "cache")) == 1
    root = class_folders(tmp_path / "other")
    for options in ({}, {"seed": 1}, {"val_fraction": 0.3}, {"image_size": 5}, {"channels": 3}, {"skip_broken": True}):
        load(root, **options)
    assert len(entries(tmp_path / "cache")) == 7
