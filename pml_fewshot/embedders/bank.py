"""EmbeddingBank: a data set's embeddings, computed once and judged many times."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pml_fewshot.checks import check_finite, check_labels, require


@dataclass(frozen=True)
class EmbeddingBank:
    """Embeddings of a data set with its labels.

    Args:
        embeddings: (M, D) floats.
        labels: (M,) int64; any values, 64 bits throughout.

    Raises:
        ValueError: another shape, labels of another length, or NaN or infinite embeddings (how many, which first).
        TypeError: labels are not int64 or embeddings not floats.
    """

    embeddings: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.embeddings.shape)
        require(len(shape) == 2, "embeddings of shape (M, D)", f"shape {shape}", "flatten each item to one row")
        if not self.embeddings.is_floating_point():
            raise TypeError(f"expected float embeddings, got {self.embeddings.dtype}; convert them with .float()")
        check_labels(self.labels, len(self.embeddings), "the bank's")
        check_finite(self.embeddings, "embeddings")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "EmbeddingBank":
        return EmbeddingBank(self.embeddings.to(device), self.labels.to(device))
