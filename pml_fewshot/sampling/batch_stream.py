"""BatchStream: the endless sequence of ordinary labeled training batches, drawn and augmented on the data's device."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.embedders.eval_mode import eval_mode
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.class_sampler import ClassSampler
from pml_fewshot.sampling.episode_stream import Augmentation

PREFETCH_BATCHES = 64  # batches

SamplerFactory = Callable[..., Iterable[Any]]


class BatchStream:
    """Yields training batches without end: `classes` classes with `per_class` items each, all distinct.

    Args:
        dataset: images to draw from, on the device of the training.
        spec: size of a batch.
        seed: of the batches and their augmentation.
        augment: `augment(images (B, C, H, W), generator) -> images`; none when None. Two views want one.
        sampler: factory of a PML sampler (or of any iterable of indices, or of lists of indices) that chooses the
            items in place of ours, for batches of `spec.size`. It is called again for each pass over its indices, with
            those of `labels` (numpy), `dataset` and `model` that it still needs: `partial(MPerClassSampler, m=4)`,
            `partial(FixedSetOfTriplets, num_triplets=1000)`, `partial(TuplesToWeightsSampler, miner=..., ...)`. PML's
            samplers draw from numpy's and torch's global generators; here they get ones seeded from `seed`.
        model: embeds for samplers that look at embeddings (TuplesToWeightsSampler).

    `state_dict()` and `load_state_dict()` let a run resume with the very batch that would have come next.

    Raises:
        UsageError: too few classes or items, two views without augmentation, a sampler without one whole batch.
    """

    def __init__(
        self,
        dataset: FewShotDataset,
        spec: BatchSpec,
        seed: int,
        augment: Augmentation | None = None,
        sampler: SamplerFactory | None = None,
        model: nn.Module | None = None,
    ) -> None:
        if spec.views == 2 and augment is None:
            raise UsageError("expected augmentation for two views, got none; give augment=RandomAffine()")
        self.dataset = dataset
        self.spec = spec
        self.augment = augment
        self.sampler = sampler
        self.model = model
        self.classes = None if sampler else ClassSampler(dataset.labels, spec.classes, spec.per_class, str(spec))
        batch_seed, augmentation_seed = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed))
        self.generator = torch.Generator().manual_seed(int(batch_seed))
        self.augmentation_generator = torch.Generator().manual_seed(int(augmentation_seed))
        self._construction_seed = seed % 2**32  # numpy's seeds have 32 bits
        self._block = torch.empty(0, spec.size, dtype=torch.int64)  # (batches, B) indices
        self._position = 0  # batches of the block that have been yielded

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._position == len(self._block):
            if self.sampler is not None:
                self._block = self._one_pass(self.sampler)
            elif self.classes is not None:
                self._block = self.classes.draw(PREFETCH_BATCHES, self.generator).flatten(1)
            self._position = 0
        index = self._block[self._position].to(self.dataset.device)
        self._position += 1
        images = self.dataset.floats(index)
        views = [images if self.augment is None else self.augment(images, self.augmentation_generator)]
        if self.spec.views == 2 and self.augment is not None:
            views.append(self.augment(images, self.augmentation_generator))
        return Batch(views[0], self.dataset.labels[index], *views[1:])

    def _one_pass(self, factory: SamplerFactory) -> Tensor:
        """One pass over the sampler, cut into whole batches (batches, B)."""
        offers = {"labels": self.dataset.labels.cpu().numpy(), "dataset": self.dataset, "model": self.model}
        arguments = inspect.signature(factory).parameters
        wanted = {
            name: offers[name] for name in offers if name in arguments and arguments[name].default is inspect._empty
        }
        epoch_seed = int(torch.randint(2**32, (), generator=self.generator))
        with _seeded(self._construction_seed):  # built alike each time: a fixed set of triplets stays the same
            sampler = factory(**wanted)
        batch_size = getattr(sampler, "batch_size", None)
        if batch_size not in (None, self.spec.size):
            raise UsageError(
                f"expected batch_size={self.spec.size} for {type(sampler).__name__}, the size of {self.spec}, got "
                f"{batch_size}; otherwise the batches that it composes would be cut elsewhere"
            )
        with _seeded(epoch_seed), eval_mode(self.model or nn.Identity()):
            drawn = [np.atleast_1d(item) for item in sampler]  # indices, or whole batches of them
        order = torch.from_numpy(np.concatenate(drawn) if drawn else np.empty(0)).long()
        batches = len(order) // self.spec.size
        if batches == 0:
            raise UsageError(
                f"expected at least {self.spec.size} items from {type(sampler).__name__}, one batch of {self.spec}, "
                f"got {len(order)}; make the sampler's pass longer or the batch smaller"
            )
        return order[: batches * self.spec.size].reshape(batches, self.spec.size)

    def state_dict(self) -> dict[str, Any]:
        return {
            "block": self._block,
            "position": self._position,
            "generator_state": self.generator.get_state(),
            "augmentation_state": self.augmentation_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._block, self._position = state["block"], state["position"]
        self.generator.set_state(state["generator_state"])
        self.augmentation_generator.set_state(state["augmentation_state"])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PML's samplers draw from numpy's global generator, and torch's: both are ours in here, and as before after."""
    before = c_f.NUMPY_RANDOM
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        c_f.NUMPY_RANDOM = np.random.RandomState(seed)
        try:
            yield
        finally:
            c_f.NUMPY_RANDOM = before
