"""Embedder: images to embeddings, by a trunk and an optional projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pml_fewshot.checks import UsageError, UsageTypeError, check_at_least_one
from pml_fewshot.data.dataset import FewShotDataset, as_dataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.modes import evaluating, widened
from pml_fewshot.parts.instantiate import Part, instantiate

# Images embedded at a time. On a CPU a batch whose largest activation stays near the cache is fastest (64 channels of
# 28 x 28 floats are 13 MB for 64 images); a GPU wants enough work for all of its units.
CPU_BATCH = 128
CUDA_BATCH = 4096


class Embedder(nn.Module):
    """Maps images to embeddings: trunk, then projection, then L2 normalization, the last two if asked for.

    Args:
        trunk: module (or a partial that makes one) from (B, C, H, W) to (B, D): Conv4(), ResNet12(),
            TorchvisionTrunk(...) or your own.
        projection: module (or partial) from (B, D) to (B, D'), for example `nn.Linear(512, 128)`.
        normalize: scale each embedding to length 1. Off by default: prototypical networks use unbounded Euclidean
            distance, and the distances of PML normalize by themselves where they should.
    """

    def __init__(
        self, trunk: Part[nn.Module], projection: Part[nn.Module] | None = None, normalize: bool = False
    ) -> None:
        super().__init__()
        self.trunk = instantiate(trunk)
        self.projection = instantiate(projection)
        self.normalize = normalize
        for name, part in (("trunk", self.trunk), ("projection", self.projection or nn.Identity())):
            if not isinstance(part, nn.Module):
                raise UsageTypeError(f"expected a module as {name}, got {part!r}; call it, or wrap it as partial(...)")

    def forward(self, images: Tensor) -> Tensor:
        """Embeds (B, C, H, W) floats in [0, 1] to (B, D)."""
        embeddings = self.trunk(images)
        if self.projection is not None:
            check_width(self.projection, embeddings)
            embeddings = self.projection(embeddings)
        embeddings = check_rows(embeddings, self.trunk)
        return F.normalize(widened(embeddings), dim=1) if self.normalize else embeddings

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def encode(
        self, dataset: FewShotDataset, batch_size: int | None = None, device: torch.device | str | None = None
    ) -> EmbeddingBank:
        """Embeds a whole data set, see the function `encode`."""
        return encode(self, dataset, batch_size, device)


def is_embedder(method: object) -> bool:
    """Whether it is a module that gives embeddings, wrapped or not; a trainer, which has a bank of its own, is not."""
    if hasattr(getattr(method, "module", None), "bank"):
        do = "give the trainer itself, its .module"
        raise UsageTypeError(f"expected a trainer or an embedder, got a trainer within {type(method).__name__}; {do}")
    return isinstance(method, nn.Module) and not hasattr(method, "bank")


def encode(
    embedder: nn.Module,
    dataset: FewShotDataset,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> EmbeddingBank:
    """Embeds a whole data set in eval mode and without autocast; the module's modes and device are the same afterwards.

    Args:
        embedder: an Embedder, a wrapped one (`torch.compile`, DataParallel, AveragedModel), or any module from images
            (B, C, H, W) to (B, D). Several threads may use it at once, where they do not move it.
        batch_size: images at a time; when None 128 on a CPU, 4,096 on a GPU. It changes results only by rounding.
        device: where to compute and to keep the bank; when None the embedder's own.

    Raises:
        UsageError: an embedding is NaN or infinite, or no row of numbers.
    """
    weight = next((p for p in embedder.parameters() if p.is_floating_point()), torch.zeros(()))
    target = weight.device if device is None else torch.device(device)
    if batch_size is None:
        batch_size = CUDA_BATCH if target.type == "cuda" else CPU_BATCH
    check_at_least_one("batch_size", batch_size)
    dataset = as_dataset(dataset)
    starts = tqdm(range(0, len(dataset), batch_size), "embedding", unit="batch", delay=3, mininterval=1)
    bank = torch.empty(0)  # one tensor: a list of parts would take twice its size when joined
    with evaluating(embedder):
        if moved := target != weight.device:
            embedder.to(target)
        try:
            for start in starts:
                images = dataset.floats(slice(start, start + batch_size), target)
                part = check_rows(embedder(images.to(weight.dtype)), embedder)
                if start == 0:
                    bank = widened(part[:1]).new_empty(len(dataset), part.shape[1])
                bank[start : start + batch_size] = part
        finally:
            if moved:
                embedder.to(weight.device)
    names = dataset.class_names
    return EmbeddingBank(bank, dataset.labels.to(target), dataset.fingerprint(), names, dataset.note)


def check_rows(output: object, module: nn.Module) -> Tensor:
    """What a module gave for images, where that is embeddings (B, D); else a UsageError that says what it gave."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"no tensor but {type(output).__name__}"
    do = "end the trunk with pooling or .flatten(1)" if isinstance(output, Tensor) else "wrap it to return one tensor"
    raise UsageError(f"expected embeddings of shape (B, D), got {got} from {type(module).__name__}; {do}")


def check_width(projection: nn.Module, embeddings: object) -> None:
    """Raises a UsageError where a linear projection is of another width than the trunk's embeddings."""
    wanted = getattr(projection, "in_features", None)
    if isinstance(wanted, int) and isinstance(embeddings, Tensor) and embeddings.shape[-1] != wanted > 0:
        got = f"{embeddings.shape[-1]} from the trunk"
        raise UsageError(f"expected embeddings of {wanted} dimensions for {projection}, got {got}; set in_features")
