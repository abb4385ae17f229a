"""FewShotDataset, join and Splits: contents, memory maps, relabelling, rotations and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits, join


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def made_up(names: str = "abc", size: int = 4, note: str = "") -> FewShotDataset:
    labels = torch.arange(6) % len(names)
    return FewShotDataset(torch.from_numpy(noise(6, 2, size, size)), labels, list(names), note)


def test_it_tells_its_size():
    dataset = made_up(note="half of it")
    assert len(dataset) == 6
    assert dataset.item_shape == (2, 4, 4)
    assert dataset.device == torch.device("cpu")
    assert dataset.class_names == ("a", "b", "c")
    assert repr(dataset) == "FewShotDataset(6 images of 2x4x4, 3 classes, half of it)"
    assert repr(made_up()) == "FewShotDataset(6 images of 2x4x4, 3 classes)"
    assert dataset.to("cpu") is dataset


def test_floats_are_the_pixels_over_255_in_the_shape_of_the_index():
    dataset = made_up()
    index = torch.tensor([[[5, 0], [1, 1]], [[2, 3], [4, 5]]])
    floats = dataset.floats(index)
    assert floats.dtype == torch.float32
    assert floats.shape == (2, 2, 2, 2, 4, 4)
    for place in np.ndindex(2, 2, 2):
        expected = dataset.images[index[place]].numpy() / np.float32(255)
        np.testing.assert_array_equal(floats[place].numpy(), expected)
    assert dataset.floats(torch.tensor(3)).shape == (2, 4, 4)
    assert dataset.floats(torch.empty(0, dtype=torch.int64)).shape == (0, 2, 4, 4)
    ends = FewShotDataset(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([0, 0]), ["a"])
    assert ends.floats(torch.arange(2)).flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_memory_map_is_read_as_it_is_and_never_written(tmp_path: Path, mode: str):
    images = noise(5, 1, 3, 4)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode=mode)
    dataset = FewShotDataset(mapped, torch.zeros(5, dtype=torch.int64), ["a"])
    np.testing.assert_array_equal(dataset.images.numpy(), images)
    before = (tmp_path / "images.npy").read_bytes()
    if mode != "r+":
        dataset.images[0] = 0
    assert (tmp_path / "images.npy").read_bytes() == before


def test_a_raw_memory_map_with_an_offset_and_views_of_one_are_read_right(tmp_path: Path):
    images = noise(6, 1, 4, 4)
    (tmp_path / "raw").write_bytes(b"header!" + images.tobytes())
    mapped = np.memmap(tmp_path / "raw", np.uint8, "r", offset=7, shape=images.shape)
    labels = torch.zeros(6, dtype=torch.int64)
    np.testing.assert_array_equal(FewShotDataset(mapped, labels, ["a"]).images.numpy(), images)
    for view, expected in [
        (mapped[2:], images[2:]),
        (mapped[::2], images[::2]),
        (mapped[1:][1:], images[2:]),
        (mapped.transpose(0, 1, 3, 2), images.transpose(0, 1, 3, 2)),
        (mapped.reshape(3, 2, 4, 4), images.reshape(3, 2, 4, 4)),
        (np.asarray(mapped), images),
    ]:
        dataset = FewShotDataset(view, labels[: len(view)], ["a"])
        np.testing.assert_array_equal(dataset.images.numpy(), expected)


def test_a_memory_map_in_fortran_order_is_read_right(tmp_path: Path):
    images = np.asfortranarray(noise(5, 1, 3, 4))
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    dataset = FewShotDataset(mapped, torch.zeros(5, dtype=torch.int64), ["a"])
    np.testing.assert_array_equal(dataset.images.numpy(), images)


def test_of_classes_keeps_the_items_and_relabels_in_the_order_given():
    dataset = made_up(note="n")
    part = dataset.of_classes([2, 0])
    assert part.class_names == ("c", "a")
    assert part.note == "n"
    expected = [i for i in range(6) if dataset.labels[i] in (2, 0)]
    assert torch.equal(part.images, dataset.images[expected])
    assert [part.class_names[c] for c in part.labels] == [dataset.class_names[c] for c in dataset.labels[expected]]
    with pytest.raises(ValueError, match="expected class names that are all different"):
        dataset.of_classes([1, 1])
    with pytest.raises(IndexError):
        dataset.of_classes([3])


def test_of_no_classes_is_refused_in_words():
    with pytest.raises(ValueError, match="at least one"):
        made_up().of_classes([])


def test_rotated_turns_each_image_into_four_classes():
    dataset = made_up(note="n")
    rotated = dataset.rotated()
    assert rotated.class_names == tuple(f"{c}/rot{degrees}" for c in "abc" for degrees in ("000", "090", "180", "270"))
    assert rotated.note == "n"
    assert len(rotated) == 24
    seen = {(int(label), image.numpy().tobytes()) for label, image in zip(rotated.labels, rotated.images, strict=True)}
    expected = {
        (4 * int(label) + r, np.rot90(image.numpy(), r, axes=(1, 2)).tobytes())
        for label, image in zip(dataset.labels, dataset.images, strict=True)
        for r in range(4)
    }
    assert len(expected) == 24
    assert seen == expected


def test_join_moves_labels_up_and_keeps_each_note_once():
    first, second, third = made_up("ab", note="x"), made_up("cde", note="y"), made_up("f", note="x")
    whole = join(iter([first, second, third]))
    assert whole.class_names == tuple("abcdef")
    assert whole.note == "x; y"
    assert [whole.class_names[c] for c in whole.labels] == [
        d.class_names[c] for d in (first, second, third) for c in d.labels
    ]
    assert torch.equal(whole.images, torch.cat([first.images, second.images, third.images]))
    with pytest.raises(ValueError, match="names that are all different"):
        join([first, made_up("bx")])


def test_splits_without_a_common_class():
    splits = Splits(made_up("ab"), None, made_up("cd"))
    assert splits.to("cpu").val is None
    assert Splits(made_up("ab"), made_up("ef"), made_up("cd")).to("cpu").val is not None
    with pytest.raises(ValueError, match="class 'b' in train and in val"):
        Splits(made_up("ab"), made_up("bc"), made_up("de"))
    with pytest.raises(ValueError, match="class 'c' in val and in test"):
        Splits(made_up("ab"), made_up("c"), made_up("cd"))
    with pytest.raises(ValueError, match="class 'a' in train and in test"):
        Splits(made_up("ab"), None, made_up("ca"))


def test_images_of_another_type_or_shape_are_refused():
    labels = torch.zeros(4, dtype=torch.int64)
    for wrong in (torch.zeros(4, 1, 2, 2), np.zeros((4, 1, 2, 2), np.int64)):
        with pytest.raises(TypeError, match=r"expected uint8 images, got torch\..*; scale floats in \[0, 1\] by 255"):
            FewShotDataset(wrong, labels, ["a"])
    with pytest.raises(ValueError, match=r"images of shape \(M, C, H, W\), got shape \(4, 2, 2\)"):
        FewShotDataset(torch.zeros(4, 2, 2, dtype=torch.uint8), labels, ["a"])
    with pytest.raises(ValueError, match="at least one image, got none"):
        FewShotDataset(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), labels[:0], ["a"])


def test_labels_of_another_type_length_or_range_are_refused():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(TypeError, match="labels as an int64 tensor"):
        FewShotDataset(images, torch.zeros(4), ["a"])
    with pytest.raises(ValueError, match=r"labels of shape \(4,\)"):
        FewShotDataset(images, torch.zeros(3, dtype=torch.int64), ["a"])
    with pytest.raises(ValueError, match=r"labels from 0 to 1, indices into the 2 class names, got labels from 1 to 2"):
        FewShotDataset(images, torch.tensor([1, 1, 2, 1]), ["a", "b"])
    with pytest.raises(ValueError, match="got labels from -1 to 0"):
        FewShotDataset(images, torch.tensor([0, -1, 0, 0]), ["a", "b"])
    with pytest.raises(ValueError, match=r"'a'. more than once"):
        FewShotDataset(images, torch.tensor([0, 1, 2, 0]), ["a", "b", "a"])
