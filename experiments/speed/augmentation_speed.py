"""Times photo augmentation relative to a training step of ResNet12 at 84 x 84. One command, one table.

    python -m experiments.speed.augmentation_speed

A step is all of it: drawing a 5-way 5-shot 15-query episode (100 images of random pixels), augmentation, forward,
backward, SGD. The contenders take turns for `rounds` rounds. The overhead is the median time of an augmentation alone,
on such a batch, divided by the median time of the plain step: the difference between two whole steps, which are in the
table for comparison, is smaller than the variation of steps. Nothing else should run on the machine.
"""

from collections.abc import Callable
from functools import partial

import torch
import tyro
from torch.optim import SGD

from experiments.speed.side_by_side import conditions, median_seconds
from pml_fewshot import Embedder, EpisodeSpec, EpisodeStream, FewShotDataset, ProtoNetTrainer, ResNet12
from pml_fewshot.data.augmentation import as_augmentation, augmented
from pml_fewshot.data.photo_augmentation import ColorJitter, RandomHorizontalFlip, RandomResizedCrop
from pml_fewshot.environment import keep_freed_memory

# isort: split
from torchvision.transforms import v2  # importing pml_fewshot has prepared this import

SPEC = EpisodeSpec(ways=5, shots=5, queries=15)
SIZE, LARGE = 84, 92  # the size trained on, and the size that some settings load and crop from
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation and hue


def photos(size: int) -> FewShotDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 3, size, size), dtype=torch.uint8, generator=generator)
    return FewShotDataset(images, torch.arange(400) // 40, [f"class {c}" for c in range(10)])


def step(trainer: ProtoNetTrainer, optimizer: SGD, stream: EpisodeStream) -> None:
    optimizer.zero_grad(set_to_none=True)
    trainer(next(stream)).backward()
    optimizer.step()


def main(rounds: int = 3, threads: int = 2) -> None:
    """Prints the table.

    Args:
        rounds: rounds in which the contenders take turns, each half a minute to a minute on two cores.
        threads: torch's number of threads.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()  # as in every training
    batched = [RandomResizedCrop(SIZE), RandomHorizontalFlip(), ColorJitter(*JITTER)]
    composed = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.ColorJitter(*JITTER)])
    settings = {
        "none": (SIZE, None),
        f"the three of this library, {LARGE} to {SIZE}": (LARGE, as_augmentation(batched)),
        f"torchvision's by PerImage, {LARGE} to {SIZE}": (LARGE, as_augmentation(composed)),
    }
    torch.manual_seed(0)
    trainer = ProtoNetTrainer(Embedder(ResNet12()))
    optimizer = SGD(trainer.parameters(), lr=1e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    steps: dict[str, Callable[[], object]] = {}
    alone: dict[str, Callable[[], object]] = {}
    for name, (size, augment) in settings.items():
        dataset = photos(size)
        steps[name] = partial(step, trainer, optimizer, EpisodeStream(dataset, SPEC, 0, augment))
        batch = dataset.floats(torch.arange(100))
        alone[f"{name}, alone"] = partial(augmented, batch, augment, generator)
    for action in (steps["none"], *alone.values()):  # the first run of each is slower
        action()
    seconds = median_seconds(steps | alone, rounds)
    print("\n".join(f"- {line}" for line in conditions(("torch", "torchvision"))))
    print(f"- medians of {rounds} rounds; {SPEC}, ResNet12, images of {SIZE} x {SIZE}\n")
    print("| augmentation | step, s | augmentation alone, s | overhead |\n|---|---|---|---|")
    for name in steps:
        own = seconds[f"{name}, alone"]
        print(f"| {name} | {seconds[name]:.3f} | {own:.3f} | {own / seconds['none']:.1%} |")


if __name__ == "__main__":
    tyro.cli(main)
