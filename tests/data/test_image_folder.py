"""load_image_folder: both layouts, the drawn split, broken images, and the cache behind it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.data.image_folder import load_image_folder

SPLITS = ("train", "val", "test")


def write(file: Path, shade: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 6), shade).save(file)


def class_folders(root: Path, classes: int = 10, images: int = 3) -> Path:
    """Class c's image i is all of shade 10 c + i."""
    for c in range(classes):
        for i in range(images):
            write(root / f"class{c}" / f"{i}.png", 10 * c + i)
    return root


def split_folders(root: Path, val: str = "val") -> Path:
    for c, split in enumerate(("train", "train", val, "test")):
        for i in range(2):
            write(root / split / f"class{c}" / f"{i}.png", 10 * c + i)
    return root


def parts(splits: Splits) -> dict[str, FewShotDataset]:
    return {name: part for name in SPLITS if (part := getattr(splits, name)) is not None}


def shades(part: FewShotDataset) -> dict[str, list[int]]:
    """Class name -> the shades of its images, in the order stored."""
    return {
        name: part.images[part.labels == label].flatten(1)[:, 0].tolist() for label, name in enumerate(part.class_names)
    }


def load(root: Path, cache: Path, **options: object) -> Splits:
    return load_image_folder(root, image_size=6, channels=1, cache_dir=cache, **options)


def entries(cache: Path) -> list[str]:
    names = os.listdir(cache) if cache.exists() else []  # noqa: PTH208, for hidden names too, but for the locks
    return sorted(name for name in names if not name.endswith("-lock"))


def test_every_image_keeps_its_class_in_a_drawn_split(tmp_path: Path):
    splits = load(class_folders(tmp_path / "set"), tmp_path / "cache")
    found: dict[str, list[int]] = {}
    for part in parts(splits).values():
        assert part.images.dtype == torch.uint8
        assert part.item_shape == (1, 6, 6)
        assert part.note == ""
        assert list(part.class_names) == sorted(part.class_names)
        found |= shades(part)
    assert found == {f"class{c}": [10 * c, 10 * c + 1, 10 * c + 2] for c in range(10)}
    assert [len(part.class_names) for part in parts(splits).values()] == [6, 2, 2]


def test_the_seed_alone_decides_the_split(tmp_path: Path):
    root = class_folders(tmp_path / "set")
    state = torch.get_rng_state()

    def names(seed: int, cache: str) -> tuple[tuple[str, ...], ...]:
        return tuple(part.class_names for part in parts(load(root, tmp_path / cache, seed=seed)).values())

    assert names(0, "a") == names(0, "b")
    assert len({names(seed, "a") for seed in range(5)}) > 1
    for seed in range(5):
        drawn = [name for part in names(seed, "a") for name in part]
        assert len(drawn) == len(set(drawn)) == 10
    assert torch.equal(state, torch.get_rng_state())


def test_the_drawn_split_does_not_change_between_versions(tmp_path: Path):
    splits = load(class_folders(tmp_path / "set", images=1), tmp_path / "cache", seed=0)
    assert splits.val is not None
    assert splits.val.class_names == ("class1", "class4")
    assert splits.test.class_names == ("class5", "class7")


def test_fractions_are_rounded_and_no_split_is_empty(tmp_path: Path):
    root = class_folders(tmp_path / "set", images=1)

    def sizes(**fractions: float) -> list[int]:
        return [len(part.class_names) for part in parts(load(root, tmp_path / "cache", **fractions)).values()]

    assert sizes(val_fraction=0.01, test_fraction=0.01) == [8, 1, 1]
    assert sizes(val_fraction=0.26, test_fraction=0.44) == [3, 3, 4]
    assert load(root, tmp_path / "cache", val_fraction=0).val is None
    assert sizes(val_fraction=0) == [8, 2]


@pytest.mark.parametrize(
    "fractions",
    [
        {"val_fraction": -0.1},
        {"test_fraction": 0},
        {"val_fraction": 0.5, "test_fraction": 0.5},
        {"val_fraction": np.nan},
    ],
)
def test_fractions_that_leave_nothing_are_errors(tmp_path: Path, fractions: dict[str, float]):
    with pytest.raises(ValueError, match="val_fraction >= 0 and test_fraction > 0, together below 1"):
        load(class_folders(tmp_path / "set"), tmp_path / "cache", **fractions)


def test_too_few_classes_are_counted_and_named(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=2)
    with pytest.raises(ValueError, match=r"more than 2 classes, .* got 2 \(class0, class1\); add classes"):
        load(root, tmp_path / "cache")
    write(root / "class2" / "x.png", 1)
    assert [len(part.class_names) for part in parts(load(root, tmp_path / "cache")).values()] == [1, 1, 1]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_given_splits_are_kept(tmp_path: Path, val: str):
    splits = load(split_folders(tmp_path / "set", val), tmp_path / "cache", seed=3)
    assert splits.val is not None
    assert shades(splits.train) == {"class0": [0, 1], "class1": [10, 11]}
    assert shades(splits.val) == {"class2": [20, 21]}
    assert shades(splits.test) == {"class3": [30, 31]}


def test_given_splits_without_val_have_none(tmp_path: Path):
    root = split_folders(tmp_path / "set", "test")
    assert load(root, tmp_path / "cache").val is None


def test_a_class_may_be_called_train(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=4)
    write(root / "train" / "x.png", 200)
    splits = load(root, tmp_path / "cache")
    assert sum("train" in part.class_names for part in parts(splits).values()) == 1


@pytest.mark.parametrize(
    ("stray", "message"),
    [
        ("train/x.png", "images of .* in class folders, got train/x.png in none"),
        ("validation/class9/x.png", "train, test and perhaps val only, got them in test, train, val, validation"),
        ("more/class9/x.png", "train, test and perhaps val only, got them in more, test"),
        ("x.png", "train, test and perhaps val only, got them in x.png, test"),
    ],
)
def test_images_beside_the_given_splits_are_errors(tmp_path: Path, stray: str, message: str):
    root = split_folders(tmp_path / "set")
    write(root / stray, 1)
    with pytest.raises(ValueError, match=message):
        load(root, tmp_path / "cache")


def test_splits_without_test_are_an_error(tmp_path: Path):
    write(tmp_path / "set" / "train" / "a" / "x.png", 1)
    write(tmp_path / "set" / "val" / "b" / "x.png", 1)
    with pytest.raises(ValueError, match="train, test and perhaps val only, got them in train, val"):
        load(tmp_path / "set", tmp_path / "cache")


def test_a_class_in_two_splits_is_the_splits_error(tmp_path: Path):
    root = split_folders(tmp_path / "set")
    write(root / "test" / "class1" / "x.png", 1)
    with pytest.raises(ValueError, match="got class 'class1' in train and in test; put each class into one split"):
        load(root, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_folders_without_images_are_errors(tmp_path: Path):
    empty = tmp_path / "empty"
    (empty / "class0").mkdir(parents=True)
    (empty / "class0" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"images in class folders below .*empty, got none; give files .*\.jpg"):
        load(empty, tmp_path / "cache")
    write(tmp_path / "flat" / "x.png", 1)
    with pytest.raises(ValueError, match=r"images of .*flat in class folders, got x.png in none"):
        load(tmp_path / "flat", tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"expected a folder of images at .*nowhere"):
        load(tmp_path / "nowhere", tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_names_with_spaces_and_other_letters_and_deeper_folders(tmp_path: Path):
    names = ["Ærøskøbing grün", "日本 語", "it's 100%", "plain"]
    for shade, name in enumerate(names):
        write(tmp_path / "set" / name / "deep er" / "ü.PNG", shade)
        write(tmp_path / "set" / name / "x.png", shade + 100)
    (tmp_path / "set" / "annotations").mkdir()
    for _ in range(2):  # read, then cached
        splits = load(tmp_path / "set", tmp_path / "cache", val_fraction=0.25, test_fraction=0.25)
        found = {name: values for part in parts(splits).values() for name, values in shades(part).items()}
        assert found == {name: [shade, shade + 100] for shade, name in enumerate(names)}


def test_three_channels_and_a_size_are_the_default(tmp_path: Path):
    splits = load_image_folder(class_folders(tmp_path / "set", classes=3, images=1), cache_dir=tmp_path / "cache")
    assert splits.train.item_shape == (3, 84, 84)
    with pytest.raises(ValueError, match="expected image_size"):
        load_image_folder(tmp_path / "set", image_size=0)
    with pytest.raises(ValueError, match="expected channels"):
        load_image_folder(tmp_path / "set", channels=2)


def test_a_broken_image_is_named_and_nothing_half_written_is_left(tmp_path: Path):
    root = class_folders(tmp_path / "set")
    whole = (root / "class4" / "1.png").read_bytes()
    (root / "class4" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"readable image at .*set/class4/1\.png, got"):
        load(root, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("memory_map", [False, True])
def test_broken_images_are_skipped_on_request_and_listed(tmp_path: Path, memory_map: bool):
    root = class_folders(tmp_path / "set")
    broken = ["class0/0.png", "class4/1.png", "class9/2.png"]
    for name in broken:
        (root / name).write_bytes(b"broken")
    for _ in range(2):  # read, then cached: both times it says so
        with pytest.warns(UserWarning, match="3 broken images skipped in .*set: ") as caught:
            splits = load(root, tmp_path / "cache", skip_broken=True, memory_map=memory_map)
        assert all(name in str(caught[0].message) for name in broken)
        assert caught[0].filename == __file__  # it points at the call, not into the library
        assert {part.note for part in parts(splits).values()} == {"3 broken images skipped"}
        found = {name: values for part in parts(splits).values() for name, values in shades(part).items()}
        assert found["class0"] == [1, 2]
        assert found["class4"] == [40, 42]
        assert found["class9"] == [90, 91]
        assert sum(map(len, found.values())) == 27
    with pytest.raises(ValueError, match=r"readable image at"):  # the cached rest is not taken for the whole
        load(root, tmp_path / "cache")


def test_a_long_list_of_broken_images_is_cut_and_one_is_singular(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=4, images=5)
    (root / "class0" / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 broken image skipped in .*: class0/0\.png$"):
        load(root, tmp_path / "cache", skip_broken=True)
    for file in [file for file in root.rglob("*.png") if file.name != "4.png"]:
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"16 broken images skipped .* and 6 more$"):
        load(root, tmp_path / "cache", skip_broken=True)


def test_a_class_of_broken_images_only_is_an_error_when_skipping(tmp_path: Path):
    root = class_folders(tmp_path / "set")
    for file in (root / "class3").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a readable image in each class of .*, got none like class3/0\.png"):
        load(root, tmp_path / "cache", skip_broken=True)
    assert entries(tmp_path / "cache") == []


def test_the_second_time_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = class_folders(tmp_path / "set")
    first = load(root, tmp_path / "cache")
    monkeypatch.setattr("pml_fewshot.data.image_folder.read_images", None)
    second = load(root, tmp_path / "cache")
    for part, same in zip(parts(first).values(), parts(second).values(), strict=True):
        assert torch.equal(part.images, same.images)
        assert torch.equal(part.labels, same.labels)
        assert part.class_names == same.class_names


def test_a_changed_added_or_removed_file_rebuilds_the_cache(tmp_path: Path):
    root = split_folders(tmp_path / "set")
    load(root, tmp_path / "cache")
    (before,) = entries(tmp_path / "cache")
    write(root / "train" / "class0" / "1.png", 99)
    os.utime(root / "train" / "class0" / "1.png", ns=(1, 1))
    assert shades(load(root, tmp_path / "cache").train)["class0"] == [0, 99]
    (after,) = entries(tmp_path / "cache")
    assert after != before
    write(root / "train" / "class0" / "2.png", 50)
    assert shades(load(root, tmp_path / "cache").train)["class0"] == [0, 99, 50]
    (root / "train" / "class0" / "0.png").unlink()
    assert shades(load(root, tmp_path / "cache").train)["class0"] == [99, 50]
    assert len(entries(tmp_path / "cache")) == 1


def test_another_size_or_seed_is_another_entry_and_both_stay(tmp_path: Path):
    root = class_folders(tmp_path / "set")
    for options in ({}, {"seed": 1}, {"val_fraction": 0.3}, {"image_size": 5}, {"channels": 3}):
        load_image_folder(root, **{"image_size": 6, "channels": 1} | options, cache_dir=tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 5


def test_memory_mapped_splits_are_slices_of_one_map_and_else_of_none(tmp_path: Path):
    root = class_folders(tmp_path / "set")
    mapped = parts(load(root, tmp_path / "cache", memory_map=True)).values()
    copied = parts(load(root, tmp_path / "cache")).values()
    storages = {part.images.untyped_storage().data_ptr() for part in mapped}
    assert len(storages) == 1
    assert {part.images.untyped_storage().nbytes() for part in mapped} == {30 * 36}
    maps = Path("/proc/self/maps")
    if maps.exists():
        address = storages.pop()
        spans = [line.split() for line in maps.read_text().splitlines() if "images.npy" in line]
        assert any(int(s[0].split("-")[0], 16) <= address < int(s[0].split("-")[1], 16) for s in spans)
    assert len({part.images.untyped_storage().data_ptr() for part in copied}) == 3
    for a, b in zip(mapped, copied, strict=True):
        assert torch.equal(a.images, b.images)
        assert b.images.untyped_storage().nbytes() == len(b) * 36
