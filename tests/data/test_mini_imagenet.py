"""load_mini_imagenet: a made-up set of 100 classes in every layout, and the real one where it is at hand."""

import hashlib
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_fewshot.data.fewshot_dataset import Splits
from pml_fewshot.data.mini_imagenet import CLASSES, load_mini_imagenet

SIZE = 8


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, val/ and test/ of 64, 16 and 20 classes with two images of noise each."""
    root = tmp_path_factory.mktemp("made_up")
    rng = np.random.default_rng(0)
    wnids = iter(rng.permutation(100))  # so that the classes of a split are no run of names
    for split, count in CLASSES.items():
        for _ in range(count):
            wnid = f"c{next(wnids):08d}"  # no WordNet id: those must be Ravi and Larochelle's
            (root / split / wnid).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / wnid / f"{wnid}{i:08d}.jpg")
    return root


def zipped(source: Path, place: Path, top: str = "") -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place, "w") as archive:
        for file in sorted(source.rglob("*.jpg"), reverse=True):
            archive.write(file, f"{top}{file.relative_to(source).as_posix()}")
    return place


def listed(source: Path, place: Path) -> Path:
    (place / "images").mkdir(parents=True)
    for split in CLASSES:
        files = sorted((source / split).rglob("*.jpg"), reverse=True)
        for file in files:
            shutil.copy(file, place / "images")
        lines = ["filename,label", *(f"{file.name},{file.parent.name}" for file in files)]
        (place / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return place


def load(root: Path, cache: Path, **options: bool) -> Splits:
    return load_mini_imagenet(root, image_size=SIZE, cache_dir=cache, **options)


def entries(cache: Path) -> list[str]:
    """Also hidden ones, but for the locks."""
    names = os.listdir(cache) if cache.exists() else []  # noqa: PTH208
    return sorted(name for name in names if not name.endswith("-lock"))


def assert_same(a: Splits, b: Splits) -> None:
    assert a.val is not None
    assert b.val is not None
    for one, other in ((a.train, b.train), (a.val, b.val), (a.test, b.test)):
        assert one.class_names == other.class_names
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)
        assert one.note == other.note


@pytest.fixture(scope="module")
def expected(made_up: Path, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load(made_up, tmp_path_factory.mktemp("cache"))


def test_split_folders_give_every_image_to_its_class(made_up: Path, expected: Splits):
    assert expected.val is not None
    for split, part in (("train", expected.train), ("val", expected.val), ("test", expected.test)):
        assert len(part.class_names) == CLASSES[split]
        assert part.class_names == tuple(sorted(folder.name for folder in (made_up / split).iterdir()))
        assert part.labels.tolist() == [label for label in range(CLASSES[split]) for _ in range(2)]
        assert part.note == "2 of 600 images a class"
        files = sorted((made_up / split).rglob("*.jpg"))
        for i in (0, 1, len(files) - 1):
            pixels = np.asarray(Image.open(files[i])).transpose(2, 0, 1)
            np.testing.assert_array_equal(part.images[i].numpy(), pixels)


def test_zip_folder_and_lists_give_the_same_sets(made_up: Path, expected: Splits, tmp_path: Path):
    places = [
        zipped(made_up, tmp_path / "plain" / "any.zip").parent,
        zipped(made_up, tmp_path / "top" / "mini_imagenet" / "any.zip", top="some top/").parent.parent,
        zipped(made_up, tmp_path / "named" / "it.zip"),
        listed(made_up, tmp_path / "lists"),
        listed(made_up, tmp_path / "deep" / "miniimagenet").parent,
    ]
    (tmp_path / "folder" / "miniImageNet").parent.mkdir()
    shutil.copytree(made_up, tmp_path / "folder" / "miniImageNet")
    for place in (*places, tmp_path / "folder"):
        before = sorted(tmp_path.rglob("*"))
        assert_same(load(place, tmp_path / "cache"), expected)  # read
        assert_same(load(place, tmp_path / "cache", memory_map=True), expected)  # cached
        new = [file for file in tmp_path.rglob("*") if file not in before]
        assert all(file.is_relative_to(tmp_path / "cache") for file in new)  # nothing is unpacked
        assert not list((tmp_path / "cache").rglob("*.jpg"))


def test_memory_mapped_splits_share_the_map(made_up: Path, tmp_path: Path):
    splits = load(made_up, tmp_path, memory_map=True)
    assert splits.val is not None
    storages = {part.images.untyped_storage().data_ptr() for part in (splits.train, splits.val, splits.test)}
    assert len(storages) == 1
    assert splits.train.images.untyped_storage().nbytes() == 200 * 3 * SIZE * SIZE


def test_uneven_classes_are_noted_and_full_ones_are_not(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = shutil.copytree(made_up, tmp_path / "set")
    monkeypatch.setattr("pml_fewshot.data.mini_imagenet.IMAGES", 2)
    assert load(root, tmp_path / "cache").test.note == ""
    next((root / "val").rglob("*.jpg")).unlink()
    assert load(root, tmp_path / "cache").test.note == "1 to 2 of 2 images a class"


def test_another_number_of_classes_is_an_error(made_up: Path, tmp_path: Path):
    root = shutil.copytree(made_up, tmp_path / "set")
    shutil.rmtree(next((root / "val").iterdir()))
    message = "expected 64 train, 16 val, 20 test classes of miniImageNet in .*, got 64 train, 15 val, 20 test"
    for place in (root, zipped(root, tmp_path / "x.zip"), listed(root, tmp_path / "lists")):
        with pytest.raises(ValueError, match=message):
            load(place, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_list_that_names_a_missing_file_is_an_error(made_up: Path, tmp_path: Path):
    root = listed(made_up, tmp_path / "lists")
    missing = sorted((root / "images").iterdir())[7]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=rf"the image {missing.name} of line \d+ of .*\.csv in .*images"):
        load(root, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\na.jpg,n1\n", r"columns filename,label in .*val\.csv"),
        ("", r"columns filename,label in .*val\.csv"),
        ("filename,label\na.jpg\n", r"a filename and a label in line 2 of .*val\.csv"),
        ("filename,label\n{taken},n1\n", r"each image in one line of the lists, got {taken} again in line 2"),
    ],
)
def test_broken_lists_are_errors(made_up: Path, tmp_path: Path, text: str, message: str):
    root = listed(made_up, tmp_path / "lists")
    taken = (root / "train.csv").read_text().splitlines()[1].split(",")[0]
    (root / "val.csv").write_text(text.replace("{taken}", taken))
    with pytest.raises(ValueError, match=message.replace("{taken}", taken)):
        load(root, tmp_path / "cache")


def test_a_missing_list_is_an_error(made_up: Path, tmp_path: Path):
    root = listed(made_up, tmp_path / "lists")
    (root / "val.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.csv"):
        load(root, tmp_path / "cache")


def test_a_file_in_the_folder_of_another_class_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four classes with WordNet's names, for of others no file says its class."""
    classes = {"train": ["n00000001", "n00000003"], "val": ["n00000002"], "test": ["n00000004"]}
    place = "pml_fewshot.data.mini_imagenet"
    monkeypatch.setattr(f"{place}.CLASSES", {split: len(names) for split, names in classes.items()})
    digests = {split: hashlib.blake2b("\n".join(names).encode(), digest_size=8) for split, names in classes.items()}
    monkeypatch.setattr(f"{place}.RAVI_LAROCHELLE", {split: digest.hexdigest() for split, digest in digests.items()})
    root = tmp_path / "set"
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (SIZE, SIZE)).save(root / split / name / f"{name}{i:08d}.jpg")
    (root / "val" / "n00000002" / "of_another_name.jpg").write_bytes(
        (root / "val" / "n00000002" / "n0000000200000000.jpg").read_bytes()
    )
    assert load(root, tmp_path / "cache").train.class_names == ("n00000001", "n00000003")
    wrong = root / "train" / "n00000001" / "n0000000300000000.jpg"
    (root / "train" / "n00000003" / wrong.name).rename(wrong)
    for number, where in enumerate((root, zipped(root, tmp_path / "x.zip"), listed(root, tmp_path / "lists"))):
        with pytest.raises(
            ValueError,
            match=rf"^expected the class that .*{wrong.name} is named after, got n00000001 in .*; fetch the set again",
        ):
            load(where, tmp_path / f"cache{number}")
        assert entries(tmp_path / f"cache{number}") == []


def test_nothing_at_root_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"expected miniImageNet in .*folders train, val and test, or images with"
    ):
        load(tmp_path, tmp_path / "cache")


def test_a_broken_zip_is_named(made_up: Path, tmp_path: Path):
    whole = zipped(made_up, tmp_path / "whole.zip").read_bytes()
    root = tmp_path / "root"
    root.mkdir()
    cut = root / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    for place in (root, cut):
        with pytest.raises(
            ValueError, match=r"expected a whole zip file at .*cut\.zip, got a broken one .*fetch it again"
        ):
            load(place, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    (root / "whole.zip").write_bytes(whole)
    assert load(root, tmp_path / "cache").train.class_names  # one that fits is there: the other one is passed over


def test_damage_inside_a_zip_is_named_and_nothing_half_written_is_left(made_up: Path, tmp_path: Path):
    place = zipped(made_up, tmp_path / "mini.zip")
    content = bytearray(place.read_bytes())
    with zipfile.ZipFile(place) as archive:
        info = archive.infolist()[100]
    content[info.header_offset + 30 + len(info.filename) + 40] ^= 0xFF
    place.write_bytes(content)
    with pytest.raises(ValueError, match=rf"whole zip file at .*mini\.zip, got a broken one .*{info.filename}"):
        load(place, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_broken_image_inside_a_zip_is_named(made_up: Path, tmp_path: Path):
    place = zipped(made_up, tmp_path / "mini.zip")
    root = shutil.copytree(made_up, tmp_path / "set")
    broken = next((root / "train").rglob("*.jpg"))
    broken.write_bytes(b"broken")
    zipped(root, place, top="top/")
    with pytest.raises(ValueError, match=rf"readable image at .*mini\.zip/train/.*{broken.name}, got"):
        load(place, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_changed_zip_rebuilds_the_cache(made_up: Path, tmp_path: Path):
    place = zipped(made_up, tmp_path / "mini.zip")
    before = load(place, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    root = shutil.copytree(made_up, tmp_path / "set")
    changed = sorted((root / "train").rglob("*.jpg"))[0]
    Image.new("RGB", (SIZE, SIZE), (255, 0, 0)).save(changed, quality=100)
    zipped(root, place)
    os.utime(place, ns=(1, 1))
    after = load(place, tmp_path / "cache")
    assert not torch.equal(after.train.images[0], before.train.images[0])
    assert torch.equal(after.train.images[1:], before.train.images[1:])
    (new_entry,) = entries(tmp_path / "cache")
    assert new_entry != entry


def test_two_zips_that_fit_are_an_error_and_others_are_passed_over(made_up: Path, tmp_path: Path):
    root = tmp_path / "root"
    zipped(made_up, root / "a.zip")
    with zipfile.ZipFile(root / "other.zip", "w") as archive:
        archive.writestr("images/x.png", b"")
    load(root, tmp_path / "cache")
    zipped(made_up, root / "b.zip")
    with pytest.raises(ValueError, match=r"one zip of miniImageNet in .*, got a\.zip, b\.zip; give the one you mean"):
        load(root, tmp_path / "cache")


def real_root() -> Path:
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    root = Path(os.environ.get("PML_FEWSHOT_DATA", beside))
    if not (root / "miniimagenet_150" / "miniimagenet_150.zip").is_file():
        pytest.skip(f"no miniimagenet_150/miniimagenet_150.zip in {root}; set PML_FEWSHOT_DATA to the data folder")
    return root


def test_the_real_set(tmp_path: Path):
    root = real_root()
    splits = load_mini_imagenet(root, memory_map=True, cache_dir=tmp_path)
    assert splits.val is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [9600, 2400, 3000]
    for part, first_wnid in ((splits.train, "n01532829"), (splits.val, "n01855672"), (splits.test, "n01930112")):
        assert part.class_names[0] == first_wnid
        assert part.item_shape == (3, 84, 84)
        assert part.note == "150 of 600 images a class"
        assert torch.bincount(part.labels).eq(150).all()
    with zipfile.ZipFile(root / "miniimagenet_150" / "miniimagenet_150.zip") as archive:
        for part, split in ((splits.train, "train"), (splits.val, "val"), (splits.test, "test")):
            names = sorted(name for name in archive.namelist() if f"/{split}/" in name)
            for i in (0, len(names) // 2, len(names) - 1):
                pixels = np.asarray(Image.open(archive.open(names[i]))).transpose(2, 0, 1)
                np.testing.assert_array_equal(part.images[i].numpy(), pixels)
    start = time.perf_counter()
    again = load_mini_imagenet(root / "miniimagenet_150", memory_map=True, cache_dir=tmp_path)  # the same entry
    assert time.perf_counter() - start < 3  # 0.2 s on a free machine
    assert torch.equal(again.test.images[-1], splits.test.images[-1])
