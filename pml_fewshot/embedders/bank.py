"""EmbeddingBank: a data set's embeddings, computed once and judged many times."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import check_finite, check_labels, require


@dataclass(frozen=True)
class EmbeddingBank:
    """Embeddings of a data set with its labels.

    Args:
        embeddings: (M, D) floats; a tensor over a memory map stays one (`load_bank` makes it).
        labels: (M,) int64; any values, 64 bits throughout.
        source: fingerprint of the data set that was embedded, so that results from the bank and from the set are known
            to be on the same episodes; empty when unknown.

    Raises:
        ValueError: another shape, labels of another length, or NaN or infinite embeddings (how many, which first).
        TypeError: labels are not int64 or embeddings not floats.
    """

    embeddings: Tensor
    labels: Tensor
    source: str = ""

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
        return EmbeddingBank(self.embeddings.to(device), self.labels.to(device), self.source)

    def fingerprint(self) -> str:
        """16 hex digits: which set this is, by its source where known, else by its labels."""
        if self.source:
            return self.source
        return hashlib.blake2b(self.labels.cpu().contiguous().numpy().astype("<i8").data, digest_size=8).hexdigest()

    def centred(self, mean: Tensor) -> "EmbeddingBank":
        """Takes a mean (D,) off every embedding: that of the training classes' bank (Wang et al. 2019, SimpleShot)."""
        width = self.embeddings.shape[1]
        require(
            mean.shape == (width,), f"a mean of shape ({width},)", f"{tuple(mean.shape)}", "use bank.embeddings.mean(0)"
        )
        return EmbeddingBank(self.embeddings - mean.to(self.embeddings), self.labels, self.source)

    def normalized(self) -> "EmbeddingBank":
        """Scales every embedding to length 1; with `centred` before it, SimpleShot's "CL2N"."""
        return EmbeddingBank(F.normalize(self.embeddings, dim=1), self.labels, self.source)
