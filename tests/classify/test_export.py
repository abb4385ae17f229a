"""Exported files answer as the classifier does, in onnxruntime and by torch.export, at any number of images."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor, nn

from pml_fewshot import (
    Conv4,
    Embedder,
    FewShotClassifier,
    ImageEmbedder,
    Preprocessing,
    ResNet12,
    TimmTrunk,
    TorchvisionTrunk,
    UsageError,
    cosine_classifier,
    export_onnx,
    export_program,
    logistic_regression,
    nearest_neighbour,
    nearest_prototype,
    ridge_regression,
    update_onnx,
)

NAMES = ["ant", "bee", "cat", "dog"]


def drawn(count: int, label: int, channels: int = 1, side: int = 28) -> Tensor:
    """Images (n, C, H, W) uint8 of a class: its own pattern, and noise."""
    generator = torch.Generator().manual_seed(100 * label + count)
    pattern = torch.randint(216, (1, channels, side, side), generator=torch.Generator().manual_seed(label))
    return (pattern + torch.randint(40, (count, channels, side, side), generator=generator)).byte()


def taught(embedder: Any, sizes: tuple[int, ...] = (1, 4, 2), **options: Any) -> FewShotClassifier:
    form = embedder.preprocessing
    X = [image for label, size in enumerate(sizes) for image in drawn(size, label, form.channels, form.size[0])]
    return FewShotClassifier(embedder, **options).fit(X, np.repeat(NAMES[: len(sizes)], sizes))


def small(trunk: nn.Module, side: int = 28, channels: int = 1) -> ImageEmbedder:
    """A trunk whose batch norms have the statistics of noise."""
    embedder = Embedder(trunk)
    for part in embedder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean over all batches, of which there is one
    form = Preprocessing((side, side), side, channels=channels)
    with torch.no_grad():
        embedder.train()(drawn(32, 7, channels, side) / 255)
    return ImageEmbedder(embedder.eval(), form)


@pytest.fixture(scope="module")
def conv4() -> ImageEmbedder:
    torch.manual_seed(0)
    return small(Conv4())


def session_of(path: Path) -> Any:
    return pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])


def answers_of(path: Path, images: Tensor) -> dict[str, np.ndarray]:
    session = session_of(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))


def check(answers: Callable[[Tensor], dict[str, np.ndarray]], what: Any, images: str = "uint8") -> None:
    """That the answers are those of the classifier or embedder, for one image and for 64."""
    embedder = getattr(what, "embedder", what) if isinstance(what, FewShotClassifier) else what
    form = embedder.preprocessing
    for count in (1, 64):
        photos = drawn(count, 2, form.channels, form.size[0])
        got = answers(photos if images == "uint8" else photos / 255)
        expected = embedder.transform(photos)
        np.testing.assert_allclose(got["embeddings"], expected, atol=1e-4 * abs(expected).max())
        if isinstance(what, FewShotClassifier):
            np.testing.assert_allclose(got["probabilities"], what.predict_proba(photos), atol=1e-4)
            np.testing.assert_allclose(got["similarities"].max(axis=1), what.similarity(photos), atol=1e-4)


@pytest.mark.long
def test_a_file_answers_as_the_classifier_and_learns_a_class(conv4: ImageEmbedder, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path, classifier = tmp_path / "animals.onnx", taught(conv4, reject="auto")
    weights = {name: value.clone() for name, value in conv4.embedder.state_dict().items()}
    conv4.embedder.train()
    conv4.embedder.trunk.blocks[1].eval()
    modes = [part.training for part in conv4.embedder.modules()]
    try:
        export_onnx(classifier, path)
        assert [part.training for part in conv4.embedder.modules()] == modes
        assert all(torch.equal(value, weights[name]) for name, value in conv4.embedder.state_dict().items())
    finally:
        conv4.embedder.eval()
    check(partial(answers_of, path), classifier)
    shapes = {value.name: value.shape for value in (*session_of(path).get_inputs(), *session_of(path).get_outputs())}
    assert shapes == {
        "images": ["batch", 1, 28, 28],
        "probabilities": ["batch", 3],
        "similarities": ["batch", 3],
        "embeddings": ["batch", 64],
    }

    classifier.partial_fit(drawn(3, 3), ["dog"] * 3)
    update_onnx(classifier, path)
    check(partial(answers_of, path), classifier)
    photos = torch.cat([drawn(20, label) for label in range(5)])
    got = answers_of(path, photos)
    about = json.loads(session_of(path).get_modelmeta().custom_metadata_map["pml_fewshot"])
    likeliest = np.array(about["classes"])[got["probabilities"].argmax(axis=1)]
    labels = np.where(got["similarities"].max(axis=1) < about["threshold"], "unknown", likeliest)
    assert labels.tolist() == classifier.predict(photos).tolist()
    assert set(labels) == {*NAMES, "unknown"}
    assert about["preprocessing"] == {"size": [28, 28], "scale_to": 28, "resampling": "bilinear", "channels": 1}
    assert about["temperature"] == classifier.model_.temperature
    assert about["calibrated"] is True

    content = path.read_bytes()
    other = taught(small(Conv4()))
    with pytest.raises(
        UsageError, match=r"Embedder\(Conv4\) of weights crc32:\w+:\d+, got that of a .*Conv4\) of weights"
    ):
        update_onnx(other, path)
    assert path.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("head", [nearest_prototype, cosine_classifier, ridge_regression, logistic_regression])
def test_each_head_that_is_a_function_of_the_embedding(head: Any, conv4: ImageEmbedder, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    classifier = taught(conv4, head=head)
    export_onnx(classifier, tmp_path / "a.onnx", images="float")
    check(partial(answers_of, tmp_path / "a.onnx"), classifier, "float")
    one = taught(conv4, (3,), head=head)
    update_onnx(one, tmp_path / "a.onnx")  # one class, known of one head, where there was another
    check(partial(answers_of, tmp_path / "a.onnx"), one, "float")


def of_timm(name: str) -> ImageEmbedder:
    timm = pytest.importorskip("timm")
    return small(TimmTrunk(timm.create_model(name, num_classes=0)), 160, 3)


def vit_of_torchvision() -> ImageEmbedder:
    from torchvision.models import VisionTransformer

    return small(TorchvisionTrunk(VisionTransformer(32, 8, 2, 2, 32, 64)), 32, 3)


TRUNKS: dict[str, Callable[[], ImageEmbedder]] = {
    "Conv4": lambda: small(Conv4()),
    "ResNet12": lambda: small(ResNet12(widths=(8, 16, 24, 32)), 32, 3),
    "torchvision resnet": lambda: small(TorchvisionTrunk("resnet18"), 64, 3),
    "torchvision mobilenet": lambda: small(TorchvisionTrunk("mobilenet_v3_small"), 64, 3),
    "torchvision vit": vit_of_torchvision,
    "timm efficientnet": lambda: of_timm("test_efficientnet"),
    "timm vit": lambda: of_timm("test_vit"),
}


@pytest.mark.slow
@pytest.mark.parametrize("images", ["uint8", "float"])
@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_each_trunk(trunk: Callable[[], ImageEmbedder], images: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    embedder = trunk()
    classifier = taught(embedder)
    export_program(classifier, tmp_path / "a.pt2", images=images)
    check(partial(programs_answers, tmp_path / "a.pt2"), classifier, images)
    pytest.importorskip("onnxscript")
    export_onnx(classifier, tmp_path / "a.onnx", images=images)
    check(partial(answers_of, tmp_path / "a.onnx"), classifier, images)


def programs_answers(path: Path, images: Tensor) -> dict[str, np.ndarray]:
    outputs = [output.numpy() for output in torch.export.load(path).module()(images)]
    return dict(zip(["probabilities", "similarities", "embeddings"], outputs, strict=True))


@pytest.mark.slow
def test_a_file_of_an_embedder_becomes_one_of_a_classifier_that_forgets(conv4: ImageEmbedder, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / "a.onnx"
    export_onnx(conv4.embedder, path, image_size=28, channels=1)
    assert [output.name for output in session_of(path).get_outputs()] == ["embeddings"]
    check(partial(answers_of, path), conv4)
    classifier = taught(conv4)
    update_onnx(classifier, path)
    check(partial(answers_of, path), classifier)
    size = path.stat().st_size
    update_onnx(classifier.remove_class("ant"), path)
    check(partial(answers_of, path), classifier)
    assert path.stat().st_size < size  # nothing of the first is left in it


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [torch.optim.swa_utils.AveragedModel, nn.Module.bfloat16, nn.Module.double])
def test_wrapped_embedders_and_other_precisions(wrap: Any, conv4: ImageEmbedder, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    embedder = wrap(Embedder(Conv4()))
    export_onnx(ImageEmbedder(embedder, conv4.preprocessing), tmp_path / "a.onnx")
    images = drawn(4, 1)
    expected = embedder.float()(images / 255) if not embedder.training else embedder.float().eval()(images / 255)
    np.testing.assert_allclose(answers_of(tmp_path / "a.onnx", images)["embeddings"], expected.detach(), atol=1e-4)


def test_torch_export_of_an_embedder(conv4: ImageEmbedder, tmp_path: Path) -> None:
    export_program(conv4, tmp_path / "a.pt2", images="float")
    extra = {"pml_fewshot.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    check(lambda images: {"embeddings": program(images).numpy()}, conv4, "float")
    assert json.loads(extra["pml_fewshot.json"])["images"] == "float"
    export_program(conv4, tmp_path / "a.pt2", image_size=(32, 48))
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    assert program(torch.zeros(3, 1, 32, 48, dtype=torch.uint8)).shape == (3, 64 * 2 * 3)
    about = json.loads(extra["pml_fewshot.json"])
    assert (about["image_size"], about["preprocessing"]) == ([32, 48], None)  # that is known of 28 x 28


class Other(nn.Module):
    """Is another network where an exporter looks at it."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * (2 if torch.compiler.is_compiling() else 1)


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.mean() > 0 else -images.flatten(1)


def test_what_differs_from_torch_or_cannot_be_traced_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"embeddings of torch.export within 0.0001 of torch's, got a difference"):
        export_program(Other(), path, image_size=8)
    with pytest.raises(UsageError, match=r"that torch.export can trace, got an error \(.*data-dependent"):
        export_program(Branching(), path, image_size=8)
    with pytest.raises(UsageError, match="images of 1 channels"):
        export_program(Embedder(Conv4()), path, image_size=28)
    assert path.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt2"]


@pytest.mark.slow
def test_operations_that_onnx_lacks_are_named(conv4: ImageEmbedder, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    distance = LpDistance(p=1, normalize_embeddings=False)
    classifier = taught(conv4, head=partial(nearest_prototype, distance=distance))
    with pytest.raises(UsageError, match=r"got an error \(.*cdist.*export_program takes more"):
        export_onnx(classifier, tmp_path / "a.onnx")
    export_program(classifier, tmp_path / "a.pt2")
    check(partial(programs_answers, tmp_path / "a.pt2"), classifier)


def test_what_cannot_be_exported_is_one_clear_error(conv4: ImageEmbedder, tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    with pytest.raises(UsageError, match=r"logistic_regression as head, got nearest_neighbour; choose one"):
        export_program(taught(conv4, head=nearest_neighbour), path)
    with pytest.raises(UsageError, match="an embedder, that is a torch module, got None"):
        export_program(FewShotClassifier().fit(np.eye(3), ["a", "b", "b"]), path)
    with pytest.raises(UsageError, match="a size of images, got Embedder without preprocessing; give image_size="):
        export_program(Embedder(Conv4()), path)
    with pytest.raises(UsageError, match="images as one of 'uint8', 'float', got 'bytes'"):
        export_program(conv4, path, images="bytes")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="not fitted"):
        export_program(FewShotClassifier(conv4), path)
    assert not path.exists()


def test_files_that_are_none_of_ours(conv4: ImageEmbedder, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    classifier, path = taught(conv4), tmp_path / "a.onnx"
    with pytest.raises(FileNotFoundError, match="write it with export_onnx"):
        update_onnx(classifier, path)
    path.write_bytes(b"\x08\xff no model")
    with pytest.raises(UsageError, match="got a broken one"):
        update_onnx(classifier, path)
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])).SerializeToString())
    with pytest.raises(UsageError, match="got one of another tool"):
        update_onnx(classifier, path)


def test_without_the_extra_or_with_an_old_torch(conv4: ImageEmbedder, tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ImportError, match=r"pip install 'pml_fewshot\[onnx\]'"):
            export_onnx(conv4, tmp_path / "a.onnx")
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(UsageError, match=r"torch 2.7 or newer for ONNX, got 2\.6"):
        export_onnx(conv4, tmp_path / "a.onnx")
