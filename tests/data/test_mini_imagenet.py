"""load_mini_imagenet: a made-up set of 100 classes in every layout, and the real one where it is at hand."""

import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data import mini_imagenet
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.mini_imagenet import CLASSES, load_mini_imagenet
from tests.data.loading import by_class, entries, parts, real_root

SIZE = 8


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, val/ and test/ of 64, 16 and 20 classes with two images of noise each."""
    root = tmp_path_factory.mktemp("made_up")
    rng = np.random.default_rng(0)
    names = iter(rng.permutation(100))  # so that the classes of a split are no run of names
    for split, count in CLASSES.items():
        for _ in range(count):
            name = f"c{next(names):08d}"  # no WordNet id: those must be Ravi and Larochelle's
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}{i:08d}.jpg")
    return root


def zipped(source: Path, path: Path, top: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(source.rglob("*.jpg"), reverse=True):
            archive.write(file, f"{top}{file.relative_to(source).as_posix()}")
    return path


def listed(source: Path, path: Path) -> Path:
    (path / "images").mkdir(parents=True)
    (path / "images" / "unlisted.jpg").touch()
    for split in CLASSES:
        files = sorted((source / split).rglob("*.jpg"), reverse=True)
        for file in files:
            shutil.copy(file, path / "images")
        lines = ["filename,label", *(f"{file.name},{file.parent.name}" for file in files)]
        (path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return path


def load(root: Path, cache: Path, **options: bool) -> Splits:
    return load_mini_imagenet(root, image_size=SIZE, cache_dir=cache, **options)


def test_every_layout_gives_every_image_to_its_class(made_up: Path, tmp_path: Path):
    shutil.copytree(made_up, tmp_path / "folder" / "miniImageNet")
    expected = {
        folder.name: np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in sorted(folder.iterdir())])
        for folder in made_up.glob("*/*")
    }
    for path in (
        made_up,
        tmp_path / "folder",
        zipped(made_up, tmp_path / "plain" / "any.zip").parent,
        zipped(made_up, tmp_path / "top" / "mini_imagenet" / "any.zip", top="some top/").parent.parent,
        zipped(made_up, tmp_path / "named" / "it.zip"),
        listed(made_up, tmp_path / "deep" / "miniimagenet").parent,
    ):
        before = set(tmp_path.rglob("*"))
        for memory_map in (False, True):  # read, then cached
            splits = load(path, tmp_path / "cache", memory_map=memory_map)
            np.testing.assert_equal(by_class(splits), expected)
            for split, part in parts(splits).items():
                assert part.class_names == tuple(sorted(folder.name for folder in (made_up / split).iterdir()))
                assert part.note == "2 of 600 images a class"
            storages = {part._stored.untyped_storage().data_ptr() for part in parts(splits).values()}
            assert len(storages) == (1 if memory_map else 3)
        assert all(file.is_relative_to(tmp_path / "cache") for file in set(tmp_path.rglob("*")) - before)
    assert not list((tmp_path / "cache").rglob("*.jpg"))  # nothing is unpacked


def pickled(source: Path, folder: Path, protocol: int = 4, size: int = SIZE) -> Path:
    """The three files that are passed around, with the images of a class not side by side."""
    folder.mkdir(parents=True)
    for split in CLASSES:
        files = sorted((source / split).rglob("*.jpg"), key=lambda file: file.name[::-1])
        images = np.stack([np.asarray(Image.open(file).resize((size, size))) for file in files])
        index: dict[str, list[int]] = {}
        for place, file in enumerate(files):
            index.setdefault(file.parent.name, []).append(place)
        content = {"image_data": images, "class_dict": index}
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content, protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_pickles_that_are_passed_around_are_read(made_up: Path, tmp_path: Path, protocol: int):
    folder = pickled(made_up, tmp_path / "data" / "miniimagenet", protocol)
    expected = {
        name.name: np.stack(
            [np.asarray(Image.open(f)).transpose(2, 0, 1) for f in sorted(name.iterdir(), key=lambda f: f.name[::-1])]
        )
        for name in made_up.glob("*/*")
    }
    for root in (folder.parent, folder, folder / "mini-imagenet-cache-val.pkl"):
        for memory_map in (False, True):
            splits = load(root, tmp_path / "cache", memory_map=memory_map)
            np.testing.assert_equal(by_class(splits), expected)
            assert splits.test.note == "2 of 600 images a class"
            assert splits.val.checksum() == splits.val.checksum(recompute=True)
    assert len(entries(tmp_path / "cache")) == 1
    (folder / "mini-imagenet-cache-test.pkl").unlink()
    with pytest.raises(MissingFileError, match=r"mini-imagenet-cache-test.pkl in .* beside the others, got none"):
        load(folder, tmp_path / "cache")


def test_pickles_of_other_classes_are_read_and_say_so(made_up: Path, tmp_path: Path):
    few = tmp_path / "few"
    for split in CLASSES:
        for folder in sorted((made_up / split).iterdir())[:3]:
            shutil.copytree(folder, few / split / folder.name)
    splits = load(pickled(few, tmp_path / "set", size=2 * SIZE), tmp_path / "cache")
    assert splits.train.item_shape == (3, SIZE, SIZE)
    assert "other numbers of classes ({'train': 3, 'val': 3, 'test': 3})" in splits.test.note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "image_data and class_dict in .*val.pkl, got list; fetch it again"),
        ({"data": 1}, "image_data and class_dict in .*, got data; fetch"),
        ({"image_data": np.zeros((2, 4, 4, 3)), "class_dict": {"a": [0]}}, r"uint8 \(N, H, W, 3\) in .*, got float64"),
        ({"image_data": np.zeros((2, 4, 4, 3), "u1"), "class_dict": {"a": [2]}}, "class 'a' in .* as ind"),
        (Path("x"), r"expected .*val.pkl"),
    ],
)
def test_pickles_of_other_content_are_refused(made_up: Path, tmp_path: Path, content: object, message: str):
    folder = pickled(made_up, tmp_path / "set")
    (folder / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match=message):
        load(folder, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_uneven_classes_are_noted_and_full_ones_are_not(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = shutil.copytree(made_up, tmp_path / "set")
    monkeypatch.setattr(mini_imagenet, "IMAGES", 2)
    assert load(root, tmp_path / "cache").test.note == ""
    next((root / "val").rglob("*.jpg")).unlink()
    splits = load(root, tmp_path / "cache")
    assert (len(splits.val), splits.test.note) == (31, "1 to 2 of 2 images a class")


def test_other_classes_than_the_split_has_are_an_error(made_up: Path, tmp_path: Path):
    root = shutil.copytree(made_up, tmp_path / "set")
    a, b = next((root / "val").iterdir()), next((root / "test").iterdir())
    for source, target in ((a, root / "val" / "n01855672"), (b, root / "test" / "n00000001")):
        source.rename(target)
    with pytest.raises(
        UsageError, match=r"miniImageNet in .*, got other val classes than Ravi and Larochelle's \(c.*; fetch"
    ):
        load(root, tmp_path / "cache")
    shutil.rmtree(root / "val" / "n01855672")
    for path in (root, zipped(root, tmp_path / "x.zip"), listed(root, tmp_path / "lists")):
        with pytest.raises(UsageError, match=r"got other numbers of classes \(.*'val': 15.*\) than .*'val': 16"):
            load(path, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("filename,label\na.jpg\n", UsageError, r"columns filename,label with values in .*val\.csv, got .*a\.jpg"),
        ("", UsageError, r"got other numbers of classes \(\{'train': 64, 'test': 20\}\) than .*; fetch"),
        ("filename,label\nnone.jpg,n1\n", MissingFileError, r"expected .*none\.jpg, an image of val\.csv, got no such"),
        ("filename,label\n{taken},n1\n", MissingFileError, r"expected .*{taken}, .* or two lines with it"),
        (None, MissingFileError, r"expected the list .*val\.csv, got none; fetch it"),
    ],
)
def test_broken_lists_are_errors(made_up: Path, tmp_path: Path, text: str | None, error: type, message: str):
    root = listed(made_up, tmp_path / "lists")
    taken = (root / "train.csv").read_text().splitlines()[1].split(",")[0]
    (root / "val.csv").unlink()
    if text is not None:
        (root / "val.csv").write_text(text.replace("{taken}", taken))
    with pytest.raises(error, match=message.replace("{taken}", taken)):
        load(root, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_broken_zip_or_image_in_it_is_named_and_nothing_half_written_is_left(made_up: Path, tmp_path: Path):
    path = tmp_path / "root" / "mini.zip"
    whole = zipped(made_up, path).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:200] + b"damage" + whole[206:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"expected a whole zip file at .*mini\.zip, got a broken one"):
            load(path.parent, tmp_path / "cache")
    root = shutil.copytree(made_up, tmp_path / "set")
    broken = next((root / "train").rglob("*.jpg"))
    broken.write_bytes(b"broken")
    zipped(root, path, top="top/")
    with pytest.raises(UsageError, match=rf"readable image at .*mini\.zip/top/train/.*{broken.name}, got"):
        load(path.parent, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_no_set_or_two_zips_that_fit_are_errors_and_others_are_ignored(made_up: Path, tmp_path: Path):
    root = tmp_path / "root"
    with pytest.raises(MissingFileError, match=r"expected miniImageNet in .*folders train, val and test, or images"):
        load(root, tmp_path / "cache")
    zipped(made_up, root / "a.zip")
    with zipfile.ZipFile(root / "other.zip", "w") as archive:
        archive.writestr("images/x.png", b"")
    load(root, tmp_path / "cache")
    zipped(made_up, root / "b.zip")
    with pytest.raises(UsageError, match=r"one zip of miniImageNet in .*, got a\.zip, b\.zip; give the right one"):
        load(root, tmp_path / "cache")


@pytest.mark.slow
def test_the_real_set(tmp_path: Path):
    root = real_root("miniimagenet_150/miniimagenet_150.zip")
    splits = load_mini_imagenet(root, cache_dir=tmp_path)
    first = {"train": "n01532829", "val": "n01855672", "test": "n01930112"}
    with zipfile.ZipFile(root / "miniimagenet_150" / "miniimagenet_150.zip") as archive:
        for split, part in parts(splits).items():
            assert part.class_names[0] == first[split]
            assert part.note == "150 of 600 images a class"
            assert torch.bincount(part.labels).tolist() == [150] * CLASSES[split]
            names = sorted(name for name in archive.namelist() if f"/{split}/" in name and name.endswith(".jpg"))
            for image, name in zip(part.images[::97], names[::97], strict=True):
                np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(Image.open(archive.open(name))))
    mapped = load_mini_imagenet(root / "miniimagenet_150", memory_map=True, cache_dir=tmp_path)  # the same entry
    for part, same in zip(parts(splits).values(), parts(mapped).values(), strict=True):
        assert part.checksum() == same.checksum(recompute=True)
    assert len(entries(tmp_path)) == 1
