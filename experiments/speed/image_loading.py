"""Times reading 10,000 JPEGs, 500 x 375 to 84 x 84, against torchvision's ImageFolder in a DataLoader of two workers.

    python -m experiments.speed.image_loading                # makes the images first, half a gigabyte, in a minute
    python -m experiments.speed.image_loading --folder DIR   # your own images, one subfolder per class

Both decode every image and resize its center with the same filter; ours also writes its cache. The memory is what the
process holds beyond the start after half and after all of the images are read: flat, as they are left in the cache.
"""

import re
import resource
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from experiments.speed.side_by_side import conditions, median_seconds
from pml_fewshot import load_images
from pml_fewshot.data import listing
from pml_fewshot.environment import prepare_imports

SIZE = 84


def main(images: int = 10_000, folder: Path | None = None, repeats: int = 3) -> None:
    """Prints the seconds of both, and how the process grows.

    Args:
        images: images to make when no folder is given
        folder: folder of images to read, one subfolder per class
        repeats: rounds in which the two take turns
    """
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as given:
        root = Path(given)
        if folder is None:
            make_images(root, images)
        with tempfile.TemporaryDirectory() as cache:
            number = iter(range(2 * repeats + 1))
            grown = growth(root, Path(cache) / "memory")
            contenders = {
                "ours": lambda: load_images(root, SIZE, memory_map=True, cache_dir=Path(cache) / str(next(number))),
                "torchvision": lambda: by_torchvision(root),
            }
            seconds = median_seconds(contenders, repeats)
    for line in conditions(["torch", "torchvision", "pillow"]):
        print(line)
    ratio = seconds["torchvision"] / seconds["ours"]
    print(f"ours {seconds['ours']:.1f} s, ImageFolder {seconds['torchvision']:.1f} s: {ratio:.2f} times as fast")
    print(f"memory beyond the start: {grown[0]:.0f} MiB after half of the images, {grown[1]:.0f} MiB after all")


def make_images(root: Path, count: int) -> None:
    """Makes photo-like JPEGs: soft random shapes with grain, about 50 kB each, in 100 classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = generator.integers(-8, 9, soft.shape, dtype=np.int16)
        path = root / f"class{number % 100:02d}" / f"{number:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(path, quality=85)


def by_torchvision(root: Path) -> None:
    prepare_imports()
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor()])
    for batch, _ in DataLoader(ImageFolder(str(root), transform), batch_size=256, num_workers=2):
        assert batch.dtype == torch.uint8


def growth(root: Path, cache: Path) -> tuple[float, float]:
    """Returns the MiB held beyond the start, without the pages of mapped files, in the middle and at the end."""
    decode, held = listing.read_images, []

    def watched(names: list[str], *rest: object) -> object:
        for number, image in enumerate(decode(names, *rest)):  # type: ignore[arg-type]
            if number in (len(names) // 2, len(names) - 1):
                held.append(anonymous_memory())
            yield image

    listing.read_images = watched  # type: ignore[assignment]
    start = anonymous_memory()
    load_images(root, SIZE, memory_map=True, cache_dir=cache)
    listing.read_images = decode
    return held[0] - start, held[1] - start


def anonymous_memory() -> float:
    """Returns the process's own memory in MiB; if the system does not report it, the peak so far."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"RssAnon:\s+(\d+) kB", status.read_text())):
        return int(match[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    start = time.perf_counter()
    tyro.cli(main)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
