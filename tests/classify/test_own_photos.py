"""A classifier of photos in files: folders, bad input, saving and loading, leave-one-out, and the command."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pml_fewshot import Embedder, FewShotClassifier, ImageEmbedder, Preprocessing, UsageError, leave_one_out
from pml_fewshot.checks import MissingFileError
from pml_fewshot.classify import command
from pml_fewshot.data.images import BrokenImageError
from pml_fewshot.evaluation.heads import nearest_neighbour

NAMES = ["ant", "bee", "cat", "dog"]


class Colors(nn.Module):
    """Mean color, with a weight, of images of 8 x 8."""

    preprocessing = Preprocessing((8, 8), 8)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), weight))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) * self.weight


def photo(number: int, seed: int) -> Image.Image:
    """A noisy picture of a color of its class."""
    rng = np.random.default_rng(seed)
    color = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [10, 10, 10]])[number]
    return Image.fromarray((color + rng.integers(-20, 21, (20 + seed % 5, 30, 3))).clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folders known (2 to 5 photos a class) and new (3 a class)."""
    for folder, counts, start in (("known", (2, 3, 4, 5), 0), ("new", (3, 3, 3, 3), 50)):
        for number, count in enumerate(counts):
            place = tmp_path / folder / NAMES[number]
            place.mkdir(parents=True)
            for each in range(count):
                photo(number, 10 * number + each + start).save(place / f"{each}.png")
    return tmp_path


def files_of(folder: Path) -> tuple[list[Path], list[str]]:
    files = sorted(folder.rglob("*.png"))
    return files, [path.parent.name for path in files]


def test_a_folder_and_its_zip_teach_what_its_files_do(photos: Path):
    classifier = FewShotClassifier(Colors(), reject="auto").fit_folder(photos / "known")
    new, truth = files_of(photos / "new")
    assert classifier.predict(new).tolist() == truth
    assert classifier.score(new, truth) == 1
    with zipfile.ZipFile(photos / "known.zip", "w") as archive:
        for path in (photos / "known").rglob("*.png"):
            archive.write(path, path.relative_to(photos / "known"))
    others = [
        FewShotClassifier(Colors(), reject="auto").fit_folder(photos / "known.zip"),
        FewShotClassifier(ImageEmbedder(Colors(), batch_size=1), reject="auto").fit(*files_of(photos / "known")),
        FewShotClassifier(Embedder(Colors()), reject="auto").fit(
            [Image.open(path) for path in files_of(photos / "known")[0]], files_of(photos / "known")[1]
        ),
    ]
    for other in others:
        assert np.allclose(other.similarity(new), classifier.similarity(new), atol=1e-6)
    assert others[0].sources_[0].startswith(f"{photos / 'known.zip'}/ant/")
    assert classifier.predict(path for path in new).tolist() == truth
    black = photo(4, 1)  # one alone, of no class
    assert classifier.predict(black).tolist() == ["unknown"]
    assert classifier.predict(new[0]).tolist() == ["ant"]
    answer = classifier.answer(new[0])[0]
    assert (answer.label, answer.nearest_label, Path(answer.nearest).parent.name) == ("ant", "ant", "ant")


def test_bad_photos_are_one_error_and_what_was_taught_stays(photos: Path):
    classifier = FewShotClassifier(Colors()).fit_folder(photos / "known")
    new, truth = files_of(photos / "new")
    (photos / "known" / "ant" / "text.jpg").write_text("no image")
    (photos / "known" / "elk").mkdir()
    with (
        pytest.warns(UserWarning, match="1 folders without an image: elk"),
        pytest.raises(BrokenImageError, match=r"text\.jpg"),
    ):
        classifier.fit_folder(photos / "known")
    with pytest.raises(MissingFileError, match=r"none\.png"):
        classifier.partial_fit([photos / "none.png"], ["ant"])
    (photos / "empty").mkdir()
    with pytest.raises(UsageError, match="expected images in class folders"):
        classifier.fit_folder(photos / "empty")
    assert classifier.predict(new).tolist() == truth
    with pytest.warns(UserWarning, match=r"in classes 'ant' and 'cat' \(.*0\.png and .*0\.png\)"):
        classifier.partial_fit([photos / "known" / "ant" / "0.png"], ["cat"])


def test_turned_and_strange_photos_are_read_alike(photos: Path):
    classifier = FewShotClassifier(Colors()).fit_folder(photos / "known")
    turned, exif = photo(1, 3), Image.Exif()
    exif[0x0112] = 6
    turned.save(photos / "turned.jpg", exif=exif, quality=95)
    turned.convert("CMYK").save(photos / "cmyk.jpg")
    turned.convert("P").save(photos / "palette.png")
    turned.convert("RGBA").save(photos / "alpha.png")
    asked: list[Any] = [photos / name for name in ("turned.jpg", "cmyk.jpg", "palette.png", "alpha.png")]
    asked += [np.asarray(turned), torch.from_numpy(np.array(turned)).permute(2, 0, 1), turned]
    assert classifier.predict(asked).tolist() == ["bee"] * len(asked)


def test_one_class_and_one_photo_a_class_work(photos: Path):
    new, truth = files_of(photos / "new")
    single = FewShotClassifier(Colors()).fit([new[0], new[3], new[6], new[9]], NAMES)
    assert single.predict(new).tolist() == truth
    only = FewShotClassifier(Colors()).fit(new[:3], ["ant"] * 3)
    assert set(only.predict(new)) == {"ant"}
    with pytest.raises(UsageError, match="two classes or more"):
        leave_one_out(only)


@pytest.mark.parametrize("labels", [NAMES, [3, 1, 4, 2]], ids=["texts", "numbers"])
def test_saved_is_loaded_as_it_was(photos: Path, labels: Any):
    new, truth = files_of(photos / "new")
    names = [labels[NAMES.index(each)] for each in truth]
    classifier = FewShotClassifier(Colors(2.0), nearest_neighbour, reject="auto", false_rejections=0.1)
    classifier.fit(new, names)
    classifier.save(photos / "saved")
    again = FewShotClassifier.load(photos / "saved", Colors(2.0))
    assert again.get_params(deep=False).keys() == classifier.get_params(deep=False).keys()
    assert (again.head, again.reject, again.false_rejections) == (nearest_neighbour, "auto", 0.1)
    assert again.classes_.dtype == classifier.classes_.dtype
    assert again.sources_ == classifier.sources_
    assert (again.predict_proba(new) == classifier.predict_proba(new)).all()
    assert again.predict(new).tolist() == classifier.predict(new).tolist()
    again.set_params(reject=0.9).save(photos / "other")  # which counts from the next teaching on, and is not saved yet
    assert FewShotClassifier.load(photos / "other", Colors(2.0)).reject == "auto"
    again.set_params(reject="auto")
    before = sorted(path.name for path in (photos / "saved").iterdir())
    again.partial_fit([photo(4, 1)], ["elk"] if isinstance(names[0], str) else [9])
    (photos / "saved" / "embedder-mine.safetensors").write_text("of the user")
    again.save(photos / "saved")  # over the first
    (photos / "saved" / "embedder-mine.safetensors").unlink()
    after = sorted(path.name for path in (photos / "saved").iterdir())
    assert len(before) == len(after) == 3
    assert len(set(before) & set(after)) == 2  # the embedder's file is the same
    assert len(FewShotClassifier.load(photos / "saved", Colors(2.0)).classes_) == 5
    damaged = next((photos / "saved").glob("examples-*"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(UsageError, match="broken"):
        FewShotClassifier.load(photos / "saved", Colors(2.0))
    again.set_params(reject=again.similarity(new).min()).fit(new, names).save(photos / "saved")  # which repairs it
    assert FewShotClassifier.load(photos / "saved", Colors(2.0)).threshold_ == pytest.approx(again.threshold_)


def test_what_does_not_belong_to_a_saved_classifier_is_refused(photos: Path):
    new, truth = files_of(photos / "new")
    FewShotClassifier(Embedder(Colors()), head=lambda s, q, d: q @ s.mean(2).mT).fit(new, truth).save(photos / "saved")
    for given, message in [
        ({}, r"expected an embedder for the classifier.*Embedder\(Colors\).*embedder="),
        (
            {"embedder": Embedder(Colors(2.0))},
            r"Embedder\(Colors\), the embedder.*got Embedder\(Colors\) with other",
        ),
        ({"embedder": nn.Linear(2, 2)}, r"expected Embedder\(Colors\).*got Linear"),
        ({"embedder": Embedder(Colors())}, r"expected a head of this library.*head="),
    ]:
        with pytest.raises(UsageError, match=message):
            FewShotClassifier.load(photos / "saved", **given)
    FewShotClassifier.load(photos / "saved", Embedder(Colors()), head=nearest_neighbour).predict(new)
    with pytest.raises(MissingFileError, match=r"expected classifier\.json"):
        FewShotClassifier.load(photos)
    about = photos / "saved" / "classifier.json"
    about.write_text(about.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(UsageError, match="damaged"):
        FewShotClassifier.load(photos / "saved", Embedder(Colors()), head=nearest_neighbour)


def test_loading_draws_nothing_from_the_callers_generator(photos: Path):
    pytest.importorskip("timm")
    from pml_fewshot import TimmTrunk

    new, truth = files_of(photos / "new")
    FewShotClassifier(TimmTrunk("test_efficientnet")).fit(new, truth).save(photos / "saved")
    before = torch.get_rng_state()
    FewShotClassifier.load(photos / "saved")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow  # two interpreters that import torchvision and timm, 10 s
def test_a_trunk_made_by_name_is_built_again_in_another_process(photos: Path):
    pytest.importorskip("timm")
    from pml_fewshot import TimmTrunk

    torch.manual_seed(0)
    embedder = Embedder(TimmTrunk("test_efficientnet", mean=(0.4, 0.4, 0.4)), normalize=True).eval()
    new, truth = files_of(photos / "new")
    classifier = FewShotClassifier(embedder, reject=0.1).fit(new, truth)
    classifier.save(photos / "saved")
    code = f"""
import sys
from pml_fewshot import FewShotClassifier
classifier = FewShotClassifier.load({str(photos / "saved")!r})
print(classifier.similarity(sys.argv[1:]).tolist())
"""
    asked = [sys.executable, "-W", "ignore", "-c", code, *map(str, new)]
    printed = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    assert np.allclose(json.loads(printed), classifier.similarity(new), atol=1e-5)


def test_leave_one_out_is_a_loop_of_classifiers(photos: Path):
    rng = np.random.default_rng(0)
    y = np.repeat(NAMES, [1, 4, 6, 5])
    X = rng.normal(size=(4, 6))[np.repeat(np.arange(4), [1, 4, 6, 5])] + rng.normal(size=(16, 6))
    classifier = FewShotClassifier().fit(X, y)
    result = leave_one_out(classifier, draws=5)
    X, y = classifier.model_.taught.items.numpy(), y  # in the classifier's own order
    assert result.items.tolist() == list(range(1, 16))  # the only ant stays
    others = []
    for row, item in enumerate(result.items.tolist()):
        rest = np.arange(16) != item
        without = FewShotClassifier().fit(X[rest], y[rest])
        assert without.predict(X[[item]])[0] == NAMES[result.predicted[row]]
        assert without.similarity(X[[item]])[0] == pytest.approx(result.similarity[row].item())
        class_gone = FewShotClassifier().fit(X[y != y[item]], y[y != y[item]])
        others.append(class_gone.similarity(X[[item]])[0])
    assert np.allclose(others, result.others[1:])
    right = sum(
        NAMES[each] == y[item] for each, item in zip(result.predicted.tolist(), result.items.tolist(), strict=True)
    )
    assert result.accuracy == pytest.approx(right / 15)
    assert result.confusion.sum() == 15
    pairs = [(a > b) + 0.5 * (a == b) for a in result.similarity.tolist() for b in result.others.tolist()]
    assert result.auroc == pytest.approx(np.mean(pairs))
    low, high = result.interval  # where p and the observed share differ by 1.96 standard errors of p
    for bound in (low, high):
        assert abs(bound - result.accuracy) == pytest.approx(1.96 * (bound * (1 - bound) / 15) ** 0.5)
    assert [each.spec.shots for each in result.shots] == [1, 2, 3]
    assert f"{right} of 15, each left out in turn" in str(result)


def test_the_command_teaches_evaluates_saves_and_classifies(photos: Path, monkeypatch: Any, capsys: Any):
    pytest.importorskip("timm")
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), photos / "weights.safetensors")
    trunk = ["--trunk", "timm/test_efficientnet", "--checkpoint", str(photos / "weights.safetensors")]
    known, new, saved = (str(photos / name) for name in ("known", "new", "saved"))
    command.main(["--support", known, *trunk, "--head", "cosine_classifier", "--evaluate", "--save", saved])
    printed = capsys.readouterr().out
    assert "14 examples of 4 classes" in printed
    assert "of 14, each left out in turn" in printed
    assert "AUROC" in printed
    photo(4, 1).save(photos / "black.png")
    black = str(photos / "black.png")
    command.main(
        [black, "--load", saved, "--add-class", "elk", black, "--csv", str(photos / "out.csv"), "--query", new]
    )
    printed = capsys.readouterr().out
    assert "15 examples of 5 classes" in printed
    lines = (photos / "out.csv").read_text().splitlines()
    assert lines[0] == "file,class,probability,similarity,nearest example"
    assert lines[1] == f"{black},elk,{lines[1].split(',')[2]},{lines[1].split(',')[3]},{black}"
    assert len(lines) == 1 + 1 + 12
    for wrong, message in [
        ([new], "expected either --support or --load"),
        (["--support", known, "--trunk", "resnet18"], "expected a trunk as LIBRARY/NAME.*timm/resnet18"),
        (["--load", saved, "--reject", "auto"], "expected the saved classifier as it is, got --reject"),
        (["--load", saved, "--add-class", "elk"], "expected photos after --add-class elk"),
        (["--load", saved, str(photos / "none.png")], r"expected a photo .*none\.png"),
        (["--support", str(photos / "gone"), *trunk], "expected a folder of images at"),
    ]:
        with pytest.raises(SystemExit) as ended:
            command.main(wrong)
        printed = capsys.readouterr().err + str(ended.value)
        assert re.search(message, printed), printed
        assert "Traceback" not in printed
