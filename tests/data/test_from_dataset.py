"""FewShotDataset.from_dataset: data sets of torch, torchvision and Hugging Face."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset
from tests.data.loading import noise

PIXELS = noise(6, 8, 8, 3)
LABELS = [2, 0, 0, 2, 2, 0]


class Pairs(Dataset[Any]):
    """A map-style data set whose images come in one of the ways that people have them."""

    def __init__(self, form: Any = Image.fromarray, labels: Any = LABELS, pixels: np.ndarray = PIXELS) -> None:
        self.form, self.labels, self.pixels = form, labels, pixels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> Any:
        return self.form(self.pixels[item]), self.labels[item]


class CifarLike(Pairs):
    classes = ("ant", "bee", "cat", "dog")


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize(
    "form",
    [
        Image.fromarray,
        chw,
        lambda pixels: chw(pixels).float() / 255,
        lambda pixels: chw(pixels).double() / 255,
        np.array,
    ],
)
def test_images_of_every_form_come_out_the_same(form: Any):
    dataset = FewShotDataset.from_dataset(Pairs(form))
    np.testing.assert_array_equal(dataset.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert (dataset.labels.tolist(), dataset.class_names) == ([1, 0, 0, 1, 1, 0], ("0", "2"))


def test_gray_images_keep_one_channel():
    gray = PIXELS[..., 0]
    for form in (Image.fromarray, torch.from_numpy, np.array, lambda pixels: torch.from_numpy(pixels)[None]):
        found = FewShotDataset.from_dataset(Pairs(form, pixels=gray)).images
        np.testing.assert_array_equal(found.numpy(), gray[:, None])
    bits = FewShotDataset.from_dataset(Pairs(torch.from_numpy, pixels=gray > 127)).images
    np.testing.assert_array_equal(bits.numpy(), 255 * (gray > 127)[:, None])


@pytest.mark.parametrize("labels", [np.array(LABELS), torch.tensor(LABELS), np.array(LABELS, np.int32)])
def test_labels_may_be_numbers_of_any_library(labels: Any):
    assert FewShotDataset.from_dataset(Pairs(labels=labels)).class_names == ("0", "2")


def test_class_names_are_the_sources_or_given_and_those_without_items_left_out():
    assert FewShotDataset.from_dataset(CifarLike()).class_names == ("ant", "cat")
    part = FewShotDataset.from_dataset(Subset(CifarLike(), [1, 2]))
    assert (part.class_names, len(part)) == (("ant",), 2)
    assert FewShotDataset.from_dataset(Pairs(), class_names=["x", "y", "z"]).class_names == ("x", "z")
    words = FewShotDataset.from_dataset(Pairs(labels=[f"c{label}" for label in LABELS]))
    assert (words.class_names, words.labels.tolist()) == (("c0", "c2"), [1, 0, 0, 1, 1, 0])
    ordered = FewShotDataset.from_dataset(Pairs(labels=list("babbab")), class_names=["b", "a"])
    assert (ordered.class_names, ordered.labels.tolist()) == (("b", "a"), [0, 1, 0, 0, 1, 0])
    for labels, names, message in (
        (LABELS, ["x"], "indices into the 1 class names, got labels from 0 to 2; give class_names"),
        (list("babbab"), ["b"], "labels among the class names, got 'a'; add it to class_names"),
    ):
        with pytest.raises(UsageError, match=message):
            FewShotDataset.from_dataset(Pairs(labels=labels), class_names=names)


def test_images_are_scaled_where_a_size_is_given_and_must_be_alike_where_not():
    class Mixed(Pairs):
        def __getitem__(self, item: int) -> Any:
            return Image.fromarray(PIXELS[item]).resize((8 + item, 8)), LABELS[item]

    dataset = FewShotDataset.from_dataset(Mixed(), image_size=(4, 6), resize="pad")
    assert dataset.item_shape == (3, 4, 6)
    assert int(dataset.images[0, :, :, 0].max()) == 0  # a square in a wide frame
    with pytest.raises(UsageError, match=r"images alike, got 3x8x8 and 3x8x9 \(item 1\); give image_size=84"):
        FewShotDataset.from_dataset(Mixed())


def test_several_processes_and_streams_give_the_same_in_order():
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from (Pairs()[item] for item in range(6))

    whole = FewShotDataset.from_dataset(Pairs())
    for source, workers in ((Pairs(), 2), (Stream(), 0)):
        assert FewShotDataset.from_dataset(source, workers=workers).checksum() == whole.checksum()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            Pairs(lambda pixels: chw(pixels).float()),
            r"floats in \[0, 1\], got values from 0 to 249 \(item 0\); leave Norm",
        ),
        (Pairs(lambda pixels: "x"), r"images as PIL images, or tensors \(C, H, W\), got str \(item 0\); leave out"),
        (Pairs(lambda pixels: torch.zeros(2, 8, 8)), r"with 1 or 3 channels, got uint8 of 2 channels \(item 0\)"),
        (Pairs(lambda pixels: torch.zeros(3, 8, 8).long()), "of 8 bits with 1 or 3 channels, got int64 of 3 channels"),
        (Pairs(labels=[0.5] * 6), "labels as integers or texts, got list of float64"),
        (Pairs(labels=[]), "expected items, got none from Pairs"),
        ([(1, 2, 3)], r"pairs \(image, label\) from list, got a tuple of 3; wrap it"),
        (7, "expected a data set, got int; give a torch or Hugging Face data set"),
    ],
)
def test_other_items_are_named_with_their_place(source: Any, message: str):
    with pytest.raises(UsageError, match=message):
        FewShotDataset.from_dataset(source)


def test_a_bug_in_the_users_data_set_keeps_its_traceback():
    class Broken(Pairs):
        def __getitem__(self, item: int) -> Any:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        FewShotDataset.from_dataset(Broken())


def test_hugging_face_data_sets_go_by_their_columns():
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(pixels) for pixels in PIXELS]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    source = datasets.Dataset.from_dict({"img": images, "kind": LABELS}, features=features)
    dataset = FewShotDataset.from_dataset(source)
    np.testing.assert_array_equal(dataset.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert (dataset.class_names, dataset.labels.tolist()) == (("ant", "cat"), [1, 0, 0, 1, 1, 0])
    texts = datasets.Dataset.from_dict({"photo": images, "word": list("babbab")})
    texts = texts.cast_column("photo", datasets.Image())
    assert FewShotDataset.from_dataset(texts, label="word").class_names == ("a", "b")
    for wrong, message in (
        (lambda: FewShotDataset.from_dataset(texts), "a column 'label', got photo, word; name it as label="),
        (lambda: FewShotDataset.from_dataset(texts, image="img"), "a column 'img', got photo, word; name it as image="),
        (
            lambda: FewShotDataset.from_dataset(datasets.DatasetDict(train=source)),
            r"one data set, got a dictionary of train; give one of them, as source\['train'\]",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            wrong()
