"""Moving tensors to a GPU without waiting for it."""

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns the tensor on `device` (itself if it is there already); on a GPU perhaps before its values have arrived.

    A copy from memory that is pageable or has gaps cannot run asynchronously: such a tensor is copied to pinned memory
    first.
    """
    if torch.device(device).type == "cuda" and tensor.is_cpu and not tensor.is_pinned():
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)
