"""FewShotDataset, concat and Splits: contents, memory maps, checksums, relabeling, rotations and refusals."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset, Splits, concat
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
    dataset.recorded_checksum = "recorded"
    moved = dataset.to("meta")
    assert (moved.images.device.type, moved.labels.device.type, dataset.images.device.type) == ("meta", "meta", "cpu")
    assert (moved.class_names, moved.note, moved.checksum()) == (("a", "b", "c"), "n", "recorded")


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
    """Spelled out, for both stand in the folders of old runs."""
    dataset = made_up()
    known = hashlib.blake2b(repr((("a", "b", "c"), (2, 4, 4))).encode(), digest_size=8)
    known.update(np.array([0, 1, 2, 0, 1, 2], "<i8").tobytes())
    assert dataset.fingerprint() == known.hexdigest()
    whole = hashlib.blake2b(known.hexdigest().encode() + dataset.images.numpy().tobytes(), digest_size=8)
    assert dataset.checksum() == whole.hexdigest()
    dataset.recorded_checksum = "recorded"  # is taken until the images are to be read or are chosen from
    assert dataset.checksum() == "recorded"
    assert dataset.checksum(recompute=True) == dataset.select_classes([0, 1, 2]).checksum() == whole.hexdigest()


def test_select_classes_keeps_the_items_and_relabels_in_the_order_given():
    dataset = made_up(note="n")
    part = dataset.select_classes([2, 0])
    assert (part.class_names, part.note) == (("c", "a"), "n")
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


def test_concat_moves_labels_up_and_keeps_each_note_once():
    sets = [made_up("ab", note="x"), made_up("cde", note="y"), made_up("f", note="x")]
    whole = concat(iter(sets))
    assert (whole.class_names, whole.note) == (tuple("abcdef"), "x; y")
    assert named(whole) == [item for part in sets for item in named(part)]
    with pytest.raises(UsageError, match="expected different class names"):
        concat([sets[0], made_up("bx")])


def test_a_class_in_two_splits_is_refused():
    with pytest.raises(UsageError, match="class 'a' in train and in test"):
        Splits(made_up("ab"), None, made_up("ca"))


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (torch.zeros(4, 1, 2, 2), [0] * 4, "a", r"expected uint8 images, got torch\.float32 .*; scale floats in"),
        (noise(4, 2, 2), [0] * 4, "a", r"images of shape \(M, C, H, W\), M > 0, got .* shape \(4, 2, 2\)"),
        (noise(0, 1, 2, 2), [], "a", r"M > 0, got .* shape \(0, 1, 2, 2\)"),
        (noise(4, 1, 2, 2), [0.0] * 4, "a", "labels as an int64 tensor"),
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
    assert isinstance(error.value, TypeError) == ("uint8" in message or "int64" in message)
