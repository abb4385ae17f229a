"""MAML on a GPU: the gradients and logits of a CPU."""

from typing import Any

import pytest
import torch

from tests.trainers.maml.small_maml import close, episodes, gradient, trainer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("parallel", ["auto", "loop", "threads"])
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
def test_gradients_and_logits_of_a_cpu(options: dict[str, Any], parallel: str) -> None:
    maml, results = trainer(parallel=parallel, **options), []
    for device in ("cpu", "cuda"):  # the same trainer, so that what it tried out on a CPU must not stay
        batch = episodes(shots=1).to(device)
        slopes = gradient(maml.to(device), batch).cpu()
        results.append((slopes, maml.classify(batch.support, batch.query.flatten(1, 2)).cpu()))
    assert parallel != "auto" or maml.inner._modes == {"cpu": "threads", "cuda": "vmap"}
    assert all(close(there, here, 1e-8) for here, there in zip(*results, strict=True))
