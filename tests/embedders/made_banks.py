"""A bank with awkward labels, and how to tell that another is the same."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.embedders.bank import EmbeddingBank

LABELS = np.array([3, -1, 3, -1, 2**53 + 1, 7], dtype=np.int64)  # one that no float64 holds
EMBEDDINGS = np.random.default_rng(0).normal(3, size=(6, 4)).astype(np.float32)
ROWS, NUMBERS = torch.from_numpy(EMBEDDINGS), torch.from_numpy(LABELS)
SOURCE = "0123456789abcdef"
TEXTS = ["cat", "ant", "cat", "dog", "bee", "ant"]
NAMES, NUMBERED = ("ant", "bee", "cat", "dog"), [2, 0, 2, 3, 1, 0]


def bank(dtype: torch.dtype = torch.float32, source: str = "") -> EmbeddingBank:
    return EmbeddingBank(ROWS.to(dtype), NUMBERS, source, note="of a test")


def check(made: EmbeddingBank, embeddings: Tensor = ROWS, labels: Any = LABELS, names: Any = ()) -> None:
    """That the bank is the expected one, to the last bit."""
    assert (made.embeddings.dtype, made.labels.dtype) == (embeddings.dtype, torch.int64)
    assert torch.equal(made.embeddings, embeddings)
    assert made.labels.tolist() == list(labels)
    assert made.class_names == tuple(names)
