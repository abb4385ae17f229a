"""MAML on a GPU: the gradients and logits of a CPU."""

import pytest
import torch
from torch import nn

from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.episodes import Episode
from pml_fewshot.trainers.maml import MAMLTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("parallel", ["auto", "loop", "grouped"])
@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 3},
        {"inner_steps": 3, "checkpoint_steps": True, "task_chunk": 2},
        {"batch_norm": "inductive", "learn_inner_lr": "per_layer"},
        {"first_order": True},
        {"reptile": True},
    ],
    ids=str,
)
def test_gradients_and_logits_of_a_cpu(options, parallel):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 5, 4, 1, 28, 28, generator=generator, dtype=torch.float64)
    results = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = nn.Sequential(Conv4(channels=8), nn.Linear(8, 5))
        maml = MAMLTrainer(network, 0.25, parallel=parallel, **options).double().to(device)
        batch = Episode(images[:, :, :1], images[:, :, 1:]).to(device)
        maml(batch).backward()
        if parallel == "auto":
            assert maml.inner.parallel == {"cpu": "grouped", "cuda": "vmap"}[device]
        gradient = torch.cat([p.grad.flatten() for p in maml.parameters() if p.requires_grad]).cpu()
        results[device] = gradient, maml.classify(batch.support, batch.query.flatten(1, 2)).cpu()
    for there, here in zip(results["cuda"], results["cpu"], strict=True):
        assert (there - here).norm() <= 1e-8 * here.norm()
