"""Damages files and reads them, in a process of its own: python worker.py COUNT FOLDER.

Prints "CASE <reader> <number>" before each case, "FAULT ..." after it unless the reader refuses the file by an error of
ours, gives the same as for the whole file, or other data where the format has no checksum of ours, and DONE at the end.
"""

import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from pml_fewshot import EmbeddingBank, Gallery, ResultTable, UsageError, load_bank, load_image_folder, save_bank
from pml_fewshot.data import omniglot
from pml_fewshot.data.cache import Source, cached_images
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.evaluation.table_formats import ResultRow
from pml_fewshot.experiment.run_folder import RunFolder, read_config
from pml_fewshot.io.checkpoint import export_embedder, load_checkpoint, load_embedder, save_checkpoint
from tests.tiny_experiments import TINY_EXPERIMENTS

EMBEDDINGS = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
BANK = EmbeddingBank(torch.from_numpy(EMBEDDINGS), torch.arange(100), "0123456789abcdef")
LETTERS = np.array([*"abcde" * 20])
IMAGES = np.random.default_rng(1).integers(0, 256, (8, 3, 6, 5), dtype=np.uint8)


class Reader(NamedTuple):
    make: Callable[[Path], object]  # writes tiny files into a folder
    read: Callable[[Path], Any]  # gives all that is read from them
    checked: bool = False  # a checksum of ours sees every change; elsewhere one may pass as other data of the same form


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def make_checkpoint(folder: Path) -> None:
    save_checkpoint(folder / "last.pt", {"model": network().state_dict(), "losses": [(1, 0.5)], "best": None})


def read_embedder(folder: Path) -> Any:
    model = network()
    load_embedder(folder / "embedder.safetensors", model)
    return model.state_dict()


def read_bank(folder: Path) -> Any:
    bank = load_bank(next(folder.glob("bank.*")))
    return bank.embeddings, bank.labels, bank.source


def make_npy(folder: Path) -> None:
    np.save(folder / "bank.npy", EMBEDDINGS)
    np.save(folder / "bank_labels.npy", np.arange(100))


def make_figures(folder: Path) -> None:
    protocol = {"figure": "accuracy", "count": 600, "split": "test", "classes": 20, "protocol": "inductive", "ways": 5}
    row = ResultRow(method='"ours", the best', value=0.5, ci95=0.01, seconds=1.5, note="ü\n", **protocol)
    ResultTable([row]).write(folder)
    for name in ("results.csv", "results.md"):  # which nobody reads
        (folder / name).unlink()


def read_gallery(folder: Path) -> Any:
    gallery = Gallery.load(folder / "gallery")
    return gallery.search(BANK.embeddings[:5], 3), gallery.labels, str(gallery), gallery.ranking.kind


def cached(folder: Path, read: Callable[[], Source]) -> Any:
    return tuple(cached_images("set", ("key",), [Path(__file__)], read, folder))


def make_cache(folder: Path) -> None:
    cached(folder, lambda: Source(iter(IMAGES), 8, (3, 6, 5), {"broken": ["x.png"]}))


def picture(number: int, suffix: str) -> bytes:
    out = BytesIO()
    Image.fromarray(np.ascontiguousarray(IMAGES[number].transpose(1, 2, 0))).save(out, suffix)
    return out.getvalue()


def make_image_folder(folder: Path) -> None:
    for number, name in enumerate(
        ("train/a/1.png", "train/a/2.jpeg", "test/b/3.gif", "test/b/4.tiff", "test/b/5.webp")
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number, name.rpartition(".")[2]))


def make_zips(folder: Path) -> None:
    for part in omniglot.PARTS:
        with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(4):
                archive.writestr(f"{part}/{part[7:]}/c{number // 2}/{number}.png", picture(number, "png"))


def read_images(folder: Path) -> Any:
    if (folder / "train").exists():
        splits = load_image_folder(folder, 6, cache_dir=folder / ".cache")
    else:
        splits = omniglot.load_omniglot(folder, 7, "official", rotations=False, cache_dir=folder / ".cache")
    return [(part.images, part.labels, part.class_names) for part in (splits.train, splits.test)]


def make_run(folder: Path) -> None:
    train, test = (FewShotDataset(IMAGES, torch.arange(8) % 2, names) for names in ("ab", "cd"))
    config = replace(TINY_EXPERIMENTS["protonet"], run_dir=folder)
    RunFolder(folder, config).begin(Splits(train, None, test), torch.device("cpu"), 2)
    (folder / "config.txt").unlink()  # which nobody reads


READERS = {
    "checkpoint": Reader(make_checkpoint, lambda folder: load_checkpoint(folder / "last.pt"), True),
    "embedder": Reader(lambda folder: export_embedder(folder / "embedder.safetensors", network()), read_embedder, True),
    "bank": Reader(lambda folder: save_bank(folder / "bank.safetensors", BANK), read_bank, True),
    "npy": Reader(make_npy, read_bank),
    "npz": Reader(lambda folder: np.savez(folder / "bank.npz", e=EMBEDDINGS, l=LETTERS), read_bank),
    "pt": Reader(lambda folder: torch.save((BANK.embeddings, BANK.labels), folder / "bank.pt"), read_bank),
    "figures": Reader(make_figures, lambda folder: [asdict(row) for row in ResultTable.read(folder).rows]),
    "gallery": Reader(lambda folder: Gallery(BANK, "ivf").save(folder / "gallery"), read_gallery, True),
    "cache": Reader(make_cache, lambda folder: cached(folder, lambda: 1 / 0), True),
    "images": Reader(make_image_folder, read_images),
    "zips": Reader(make_zips, read_images),
    "config": Reader(make_run, read_config, True),
}


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A bit or a block changed, zeroed, dropped or doubled, or the file cut short; often near its start or end."""
    size = len(content)
    low, high = [(0, min(size, 160)), (max(0, size - 160), size), (0, size)][rng.integers(3)]
    start = int(rng.integers(low, high))
    end = min(size, start + int(rng.integers(1, 65)))
    before, block, after = content[:start], content[start:end], content[end:]
    flipped = bytes([block[0] ^ 1 << int(rng.integers(8))]) + block[1:]
    kinds = [before, before + after, before + block + block + after]
    kinds += [before + each + after for each in (flipped, bytes(len(block)), rng.bytes(len(block)))]
    return kinds[rng.integers(len(kinds))]


def plain(value: Any) -> Any:
    """The same in lists and numbers, whose repr shows every bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return [(key, plain(each)) for key, each in value.items()]
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def try_reader(name: str, reader: Reader, count: int, folder: Path) -> None:
    folder.mkdir(parents=True)
    reader.make(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    whole, refused = repr(plain(reader.read(folder))), 0
    for number in range(count):
        print("CASE", name, number, flush=True)
        rng = np.random.default_rng([number, len(name)])
        path = files[number % len(files)]
        content = path.read_bytes()
        path.unlink()  # a map of it may still be open
        path.write_bytes(damaged(content, rng))
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        try:
            if repr(plain(reader.read(folder))) != whole and reader.checked:
                print("FAULT", name, number, path.name, "silently other data")
        except UsageError:
            refused += 1
        except Exception as error:  # noqa: BLE001
            print("FAULT", name, number, path.name, repr(error)[:300])
        path.unlink()
        path.write_bytes(content)
    print("REFUSED", name, refused / count)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of Pillow, numpy and torch on what is broken
    omniglot.PARTS, omniglot.DRAWINGS = dict.fromkeys(omniglot.PARTS, 2), 2
    for each in READERS:
        try_reader(each, READERS[each], int(sys.argv[1]), Path(sys.argv[2]) / each)
    print("DONE", flush=True)
