"""The global generators of torch, numpy and Python: our code uses none, but dropout, PML and a user's parts may."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators for a block and restores the caller's states at the end."""
    with restored():
        torch.manual_seed(seed)
        seed_others(seed)
        yield


@contextmanager
def restored() -> Iterator[None]:
    """Restores the caller's states at the end, whatever is seeded or drawn in the block."""
    before = global_state()
    try:
        yield
    finally:
        set_global_state(before)


def seed_quickly(seed: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and one device: `torch.manual_seed` takes 20 times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    seed_others(seed)


def seed_others(seed: int) -> None:
    """Seeds the global generators of numpy and Python."""
    np.random.seed(seed % 2**32)  # noqa: NPY002 (it is the global one)
    random.seed(seed)


def global_state() -> dict[str, Any]:
    """Returns the states of all global generators, as tensors, numbers and strings."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # empty where there is no GPU
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, torch.tensor(numbers), gauss],
    }


def set_global_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():  # a GPU's run may resume on a CPU, and vice versa
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
