"""TorchvisionTrunk: a torchvision classifier without its head; and that torchvision can be imported at all."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import pml_fewshot.torchvision_import as torchvision_import
from pml_fewshot.embedders.torchvision_trunk import TorchvisionTrunk

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_torchvision_is_imported_where_its_operators_do_not_fit_torch(tmp_path: Path):
    """A made-up torchvision that, as the real one, wants to describe its operators at import."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n@torch.library.register_fake('torchvision::nms')\ndef nms(dets, scores, iou_threshold): ...\n"
    )
    program = (
        "import runpy, sys\n"
        f"runpy.run_path({torchvision_import.__file__!r})['ensure_torchvision']()\n"
        f"import torchvision; assert torchvision.__file__.startswith({str(tmp_path)!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_faults_of_torchvision_are_not_hidden(tmp_path: Path):
    package = tmp_path / "torchvision"
    package.mkdir()
    program = f"import runpy; runpy.run_path({torchvision_import.__file__!r})['ensure_torchvision']()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for fault in ("RuntimeError('no memory')", "ImportError('no such file')"):
        (package / "__init__.py").write_text(f"raise {fault}\n")
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert fault.split("'")[1] in done.stderr


def test_resnet18_gives_its_pooled_features_of_normalised_images():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().eval()
    children = [child for name, child in model.named_children() if name != "fc"]
    trunk = TorchvisionTrunk(model).eval()
    images = noise(2, 3, 40, 40)
    with torch.no_grad():
        expected = nn.Sequential(*children)((images - MEAN) / STD).flatten(1)
        assert expected.shape == (2, 512)
        torch.testing.assert_close(trunk(images), expected)
        grey = noise(2, 1, 40, 40)
        torch.testing.assert_close(trunk(grey), trunk(torch.cat([grey, grey, grey], dim=1)))


def test_a_factory_and_a_partial_of_one_are_called():
    from torchvision.models import mobilenet_v3_small

    for model in (mobilenet_v3_small, partial(mobilenet_v3_small, num_classes=7)):
        trunk = TorchvisionTrunk(model).eval()
        with torch.no_grad():
            assert trunk(noise(1, 3, 32, 32)).shape == (1, 1024)


def test_the_pixels_statistics_are_no_part_of_a_checkpoint():
    trunk = TorchvisionTrunk(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert trunk(noise(5, 3, 2, 2)).shape == (5, 4)
    assert all(name.startswith("model.") for name in trunk.state_dict())


def test_a_model_without_a_linear_layer_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"ends in a linear layer, got Sequential, which has none; give a module"):
        TorchvisionTrunk(nn.Sequential(nn.Conv2d(3, 4, 1)))
