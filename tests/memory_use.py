"""Embeds and evaluates sets that lie in files of 1 GiB, and prints how much memory of its own the process took for it.

    python -m tests.memory_use {images|bank} FOLDER

Memory of its own is RssAnon of /proc/self/status: pages of the mapped files, which the system takes back when it
needs them, do not count.
"""

import sys
import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pml_fewshot import Embedder, EmbeddingBank, EpisodeSpec, EpisodicEvaluator, FewShotDataset, RetrievalTester
from pml_fewshot.embedders.bank import load_bank
from pml_fewshot.trainers.protonet import ProtoNetTrainer

CLASSES = 100
GIB = 2**30


def own_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("expected RssAnon in /proc/self/status, got none; run this on Linux")


class Peak(threading.Thread):
    """Looks at the memory every 2 ms until it is asked for the peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.ended = own_mib(), threading.Event()
        self.before = self.highest

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.highest = max(self.highest, own_mib())

    def growth(self) -> float:
        self.ended.set()
        self.join()
        return max(self.highest, own_mib()) - self.before


def images(folder: Path) -> None:
    """50,000 images of 84 x 84 in color; a bank of 12 MiB."""
    count = GIB // (3 * 84 * 84)
    mapped = np.memmap(folder / "images", np.uint8, "w+", shape=(count, 3, 84, 84))
    mapped[:, 0, 0, 0] = np.arange(count) % CLASSES  # else all are alike
    labels = torch.arange(count) % CLASSES
    trunk = nn.Sequential(nn.Conv2d(3, 4, 7, stride=7), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    trainer = ProtoNetTrainer(Embedder(trunk))
    peak = Peak()
    peak.start()
    dataset = FewShotDataset(mapped, labels, [str(c) for c in range(CLASSES)])
    EpisodicEvaluator(EpisodeSpec(20, 5, 15), 1000).evaluate(trainer, dataset)
    print(peak.growth())


def bank(folder: Path) -> None:
    """1,048,576 embeddings of 256 dimensions."""
    mapped = np.lib.format.open_memmap(folder / "bank.npy", "w+", np.float32, (GIB // 1024, 256))
    for start in range(0, len(mapped), 2**14):
        mapped[start : start + 2**14, :CLASSES] = np.eye(CLASSES)[np.arange(start, start + 2**14) % CLASSES]
    np.save(folder / "bank_labels.npy", np.arange(len(mapped)) % CLASSES)
    del mapped
    peak = Peak()
    peak.start()
    stored = load_bank(folder / "bank.npy")
    result = EpisodicEvaluator(EpisodeSpec(20, 5, 15), 1000).evaluate(stored)
    assert result.mean == 1
    few = EmbeddingBank(stored.embeddings[:50].clone(), stored.labels[:50])
    RetrievalTester(metrics=("precision_at_1",), k=1).test(few, reference=stored)
    print(peak.growth())


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"images": images, "bank": bank}[sys.argv[1]](Path(sys.argv[2]))
