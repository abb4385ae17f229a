"""Embedder: maps images to embeddings with a trunk and an optional projection."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pml_fewshot.checks import (
    ExistingFileError,
    UsageError,
    UsageTypeError,
    check_at_least_one,
    check_choice,
    check_finite,
    check_floats,
)
from pml_fewshot.data.dataset import FewShotDataset, as_dataset
from pml_fewshot.distributed import everyones, together, world
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.modes import evaluating, widened
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.environment import keep_memory
from pml_fewshot.io.atomic import atomic_write, fsync, translate_write_errors
from pml_fewshot.parts.instantiate import Part, instantiate

# Images embedded at a time up to 84 x 84; of larger ones, as many as have no more pixels: 18 of 224 x 224. On a CPU a
# batch whose largest activation stays near the cache is fastest (64 channels of 28 x 28 floats are 13 MB for 64
# images); a GPU needs enough work for all of its units.
CPU_BATCH = 128
CUDA_BATCH = 4096
FULL_BATCH_PIXELS = 84 * 84


class Embedder(nn.Module):
    """Maps images to embeddings: trunk, then projection, then L2 normalization, the last two optional.

    Args:
        trunk: module (or a partial that makes one) from (B, C, H, W) to (B, D): Conv4(), ResNet12(),
            TorchvisionTrunk(...) or your own.
        projection: module (or partial) from (B, D) to (B, D'), for example `nn.Linear(512, 128)`.
        normalize: L2-normalize each embedding. Off by default: prototypical networks use unbounded Euclidean distance,
            and PML's distances normalize on their own where they should.
        frozen: True, or the names of parts of the trunk ("model.layer1"): their weights are not trained, and they stay
            in eval mode, batch norm too, whatever mode the rest is in. (`ExperimentConfig.frozen` freezes temporarily.)

    Raises:
        UsageError: the trunk has no part of that name; the trunk or projection is not a module (UsageTypeError).
    """

    def __init__(
        self,
        trunk: Part[nn.Module],
        projection: Part[nn.Module] | None = None,
        normalize: bool = False,
        frozen: bool | Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.trunk = instantiate(trunk)
        self.projection = instantiate(projection)
        self.normalize = normalize
        for name, part in (("trunk", self.trunk), ("projection", self.projection or nn.Identity())):
            if not isinstance(part, nn.Module):
                raise UsageTypeError(f"expected a module as {name}, got {part!r}; call it, or wrap it as partial(...)")
        if isinstance(frozen, bool):
            frozen = ("",) if frozen else ()  # the trunk itself
        self.frozen = (frozen,) if isinstance(frozen, str) else tuple(frozen)
        for name in self.frozen:
            if name:
                names = [name for name, _ in self.trunk.named_modules() if name]
                check_choice("a part of the trunk to freeze", name, names)
            self.trunk.get_submodule(name).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Embedder":
        super().train(mode)
        for name in self.frozen:
            self.trunk.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Embeds (B, C, H, W) floats in [0, 1] to (B, D)."""
        check_floats(images)
        embeddings = self.trunk(images)
        if self.projection is not None:
            check_width(self.projection, embeddings)
            embeddings = self.projection(embeddings)
        embeddings = check_rows(embeddings, self.trunk)
        return F.normalize(widened(embeddings), dim=1) if self.normalize else embeddings

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images of any size become the trunk's input, if the trunk defines it."""
        return getattr(self.trunk, "preprocessing", None)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def encode(
        self, dataset: FewShotDataset, batch_size: int | None = None, device: torch.device | str | None = None
    ) -> EmbeddingBank:
        """Embeds a whole dataset; see the function `encode`."""
        return encode(self, dataset, batch_size, device)


def is_embedder(method: object) -> bool:
    """Whether it is a module that returns embeddings, wrapped or not; a trainer, which has its own bank, is not."""
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
    """Embeds a whole dataset in eval mode without autocast, then restores the module's modes and device.

    Args:
        embedder: an Embedder, a wrapped one (`torch.compile`, DataParallel, AveragedModel), or any module from images
            (B, C, H, W) to (B, D). Several threads may use it at once if they do not move it.
        batch_size: images at a time; when None, `images_at_a_time`. It affects results only by rounding.
        device: where to compute and keep the bank; when None, the embedder's own.

    On a CPU, freed memory is kept for reuse from then on (see `keep_memory`). With several processes (see `processes`),
    each embeds every N-th batch, and all have the same bank, bit for bit that of one process.

    Raises:
        UsageError: an embedding is NaN or infinite, or not a row of numbers.
    """
    weight = next((p for p in embedder.parameters() if p.is_floating_point()), torch.zeros(()))
    target = weight.device if device is None else torch.device(device)
    dataset = as_dataset(dataset)
    if batch_size is None:
        batch_size = images_at_a_time(math.prod(dataset.item_shape[1:]), target)
    check_at_least_one("batch_size", batch_size)
    keep_memory(target)
    batch_size = max(1, min(batch_size, len(dataset)))
    starts, ranks = range(0, len(dataset), batch_size), world().size
    # each round has one batch per process, repeating the last where there are no more
    bank = torch.empty(0)  # one tensor: a list of parts would take twice its size when joined
    with _embedding(embedder, dataset, batch_size, target) as embed:
        rounds = range(0, len(starts), ranks)
        parts = (embed(starts[min(first + world().rank, len(starts) - 1)]) for first in _shown(rounds))
        # several processes embed at their own pace, so each holds its share of the bank twice
        for first, part in zip(rounds, list(parts) if ranks > 1 else parts, strict=True):
            if first == 0:
                bank = part.new_empty(len(dataset), part.shape[1])
            whole = F.pad(part, (0, 0, 0, batch_size - len(part))) if ranks > 1 else part  # the same length for all
            for start, rows in zip(starts[first : first + ranks], everyones(whole), strict=False):
                bank[start : start + batch_size] = rows[: len(dataset) - start]
    names = dataset.class_names
    return EmbeddingBank(bank, dataset.labels.to(target), dataset.fingerprint(), names, dataset.note)


def encode_to_file(
    embedder: nn.Module,
    dataset: FewShotDataset,
    file: str | Path,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> EmbeddingBank:
    """Embeds a whole dataset into a .npy, for a bank larger than memory, and returns the memory-mapped bank.

    With several processes, each writes the batches that it embeds to one file, which all can see. `load_bank(file)`
    reads it back; labels are next to it, in `<name>_labels.npy`, as numbers. The rest is as in `encode`.

    Raises:
        UsageError: another extension, an existing file (ExistingFileError), NaN or infinity, or a full disk
            (CannotWriteError).
    """
    file, weight = Path(file), next((p for p in embedder.parameters() if p.is_floating_point()), torch.zeros(()))
    labels_file, temporary = file.with_name(f"{file.stem}_labels.npy"), file.with_name(f".{file.name}.tmp")
    with together():
        if file.suffix != ".npy":
            raise UsageError(f"expected a path that ends with .npy, got {file}; rename it")
        for each in (file, labels_file):
            if each.exists():
                raise ExistingFileError(f"expected a new file, got {each}, which exists; name another, or remove it")
    target = weight.device if device is None else torch.device(device)
    dataset = as_dataset(dataset)
    if batch_size is None:
        batch_size = images_at_a_time(math.prod(dataset.item_shape[1:]), target)
    check_at_least_one("batch_size", batch_size)
    keep_memory(target)
    starts = range(0, len(dataset), batch_size)
    try:
        with _embedding(embedder, dataset, batch_size, target) as embed:
            with together(), translate_write_errors(file):
                row = embed(0)[:1].cpu().numpy()
                if world().is_first:
                    np.lib.format.open_memmap(temporary, "w+", row.dtype, (len(dataset), row.shape[1]))
            with together(), translate_write_errors(file):
                rows = np.lib.format.open_memmap(temporary, "r+")
                for start in _shown(starts[world().share(len(starts))]):
                    part = embed(start)
                    check_finite(part, f"embeddings of items {start} and on")
                    rows[start : start + batch_size] = part.cpu().numpy()
                rows.flush()
        with together(), translate_write_errors(file):
            if world().is_first:
                with atomic_write(labels_file) as labels, labels.open("wb") as out:
                    np.save(out, dataset.labels.cpu().numpy())
                fsync(temporary)
                temporary.replace(file)
    finally:
        if world().is_first:
            temporary.unlink(missing_ok=True)
    mapped = torch.from_numpy(np.load(file, mmap_mode="c"))
    return EmbeddingBank(mapped, dataset.labels.cpu(), dataset.fingerprint(), dataset.class_names, dataset.note)


@contextmanager
def _embedding(
    embedder: nn.Module, dataset: FewShotDataset, batch_size: int, device: torch.device
) -> Iterator[Callable[[int], Tensor]]:
    """Yields a function that embeds the batch starting at an item, (B, D), at least float32; on `device` meanwhile."""
    weight = next((p for p in embedder.parameters() if p.is_floating_point()), torch.zeros(()))

    def embed(start: int) -> Tensor:
        images = dataset.floats(slice(start, start + batch_size), device)
        return widened(check_rows(embedder(images.to(weight.dtype)), embedder))

    with evaluating(embedder):
        if moved := device != weight.device:
            embedder.to(device)
        try:
            yield embed
        finally:
            if moved:
                embedder.to(weight.device)


def _shown(starts: range) -> Iterable[int]:
    """Batches, with a progress bar if they take more than three seconds."""
    return tqdm(starts, "embedding", unit="batch", delay=3, mininterval=1, disable=not world().is_first)


def images_at_a_time(pixels: int, device: torch.device) -> int:
    """How many images with this many pixels (H * W) to embed at a time.

    128 on a CPU and 4,096 on a GPU up to 84 x 84, the sizes of few-shot papers; for larger images, as many as have no
    more pixels in total, so that activations take no more memory. EfficientNet-Lite0 at 224 x 224 is within 5 % of its
    top speed from 8 images on if freed memory is kept; with glibc's own settings, 64 images are half as fast as 2.
    """
    most = CUDA_BATCH if device.type == "cuda" else CPU_BATCH
    return max(1, most * FULL_BATCH_PIXELS // max(pixels, FULL_BATCH_PIXELS))


def check_rows(output: object, module: nn.Module) -> Tensor:
    """Returns a module's output if it is embeddings (B, D); else raises a UsageError that says what it is."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"no tensor but {type(output).__name__}"
    do = "end the trunk with pooling or .flatten(1)" if isinstance(output, Tensor) else "wrap it to return one tensor"
    raise UsageError(f"expected embeddings of shape (B, D), got {got} from {type(module).__name__}; {do}")


def check_width(projection: nn.Module, embeddings: object) -> None:
    """Raises a UsageError if a linear projection expects another width than that of the trunk's embeddings."""
    wanted = getattr(projection, "in_features", None)
    if isinstance(wanted, int) and isinstance(embeddings, Tensor) and embeddings.shape[-1] != wanted > 0:
        got = f"{embeddings.shape[-1]} from the trunk"
        raise UsageError(f"expected embeddings of {wanted} dimensions for {projection}, got {got}; set in_features")
