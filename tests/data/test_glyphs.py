"""The built-in glyphs: how many, of which scripts, and how they are drawn."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path

from pml_fewshot.checks import MissingFileError
from pml_fewshot.data import glyphs
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.glyphs import load_glyphs
from tests.data.loading import parts

FONT_FOLDER = Path(get_data_path()) / "fonts" / "ttf"
Holders = dict[str, list[str]]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def few(cache_dir: Path) -> Splits:
    """The set with one drawing of each class instead of 20, for the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "DRAWINGS", 1)
        return load_glyphs(cache_dir=cache_dir)


@pytest.fixture(scope="module")
def holders() -> Holders:
    return glyphs._characters(glyphs._outlines(glyphs._find_faces(FONT_FOLDER)))[0]


def draw(holders: Holders, characters: str, seed: int) -> torch.Tensor:
    """(classes, drawings, 1, 28, 28), without the cache."""
    few = {character: holders[character] for character in characters}
    items = list(glyphs._drawings(few, glyphs._find_faces(FONT_FOLDER), seed))
    return torch.from_numpy(np.stack(items)).reshape(len(few), glyphs.DRAWINGS, 1, 28, 28)


def test_each_split_has_its_classes_scripts_and_note(few: Splits):
    assert {name: len(part.class_names) for name, part in parts(few).items()} == {"train": 884, "val": 120, "test": 303}
    scripts = [{name.split()[0] for name in part.class_names} for part in parts(few).values()]
    assert scripts == [{"LATIN", "CYRILLIC", "DIGIT"}, {"ARMENIAN", "GEORGIAN"}, {"GREEK"}]
    notes = [part.note for part in parts(few).values()]
    assert notes == ["", "1 look like a training class", "30 look like a training class"]
    for part in parts(few).values():
        assert part.images.dtype == torch.uint8
        assert part.images.shape == (len(part.class_names), 1, 28, 28)
        assert part.labels.tolist() == list(range(len(part.class_names)))


def test_classes_are_letters_and_digits_and_no_doubles(few: Splits, holders: Holders, monkeypatch: pytest.MonkeyPatch):
    names = [name for part in parts(few).values() for name in part.class_names]
    characters = [unicodedata.lookup(name) for name in names]
    assert {unicodedata.category(c) for c in characters} == {"Lu", "Ll", "Lt", "Lo", "Nd"}
    assert len({unicodedata.normalize("NFC", c) for c in characters}) == len(characters)
    assert not {"KELVIN SIGN", "MICRO SIGN", "OHM SIGN", "GREEK SMALL LETTER ALPHA WITH OXIA"} & set(names)
    assert {"DIGIT ZERO", "DIGIT NINE"} <= set(few.train.class_names)
    assert characters[:30] == list(holders)[:30]
    monkeypatch.setattr(glyphs, "DRAWINGS", 1)
    assert torch.equal(draw(holders, "".join(characters[:30]), seed=0)[:, 0], few.train.images[:30])


def test_ink_is_high_and_nothing_is_cut_off(few: Splits):
    for part in parts(few).values():
        inside = part.images[..., 1:-1, 1:-1]
        assert (inside.amax(dim=(1, 2, 3)) > 200).all()
        assert part.images.sum() == inside.sum()  # not a trace of ink on the border
        assert 0.05 < (part.images > 127).float().mean() < 0.35  # ink on ground, not ground on ink


def test_twins_have_the_same_outline_in_six_faces(holders: Holders):
    def alike(count: int, others: bytes = b"", faces: int = 12) -> dict[str, bytes]:
        return {f"face{number}": b"A" if number < count else others for number in range(faces)}

    latin = {"A": alike(12), "B": alike(6, b"?"), "C": alike(5, b"-")}
    greek = {"\u0391": alike(6, b"?"), "\u0392": alike(5, b"%"), "\u0393": alike(11, faces=11)}
    classes, twins = glyphs._characters(latin | greek)
    assert list(classes) == ["A", "C", "\u0391", "\u0392"]  # B is a twin of A, \u0393 in too few faces
    assert twins == {"train": 0, "val": 0, "test": 1}
    assert holders["A"] == list(glyphs.FACES)
    assert not set(holders["\N{LATIN CAPITAL LETTER A WITH GRAVE}"]) & set(glyphs.ASCII_FACES)  # there a Gamma


def test_a_letter_fills_most_of_the_frame(holders: Holders):
    capital, small = (draw(holders, "Oo", seed=0) > 64).any(dim=4).sum(dim=(2, 3)).float().mean(dim=1).tolist()
    assert capital > 18
    assert small < capital - 3  # so that the two are different classes


def test_each_face_is_used_before_any_is_used_again(holders: Holders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(glyphs, "_drawing", lambda font, *_: str(font.path))
    few = {character: holders[character] for character in "A\N{GEORGIAN LETTER AN}"}
    fonts = list(glyphs._drawings(few, glyphs._find_faces(FONT_FOLDER), seed=3))
    assert len(set(fonts[:20])) == 20  # 21 faces hold it
    assert len(set(fonts[20:32])) == 12  # 12 hold it: each once, then 8 of them again
    assert len(set(fonts[32:])) == 8


def test_the_seed_alone_decides_every_byte(holders: Holders):
    characters, state = "".join(holders)[:12], torch.get_rng_state()
    first, same, other = (draw(holders, characters, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same)
    assert (first != other).flatten(2).any(dim=2).all()
    for images in first.flatten(2):
        assert len(torch.unique(images, dim=0)) == 20  # no two drawings of a class are the same


def test_a_second_load_reads_the_cache(cache_dir: Path, monkeypatch: pytest.MonkeyPatch, few: Splits):
    monkeypatch.setattr(glyphs, "_read", lambda *_: pytest.fail("drawn again"))
    again = load_glyphs(cache_dir=str(cache_dir))
    for part, same in zip(parts(few).values(), parts(again).values(), strict=True):
        assert (part.class_names, part.note, part.checksum()) == (same.class_names, same.note, same.checksum())
    with pytest.raises(pytest.fail.Exception, match="drawn again"):  # another seed is another entry
        load_glyphs(seed=1, cache_dir=cache_dir)


def test_a_missing_typeface_is_named(tmp_path: Path):
    for face in set(glyphs.FACES) - {"cmr10"}:
        (tmp_path / f"{face}.ttf").touch()
    with pytest.raises(MissingFileError, match=r"expected matplotlib's 21 typefaces .*, got no cmr10\.ttf; install"):
        glyphs._find_faces(tmp_path)
