"""FewShotDataset, concat and Splits: contents, memory maps, checksums, relabeling, rotations and refusals."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset, Splits, concat, digests_of
from pml_fewshot.embedders.bank import EmbeddingBank
from tests.data.loading import noise


def made_up(names: str = "abc", note: str = "") -> FewShotDataset:
    return FewShotDataset(torch.from_numpy(noise(6, 2, 4, 4)), torch.arange(6) % len(names), list(names), note)


def named(dataset: FewShotDataset) -> list[tuple[str, bytes]]:
    """Each item's class name and pixels."""
    items = zip(dataset.labels, dataset.images, strict=True)
    return [(dataset.class_names[label], image.numpy().tobytes()) for label, image in items]


def test_it_shows_its_size_and_moving_keeps_everything_but_the_place():
    dataset = made_up(note="n")
    assert repr(dataset) == "FewShotDataset(6 images of 2x4x4, 3 classes, n)"
    assert (len(dataset), dataset.item_shape, dataset.device) == (6, (2, 4, 4), torch.device("cpu"))
    assert dataset.to("cpu") is dataset
    dataset.digests = torch.arange(6)
    moved = dataset.to("meta")
    assert (moved.images.device.type, moved.labels.device.type, dataset.images.device.type) == ("meta", "meta", "cpu")
    assert (moved.class_names, moved.note, moved.digests) == (("a", "b", "c"), "n", dataset.digests)


def test_floats_are_the_pixels_over_255_in_the_shape_of_the_index():
    dataset = made_up()
    index = torch.tensor([[[5, 0], [1, 1]], [[2, 3], [4, 5]]])
    floats = dataset.floats(index)
    assert (floats.dtype, floats.shape) == (torch.float32, (2, 2, 2, 2, 4, 4))
    for place in np.ndindex(2, 2, 2):
        image, label = dataset[int(index[place])]
        expected = dataset.images[index[place]].numpy() / np.float32(255)
        np.testing.assert_array_equal(floats[place].numpy(), expected)
        np.testing.assert_array_equal(image.numpy(), expected)
        assert label == dataset.labels[index[place]]
    assert dataset.floats(torch.tensor(3)).shape == (2, 4, 4)
    assert dataset.floats(torch.empty(0, dtype=torch.int64)).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_memory_map_is_read_as_it_is_and_never_written(tmp_path: Path, mode: str):
    images = noise(6, 1, 3, 4)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode=mode)
    dataset = FewShotDataset(mapped, torch.zeros(6, dtype=torch.int64), ["a"])
    np.testing.assert_array_equal(dataset.images.numpy(), images)
    images[-1] ^= 1
    np.save(tmp_path / "images.npy", images)  # into the same file
    np.testing.assert_array_equal(dataset.images.numpy(), images)  # it was not copied
    dataset.images[:] = 0
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images)


def test_views_of_a_read_only_memory_map_are_read_right(tmp_path: Path):
    images = noise(6, 1, 4, 4)
    (tmp_path / "raw").write_bytes(b"header!" + images.tobytes())
    np.save(tmp_path / "fortran.npy", np.asfortranarray(images))
    mapped = np.memmap(tmp_path / "raw", np.uint8, "r", offset=7, shape=images.shape)
    views = [(mapped, images), (mapped[1:][1:], images[2:]), (mapped[::2], images[::2]), (np.asarray(mapped), images)]
    views += [(mapped.transpose(0, 1, 3, 2), images.transpose(0, 1, 3, 2))]
    views += [(np.load(tmp_path / "fortran.npy", mmap_mode="r"), images)]
    for view, expected in views:
        dataset = FewShotDataset(view, torch.zeros(len(view), dtype=torch.int64), ["a"])
        np.testing.assert_array_equal(dataset.images.numpy(), expected)


def test_the_fingerprint_is_of_all_but_the_images_and_the_checksum_of_all():
    """Spelled out, for both stand in the folders of runs."""
    dataset = made_up()
    known = hashlib.blake2b(repr((("a", "b", "c"), (2, 4, 4))).encode(), digest_size=8)
    known.update(np.array([0, 1, 2, 0, 1, 2], "<i8").tobytes())
    assert dataset.fingerprint() == known.hexdigest()
    each = b"".join(hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in dataset.images)
    whole = hashlib.blake2b(known.hexdigest().encode() + each, digest_size=8)
    assert dataset.checksum() == whole.hexdigest()
    dataset.digests = digests_of(dataset.images.numpy())
    dataset.images[0] ^= 1  # the recorded one counts until the images are to be read
    assert dataset.checksum() == dataset.select_classes([0, 1, 2]).checksum() == whole.hexdigest()
    assert dataset.checksum(recompute=True) != whole.hexdigest()


def test_class_names_of_other_types_of_text_make_no_other_set():
    images, labels = noise(4, 1, 8, 8), torch.arange(4)
    sets = [FewShotDataset(images, labels, names) for names in (list("abcd"), np.array(list("abcd")), "abcd")]
    assert len({each.checksum() for each in sets}) == 1
    assert all(type(name) is str for each in sets for name in each.class_names)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 1, 1, 0], None, ("0", "1")),
        (np.array([0, 1, 1, 0], np.int32), list("ab"), ("a", "b")),
        (torch.tensor([0, 1, 1, 0], dtype=torch.uint8), None, ("0", "1")),
        ([7, 30, 30, 7], None, ("7", "30")),
        (["bee", "cat", "cat", "bee"], None, ("bee", "cat")),
        (np.array(["bee", "cat", "cat", "bee"]), None, ("bee", "cat")),
    ],
)
def test_labels_of_any_kind_are_numbered(labels: object, names: list[str] | None, expected: tuple[str, ...]):
    dataset = FewShotDataset(noise(4, 1, 8, 8), labels, names)
    assert (dataset.labels.dtype, dataset.labels.tolist()) == (torch.int64, [0, 1, 1, 0])
    assert dataset.class_names == expected


def test_deep_images_and_features_are_floats_in_their_own_ways():
    deep = np.array([0, 1, 32768, 65535], np.uint16).reshape(4, 1, 1, 1)
    found = FewShotDataset(deep, [0, 1, 0, 1]).floats(torch.arange(4)).flatten()
    np.testing.assert_array_equal(found.numpy(), deep.ravel() / np.float32(65535))
    features = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float16)
    dataset = FewShotDataset(features, ["a", "b", "a", "b"])
    assert (repr(dataset), dataset.item_shape) == ("FewShotDataset(4 items of 7, 2 classes)", (7,))
    index = torch.tensor([[3, 0], [1, 1]])
    assert dataset.floats(index).dtype == torch.float32
    np.testing.assert_array_equal(dataset.floats(index).numpy(), features[index.numpy()].astype(np.float32))
    np.testing.assert_array_equal(dataset[2][0].numpy(), features[2].astype(np.float32))
    with pytest.raises(UsageError, match="finite features, got NaN or infinity in 1 of 4 rows, first in row 3"):
        FewShotDataset(np.array([[0.0], [1], [2], [np.nan]]), [0, 1, 0, 1])


def test_a_selection_from_a_memory_map_reads_and_holds_its_own_items_alone(tmp_path: Path):
    images = noise(9, 1, 4, 4)
    np.save(tmp_path / "images.npy", images)
    rows = torch.tensor([8, 1, 2, 5, 5, 0])
    dataset = FewShotDataset(np.load(tmp_path / "images.npy", mmap_mode="c"), [0, 1, 2, 0, 1, 2], "abc", rows=rows)
    plain = FewShotDataset(images[rows], [0, 1, 2, 0, 1, 2], "abc")
    assert len(dataset) == 6
    for mine, other in (
        (dataset, plain),
        (dataset.select_classes([2, 0]), plain.select_classes([2, 0])),
        (dataset.without_small_classes(1), plain),
        (dataset.first(4), plain.first(4)),
        (concat([dataset, dataset]), concat([plain, plain])),
        (dataset.with_rotations_as_classes(), plain.with_rotations_as_classes()),
        (dataset.transformed(lambda part: part.flip(3)), plain.transformed(lambda part: part.flip(3))),
    ):
        assert mine.checksum() == other.checksum()
        np.testing.assert_array_equal(mine.images.numpy(), other.images.numpy())
        np.testing.assert_array_equal(mine.floats(slice(1, 3)).numpy(), other.floats(slice(1, 3)).numpy())
        np.testing.assert_array_equal(mine[1][0].numpy(), other[1][0].numpy())
    mapped = FewShotDataset(np.load(tmp_path / "images.npy", mmap_mode="c"), [0, 1, 2] * 3)
    for each in (dataset, mapped):  # nothing is copied
        assert each.select_classes([1])._stored is each._stored
        cropped = each.select_classes([2, 0]).transformed(lambda part: part[:, :, 1:3])
        assert cropped._stored.untyped_storage().data_ptr() == each._stored.untyped_storage().data_ptr()
        np.testing.assert_array_equal(cropped.images.numpy(), each.select_classes([2, 0]).images[:, :, 1:3].numpy())


def test_small_classes_are_left_out_on_request_and_counted():
    dataset = FewShotDataset(noise(9, 1, 4, 4), [0, 0, 0, 1, 2, 2, 2, 3, 3], "abcd", "n")
    part = dataset.without_small_classes(3)
    assert (part.class_names, part.note) == (("a", "c"), "n; 2 of 4 classes with fewer than 3 items left out (3 items)")
    assert named(part) == [item for item in named(dataset) if item[0] in "ac"]
    assert dataset.without_small_classes(1) is dataset
    with pytest.raises(UsageError, match="a class of at least 4 items, got at most 3; lower it"):
        dataset.without_small_classes(4)


def test_a_transform_is_applied_once_and_a_crop_takes_no_memory():
    dataset = made_up(note="n")
    dataset.digests = digests_of(dataset.images.numpy())
    cropped = dataset.transformed(lambda images: images[:, :, 1:3, 1:3])
    assert cropped.item_shape == (2, 2, 2)
    np.testing.assert_array_equal(cropped.images.numpy(), dataset.images[:, :, 1:3, 1:3].numpy())
    assert cropped.images.untyped_storage().data_ptr() == dataset.images.untyped_storage().data_ptr()
    assert cropped.checksum() != dataset.checksum()
    assert (cropped.class_names, cropped.note, dataset.item_shape) == (dataset.class_names, "n", (2, 4, 4))
    doubled = dataset.transformed(lambda images: images.repeat_interleave(2, dim=3))
    np.testing.assert_array_equal(doubled.images.numpy(), np.repeat(dataset.images.numpy(), 2, axis=3))
    in_place = FewShotDataset(np.full((4, 1, 2, 2), 100, np.uint8), [0, 1, 0, 1])
    in_place.images[0] = 250  # which the change below leaves as it is
    assert in_place.transformed(lambda images: images.clamp_(min=120)).images[1:].unique().tolist() == [120]
    assert in_place.images[1:].unique().tolist() == [100]
    for wrong in (
        *(lambda images: images.float(), lambda images: images[0], lambda images: "x"),
        *(lambda images: images[:1], lambda images: images[:1].clone(), lambda images: images[:, :, 4:]),
        lambda images: images.float().mean(0, keepdim=True).byte(),
        lambda images: images if len(images) == 2 else images[:1],
    ):
        with pytest.raises(UsageError, match=r"a transform from torch.uint8 \(B, \*item\) to the same, here .*, got"):
            dataset.transformed(wrong)


def test_select_classes_keeps_the_items_and_relabels_in_the_order_given():
    dataset = made_up(note="n")
    part = dataset.select_classes([2, 0])
    assert (part.class_names, part.note) == (("c", "a"), "n (of all 3 classes)")
    assert part.select_classes([1]).note == part.note
    assert dataset.select_classes([2, 0, 1]).note == "n"
    assert named(part) == [item for item in named(dataset) if item[0] != "b"]
    with pytest.raises(UsageError, match="expected different class names"):
        dataset.select_classes([1, 1])
    with pytest.raises(UsageError, match="at least one class, got none"):
        dataset.select_classes([])


def test_rotations_make_each_image_into_four_classes():
    dataset = made_up(note="n")
    rotated = dataset.with_rotations_as_classes()
    assert rotated.class_names == tuple(f"{c}/rot{degrees}" for c in "abc" for degrees in ("000", "090", "180", "270"))
    assert rotated.note == "n"
    expected = {
        (f"{name}/rot{90 * r:03d}", np.rot90(image.numpy(), r, axes=(1, 2)).tobytes())
        for (name, _), image in zip(named(dataset), dataset.images, strict=True)
        for r in range(4)
    }
    assert len(rotated) == len(expected) == 24
    assert set(named(rotated)) == expected


def test_mirrors_as_classes():
    dataset = made_up("abc", note="n")
    mirrored = dataset.with_mirrors_as_classes()
    assert mirrored.class_names == ("a", "b", "c", "a/mirrored", "b/mirrored", "c/mirrored")
    assert mirrored.note == "n"
    flipped = [
        (f"{name}/mirrored", image.numpy()[:, :, ::-1].tobytes())
        for (name, _), image in zip(named(dataset), dataset.images, strict=True)
    ]
    assert named(mirrored) == named(dataset) + flipped
    with pytest.raises(UsageError, match="expected images to mirror"):
        FewShotDataset(torch.ones(2, 3), [0, 1]).with_mirrors_as_classes()


def test_concat_moves_labels_up_and_keeps_each_note_once():
    sets = [made_up("ab", note="x"), made_up("cde", note="y"), made_up("f", note="x")]
    whole = concat(iter(sets))
    assert (whole.class_names, whole.note) == (tuple("abcdef"), "x; y")
    assert named(whole) == [item for part in sets for item in named(part)]
    joined = concat([made_up("ab"), made_up("bx")])  # a class of the same name is the same class
    assert joined.class_names == ("a", "b", "x")
    assert named(joined) == named(made_up("ab")) + named(made_up("bx"))
    with pytest.raises(
        UsageError, match=r"one item shape and type to join, got .*\(2, 4, 4\).* and .*; load them alike"
    ):
        concat([sets[0], FewShotDataset(noise(2, 2, 4, 5), [0, 1])])


def test_only_square_images_are_rotated():
    with pytest.raises(
        UsageError, match=r"square images to rotate, got FewShotDataset\(2 images of 1x4x5.*; load them"
    ):
        FewShotDataset(noise(2, 1, 4, 5), [0, 1]).with_rotations_as_classes()


def test_a_class_in_two_splits_is_refused_unless_it_is_meant():
    with pytest.raises(UsageError, match=r"class 'a' in train and in test.*shared_classes=True"):
        Splits(made_up("ab"), None, made_up("ca"))
    splits = Splits(made_up("ab"), None, made_up("ca"), shared_classes=True)
    assert splits.seen_in_training("test")
    assert not Splits(made_up("ab"), None, made_up("cd")).seen_in_training("test")
    splits = Splits(made_up("ab"), made_up("ax"), made_up("cd"), shared_classes=True)
    assert [splits.seen_in_training(part) for part in ("train", "val", "test")] == [False, True, False]
    assert list(vars(splits)) == ["train", "val", "test"]


def test_without_a_test_set_val_takes_its_place_through_every_change():
    splits = Splits.of({"train": made_up("ab"), "val": made_up("cd")})
    assert splits.test_is_val
    assert splits.test is splits.val
    assert splits.map(lambda part: part.transformed(lambda images: images.flip(3))).test_is_val
    assert not Splits.of({"train": made_up("ab"), "test": made_up("cd")}).test_is_val
    with pytest.raises(UsageError, match="expected parts train and test or val, got train"):
        Splits.of({"train": made_up("ab")})
    assert Splits(made_up("ab"), made_up("cd"), None).test_is_val
    for parts in ((made_up("ab"), None, None), (None, None, made_up("ab"))):
        with pytest.raises(UsageError, match=r"expected train and test or val, got (train|test); a set alone is"):
            Splits(*parts)
    bank = EmbeddingBank(torch.rand(4, 3), [0, 0, 1, 1], class_names=("c", "d"))
    other = EmbeddingBank(torch.rand(4, 3), [0, 0, 1, 1], class_names=("a", "b"))
    assert Splits(other, bank, bank).test_is_val
    assert Splits(other, None, bank).test.class_names == ("c", "d")
    with pytest.raises(UsageError, match="expected test as a FewShotDataset or an EmbeddingBank, got list; use"):
        Splits(other, None, [1])


def test_classes_are_divided_by_lists_or_a_draw():
    dataset = made_up("abcdef")
    splits = dataset.split({"train": ["b", "a"], "validation": ["e"], "test": ["f"]})
    assert [part.class_names for part in vars(splits).values()] == [("a", "b"), ("e",), ("f",)]
    assert {part.note for part in vars(splits).values()} == {"2 of 6 classes in no list"}
    assert named(splits.test) == [item for item in named(dataset) if item[0] == "f"]
    drawn = dataset.split(seed=0)
    assert sorted(name for part in vars(drawn).values() for name in part.class_names) == list("abcdef")
    assert {part.note for part in vars(drawn).values()} == {""}


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (
            torch.zeros(4, 1, 2, 2).int(),
            [0] * 4,
            "a",
            r"expected uint8 images, or floats, got torch\.int32 .*; convert",
        ),
        ([[1]], [0], "a", "images as a tensor or a numpy array, got list; use FewShotDataset.from_dataset"),
        (torch.zeros(4), [0] * 4, "a", r"features of shape \(M, D\), M > 0, got"),
        (noise(4, 2, 2), [0] * 4, "a", r"images of shape \(M, C, H, W\), M > 0, got .* shape \(4, 2, 2\)"),
        (noise(0, 1, 2, 2), [], "a", r"M > 0, got .* shape \(0, 1, 2, 2\)"),
        (noise(4, 1, 2, 2), [0.0] * 4, "a", "labels as integers or texts, got a tensor of torch.float32"),
        (noise(4, 1, 2, 2), [0] * 3, "a", r"labels of shape \(4,\)"),
        (noise(4, 1, 2, 2), [1, 1, 2, 1], "ab", "indices into the 2 class names, got labels from 1 to 2"),
        (noise(4, 1, 2, 2), [0, -1, 0, 0], "ab", "got labels from -1 to 0"),
        (noise(4, 1, 2, 2), [0, 1, 2, 0], "aba", r"'a'. more than once"),
        (noise(4, 1, 2, 2), [0, 2, 2, 0], "abc", "an image in every class, got none in 1 of 3, first 'b'; add images"),
    ],
)
def test_other_types_shapes_and_labels_are_refused(images: np.ndarray, labels: list[int], names: str, message: str):
    with pytest.raises(UsageError, match=message) as error:
        FewShotDataset(images, torch.tensor(labels, dtype=None if labels else torch.int64), names)
    assert isinstance(error.value, TypeError) == ("convert" in message or "as " in message)
