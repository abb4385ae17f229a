"""TaughtSet and its files: the answers are FewShotClassifier's, whatever comes, goes, and is saved in between."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pml_fewshot import FewShotClassifier
from pml_fewshot.app.drawings import InkPreprocessing, NoInkError, glyph_embedder
from pml_fewshot.app.pictures import Picture, PictureEmbedder, encoded
from pml_fewshot.app.saved_sets import SavedSets
from pml_fewshot.app.taught_set import TaughtSet, TooMuchError, UnknownExampleError
from pml_fewshot.checks import ExistingFileError, MissingFileError, UsageError
from pml_fewshot.io.atomic import CannotWriteError
from pml_fewshot.io.tensors import CHECKSUM, checksum, read_tensors, write_tensors

DOT = encoded(Image.new("L", (4, 4)))


def rows_near(center: Sequence[float], number: int, seed: int = 0) -> list[np.ndarray]:
    noise = np.random.default_rng(seed).normal(scale=0.05, size=(number, len(center)))
    return list((np.array(center) + noise).astype(np.float32))


CENTERS = {"ant": (1, 0, 0), "bee": (0, 1, 0), "cat": (0, 0, 1)}
ANTS, BEES, CATS = (rows_near(center, 3, seed) for seed, center in enumerate(CENTERS.values()))
FAR = np.array([-1, -1, -1], np.float32)


def add(taught: TaughtSet, label: str, rows: Sequence[np.ndarray]) -> list[int]:
    return taught.add(label, [DOT] * len(rows), rows)


def three_classes() -> TaughtSet:
    taught = TaughtSet()
    for name, rows in (("ant", ANTS), ("bee", BEES), ("cat", CATS)):
        add(taught, name, rows)
    return taught


def drawing(shape: str, size: int = 200, width: int = 9, ink: int = 0, paper: int = 255) -> bytes:
    """A drawing as a canvas sends it."""
    image = Image.new("RGB", (320, 320), (paper,) * 3)
    box = (40, 60, 40 + size, 60 + size)
    pen = ImageDraw.Draw(image)
    if shape == "ring":
        pen.ellipse(box, outline=(ink,) * 3, width=width)
    elif shape == "cross":
        pen.line((box[0], box[1], box[2], box[3]), (ink,) * 3, width)
        pen.line((box[0], box[3], box[2], box[1]), (ink,) * 3, width)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def glyphs() -> PictureEmbedder:
    return PictureEmbedder.of("glyphs")


def test_answers_are_those_of_the_classifier() -> None:
    taught = three_classes()
    labels = [name for name in CENTERS for _ in range(3)]
    classifier = FewShotClassifier(reject="auto").fit(np.stack([*ANTS, *BEES, *CATS]), labels)
    query = rows_near(CENTERS["bee"], 1, seed=9)
    answer = taught.answer(query[0])
    assert answer["label"] == classifier.predict(query)[0] == "bee"
    found = {each["name"]: each["probability"] for each in answer["classes"]}
    assert [found[name] for name in classifier.classes_] == classifier.predict_proba(query)[0].tolist()
    assert answer["similarity"] == pytest.approx(classifier.similarity(query)[0])
    assert answer["threshold"] == classifier.threshold_
    assert [each["similarity"] for each in answer["nearest"]] == classifier.nearest(query, 5).distances[0].tolist()
    assert {each["name"] for each in answer["nearest"][:3]} == {"bee"}
    assert {each["example"] for each in answer["nearest"][:3]} == {4, 5, 6}
    assert taught.answer(FAR)["label"] is None
    assert taught.answer(FAR)["rejected"]


def test_examples_are_corrected_renamed_merged_and_removed() -> None:
    taught = three_classes()
    wrong = add(taught, "bee", rows_near(CENTERS["ant"], 1, seed=7))[0]
    taught.move(wrong, "ant")
    assert {name: len(own) for name, own in taught.known.classes.items()} == {"ant": 4, "bee": 3, "cat": 3}
    taught.remove(wrong)
    taught.rename("bee", "  wasp ")
    assert taught.answer(BEES[0])["label"] == "wasp"
    taught.rename("wasp", "cat")
    assert {name: len(own) for name, own in taught.known.classes.items()} == {"ant": 3, "cat": 6}
    taught.remove_class("cat")
    assert list(taught.known.classes) == ["ant"]
    for missing in (lambda: taught.remove(99), lambda: taught.move(99, "ant"), lambda: taught.remove_class("cat")):
        with pytest.raises(UnknownExampleError, match="load the page again"):
            missing()
    for example in taught.known.examples:
        taught.remove(example.number)
    with pytest.raises(UsageError, match="teach one first"):
        taught.answer(FAR)


def test_what_is_missing_is_said_and_never_an_error() -> None:
    taught = TaughtSet()
    assert "Teach a first class" in taught.known.advice[0]
    add(taught, "ant", ANTS[:1])
    assert taught.answer(FAR)["label"] == "ant"  # nothing can be rejected yet
    assert taught.answer(FAR)["threshold"] is None
    assert [text.split(":")[0][:20] for text in taught.known.advice] == ["Teach a second class", "Give a class two dif"]
    add(taught, "ant", ANTS[:1])  # the same once more is no second example
    assert any("twice in a class" in text for text in taught.known.advice)
    assert taught.answer(FAR)["threshold"] is None
    add(taught, "bee", ANTS[:1])
    assert any("in “ant” and in “bee”" in text for text in taught.known.advice)
    taught.remove_class("bee")
    add(taught, "ant", ANTS[1:])
    assert taught.answer(ANTS[0] * 1.01)["label"] == "ant"
    assert taught.answer(FAR)["rejected"]
    add(taught, "bee", BEES)
    assert taught.known.advice == ("Pictures that are twice in a class count once (1 here): give different ones.",)


@pytest.mark.parametrize("name", ["", "  ", "\u200b\u200e", "\u202e", "x" * 201, "a\0b", "a\ud800", None, 7])
def test_names_that_are_none_are_refused(name: object) -> None:
    with pytest.raises(UsageError, match=r"^expected a name"):
        TaughtSet().add(name, [DOT], ANTS[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x" * 200, "<b>&amp;", "שלום", "unknown", "日本", "../..", "None", "e\u0301"])
def test_names_of_any_writing_are_taken(name: str) -> None:
    taught = TaughtSet()
    add(taught, name, ANTS)
    add(taught, "other", BEES)
    assert taught.answer(ANTS[0])["label"] == name.replace("e\u0301", "é")


def test_marks_that_turn_text_around_are_no_part_of_a_name() -> None:
    taught = TaughtSet()
    add(taught, "\u202eant\u200b", ANTS)
    assert list(taught.known.classes) == ["ant"]


def test_no_more_than_so_many_examples() -> None:
    taught = TaughtSet(most_examples=4)
    add(taught, "ant", ANTS)
    with pytest.raises(TooMuchError, match="at most 4 examples, got 3 and 3 more"):
        add(taught, "bee", BEES)
    assert len(taught.known.examples) == 3


def test_a_drawing_is_seen_alike_in_any_size_place_stroke_and_polarity() -> None:
    see = InkPreprocessing()
    ways = {"small": (120, 8), "thick": (200, 18), "white on black": (200, 9, 255, 0), "pale": (220, 9, 90, 190)}
    ring = see(Image.open(BytesIO(drawing("ring")))).astype(float)
    cross = see(Image.open(BytesIO(drawing("cross")))).astype(float)
    assert ring.shape == (1, 28, 28)
    for name, how in ways.items():
        other = see(Image.open(BytesIO(drawing("ring", *how))))
        assert np.abs(other - ring).mean() < 0.5 * np.abs(other - cross).mean(), name
    with pytest.raises(NoInkError, match="draw first"):
        see(Image.open(BytesIO(drawing("nothing"))))
    for odd in (Image.new("L", (1, 1)), Image.new("RGB", (900, 1)), Image.linear_gradient("L")):
        with suppress(NoInkError):
            assert see(odd).shape == (1, 28, 28)
    line = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(line).line((10, 150, 290, 150), 0, 1)
    assert see(line).max() > 100


def taught_by_drawings(glyphs: PictureEmbedder, *names: str) -> TaughtSet:
    taught = TaughtSet()
    for name, shape in zip(names, ("ring", "cross"), strict=True):
        pictures = [glyphs.picture(drawing(shape, size), "d") for size in (200, 150, 100)]
        taught.add(name, pictures, [glyphs(each) for each in pictures])
    return taught


def test_a_saved_set_gives_the_same_answers_and_is_a_folder_of_classes(glyphs: PictureEmbedder, tmp_path: Path) -> None:
    taught = taught_by_drawings(glyphs, "ring", "a/b: <x>")
    sets = SavedSets(tmp_path, glyphs)
    assert sets.save("my set", taught.known) == "my set"
    again = TaughtSet()
    labels, pictures, embeddings, name = SavedSets(tmp_path, PictureEmbedder.of("glyphs")).load("my set")
    assert name == "my set"
    again.replace(labels, pictures, embeddings)
    asked = glyphs.picture(drawing("ring", 170), "d")
    query = glyphs(asked)
    assert {**again.answer(query), "version": 0} == {**taught.answer(query), "version": 0}
    for old, new in zip(taught.known.examples, again.known.examples, strict=True):
        assert np.array_equal(old.embedding, new.embedding)
        assert np.array_equal(glyphs(new.picture), new.embedding)
    classifier = FewShotClassifier(glyph_embedder(), reject="auto").fit_folder(tmp_path / "my set/pictures")
    assert classifier.classes_.tolist() == ["class-2", "ring"]
    (tmp_path / "new.png").write_bytes(asked.content)
    expected = {each["name"]: each["probability"] for each in again.answer(query)["classes"]}
    found = classifier.predict_proba([tmp_path / "new.png"])[0]
    assert found == pytest.approx([expected["a/b: <x>"], expected["ring"]], abs=1e-5)


def test_a_set_is_replaced_only_when_asked_and_comes_back_after_a_kill(glyphs: PictureEmbedder, tmp_path: Path) -> None:
    sets, taught = SavedSets(tmp_path, glyphs), taught_by_drawings(glyphs, "ring", "cross")
    sets.save("one", taught.known)
    with pytest.raises(ExistingFileError, match="'one', which is there"):
        sets.save("one", taught.known)
    taught.remove_class("cross")
    sets.save("one", taught.known, replace=True)
    assert set(sets.load("one").labels) == {"ring"}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    (tmp_path / "one").rename(tmp_path / ".one.old")  # as a kill between the two renames leaves it
    (tmp_path / ".one.tmp").mkdir()
    assert sets.names() == ["one"]
    assert len(sets.load("one").labels) == 3
    sets.delete("one")
    assert sets.names() == []
    with pytest.raises(MissingFileError, match="none named 'one'"):
        sets.load("one")


def test_a_full_disk_leaves_the_old_set(
    glyphs: PictureEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, taught = SavedSets(tmp_path, glyphs), taught_by_drawings(glyphs, "ring", "cross")
    sets.save("one", taught.known)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CannotWriteError, match="No space left"):
            sets.save("one", taught.known, replace=True)
    assert len(sets.load("one").labels) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_names_of_sets_stay_in_the_folder(glyphs: PictureEmbedder, tmp_path: Path) -> None:
    sets, known = SavedSets(tmp_path / "sets", glyphs), taught_by_drawings(glyphs, "ring", "cross").known
    for name in ("../x", "/etc", "a/b", "..", ".hidden", "a\\b", "con", "", "x" * 81, "a:b", "x."):
        for action in (sets.load, sets.delete, partial(sets.save, known=known)):
            with pytest.raises(UsageError, match=r"^expected a "):
                action(name)
    assert list(tmp_path.iterdir()) == []


def test_damage_and_manifests_that_lead_elsewhere_are_refused(glyphs: PictureEmbedder, tmp_path: Path) -> None:
    sets, known = SavedSets(tmp_path, glyphs), taught_by_drawings(glyphs, "ring", "cross").known
    secret = tmp_path / "secret.png"
    secret.write_bytes(DOT.content)

    def forged(file: str) -> None:
        about = json.loads((tmp_path / "one/set.json").read_text())
        about.pop(CHECKSUM)
        about["classes"][0]["files"][0] = file
        about["classes"][0]["checksums"][0] = checksum([DOT.content])
        seal = checksum([json.dumps(about, sort_keys=True).encode()])
        (tmp_path / "one/set.json").write_text(json.dumps({**about, CHECKSUM: seal}))

    def rows(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Other embeddings, in a file that is whole."""
        path = tmp_path / "one/examples.safetensors"
        write_tensors(path, {"embeddings": change(read_tensors(path)[0]["embeddings"]).contiguous()})

    picture = tmp_path / "one/pictures/ring/0001.png"
    damages = [
        lambda: rows(lambda each: each.flip(0)),  # of other pictures
        lambda: rows(lambda each: each[:, :3]),
        lambda: rows(lambda each: each[0]),
        lambda: rows(lambda each: each * torch.nan),
        lambda: (tmp_path / "one/set.json").write_text("[" * 200_000),
        lambda: picture.write_bytes(picture.read_bytes()[:-9]),
        lambda: picture.unlink(),
        lambda: (tmp_path / "one/set.json").write_text("{}"),
        lambda: (tmp_path / "one/examples.safetensors").write_bytes(b"x"),
        lambda: (tmp_path / "one/examples.safetensors").unlink(),
        lambda: forged("../secret.png"),
        lambda: forged("pictures/../../secret.png"),
        lambda: forged(str(secret)),
        lambda: (picture.unlink(), picture.symlink_to(secret), forged("pictures/ring/0001.png")),
    ]
    for damage in damages:
        sets.save("one", known, replace=True)
        damage()
        with pytest.raises(UsageError, match=r"damaged|broken|no such file"):
            sets.load("one")


def test_a_set_of_another_embedder_is_refused_by_name(glyphs: PictureEmbedder, tmp_path: Path) -> None:
    SavedSets(tmp_path, glyphs).save("one", taught_by_drawings(glyphs, "ring", "cross").known)
    other = PictureEmbedder("timm/resnet18", glyph_embedder())
    other.fingerprint = "other"
    with pytest.raises(UsageError, match=r"with timm/resnet18, got 'one' with glyphs; .* --embedder glyphs"):
        SavedSets(tmp_path, other).load("one")


def test_photos_are_kept_small_and_drawings_without_loss(glyphs: PictureEmbedder) -> None:
    photo = BytesIO()
    Image.effect_noise((1600, 1200), 80).save(photo, "JPEG", exif=b"")
    kept = glyphs.picture(photo.getvalue(), "photo.jpg")
    assert kept.suffix == ".jpg"
    assert Image.open(BytesIO(kept.content)).size == (512, 384)
    assert glyphs.picture(drawing("ring"), "d") == Picture(glyphs.picture(drawing("ring"), "d").content, ".png")
    assert np.array_equal(
        Image.open(BytesIO(glyphs.picture(drawing("ring"), "d").content)).convert("L"),
        Image.open(BytesIO(drawing("ring"))).convert("L"),
    )
