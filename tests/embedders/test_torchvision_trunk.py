"""TorchvisionTrunk: a torchvision classifier without its last linear layer."""

from collections import namedtuple
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.embedders.torchvision_trunk import TorchvisionTrunk
from tests.embedders.formulas import noise
from tests.embedders.test_preprocessing import noise_image


def normalized(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def test_resnet18_gives_its_pooled_features_of_normalized_images():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().eval()
    children = [child for name, child in model.named_children() if name != "fc"]
    trunk = TorchvisionTrunk(model).eval()
    images, gray = (noise(2, channels, 40, 40, dtype=torch.float32) for channels in (3, 1))
    with torch.no_grad():
        expected = nn.Sequential(*children)(normalized(images)).flatten(1)
        assert expected.shape == (2, 512)
        torch.testing.assert_close(trunk(images), expected)
        torch.testing.assert_close(trunk(gray), trunk(torch.cat([gray, gray, gray], dim=1)))


def test_only_the_last_linear_layer_is_removed_and_the_pixels_statistics_are_no_part_of_a_checkpoint():
    trunk = TorchvisionTrunk(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert trunk(torch.zeros(5, 3, 2, 2)).shape == (5, 4)
    assert list(trunk.state_dict()) == ["model.1.weight", "model.1.bias"]
    assert trunk.double().mean.dtype == trunk.std.dtype == torch.float64  # but they move with it


def test_of_outputs_with_auxiliary_heads_the_main_one_is_taken():
    class Auxiliary(nn.Sequential):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return namedtuple("Outputs", ["logits", "aux_logits"])(super().forward(images), -images)

    images = noise(5, 3, 2, 2, dtype=torch.float32)
    embeddings = TorchvisionTrunk(Auxiliary(nn.Flatten(), nn.Linear(12, 4)))(images)
    torch.testing.assert_close(embeddings, normalized(images).flatten(1))


def test_what_is_no_model_with_a_linear_layer_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match=r"ends in a linear layer, got Sequential, which has none; give a module"):
        TorchvisionTrunk(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(UsageTypeError, match=r"expected a model, got .*; call it"):
        TorchvisionTrunk(nn.Linear)  # type: ignore[arg-type]


def test_preprocessing_and_normalization_are_those_of_the_weights():
    from torchvision.models import EfficientNet_B1_Weights, EfficientNet_V2_L_Weights, ResNet18_Weights, resnet18

    image = noise_image(301, 200)
    others = EfficientNet_B1_Weights.IMAGENET1K_V2, EfficientNet_V2_L_Weights.DEFAULT  # 255 -> 240; mean and std 0.5
    for weights in (ResNet18_Weights.IMAGENET1K_V1, *others):
        trunk = TorchvisionTrunk(resnet18(), weights)  # which says whose weights the model has
        pixels = torch.from_numpy(trunk.preprocessing(image))[None] / 255
        torch.testing.assert_close(trunk.normalized(pixels)[0], weights.transforms()(image), atol=0.02, rtol=0)
        assert not trunk.training


def test_a_name_makes_the_model_with_weights_of_a_file_or_none(tmp_path: Path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=7)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    trunk, images = TorchvisionTrunk("resnet18", checkpoint=tmp_path / "w.pth"), noise(1, 3, 40, 40).float()
    assert not trunk.training
    assert trunk.name == "resnet18"
    torch.testing.assert_close(trunk(images), TorchvisionTrunk(model).eval()(images))
    fresh = TorchvisionTrunk("resnet18")
    assert fresh.training
    assert fresh.width == 512
    assert not fresh.model.bn1.running_mean.any()


def test_weights_are_downloaded_or_an_error_says_how_to_give_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import torchvision.models._api as api
    from torchvision.models import resnet18

    state = resnet18().state_dict()
    monkeypatch.setattr(api, "load_state_dict_from_url", lambda *_, **__: state)
    trunk = TorchvisionTrunk("resnet18", "IMAGENET1K_V1")
    assert torch.equal(trunk.model.conv1.weight, state["conv1.weight"])
    assert not trunk.training

    def fail(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(api, "load_state_dict_from_url", fail)
    with pytest.raises(
        UsageError, match=r"weights of resnet18 at https://.*resnet18.*\.pth, got an error .*checkpoint="
    ):
        TorchvisionTrunk("resnet18", "DEFAULT")


def test_names_that_do_not_exist_are_refused_with_the_near_one():
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        TorchvisionTrunk("resnet_18")
    with pytest.raises(UsageError, match="did you mean 'IMAGENET1K_V1'"):
        TorchvisionTrunk("resnet18", "IMAGENET_V1")
    with pytest.raises(UsageError, match="weights 'DEFAULT' with a model's name, got Sequential"):
        TorchvisionTrunk(nn.Sequential(nn.Linear(2, 2)), "DEFAULT")
    with pytest.raises(UsageError, match="got both"):
        TorchvisionTrunk("resnet18", "DEFAULT", "w.pth")
