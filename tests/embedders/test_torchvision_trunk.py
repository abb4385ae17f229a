"""TorchvisionTrunk: a torchvision classifier without its last linear layer."""

from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.embedders.torchvision_trunk import TorchvisionTrunk
from tests.embedders.formulas import noise


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
