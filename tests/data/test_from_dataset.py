"""FewShotDataset.from_dataset: data sets of torch, torchvision and Hugging Face."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

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


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_nothing_from_the_callers_generator(workers: int):
    before = torch.get_rng_state()
    FewShotDataset.from_dataset(Pairs(), workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


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
    with pytest.raises(UsageError, match=r"images of one size, got 8x8 and 8x9 \(item 1\); give image_size=84"):
        FewShotDataset.from_dataset(Mixed())


def test_several_processes_give_the_same_in_order():
    whole = FewShotDataset.from_dataset(Pairs())
    assert FewShotDataset.from_dataset(Pairs(), workers=2).checksum() == whole.checksum()


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
        (
            lambda: FewShotDataset.from_dataset(texts, image="img", label="word"),
            "items with 'img' and 'word', got photo",
        ),
        (
            lambda: FewShotDataset.from_dataset(datasets.DatasetDict(train=source)),
            r"one data set, got a dictionary of train; give one of them, as source\['train'\]",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            wrong()


def test_a_stream_is_read_once_and_not_by_each_worker():
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from (Pairs()[item] for item in range(6))

    with pytest.raises(
        UsageError, match=r"workers=0, as each of several would read all of it, got workers=2 for a str"
    ):
        FewShotDataset.from_dataset(Stream(), workers=2)
    whole = FewShotDataset.from_dataset(Pairs())
    for source in (Stream(), (Pairs()[item] for item in range(6)), [Pairs()[item] for item in range(6)]):
        assert FewShotDataset.from_dataset(source).checksum() == whole.checksum()


def test_joined_sets_must_number_their_classes_alike():
    both = FewShotDataset.from_dataset(ConcatDataset([CifarLike(), Subset(CifarLike(), [0])]))
    assert (both.class_names, len(both)) == (("ant", "cat"), 7)

    class Other(CifarLike):
        classes = ("bee", "cat", "dog", "eel")

    with pytest.raises(
        UsageError, match=r"data sets of the same classes, got \('ant', 'bee', 'cat', 'dog'\) and others"
    ):
        FewShotDataset.from_dataset(ConcatDataset([CifarLike(), Other()]))


def test_names_are_kept_of_our_own_sets_and_not_where_labels_are_changed():
    own = FewShotDataset.from_dataset(CifarLike())
    again = FewShotDataset.from_dataset(Subset(own, list(range(6))))
    assert (again.class_names, again.checksum()) == (own.class_names, own.checksum())
    changed = CifarLike()
    changed.target_transform = lambda label: 3 - label
    assert FewShotDataset.from_dataset(changed).class_names == ("0", "2")


def test_gray_images_among_colors_get_three_channels():
    images = [Image.fromarray(pixels) for pixels in PIXELS]
    for grays in ((0,), (3, 4), (0, 1, 5)):
        mixed = [(image.convert("L") if i in grays else image, LABELS[i]) for i, image in enumerate(images)]
        found = FewShotDataset.from_dataset(mixed).images.numpy()
        for i, image in enumerate(images):
            expected = np.asarray(image.convert("L").convert("RGB") if i in grays else image)
            np.testing.assert_array_equal(found[i], expected.transpose(2, 0, 1))


def test_photos_are_upright_as_those_of_files():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    photo = Image.fromarray(PIXELS[0])
    photo.info["exif"] = exif.tobytes()
    found = FewShotDataset.from_dataset([(photo, 0)]).images[0]
    np.testing.assert_array_equal(found.permute(1, 2, 0), np.rot90(PIXELS[0], -1))


def test_items_may_be_dictionaries():
    items = [{"img": Image.fromarray(PIXELS[i]), "fine_label": LABELS[i], "id": i} for i in range(6)]
    assert FewShotDataset.from_dataset(items).checksum() == FewShotDataset.from_dataset(Pairs()).checksum()
    assert FewShotDataset.from_dataset(items, label="id").class_names == tuple("012345")
    with pytest.raises(
        UsageError, match="items with 'photo' and 'label', got img, fine_label, id; name yours as image="
    ):
        FewShotDataset.from_dataset(items, image="photo")


def test_one_hot_labels_and_other_workers_are_refused():
    with pytest.raises(
        UsageError, match=r"one number or text as a label, got shape \(4,\) \(item 0\); take its argmax"
    ):
        FewShotDataset.from_dataset(Pairs(labels=torch.eye(4)))
    with pytest.raises(UsageError, match="workers of at least 0, got -1"):
        FewShotDataset.from_dataset(Pairs(), workers=-1)


def test_a_wrapper_that_may_change_labels_has_no_names():
    class Coarse(Pairs):
        def __init__(self) -> None:
            super().__init__(labels=[label // 2 for label in LABELS])
            self.dataset = CifarLike()

    assert FewShotDataset.from_dataset(Coarse()).class_names == ("0", "1")


def test_gray_of_32_bit_numbers_that_8_bits_hold_stays_what_it_is():
    gray = PIXELS[..., 0].astype(np.int32)
    found = FewShotDataset.from_dataset(Pairs(pixels=gray)).images
    np.testing.assert_array_equal(found.numpy(), gray[:, None])


def test_columns_that_a_transform_makes_are_read():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    columns = {"img": [Image.fromarray(pixels) for pixels in PIXELS], "label": LABELS}
    source = datasets.Dataset.from_dict(columns, features=features)
    source = source.with_transform(lambda batch: {"pixel_values": batch["img"], "label": batch["label"]})
    dataset = FewShotDataset.from_dataset(source, image="pixel_values")
    assert dataset.class_names == ("ant", "cat")
    np.testing.assert_array_equal(dataset.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
