"""The built-in glyphs: how many, of which scripts, and how they are drawn. Drawn once here, in about 6 seconds."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path

from pml_fewshot.data import glyphs
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.data.glyphs import load_glyphs

FONT_FOLDER = Path(get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def splits(cache_dir: Path) -> Splits:
    return load_glyphs(cache_dir=cache_dir)


@pytest.fixture(scope="module")
def holders() -> dict[str, list[str]]:
    return glyphs._characters(glyphs._find_faces(FONT_FOLDER))


def all_three(splits: Splits) -> list[FewShotDataset]:
    assert splits.val is not None
    return [splits.train, splits.val, splits.test]


def draw(holders: dict[str, list[str]], characters: str, seed: int) -> torch.Tensor:
    """(classes, 20, 1, 28, 28), without the cache."""
    few = {character: holders[character] for character in characters}
    items = list(glyphs._drawings(few, glyphs._find_faces(FONT_FOLDER), seed))
    assert [label for _, label in items] == [c for c in range(len(few)) for _ in range(20)]
    return torch.from_numpy(np.stack([image for image, _ in items])).reshape(len(few), 20, 1, 28, 28)


def test_more_than_1300_classes_of_20_images(splits: Splits) -> None:
    assert [len(part.class_names) for part in all_three(splits)] == [884, 120, 303]  # 1,307 in all
    for part in all_three(splits):
        assert part.images.dtype == torch.uint8
        assert part.images.shape == (20 * len(part.class_names), 1, 28, 28)
        assert part.labels.bincount().tolist() == [20] * len(part.class_names)


def test_each_split_has_its_own_scripts(splits: Splits) -> None:
    scripts = [{name.split()[0] for name in part.class_names} for part in all_three(splits)]
    assert scripts == [{"LATIN", "CYRILLIC", "DIGIT"}, {"ARMENIAN", "GEORGIAN"}, {"GREEK"}]


def test_classes_are_letters_and_digits_and_no_doubles(splits: Splits) -> None:
    names = [name for part in all_three(splits) for name in part.class_names]
    characters = [unicodedata.lookup(name) for name in names]
    assert {unicodedata.category(c) for c in characters} == {"Lu", "Ll", "Lt", "Lo", "Nd"}
    assert len({unicodedata.normalize("NFC", c) for c in characters}) == len(characters)
    assert not {"KELVIN SIGN", "MICRO SIGN", "OHM SIGN", "GREEK SMALL LETTER ALPHA WITH OXIA"} & set(names)
    assert {f"DIGIT {digit}" for digit in ("ZERO", "ONE", "NINE")} <= set(splits.train.class_names)
    assert "GREEK SMALL LETTER ALPHA" in splits.test.class_names


def test_a_twin_in_the_same_split_is_left_out_and_one_in_another_split_kept(holders: dict[str, list[str]]) -> None:
    latin, cyrillic, greek = "A", "\N{CYRILLIC CAPITAL LETTER A}", "\N{GREEK CAPITAL LETTER ALPHA}"
    assert latin in holders
    assert cyrillic not in holders
    assert greek in holders


def test_faces_that_hold_a_class(holders: dict[str, list[str]]) -> None:
    assert min(len(faces) for faces in holders.values()) == 12
    assert holders["A"] == list(glyphs.FACES)
    assert not set(holders["\N{LATIN CAPITAL LETTER A WITH GRAVE}"]) & set(glyphs.ASCII_FACES)  # there a Gamma


def test_ink_is_high_and_nothing_is_cut_off(splits: Splits) -> None:
    for part in all_three(splits):
        inside = part.images[..., 1:-1, 1:-1]
        assert (inside.amax(dim=(1, 2, 3)) > 200).all()
        assert part.images.sum() == inside.sum()  # not a trace of ink on the border
        assert 0.05 < (part.images > 127).float().mean() < 0.35  # ink on ground, not ground on ink


def test_a_letter_fills_most_of_the_frame(holders: dict[str, list[str]]) -> None:
    capital, small = (draw(holders, "Oo", seed=0) > 64).any(dim=4).sum(dim=(2, 3)).float().mean(dim=1).tolist()
    assert capital > 18
    assert small < capital - 3  # so that the two are different classes


def test_the_images_of_a_class_differ(splits: Splits) -> None:
    for part in all_three(splits):
        for images in part.images.reshape(len(part.class_names), 20, -1):
            assert len(torch.unique(images, dim=0)) == 20


def test_each_face_is_used_before_any_is_used_again(
    holders: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fonts: list[str] = []

    def note_the_font(font: glyphs.ImageFont.FreeTypeFont, *_: object) -> np.ndarray:
        fonts.append(str(font.path))
        return np.zeros((1, 28, 28), dtype=np.uint8)

    monkeypatch.setattr(glyphs, "_drawing", note_the_font)
    few = {"A": holders["A"], "\N{GEORGIAN LETTER AN}": holders["\N{GEORGIAN LETTER AN}"]}
    list(glyphs._drawings(few, glyphs._find_faces(FONT_FOLDER), seed=3))
    assert len(set(fonts[:20])) == 20  # 21 faces hold it
    assert len(set(fonts[20:32])) == 12  # 12 hold it: each once, then 8 of them again
    assert len(set(fonts[32:])) == 8


def test_the_seed_decides_every_byte(splits: Splits, holders: dict[str, list[str]]) -> None:
    first = "".join(holders)[:30]
    same = draw(holders, first, seed=0)
    names = [unicodedata.name(character) for character in first]
    assert list(splits.train.class_names[:30]) == names
    assert torch.equal(same.flatten(0, 1), splits.train.images[:600])
    other = draw(holders, first, seed=1)
    assert (same != other).flatten(2).any(dim=2).all()


def test_the_global_generator_is_left_alone(holders: dict[str, list[str]]) -> None:
    before = torch.get_rng_state()
    draw(holders, "Ab1", seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_load_reads_the_cache(splits: Splits, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(glyphs, "_read", fail)
    again = load_glyphs(seed=0, cache_dir=str(cache_dir))
    for part, same in zip(all_three(splits), all_three(again), strict=True):
        assert part.class_names == same.class_names
        assert torch.equal(part.images, same.images)
        assert torch.equal(part.labels, same.labels)
    with pytest.raises(AssertionError, match="drawn again"):  # another seed is another entry
        load_glyphs(seed=1, cache_dir=cache_dir)


def test_a_missing_typeface_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fonts" / "ttf"
    folder.mkdir(parents=True)
    for face in set(glyphs.FACES) - {"cmr10"}:
        (folder / f"{face}.ttf").symlink_to(FONT_FOLDER / f"{face}.ttf")
    monkeypatch.setattr(glyphs, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected matplotlib's 21 typefaces .*, got no cmr10\.ttf; install"):
        load_glyphs(cache_dir=tmp_path / "cache")


def test_letters_that_look_like_a_training_letter_are_told(splits: Splits):
    train, val, test = all_three(splits)
    assert (train.note, val.note, test.note) == ("", "1 look like a training class", "30 look like a training class")


def test_twins_are_counted_by_their_outlines():
    same = {f"face{number}": b"A" for number in range(6)}
    few = dict(list(same.items())[:5])
    outlines = {"A": same, "\u0391": same, "\u0392": few, "\u0531": {"face0": b"other"}}  # Latin A, Greek A and B
    assert glyphs._twins_of_training(list(outlines), outlines) == {"test": 1}
