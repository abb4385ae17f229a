"""Embedding photos with EfficientNet-Lite0: batch sizes at 224 x 224, and 12-megapixel JPEGs from disk.

    python -m experiments.speed.embed_photos               # makes 60 photos first, 120 MB; six minutes

The first table is a user's own script at glibc's default settings: batches of each size by hand, and ours. The second
compares ImageEmbedder on files with what two processes could do: the trunk alone on ready tensors, while another
process decodes the files as torchvision's transform does. Weights are random, which costs the same.
"""

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from experiments.speed.image_loading import anonymous_memory
from experiments.speed.side_by_side import conditions, median_seconds
from pml_fewshot import Embedder, FewShotDataset
from pml_fewshot.embedders.embedder import images_at_a_time
from pml_fewshot.embedders.image_embedder import ImageEmbedder
from pml_fewshot.embedders.timm_trunk import TimmTrunk

BY_HAND = (1, 2, 4, 8, 16, 32, 64)
MEGAPIXELS = (3000, 4000)


def main(photos: int = 60, images: int = 192, repeats: int = 3) -> None:
    """Prints the images per second of each method, and how the process grows.

    Args:
        photos: JPEG files to make
        images: tensors of 224 x 224 to embed
        repeats: rounds in which the methods take turns
    """
    torch.manual_seed(0)
    trunk = TimmTrunk("tf_efficientnet_lite0").eval()
    for line in conditions(["torch", "timm", "pillow"]):
        print(line)
    print(f"\n| batch size at 224 x 224 | images/s |\n|---|---|\n{batch_sizes(trunk, images, repeats)}")
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photos(Path(folder), photos)
        print(f"\n| {photos} JPEGs of 12 megapixels | photos/s |\n|---|---|\n{from_files(trunk, paths, repeats)}")


def batch_sizes(trunk: TimmTrunk, images: int, repeats: int) -> str:
    """Returns table lines; by hand first, because ours makes the allocator keep freed memory from then on."""
    pixels = torch.randint(256, (images, 3, 224, 224), generator=torch.Generator().manual_seed(0)).byte()
    dataset = FewShotDataset(pixels, torch.zeros(images).long(), ["any"])
    embedder, floats = Embedder(trunk), pixels / 255

    def by_hand(size: int) -> None:
        with torch.no_grad():
            for batch in floats.split(size):
                trunk(batch)

    at_once = images_at_a_time(224 * 224, torch.device("cpu"))
    before = median_seconds({str(size): lambda size=size: by_hand(size) for size in BY_HAND}, repeats)  # type: ignore[misc]
    embedder.encode(dataset, 1)
    kept = {f"{size}, freed memory kept": lambda size=size: by_hand(size) for size in BY_HAND}
    after = median_seconds({**kept, f"ours ({at_once})": lambda: embedder.encode(dataset)}, repeats)
    return "\n".join(f"| {what} | {images / seconds:.1f} |" for what, seconds in {**before, **after}.items())


def from_files(trunk: TimmTrunk, paths: Sequence[Path], repeats: int) -> str:
    embedder = ImageEmbedder(trunk, progress=False)
    ready = torch.rand(len(paths), 3, 224, 224, generator=torch.Generator().manual_seed(0))
    at_once = images_at_a_time(224 * 224, torch.device("cpu"))
    context = multiprocessing.get_context("spawn")
    queue, go = context.Queue(), context.Semaphore(0)
    decoder = context.Process(target=decode, args=([str(path) for path in paths], repeats + 1, go, queue), daemon=True)
    decoder.start()

    def two_processes() -> None:
        go.release()
        with torch.no_grad():
            for batch in ready.split(at_once):
                trunk(batch)
        queue.get()

    def tensors() -> None:
        with torch.no_grad():
            for batch in ready.split(at_once):
                trunk(batch)

    two_processes()  # starts the process
    start = anonymous_memory()
    with Peak() as peak:
        embedder.transform(paths)
    half = Peak()
    with half:
        embedder.transform(paths[: len(paths) // 2])
    ways = {"trunk alone, on ready tensors": tensors, "trunk, and files decoded in a second process": two_processes}
    seconds = median_seconds({**ways, "ImageEmbedder on files": lambda: embedder.transform(paths)}, repeats)
    decoder.join()
    lines = [f"| {what} | {len(paths) / taken:.1f} |" for what, taken in seconds.items()]
    grown = f"{peak.highest - start:.0f} MiB after all, {half.highest - start:.0f} MiB after half of them again"
    return "\n".join([*lines, f"\nmemory beyond the start, at most: {grown}"])


def decode(paths: Sequence[str], rounds: int, go: Any, queue: Any) -> None:
    """The second process: decodes all files to 224 x 224, each round when told to."""
    torch.set_num_threads(1)
    from torchvision.transforms import InterpolationMode, v2

    import pml_fewshot  # noqa: F401  before torchvision

    transform = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()])
    for _ in range(rounds):
        go.acquire()
        for path in paths:
            with Image.open(path) as image:
                transform(image.convert("RGB"))
        queue.put(None)


def make_photos(folder: Path, count: int) -> list[Path]:
    """Makes photo-like JPEGs of 12 megapixels, 2 MB each: soft shapes of every size, with grain."""
    generator, (height, width) = np.random.default_rng(0), MEGAPIXELS
    paths = []
    for number in range(count):
        pixels = np.full((height, width, 3), 128, np.float32)
        for level in range(2, 9):
            coarse = generator.integers(0, 256, (3 * 2**level // 4, 2**level, 3), dtype=np.uint8)
            soft = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
            pixels += (np.asarray(soft, np.float32) - 128) / level
        pixels += generator.standard_normal((height, width, 1), np.float32) * 4
        paths.append(folder / f"{number:03d}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class Peak(threading.Thread):
    """Peak memory of the process within a `with` block, sampled every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.ended = 0.0, threading.Event()

    def __enter__(self) -> "Peak":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            with suppress(FileNotFoundError):
                self.highest = max(self.highest, anonymous_memory())


if __name__ == "__main__":
    start = time.perf_counter()
    tyro.cli(main)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
