"""What is moved to a GPU is pinned first; told without one, from what torch is asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pml_fewshot.sampling.batches import Batch
from pml_fewshot.sampling.episodes import Episode, EpisodeIndex

FLOATS, NUMBERS = torch.rand(1, 2, 3, 3)[:, :, :1], torch.zeros(1, 2, 1, dtype=torch.int64)  # the former with gaps
MOVED = [
    Episode(FLOATS, FLOATS, NUMBERS),
    EpisodeIndex(NUMBERS, NUMBERS, NUMBERS),
    Batch(FLOATS, torch.zeros(1, dtype=torch.int64), FLOATS),
]


@pytest.mark.parametrize("given", MOVED, ids=lambda given: type(given).__name__)
def test_copies_to_a_gpu_are_of_pinned_memory_and_not_waited_for(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    copies: list[tuple[str, bool, bool]] = []
    empty_like = torch.empty_like

    def in_pinned_memory(tensor: Tensor, pin_memory: bool) -> Tensor:
        assert pin_memory
        pinned.append(empty_like(tensor))
        return pinned[-1]

    def to(tensor: Tensor, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        is_pinned = tensor.is_contiguous() and any(tensor is each for each in pinned)
        copies.append((str(device), non_blocking, is_pinned))
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", in_pinned_memory)
        patch.setattr(Tensor, "to", to)
        moved = [given.to(device) for device in ("cuda", torch.device("cuda:1"), "cpu")]
    assert copies == [("cuda", True, True)] * 3 + [("cuda:1", True, True)] * 3 + [("cpu", True, False)] * 3
    for each in moved:
        assert all(torch.equal(value, getattr(given, name)) for name, value in vars(each).items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_arrives_is_what_was_sent() -> None:
    images = torch.rand(500, 3, 84, 84)
    moved = Batch(images, torch.arange(500)).to("cuda")
    assert torch.equal(moved.images.cpu(), images)
    assert moved.labels.tolist() == list(range(500))
