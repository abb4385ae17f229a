"""load_omniglot: made-up archives in every layout and state, and the real one where it is at hand."""

import os
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_fewshot.data import omniglot
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.data.omniglot import load_omniglot

# Character -> its two drawings: the made-up set has all roles of the Vinyals split.
BACKGROUND = ("Angelic/character01", "Angelic/character02", "Hebrew/character01")
EVALUATION = ("Gurmukhi/character41", "Gurmukhi/character42", "Kannada/character07", "Zzz/character01")
ROLES = {
    "train": ("Angelic/character01", "Angelic/character02", "Gurmukhi/character41", "Zzz/character01"),
    "val": ("Hebrew/character01",),
    "test": ("Gurmukhi/character42", "Kannada/character07"),
}
PARTS = {"images_background": BACKGROUND, "images_evaluation": EVALUATION}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    if "real" not in request.fixturenames:
        monkeypatch.setattr(omniglot, "PARTS", {part: len(characters) for part, characters in PARTS.items()})
        monkeypatch.setattr(omniglot, "DRAWINGS", 2)


def paper(part: str, character: str, drawing: int) -> np.ndarray:
    """(105, 105) bool: True is paper, False is ink, as in the real files; about one pixel of eight is ink."""
    number = 100 * list(PARTS).index(part) + 10 * PARTS[part].index(character) + drawing
    return np.random.default_rng(number).random((105, 105)) > 0.125


def png(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def files(part: str) -> dict[str, bytes]:
    """Name within the part -> content, in an order that is not the sorted one."""
    return {
        f"{character}/{i:04d}_{drawing:02d}.png": png(paper(part, character, drawing))
        for i, character in reversed(list(enumerate(PARTS[part])))
        for drawing in (1, 0)
    }


def write_zip(place: Path, part: str, content: dict[str, bytes] | None = None) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{part}/", "")
        archive.writestr(f"__MACOSX/{part}/Angelic/character01/._0000_00.png", "no picture")
        for name, data in (files(part) if content is None else content).items():
            archive.writestr(f"{part}/{name}", data)
    return place / f"{part}.zip"


def write_folder(place: Path, part: str) -> Path:
    for name, data in files(part).items():
        (place / part / name).parent.mkdir(parents=True, exist_ok=True)
        (place / part / name).write_bytes(data)
    return place / part


def zips(root: Path) -> Path:
    for part in PARTS:
        write_zip(root, part)
    return root


def load(root: Path, cache: Path, **options: object) -> Splits:
    options = {"image_size": 35, "rotations": False} | options
    return load_omniglot(root, cache_dir=cache, **options)  # type: ignore[arg-type]


def entries(cache: Path) -> list[str]:
    """Also hidden ones, but for the locks."""
    names = os.listdir(cache) if cache.exists() else []  # noqa: PTH208
    return sorted(name for name in names if not name.endswith("-lock"))


def parts(splits: Splits) -> dict[str, FewShotDataset]:
    return {name: part for name in ROLES if (part := getattr(splits, name)) is not None}


def images_of(part: FewShotDataset) -> dict[str, np.ndarray]:
    return {name: part.images[part.labels == c, 0].numpy() for c, name in enumerate(part.class_names)}


def all_images(splits: Splits) -> dict[str, np.ndarray]:
    return {name: images for part in parts(splits).values() for name, images in images_of(part).items()}


def expected_pixels(character: str, size: int) -> np.ndarray:
    """Drawings of a character with ink high, each pixel the mean of a square of the original."""
    part = next(part for part, characters in PARTS.items() if character in characters)
    block = 105 // size
    means = [paper(part, character, d).reshape(size, block, size, block).mean(axis=(1, 3)) for d in (0, 1)]
    return 255 - np.floor(255 * np.stack(means) + 0.5)


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "zips": zips,
    "zips in omniglot": lambda root: zips(root / "omniglot"),
    "folders": lambda root: [write_folder(root, part) for part in PARTS],
    "folders in omniglot": lambda root: [write_folder(root / "omniglot", part) for part in PARTS],
    "one of each": lambda root: (
        write_zip(root, "images_background"),
        write_folder(root / "omniglot", "images_evaluation"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pixels_and_classes(tmp_path: Path, layout: str):
    LAYOUTS[layout](tmp_path / "data")
    splits = load(tmp_path / "data", tmp_path / "cache")
    assert {role: part.class_names for role, part in parts(splits).items()} == ROLES
    for name, images in all_images(splits).items():
        np.testing.assert_allclose(images, expected_pixels(name, 35), atol=1.0)


def test_ink_is_high_and_a_full_size_image_is_the_drawing(tmp_path: Path):
    splits = load(zips(tmp_path / "data"), tmp_path / "cache", image_size=105)
    for name, images in all_images(splits).items():
        assert set(np.unique(images)) == {0, 255}
        np.testing.assert_array_equal(images, expected_pixels(name, 105))
        assert 0.1 < (images == 255).mean() < 0.15  # ink
    assert splits.train.images.dtype == torch.uint8
    assert splits.train.item_shape == (1, 105, 105)


def test_the_default_size_is_28_with_rotations(tmp_path: Path):
    splits = load_omniglot(zips(tmp_path / "data"), cache_dir=tmp_path / "cache")
    assert splits.train.item_shape == (1, 28, 28)
    assert [len(part.class_names) for part in parts(splits).values()] == [16, 4, 8]


def test_rotations_are_turns_of_the_base_classes(tmp_path: Path):
    zips(tmp_path / "data")
    base = all_images(load(tmp_path / "data", tmp_path / "cache"))
    turned = all_images(load(tmp_path / "data", tmp_path / "cache", rotations=True))
    assert len(turned) == 4 * len(base)
    for name, images in base.items():
        for r in range(4):
            np.testing.assert_array_equal(turned[f"{name}/rot{90 * r:03d}"], np.rot90(images, r, axes=(1, 2)))


def test_the_official_split_follows_the_two_parts(tmp_path: Path):
    splits = load(zips(tmp_path / "data"), tmp_path / "cache", split="official")
    assert splits.val is None
    assert splits.train.class_names == BACKGROUND
    assert splits.test.class_names == EVALUATION


def test_a_second_load_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    zips(tmp_path / "data")
    decode, calls = omniglot._drawing, []
    monkeypatch.setattr(omniglot, "_drawing", lambda *arguments: calls.append(1) or decode(*arguments))
    first = load(tmp_path / "data", tmp_path / "cache")
    assert len(calls) == 14
    monkeypatch.setattr(omniglot, "open_zip", lambda place: pytest.fail("the source was opened"))
    for options in ({}, {"split": "official"}, {"rotations": True}):  # neither is part of what is cached
        again = load(tmp_path / "data", tmp_path / "cache", **options)
    again = load(tmp_path / "data", tmp_path / "cache")
    assert len(calls) == 14
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(again.train.labels, first.train.labels)
    assert len(entries(tmp_path / "cache")) == 1


def test_another_size_is_another_entry(tmp_path: Path):
    zips(tmp_path / "data")
    load(tmp_path / "data", tmp_path / "cache")
    assert load(tmp_path / "data", tmp_path / "cache", image_size=21).train.item_shape == (1, 21, 21)
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize("layout", ["zips", "folders"])
def test_a_changed_source_is_read_again_and_the_old_entry_removed(tmp_path: Path, layout: str):
    root, cache = tmp_path / "data", tmp_path / "cache"
    LAYOUTS[layout](root)
    before, old_entries = all_images(load(root, cache)), entries(cache)
    blank = png(np.ones((105, 105), dtype=bool))
    content = files("images_background") | {"Hebrew/character01/0002_00.png": blank}
    if layout == "zips":
        write_zip(root, "images_background", content)
    else:
        (root / "images_background" / "Hebrew/character01/0002_00.png").write_bytes(blank)
    after = all_images(load(root, cache))
    assert not after["Hebrew/character01"][0].any()
    np.testing.assert_array_equal(after["Hebrew/character01"][1], before["Hebrew/character01"][1])
    np.testing.assert_array_equal(after["Zzz/character01"], before["Zzz/character01"])
    assert len(entries(cache)) == 1
    assert entries(cache) != old_entries


def fails_and_leaves_nothing(root: Path, cache: Path, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load(root, cache)
    assert entries(cache) == []


def test_a_missing_part_is_named_with_what_to_do(tmp_path: Path):
    cache = tmp_path / "cache"
    words = r"expected Omniglot's {}.zip or folder {} in .*; name another root .*, or pass download=True"
    wanted = words.format("images_background", "images_background")
    fails_and_leaves_nothing(tmp_path / "nowhere", cache, FileNotFoundError, wanted)
    write_zip(tmp_path / "data", "images_background")
    wanted = words.format("images_evaluation", "images_evaluation")
    fails_and_leaves_nothing(tmp_path / "data", cache, FileNotFoundError, wanted)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_cut_zip_is_named(tmp_path: Path, keep: float):
    place = zips(tmp_path / "data") / "images_evaluation.zip"
    content = place.read_bytes()
    place.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    words = r"expected a whole zip file at .*images_evaluation.zip, got a broken one .*; delete it and fetch it again"
    fails_and_leaves_nothing(tmp_path / "data", tmp_path / "cache", ValueError, words)


def damaged_zip(place: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    """Damages the compressed bytes of one member in place."""
    with zipfile.ZipFile(place) as archive:
        info = archive.getinfo(name)
    content = place.read_bytes()
    start = info.header_offset + 30 + len(info.filename.encode())
    end = start + info.compress_size
    damaged = damage(content[start:end])
    assert len(damaged) == end - start
    assert damaged != content[start:end]
    place.write_bytes(content[:start] + damaged + content[end:])


DRAWING = "Kannada/character07/0002_01.png"


def test_a_drawing_with_a_wrong_checksum_is_named(tmp_path: Path):
    place = zips(tmp_path / "data") / "images_evaluation.zip"
    damaged_zip(place, f"images_evaluation/{DRAWING}", lambda data: data[:-40] + b"\0" * 40)
    fails_and_leaves_nothing(tmp_path / "data", tmp_path / "cache", ValueError, f"expected a drawing at .*{DRAWING}")


def test_a_drawing_whose_compressed_bytes_are_broken_is_named(tmp_path: Path):
    place = zips(tmp_path / "data") / "images_evaluation.zip"
    damaged_zip(place, f"images_evaluation/{DRAWING}", lambda data: b"\xff" + data[1:])  # no such block type
    fails_and_leaves_nothing(tmp_path / "data", tmp_path / "cache", ValueError, f"expected a drawing at .*{DRAWING}")


@pytest.mark.parametrize("keep", [0, 4, 20, 60, 300])
@pytest.mark.parametrize("layout", ["zips", "folders"])
def test_a_cut_drawing_is_named(tmp_path: Path, layout: str, keep: int):
    root, cut = tmp_path / "data", files("images_evaluation")[DRAWING][:keep]
    LAYOUTS[layout](root)
    if layout == "zips":
        write_zip(root, "images_evaluation", files("images_evaluation") | {DRAWING: cut})
    else:
        (root / "images_evaluation" / DRAWING).write_bytes(cut)
    words = f"expected a drawing at .*{DRAWING} in .*, got something unreadable .*; fetch the file again"
    fails_and_leaves_nothing(root, tmp_path / "cache", ValueError, words)


def test_a_failure_keeps_the_good_entry_of_before(tmp_path: Path):
    root, cache = zips(tmp_path / "data"), tmp_path / "cache"
    load(root, cache)
    good = entries(cache)
    write_zip(root, "images_evaluation", files("images_evaluation") | {DRAWING: b"broken"})
    with pytest.raises(ValueError, match="expected a drawing"):
        load(root, cache)
    assert entries(cache) == good


def test_another_number_of_characters_or_drawings_is_told(tmp_path: Path):
    root, cache = zips(tmp_path / "data"), tmp_path / "cache"
    whole = files("images_evaluation")
    write_zip(root, "images_evaluation", {n: data for n, data in whole.items() if not n.startswith("Kannada")})
    fails_and_leaves_nothing(root, cache, ValueError, "expected 4 characters of 2 drawings in .*, got 3 characters;")
    write_zip(root, "images_evaluation", {n: data for n, data in whole.items() if n != DRAWING})
    words = "got 4 characters, Kannada/character07 with another number of drawings; unpack or fetch the file again"
    fails_and_leaves_nothing(root, cache, ValueError, words)
    write_zip(root, "images_evaluation", whole | {"Kannada/character07/0002_09.png": whole[DRAWING]})
    fails_and_leaves_nothing(root, cache, ValueError, words)
    write_zip(root, "images_evaluation", {})
    fails_and_leaves_nothing(root, cache, ValueError, "got 0 characters;")


def test_wrong_arguments_are_refused(tmp_path: Path):
    for wrong in (0, 28.0, True):
        with pytest.raises(ValueError, match="expected image_size to be an integer of at least 1"):
            load(tmp_path, tmp_path, image_size=wrong)
    with pytest.raises(
        ValueError, match="expected split as one of 'vinyals', 'official', got 'lake'; choose one of them"
    ):
        load(tmp_path, tmp_path, split="lake")


def test_a_download_fetches_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision.datasets import utils

    root, calls = tmp_path / "data", []
    write_folder(root, "images_background")

    def fetch(url: str, folder: str, filename: str | None = None, md5: str | None = None) -> None:
        calls.append((url, md5))
        write_zip(Path(folder), "images_evaluation")

    monkeypatch.setattr(utils, "download_url", fetch)
    splits = load(root, tmp_path / "cache", download=True)
    load(root, tmp_path / "cache", download=True)
    assert calls == [
        (f"{omniglot.OFFICIAL_URL}/images_evaluation.zip", omniglot.OFFICIAL_MD5["images_evaluation"]),
    ]
    assert splits.test.class_names == ROLES["test"]


def real_root() -> Path:
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    root = Path(os.environ.get("PML_FEWSHOT_DATA", beside))
    if not (root / "omniglot" / "images_evaluation.zip").is_file():
        pytest.skip(f"no omniglot/images_evaluation.zip in {root}; set PML_FEWSHOT_DATA to the data folder")
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return real_root(), tmp_path_factory.mktemp("cache")


def test_the_real_set_has_the_classes_and_pixels_of_the_vinyals_split(real: tuple[Path, Path]):
    root, cache = real
    splits = load_omniglot(root, cache_dir=cache)
    assert [len(part.class_names) for part in parts(splits).values()] == [4112, 688, 1692]
    for part in parts(splits).values():
        assert (torch.bincount(part.labels) == 20).all()
        ink = part.images[:400].float().mean() / 255
        assert 0.02 < ink < 0.2
    lists = root / "splits" / "omniglot_vinyals"
    if lists.is_dir():
        for role, part in parts(splits).items():
            assert set(part.class_names) == set((lists / f"{role}.txt").read_text().split())


def test_a_known_real_drawing_equals_pillows_reading(real: tuple[Path, Path]):
    root, cache = real
    splits = load_omniglot(root, cache_dir=cache, split="official", rotations=False)
    assert splits.val is None
    assert (len(splits.train.class_names), len(splits.test.class_names)) == (964, 659)
    for part, archive_name, name in (
        (splits.train, "images_background", "Greek/character05"),
        (splits.test, "images_evaluation", "Tibetan/character17"),
    ):
        images = part.images[part.labels == part.class_names.index(name), 0].numpy()
        with zipfile.ZipFile(root / "omniglot" / f"{archive_name}.zip") as archive:
            members = sorted(m for m in archive.namelist() if f"/{name}/" in m and m.endswith(".png"))
            assert len(members) == 20
            for image, member in zip(images, members, strict=True):
                with archive.open(member) as file:
                    drawing = np.asarray(Image.open(file)).astype(np.float64)  # 1 is paper
                assert drawing.shape == (105, 105)
                # the mean over 3.75 x 3.75 pixels, each by the share of it inside: Pillow's filter weighs the
                # edges otherwise, so a pixel of the border counts by up to half of itself
                weights = np.clip(
                    np.minimum.outer(np.arange(1, 29) * 3.75, np.arange(1, 106))
                    - np.maximum.outer(np.arange(28) * 3.75, np.arange(105)),
                    0,
                    1,
                )
                exact = 255 * weights @ (1 - drawing) @ weights.T / 3.75**2
                assert np.abs(image - exact).mean() < 8
                assert np.corrcoef(image.flatten(), exact.flatten())[0, 1] > 0.98
                pillow = Image.fromarray((drawing * 255).astype(np.uint8)).resize((28, 28), Image.Resampling.BOX)
                np.testing.assert_array_equal(image, 255 - np.asarray(pillow))


@pytest.mark.parametrize("error", [RuntimeError("File not found or corrupted."), OSError("no route")])
def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fails(url: str, root: str, md5: str) -> None:
        (Path(root) / url.split("/")[-1]).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fails)
    with pytest.raises(ConnectionError, match=r"expected images_background.zip with md5 .* got .*; fetch it by hand"):
        load_omniglot(tmp_path / "new", download=True, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "new").iterdir()) == []
