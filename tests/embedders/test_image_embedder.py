"""ImageEmbedder: images of every kind to the same embeddings, in order, in flat memory, as scikit-learn wants it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from pml_fewshot.checks import MissingFileError, UsageError, UsageTypeError
from pml_fewshot.data.images import THREADS, BrokenImageError
from pml_fewshot.embedders import image_embedder
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder, images_at_a_time
from pml_fewshot.embedders.image_embedder import ImageEmbedder, prepared, read_photo
from pml_fewshot.embedders.preprocessing import Preprocessing
from tests.embedders.test_preprocessing import noise_image

PLAIN = Preprocessing((8, 8), 8)


class Means(nn.Module):
    """A trunk that gives the mean of each channel."""

    preprocessing = PLAIN

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        return images.mean(dim=(2, 3))


def means(image: Image.Image) -> np.ndarray:
    return PLAIN(image).mean(axis=(1, 2)) / 255


def test_images_of_every_kind_are_embedded_alike(tmp_path: Path):
    image = noise_image(9, 13)
    pixels, path = np.asarray(image), tmp_path / "a.png"
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    image.save(path)
    kinds = [str(path), path, np.str_(path), image]
    kinds += [pixels, pixels / 255, (pixels / 255).astype(np.float32), pixels.transpose(2, 0, 1)]
    kinds += [tensor, tensor / 255, (tensor / 255).double(), (tensor / 255).requires_grad_()]
    found = ImageEmbedder(Means()).transform(kinds)
    assert found.shape == (len(kinds), 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.tile(means(image), (len(kinds), 1)), rtol=1e-5)
    for alone in (image, str(path), pixels[None], tensor[None]):
        np.testing.assert_array_equal(ImageEmbedder(Means()).transform(alone), found[:1])
    np.testing.assert_array_equal(ImageEmbedder(Means()).transform(iter(kinds)), found)
    np.testing.assert_array_equal(ImageEmbedder(Means()).transform(np.array([str(path)] * 2)), found[:2])


def test_gray_deep_and_transparent_arrays():
    gray = np.asarray(noise_image(9, 13, "L"))
    clear = np.dstack([np.asarray(noise_image(9, 13)), np.zeros((9, 13), np.uint8)])
    deep = gray.astype(np.uint16) * 257
    tensor = torch.from_numpy(gray.copy())
    kinds = [gray, gray[..., None], gray[None], tensor, tensor[None], deep]
    found = ImageEmbedder(Means()).transform([*kinds, clear])
    np.testing.assert_allclose(found[:-1], np.tile(means(Image.fromarray(gray)), (6, 1)), rtol=1e-5)
    np.testing.assert_array_equal(found[-1], [1, 1, 1])  # on white


def test_images_are_upright_from_files_and_from_memory(tmp_path: Path):
    image, exif = noise_image(8, 16), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    for item in (tmp_path / "turned.png", Image.open(BytesIO((tmp_path / "turned.png").read_bytes()))):
        upright = read_photo(item)
        assert upright.size == (8, 16)
        assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


def test_batches_are_of_the_size_asked_for_and_results_in_order():
    images = [Image.new("RGB", (5 + i, 9), (i, 2 * i, 100)) for i in range(11)]
    trunk = Means()
    found = ImageEmbedder(trunk, batch_size=4).transform(images)
    assert trunk.batches == [4, 4, 3]
    np.testing.assert_allclose(found * 255, [(i, 2 * i, 100) for i in range(11)], rtol=1e-5)


def test_a_batch_has_as_many_pixels_as_84_x_84_images_had():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [images_at_a_time(side**2, cpu) for side in (1, 28, 84, 168, 224, 5000)] == [128, 128, 128, 32, 18, 1]
    assert [images_at_a_time(side**2, cuda) for side in (28, 84, 224)] == [4096, 4096, 576]


def test_what_is_decoded_ahead_is_bounded_however_many_images_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_embedder, "AHEAD_PIXELS", 0)
    given = 0

    def many() -> Iterator[Image.Image]:
        nonlocal given
        while given < 10_000:
            given += 1
            yield Image.new("RGB", (8, 8))

    images = prepared(many(), PLAIN)
    for taken in range(1, 50):
        next(images)
        assert given <= taken + 2 * THREADS
    images.close()


def test_a_large_jpeg_is_decoded_smaller_and_differs_by_less_than_a_gray_level(tmp_path: Path):
    soft = noise_image(30, 40).resize((640, 480), Image.Resampling.BICUBIC)
    soft.save(tmp_path / "a.jpg", quality=95)
    assert read_photo(tmp_path / "a.jpg").size == (640, 480)
    assert read_photo(tmp_path / "a.jpg", 81).size == (640, 480)
    assert read_photo(tmp_path / "a.jpg", 80).size == (320, 240)  # three times as many at least are left
    assert read_photo(tmp_path / "a.jpg", 10).size == (80, 60)
    form = Preprocessing((64, 64), 64, "bicubic")
    small, whole = (form(read_photo(tmp_path / "a.jpg", side)).astype(float) for side in (64, None))
    assert 0 < np.abs(small - whole).mean() < 0.5
    soft.save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png", 10).size == (640, 480)


def test_an_embedder_without_preprocessing_says_what_to_give():
    embedder = Embedder(Conv4(in_channels=3, channels=4))
    with pytest.raises(UsageError, match=r"got Embedder, .*Preprocessing\(size=\(84, 84\), scale_to=84\)"):
        ImageEmbedder(embedder).transform([noise_image(9, 9)])
    found = ImageEmbedder(embedder, Preprocessing((32, 32), 32)).transform([noise_image(9, 9)])
    assert found.shape == (1, 16)
    assert Embedder(Means()).preprocessing is PLAIN
    assert np.array_equal(
        ImageEmbedder(lambda images: images.flatten(1), PLAIN).transform([noise_image(8, 8)]).shape, (1, 192)
    )


def test_a_module_computes_in_eval_mode_and_has_its_modes_back():
    torch.manual_seed(0)
    embedder = Embedder(Conv4(in_channels=3, channels=4))
    embedder.trunk.blocks[0].eval()
    modes, before = [each.training for each in embedder.modules()], embedder.trunk.blocks[1].norm.running_mean.clone()
    images = [noise_image(20 + i, 30) for i in range(5)]
    form = Preprocessing((16, 16), 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = ImageEmbedder(embedder, form).transform(images)
    assert [each.training for each in embedder.modules()] == modes
    assert torch.equal(embedder.trunk.blocks[1].norm.running_mean, before)
    pixels = torch.from_numpy(np.stack([form(image) for image in images])).float() / 255
    np.testing.assert_allclose(found, embedder.eval()(pixels).detach(), rtol=1e-4, atol=1e-5)
    half = ImageEmbedder(embedder.double(), form).transform(images)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, found, rtol=1e-3, atol=1e-5)


def test_threads_may_share_one():
    torch.manual_seed(0)
    shared = ImageEmbedder(Embedder(Conv4(in_channels=3, channels=4)), Preprocessing((16, 16), 16), progress=False)
    items = [[noise_image(20 + i, 30 + k) for k in range(3)] for i in range(8)]
    expected = [shared.transform(each) for each in items]
    started = threading.Barrier(4)

    def embed(number: int) -> np.ndarray:
        if number < 4:
            started.wait()
        return shared.transform(items[number])

    with ThreadPoolExecutor(4) as pool:
        for found, each in zip(pool.map(embed, range(8)), expected, strict=True):
            np.testing.assert_array_equal(found, each)
    assert shared.embedder.training


def test_it_is_a_transformer_of_scikit_learn():
    pytest.importorskip("pandas", reason="pandas is not installed (the extra tables)")
    embedder, images = ImageEmbedder(Means(), batch_size=2), [noise_image(9, 9 + i) for i in range(5)]
    copy = clone(embedder)
    assert copy.get_params() == {**embedder.get_params(), "embedder": copy.embedder}
    assert copy.fit(images) is copy
    expected = embedder.transform(images)
    np.testing.assert_array_equal(copy.fit_transform(images), expected)
    assert list(embedder.get_feature_names_out()) == ["imageembedder0", "imageembedder1", "imageembedder2"]
    scaled = make_pipeline(embedder, StandardScaler()).fit(images).transform(images)
    np.testing.assert_allclose(scaled, (expected - expected.mean(axis=0)) / expected.std(axis=0), rtol=1e-3, atol=1e-4)
    table = copy.set_output(transform="pandas").transform(images)
    assert list(table.columns) == list(embedder.get_feature_names_out())


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("nowhere.jpg", MissingFileError, "expected an image at nowhere.jpg, got no such file"),
        (Path(), MissingFileError, "got a folder"),
        (3, UsageTypeError, "expected an image, got int"),
        (np.zeros((9, 9, 5), np.uint8), UsageError, r"1, 3 or 4 channels, got shape \(9, 9, 5\)"),
        (torch.zeros(9, 9, 3), UsageError, r"a tensor \(H, W\) or \(C, H, W\).* got shape \(9, 9, 3\)"),
        (np.zeros((0, 9), np.uint8), UsageError, r"got shape \(0, 9\)"),
        (np.full((9, 9), 1.5), UsageError, r"floats in \[0, 1\], got 1.5 to 1.5; divide"),
        (np.full((9, 9), np.nan), UsageError, r"got nan to nan"),
        (np.zeros((9, 9), np.int64), UsageTypeError, r"got int64; convert them with .astype"),
        (torch.zeros(9, 9).long(), UsageTypeError, r"got torch.int64; convert them with .byte"),
    ],
)
def test_what_is_no_image_is_one_clear_error(item: Any, error: type[Exception], message: str):
    for items in ([item], [noise_image(9, 9), item, noise_image(9, 9)]):
        with pytest.raises(error, match=message):
            ImageEmbedder(Means()).transform(items)


def test_broken_files_are_named_and_empty_or_odd_lists_refused(tmp_path: Path):
    noise_image(90, 90).save(tmp_path / "whole.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    with pytest.raises(BrokenImageError, match=r"broken\.png"):
        ImageEmbedder(Means()).transform([tmp_path / "whole.png", broken])
    with pytest.raises(BrokenImageError, match="a PIL image"):
        ImageEmbedder(Means()).transform([Image.open(BytesIO(broken.read_bytes())), noise_image(9, 9)])
    with pytest.raises(UsageError, match="at least one image, got none"):
        ImageEmbedder(Means()).transform([])
    with pytest.raises(UsageError, match=r"an array of 4 axes, images first, got shape \(9, 9, 3\); put"):
        ImageEmbedder(Means()).transform(np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(UsageTypeError, match="a list of images, got 3"):
        ImageEmbedder(Means()).transform(3)
    with pytest.raises(UsageError, match="batch_size"):
        ImageEmbedder(Means(), batch_size=0).transform([noise_image(9, 9)])


def test_embeddings_that_are_not_finite_are_counted():
    def divided(images: Tensor) -> Tensor:
        return 1 / images[:, :, 0, 0]

    images = [Image.new("RGB", (8, 8), (9, 9, value)) for value in (5, 0, 7, 0)]
    with pytest.raises(UsageError, match="finite embeddings, got NaN or infinity in 2 of 4 rows, first in row 1"):
        ImageEmbedder(divided, PLAIN).transform(images)
