"""load_image_folder: both layouts, the drawn split, broken images, and the cache behind it."""

import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.image_folder import load_image_folder, load_images
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
        storages = {part._stored.untyped_storage().data_ptr() for part in parts(splits).values()}
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
        (
            f"{GIVEN} validation/a/x.png",
            "the folders train, test and val, or train and one of them, got them in test, train, val, validation",
        ),
        (f"{GIVEN} x.png", "images of .*set in class folders, got x.png in none"),
        (f"{GIVEN} other/a/x.png", "or train and one of them, got them in other, test, train, val; move the others"),
        (f"{GIVEN} test/class1/x.png", "got class 'class1' in train and in test; put each class into one split"),
        ("val/a/x.png test/b/x.png", "train and one of them, got them in test, val"),
        ("class0/notes.txt", r"images in class folders in .*set, got none among 1 other files; add files .*\.jpg"),
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
        with pytest.warns(UserWarning, match="folder train is taken as a class, among 6 others; 7 images in deeper f"):
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
        with pytest.warns(UserWarning, match=r"set: 3 broken images skipped: class0/0.png, c") as caught:
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
    with pytest.warns(UserWarning, match=r"1 broken image skipped: class0/0\.png$"):
        load(root, skip_broken=True)
    for file in [file for file in root.rglob("*.png") if file.name != "4.png"]:
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"16 broken images skipped: .* and 6 more$"):
        load(root, skip_broken=True)
    (root / "class3" / "4.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"an image in every class of .*, got only broken ones in class3; replace"):
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
    assert len(entries(tmp_path / "cache")) == 5  # seed and fractions choose among the same images


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JPEG", ".dib", ".webp", ".tif"])
def test_every_usual_ending_is_read(tmp_path: Path, ending: str):
    root = class_folders(tmp_path / "set", classes=3, images=1)
    (root / "class3").mkdir()
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".dib": "DIB", ".webp": "WEBP", ".tif": "TIFF"}.get(ending, "JPEG")
    Image.new("L", (6, 6), 200).save(root / "class3" / f"0{ending}", kind)
    assert abs(shades(load(root, val_fraction=0))["class3"][0] - 200) <= 2


def test_what_is_left_out_is_counted_aloud(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=4, images=1)
    left_out, ignored = ("class0/a.heic", "class0/b.heic", "raw/x.cr2", "class1/notes"), (".git/x", "class0/Thumbs.db")
    for name in (*left_out, *ignored, "readme.md"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    message = (
        r"set: left out 4 files that are no images by their ending \(2 .heic, 1 without ending, 1 .cr2\), first "
        r"class0/a.heic; left out 1 folders without an image: raw$"
    )
    for load_it in (load, lambda root: load_images(root, 6, 1, cache_dir=root.parent / "cache")):
        with pytest.warns(UserWarning, match=message) as caught:
            load_it(root)
        assert caught[0].filename == __file__


def test_train_and_val_alone_are_taken_as_they_are(tmp_path: Path):
    root = class_folders(tmp_path / "set", 4, 2, ("train", "train", "val", "val"))
    splits = load(root)
    assert splits.test_is_val
    assert splits.val.class_names == ("class2", "class3")
    assert splits.test.note == "no test classes: val's in their place"
    write(root / "val" / "class0" / "9.png", 99)
    with pytest.raises(UsageError, match=r"class 'class0' in train and in val; .*shared_classes=True"):
        load(root)
    shared = load(root, shared_classes=True)
    assert shared.test.class_names == ("class0", "class2", "class3")
    assert shared.test.images[shared.test.labels == 0].unique().tolist() == [99]


def test_the_classes_of_cub_are_below_its_images_and_divided_by_lists(tmp_path: Path):
    root = class_folders(tmp_path / "CUB" / "images", classes=6, images=2)
    (tmp_path / "CUB" / "images.txt").write_text("1 a.jpg")
    (tmp_path / "CUB" / "attributes").mkdir()
    (tmp_path / "CUB" / "attributes" / "names.txt").write_text("x")
    lists = {"train": ["class5", "class0"], "val": ["class1"], "test": ["class3"]}
    for place in (root, root.parent):
        splits = load(place, splits=lists)
        assert [part.class_names for part in parts(splits).values()] == [("class0", "class5"), ("class1",), ("class3",)]
        assert shades(splits)["class3"] == [30, 31]
        assert {part.note for part in parts(splits).values()} == {"2 of 6 classes in no list"}
    with zipfile.ZipFile(tmp_path / "cub.zip", "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, f"CUB/images/{file.relative_to(root)}")
    assert shades(load(tmp_path / "cub.zip", splits=lists))["class5"] == [50, 51]


def test_one_set_holds_all_classes(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=3, images=2)
    for memory_map in (False, True):
        whole = load_images(root, 6, 1, memory_map=memory_map, cache_dir=tmp_path / "cache")
        assert whole.class_names == ("class0", "class1", "class2")
        assert whole.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21]
    load(root)
    assert len(entries(tmp_path / "cache")) == 1  # the same copy for every division
    with pytest.raises(MissingFileError, match=r"a folder of images at .*nowhere, got none there"):
        load_images(tmp_path / "nowhere")


def test_folders_that_change_places_are_seen(tmp_path: Path):
    """The files have the same names, sizes and times afterwards."""
    root = class_folders(tmp_path / "set", classes=4, images=1)
    for file in root.rglob("*.png"):
        (root / "x.bmp").write_bytes(file.read_bytes())
        file.unlink()
        Image.new("L", (6, 6), 10 * int(file.parent.name[-1])).save(file.with_suffix(".bmp"))
        os.utime(file.with_suffix(".bmp"), (1e9, 1e9))
    (root / "x.bmp").unlink()
    assert shades(load(root)) == {f"class{c}": [10 * c] for c in range(4)}
    for old, new in (("class0", "x"), ("class1", "class0"), ("x", "class1")):
        (root / old).rename(root / new)
    assert shades(load(root)) == {"class0": [10], "class1": [0], "class2": [20], "class3": [30]}
    assert len(entries(tmp_path / "cache")) == 1


def test_sizes_depth_and_ways_to_resize_reach_the_images(tmp_path: Path):
    root = tmp_path / "set"
    for c in range(3):
        (root / str(c)).mkdir(parents=True)
        Image.fromarray(np.full((4, 8), 300 * c + 5, np.uint16)).save(root / str(c) / "0.png")
    splits = load(root, image_size=(2, 6), resize="pad", depth=16, val_fraction=0)
    images = by_class(splits)
    assert splits.train.images.dtype == torch.uint16
    for c in range(3):  # 2 x 4 in the middle of 2 x 6
        expected = [[0, *[300 * c + 5] * 4, 0]] * 2
        np.testing.assert_array_equal(images[str(c)][0, 0], expected)
    assert len(entries(tmp_path / "cache")) == 1
    load(root, image_size=(2, 6), resize="stretch", depth=16, val_fraction=0)
    assert len(entries(tmp_path / "cache")) == 2


def test_empty_folders_and_copies_are_counted(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=3, images=2)
    (root / "empty" / "deep").mkdir(parents=True)
    write(root / "class0" / "copy.png", 1)
    write(root / "class2" / "copy.png", 0)
    with pytest.warns(UserWarning, match="set: left out 1 folders without an image: empty$"):
        whole = load_images(root, 6, 1, cache_dir=tmp_path / "cache")
    assert whole.note == "copies of other images: 2, 1 of them in another class or split, as all/class0 and all/class2"


def test_a_zip_with_names_twice_counts_the_last_of_each(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=3, images=1)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, about the names
        for times in range(2):
            for file in sorted(root.rglob("*.png")):
                archive.write(file, f"{'./' if times else ''}{file.relative_to(root).as_posix()}")
            write(root / "class1" / "0.png", 99)
    with pytest.warns(UserWarning, match=r"left out 3 entries of names that come again in the zip; the last"):
        whole = load_images(tmp_path / "d.zip", 6, 1, cache_dir=tmp_path / "cache")
    assert whole.images[:, 0, 0, 0].tolist() == [0, 99, 20]


@pytest.mark.parametrize("names", [("Train", "Val", "TEST"), ("training", "dev", "Testing")])
def test_split_folders_go_by_any_of_their_names(tmp_path: Path, names: tuple[str, str, str]):
    root = class_folders(tmp_path / "set", 4, 2, (names[0], names[0], names[1], names[2]))
    splits = load(root)
    assert [part.class_names for part in parts(splits).values()] == [("class0", "class1"), ("class2",), ("class3",)]
    with pytest.raises(
        UsageError, match=r"class folders in .*, got those of splits, .*; use load_image_folder, or give"
    ):
        load_images(root, 6, 1)


def test_links_to_a_folder_above_are_not_followed_and_dangling_ones_named_or_skipped(tmp_path: Path):
    root = class_folders(tmp_path / "set", classes=3, images=1)
    for name in ("class0", "class1"):
        (root / name / "all").symlink_to(root)
    assert len(load_images(root, 6, 1, cache_dir=tmp_path / "cache")) == 3
    (root / "class0" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"gone.png"):
        load_images(root, 6, 1, cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match=r"1 broken image skipped: class0/gone.png"):
        assert len(load_images(root, 6, 1, skip_broken=True, cache_dir=tmp_path / "cache")) == 3


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, scan = class_folders(tmp_path / "set", classes=3, images=1), os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("class1"):
            raise PermissionError(13, "not yours", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        load_images(root, 6, 1, cache_dir=tmp_path / "cache")


def test_a_file_that_is_no_zip_is_not_taken_for_a_broken_one(tmp_path: Path):
    write(tmp_path / "photo.png", 1)
    with pytest.raises(UsageError, match=r"a folder or a zip at .*photo.png, got another file; name the folder"):
        load_images(tmp_path / "photo.png")
