"""load_omniglot: made-up archives in every layout and state, and the real one where it is at hand."""

import sys
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data import omniglot
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.omniglot import load_omniglot
from tests.data.loading import by_class, entries, parts, real_root

# Character -> its two drawings: the made-up set has all roles of the Vinyals split.
BACKGROUND = ("Angelic/character01", "Angelic/character02", "Hebrew/character01")
EVALUATION = ("Gurmukhi/character41", "Gurmukhi/character42", "Kannada/character07", "Zzz/character01")
ROLES = {
    "train": ("Angelic/character01", "Angelic/character02", "Gurmukhi/character41", "Zzz/character01"),
    "val": ("Hebrew/character01",),
    "test": ("Gurmukhi/character42", "Kannada/character07"),
}
PARTS = {"images_background": BACKGROUND, "images_evaluation": EVALUATION}
DRAWING = "Kannada/character07/0002_01.png"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.keywords:  # those look at the real set
        monkeypatch.setattr(omniglot, "PARTS", {part: len(characters) for part, characters in PARTS.items()})
        monkeypatch.setattr(omniglot, "DRAWINGS", 2)


def paper(character: str, drawing: int) -> np.ndarray:
    """(105, 105) bool: True is paper, False is ink, as in the real files; about one pixel of eight is ink."""
    seed = 10 * (BACKGROUND + EVALUATION).index(character) + drawing
    return np.random.default_rng(seed).random((105, 105)) > 0.125


def png(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def files(part: str) -> dict[str, bytes]:
    """Name within the part -> content, in an order that is not the sorted one."""
    order = [(i, character, drawing) for i, character in enumerate(PARTS[part]) for drawing in (0, 1)][::-1]
    return {f"{name}/{i:04d}_{drawing:02d}.png": png(paper(name, drawing)) for i, name, drawing in order}


def write(root: Path, part: str, kind: str = "zip", **changes: bytes | None) -> None:
    """A part as a zip or a folder, with other content for the names in changes; None leaves one out."""
    root.mkdir(parents=True, exist_ok=True)
    content = {name: data for name, data in (files(part) | changes).items() if data is not None}
    if kind == "folder":
        for name, data in content.items():
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
            (root / part / name).write_bytes(data)
        return
    with zipfile.ZipFile(root / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{part}/", "")
        archive.writestr(f"__MACOSX/{part}/Angelic/character01/._0000_00.png", "no picture")
        for name, data in content.items():
            archive.writestr(f"{part}/{name}", data)


def written(root: Path, kind: str = "zip") -> Path:
    for part in PARTS:
        write(root, part, kind)
    return root


def load(root: Path, **options: object) -> Splits:
    given = {"image_size": 35, "rotations": False, "cache_dir": root.parent / "cache"} | options
    return load_omniglot(root, **given)  # type: ignore[arg-type]


def expected_pixels(character: str, size: int) -> np.ndarray:
    """Drawings of a character with ink high, each pixel the mean of a square of the original."""
    block = 105 // size
    means = [paper(character, d).reshape(size, block, size, block).mean(axis=(1, 3)) for d in (0, 1)]
    return 255 - np.floor(255 * np.stack(means)[:, None] + 0.5)


@pytest.mark.parametrize("kinds", [("zip", "zip"), ("folder", "folder"), ("zip", "folder")])
def test_every_layout_gives_the_same_pixels_and_classes(tmp_path: Path, kinds: tuple[str, str]):
    for part, kind in zip(PARTS, kinds, strict=True):
        write(tmp_path / "data" / ("" if len(set(kinds)) == 1 else "omniglot"), part, kind)
    for size in (35, 105):
        splits = load(tmp_path / "data", image_size=size)
        assert {role: part.class_names for role, part in parts(splits).items()} == ROLES
        assert splits.train.item_shape == (1, size, size)
        for name, images in by_class(splits).items():
            np.testing.assert_allclose(images, expected_pixels(name, size), atol=1.0 if size < 105 else 0)


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_what_torchvision_fetched_is_found_by_its_name(tmp_path: Path, kind: str):
    write(tmp_path / "data" / "omniglot-py", "images_background", "folder")
    write(tmp_path / "data" / "omniglot-py", "images_evaluation", kind)
    expected = by_class(load(written(tmp_path / "other")))
    for root in (tmp_path / "data", tmp_path / "data" / "omniglot-py"):
        np.testing.assert_equal(by_class(load(root)), expected)


def test_rotations_of_the_classes_at_28_pixels_are_the_default(tmp_path: Path):
    base = load(written(tmp_path / "data"), image_size=28)
    splits = load_omniglot(tmp_path / "data", cache_dir=tmp_path / "cache")
    for part, plain in zip(parts(splits).values(), parts(base).values(), strict=True):
        assert part.checksum() == plain.with_rotations_as_classes().checksum()


def test_the_official_split_follows_the_two_parts_and_wrong_arguments_are_refused(tmp_path: Path):
    splits = load(written(tmp_path / "data"), split="official")
    assert (splits.train.class_names, splits.val, splits.test.class_names) == (BACKGROUND, None, EVALUATION)
    for wrong in ({"split": "lake"}, {"image_size": 0}):
        with pytest.raises(UsageError, match=f"expected {next(iter(wrong))}"):
            load(tmp_path / "data", **wrong)


def test_a_second_load_opens_nothing_and_a_size_is_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = load(written(tmp_path / "data"))
    with monkeypatch.context() as patch:
        patch.setattr(omniglot, "open_images", lambda _: pytest.fail("the source was opened"))
        for options in ({"split": "official"}, {"rotations": True}, {}):  # neither is part of what is cached
            again = load(tmp_path / "data", **options)
    np.testing.assert_equal(by_class(again), by_class(first))
    assert len(entries(tmp_path / "cache")) == 1
    assert load(tmp_path / "data", image_size=21).train.item_shape == (1, 21, 21)
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_changed_source_is_read_again_and_the_old_entry_removed(tmp_path: Path, kind: str):
    before = by_class(load(written(tmp_path / "data", kind)))
    blank = png(np.ones((105, 105), dtype=bool))
    write(tmp_path / "data", "images_background", kind, **{"Hebrew/character01/0002_00.png": blank})
    before["Hebrew/character01"][0] = 0
    np.testing.assert_equal(by_class(load(tmp_path / "data")), before)
    assert len(entries(tmp_path / "cache")) == 1


def test_a_missing_part_is_named_with_what_to_do(tmp_path: Path):
    for part in PARTS:
        with pytest.raises(MissingFileError, match=rf"Omniglot's {part}.zip or folder {part} in .*; .* download=True"):
            load(tmp_path / "data")
        write(tmp_path / "data", part)
    load(tmp_path / "data")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({DRAWING: b"broken"}, f"readable image at .*{DRAWING}, got .*"),
        ({DRAWING: None}, "of 2 drawings in .*, got 4 characters, 1 drawings of Kannada/character07; unpack"),
        ({"Kannada/character07/0002_09.png": b""}, "got 4 characters, 3 drawings of Kannada/character07; unpack"),
        ({DRAWING: None, DRAWING.replace("01.", "00."): None}, "of 2 drawings in .*, got 3 characters; unpack"),
    ],
)
def test_a_broken_part_is_named_and_keeps_the_good_entry(tmp_path: Path, changes: dict[str, bytes | None], words: str):
    load(written(tmp_path / "data"))
    good = entries(tmp_path / "cache")
    write(tmp_path / "data", "images_evaluation", **changes)
    with pytest.raises(UsageError, match=words):
        load(tmp_path / "data")
    assert entries(tmp_path / "cache") == good


def test_a_download_fetches_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fetch(root: str, background: bool, download: bool) -> None:
        asked.append((root, background, download))
        for kind in ("zip", "folder"):  # as torchvision does
            write(Path(root) / "omniglot-py", "images_evaluation", kind)

    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Omniglot=fetch))
    write(tmp_path / "data", "images_background", "folder")
    assert load(tmp_path / "data", download=True).test.class_names == ROLES["test"]
    load(tmp_path / "data")
    assert asked == [(str(tmp_path / "data"), False, True)]


@pytest.mark.slow
def test_the_real_set_has_the_classes_and_pixels_of_the_published_splits(tmp_path: Path):
    from torchvision.datasets import Omniglot

    assert Omniglot.folder == "omniglot-py"  # where torchvision puts the zips
    root = real_root("omniglot/images_evaluation.zip")
    splits = load_omniglot(root, cache_dir=tmp_path)
    assert [len(part.class_names) for part in parts(splits).values()] == [4112, 688, 1692]
    lists = root / "splits" / "omniglot_vinyals"
    for role, part in parts(splits).items():
        assert (torch.bincount(part.labels) == 20).all()
        assert 0.02 < part.images[:400].float().mean() / 255 < 0.2  # ink
        assert not lists.is_dir() or set(part.class_names) == set((lists / f"{role}.txt").read_text().split())
    splits = load_omniglot(root, cache_dir=tmp_path, split="official", rotations=False)
    assert (len(splits.train.class_names), splits.val, len(splits.test.class_names)) == (964, None, 659)
    for part, name in (("images_background", "Greek/character05"), ("images_evaluation", "Tibetan/character17")):
        with zipfile.ZipFile(root / "omniglot" / f"{part}.zip") as archive:
            members = sorted(m for m in archive.namelist() if f"/{name}/" in m and m.endswith(".png"))
            for image, member in zip(by_class(splits)[name], members, strict=True):
                drawing = Image.fromarray(np.asarray(Image.open(archive.open(member))).astype(np.uint8) * 255)
                small = drawing.resize((28, 28), Image.Resampling.BOX)  # as Pillow averages areas; paper is 255
                np.testing.assert_array_equal(image[0], 255 - np.asarray(small))
