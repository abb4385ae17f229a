"""BatchStream: the endless sequence of ordinary labeled training batches, drawn and augmented on the data's device."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.data.augmentation import Augmentation, as_augmentation, augmented
from pml_fewshot.data.dataset import FewShotDataset, as_dataset
from pml_fewshot.embedders.modes import eval_mode
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.class_sampler import ClassSampler
from pml_fewshot.sampling.randomness import seeded

PREFETCH_BATCHES = 64

SamplerFactory = Callable[..., Iterable[Any]]


@dataclass(eq=False, repr=False)
class BatchStream:
    """Yields training batches without end: `classes` classes with `per_class` items each, all distinct.

    Args:
        dataset: images to draw from, on the training device.
        spec: size of a batch.
        seed: seed of the batches and their augmentation.
        augment: `augment(images (B, C, H, W), generator) -> images`, a transform of one image (from torchvision, or any
            function), which becomes a PerImage, or a list of these; none when None. Two views need one. The size of the
            images may change.
        sampler: factory of a PML sampler (or of any iterable of indices or lists of indices) that chooses the items
            instead of ours, for batches of `spec.size`. It is called again for each pass over its indices, with
            those of `labels` (numpy), `dataset` and `model` that it still needs: `partial(MPerClassSampler, m=4)`,
            `partial(FixedSetOfTriplets, num_triplets=1000)`, `partial(TuplesToWeightsSampler, miner=..., ...)`. PML's
            samplers draw from numpy's and torch's global generators; here these are seeded from `seed`.
        model: computes embeddings for samplers that use them (TuplesToWeightsSampler).

    `state_dict()` and `load_state_dict()` let a run resume with the very batch that would have come next.

    Raises:
        UsageError: too few classes or items, two views without augmentation, or a sampler with less than one batch
            or another batch size.
    """

    dataset: FewShotDataset
    spec: BatchSpec
    seed: InitVar[int]
    augment: Augmentation | None = None
    sampler: SamplerFactory | None = None
    model: nn.Module | None = None

    def __post_init__(self, seed: int) -> None:
        spec, self.dataset = self.spec, as_dataset(self.dataset)
        self._augment = as_augmentation(self.augment)
        if spec.views == 2 and self._augment is None:
            raise UsageError("expected augmentation for two views, got none; give augment=RandomAffine()")
        if self.sampler is None:
            names = self.dataset.class_names
            self.classes = ClassSampler(self.dataset.labels, spec.classes, spec.per_class, str(spec), names)
        seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(int(seed))).tolist()
        self.generator, self.augmentation_generator = (torch.Generator().manual_seed(each) for each in seeds)
        self._construction_seed = seed % 2**32  # numpy's seeds have 32 bits
        self._block = torch.empty(0, spec.size, dtype=torch.int64)  # (batches, B) indices
        self._position = 0  # batches of the block that have been yielded

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._position == len(self._block):
            if self.sampler is None:
                self._block = self.classes.draw(PREFETCH_BATCHES, self.generator).flatten(1)
            else:
                self._block = self._one_pass(self.sampler).to(self.dataset.device)  # all at once: this waits for a GPU
            self._position = 0
        index = self._block[self._position]
        self._position += 1
        images = self.dataset.floats(index)
        views = [augmented(images, self._augment, self.augmentation_generator) for _ in range(self.spec.views)]
        return Batch(views[0], self.dataset.labels[index], *views[1:])

    def _one_pass(self, factory: SamplerFactory) -> Tensor:
        """Returns one pass over the sampler, cut into whole batches (batches, B)."""
        offers = {"labels": self.dataset.labels.cpu().numpy(), "dataset": self.dataset, "model": self.model}
        arguments = inspect.signature(factory).parameters.items()
        wanted = {name: offers[name] for name, each in arguments if name in offers and each.default is each.empty}
        epoch_seed = int(torch.randint(2**32, (), generator=self.generator))
        with _seeded(self._construction_seed):  # built the same each time: a fixed set of triplets stays fixed
            sampler = factory(**wanted)
        name, size = type(sampler).__name__, self.spec.size
        if (composed := getattr(sampler, "batch_size", None)) not in (None, size):
            got = f"got {composed}, which would cut its batches elsewhere"
            raise UsageError(f"expected batch_size={size} for {name}, the size of {self.spec}, {got}; set it to {size}")
        with _seeded(epoch_seed), eval_mode(self.model or nn.Identity()):
            drawn = [np.atleast_1d(item) for item in sampler]  # indices, or whole batches of them
        order = torch.from_numpy(np.concatenate(drawn) if drawn else np.empty(0)).long()
        if len(order) < size:
            raise UsageError(
                f"expected at least {size} items from {name}, one batch of {self.spec}, got {len(order)}; make the "
                "sampler's pass longer or the batch smaller"
            )
        return order[: len(order) // size * size].reshape(-1, size)

    def state_dict(self) -> dict[str, Any]:
        return {
            "block": self._block,
            "position": self._position,
            "generator_state": self.generator.get_state(),
            "augmentation_state": self.augmentation_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._block, self._position = state["block"].to(self.dataset.device), state["position"]
        self.generator.set_state(state["generator_state"])
        self.augmentation_generator.set_state(state["augmentation_state"])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators, with numpy's as that of PML's samplers, and restores all of them afterwards."""
    before = c_f.NUMPY_RANDOM
    with seeded(seed):
        c_f.NUMPY_RANDOM = np.random
        try:
            yield
        finally:
            c_f.NUMPY_RANDOM = before
