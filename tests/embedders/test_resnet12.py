"""ResNet12 against its blocks written out on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.embedders.resnet12 import ResNet12
from tests.embedders.formulas import Weights, batch_norm, check, noise, used


def leaky(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 0.1 * values)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_the_blocks_written_out(training: bool, pool: bool):
    def written_out(weights: Weights, images: Tensor) -> Tensor:
        def convolved(values: Tensor, conv: str, norm: str, padding: int) -> Tensor:
            return batch_norm(weights, norm, F.conv2d(values, weights[f"{conv}.weight"], padding=padding), training)

        for block in (f"blocks.{i}" for i in range(4)):
            out = leaky(convolved(images, f"{block}.convs.0", f"{block}.norms.0", 1))
            out = leaky(convolved(out, f"{block}.convs.1", f"{block}.norms.1", 1))
            out = convolved(out, f"{block}.convs.2", f"{block}.norms.2", 1)
            images = F.max_pool2d(leaky(out + convolved(images, f"{block}.shortcut.0", f"{block}.shortcut.1", 0)), 2)
        nodes = [images[:, :, i, j] for i in range(2) for j in range(2)]
        return sum(nodes) / 4 if pool else torch.stack(nodes, dim=2).flatten(1)

    network = ResNet12(2, (3, 4, 5, 6)) if pool else ResNet12(2, (3, 4, 5, 6), pool=False)
    check(used(network).train(training), noise(3, 2, 37, 32, seed=99), written_out)


def test_at_84_its_map_has_25_nodes():
    with torch.device("meta"):
        assert ResNet12(pool=False)(torch.zeros(2, 3, 84, 84)).shape == (2, 16_000)


def test_the_default_has_the_papers_size_and_a_signal_that_neither_dies_nor_explodes():
    """12.4 million parameters (Lee et al. 2019), 640 dimensions."""
    torch.manual_seed(0)
    network = ResNet12().eval()  # batch norm would hide how large the weights are
    assert sum(p.numel() for p in network.parameters()) == 12_424_320
    with torch.no_grad():
        out = network(noise(4, 3, 20, 16, dtype=torch.float32))
    assert out.shape == (4, 640)
    assert 0.05 < out.std().item() < 20
