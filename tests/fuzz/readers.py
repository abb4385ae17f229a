"""What is fuzzed: for each reader how its files are made, and how they are read.

To add one: write `make(folder)`, which writes tiny files into a folder, and `read(folder)`, which gives all that was
read from them (tensors, arrays, texts, numbers, lists, dicts, tuples), and add a Reader to READERS.
"""

import csv
import hashlib
import json
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import BytesIO, StringIO
from pathlib import Path
from shutil import copyfile
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pml_fewshot import tensor_file
from pml_fewshot.checkpoint import export_embedder, load_checkpoint, load_embedder, save_checkpoint
from pml_fewshot.data import cache, mini_imagenet, omniglot
from pml_fewshot.data.fewshot_dataset import Splits
from pml_fewshot.data.image_file import read_image
from pml_fewshot.data.image_folder import load_image_folder
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.bank_file import load_bank, save_bank
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.index_file import index_checksum
from pml_fewshot.evaluation.result_row import ResultRow
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment import run
from pml_fewshot.provenance import provenance_text
from pml_fewshot.recording import Recorder
from pml_fewshot.reproduce import read_run
from tests.tiny_experiments import TINY_EXPERIMENTS

from mutations import with_png_checksums  # isort: skip - of this folder


@dataclass(frozen=True)
class Reader:
    """One reader.

    Args:
        make: writes its files into an empty folder.
        read: reads them and gives all that came of it.
        checked: every change of the files is seen, by a checksum or a shape; else (JPEG, .npy, CSV) a change may pass
            as other data of the same form.
        mend: makes the checksums in the folder right again after damage, as a hostile writer would.
        damages: names of the files that are damaged; all when empty.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    checked: bool = True
    mend: Callable[[Path], None] | None = None
    damages: tuple[str, ...] = ()


EMBEDDINGS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
LABELS = np.array([3, 1, 3, 1, 2**53 + 1, 7])
ROWS = torch.from_numpy(np.random.default_rng(1).normal(size=(700, 4)).astype(np.float32))
BANK = EmbeddingBank(torch.from_numpy(EMBEDDINGS), torch.from_numpy(LABELS), "0123456789abcdef")


def picture(number: int, side: int = 6, kind: str = "PNG", grey: bool = False) -> bytes:
    shape = (side, side) if grey else (side, side, 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(pixels > 127 if grey else pixels).save(out, kind)
    return out.getvalue()


def parts_of(splits: Splits) -> list[Any]:
    return [
        (part.images, part.labels, list(part.class_names), part.note) if part is not None else None
        for part in (splits.train, splits.val, splits.test)
    ]


# --- zips -------------------------------------------------------------------------------------------------------------

CHARACTERS = {"images_background": ("Angelic/character01", "Hebrew/character01"), "images_evaluation": ("ULOG/x",)}


def make_omniglot(folder: Path) -> None:
    for part, characters in CHARACTERS.items():
        with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for i, name in enumerate(characters):
                for drawing in range(2):
                    content = picture(10 * i + drawing, 105, grey=True)
                    archive.writestr(f"{part}/{name}/{i:04d}_{drawing:02d}.png", content)


def read_omniglot(folder: Path) -> Any:
    omniglot.PARTS = {part: len(characters) for part, characters in CHARACTERS.items()}
    omniglot.DRAWINGS = 2
    return parts_of(omniglot.load_omniglot(folder, 7, rotations=False, cache_dir=folder / "cache"))


CLASSES = {"train": ("n00000003", "n00000001"), "val": ("n00000004",), "test": ("n00000002",)}


def use_tiny_mini_imagenet() -> None:
    mini_imagenet.CLASSES = {split: len(names) for split, names in CLASSES.items()}
    mini_imagenet.RAVI_LAROCHELLE = {
        split: hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()
        for split, names in CLASSES.items()
    }


def make_mini_imagenet_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "mini.zip", "w") as archive:
        for split, names in CLASSES.items():
            for number, name in enumerate(names):
                for i in range(2):
                    archive.writestr(f"{split}/{name}/{name}{i:08d}.jpg", picture(10 * number + i, 6, "JPEG"))


def make_mini_imagenet_lists(folder: Path) -> None:
    (folder / "images").mkdir()
    for split, names in CLASSES.items():
        lines = [(f"{name}{i:08d}.jpg", name) for name in names for i in range(2)]
        for number, (file, _) in enumerate(lines):
            (folder / "images" / file).write_bytes(picture(number, 6, "JPEG"))
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), *lines])


def read_mini_imagenet(folder: Path) -> Any:
    use_tiny_mini_imagenet()
    return parts_of(mini_imagenet.load_mini_imagenet(folder, 6, cache_dir=folder / "cache"))


# --- images -----------------------------------------------------------------------------------------------------------


def image_reader(suffix: str, kind: str) -> Reader:
    def make(folder: Path) -> None:
        (folder / f"a.{suffix}").write_bytes(picture(1, 12, kind))

    def read(folder: Path) -> Any:
        return read_image(folder / f"a.{suffix}", 8, 3, f"a.{suffix}")

    return Reader(make, read, checked=suffix == "png", mend=mend_png if suffix == "png" else None)


def mend_png(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        file.write_bytes(with_png_checksums(file.read_bytes()))


def make_image_folder(folder: Path) -> None:
    for number, name in enumerate(("train/a/1.png", "train/a/2.jpg", "test/b/3.gif", "test/b/4.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number, 6, {"png": "PNG", "jpg": "JPEG", "gif": "GIF"}[name[-3:]]))


def read_image_folder(folder: Path) -> Any:
    return parts_of(load_image_folder(folder, 6, cache_dir=folder / ".cache"))


# --- banks ------------------------------------------------------------------------------------------------------------


def read_bank(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        bank = load_bank(folder / name)
        return bank.embeddings, bank.labels, bank.source

    return read


def make_npy(folder: Path) -> None:
    np.save(folder / "bank.npy", EMBEDDINGS)
    np.save(folder / "bank_labels.npy", LABELS)


def make_npz(folder: Path) -> None:
    np.savez_compressed(folder / "bank.npz", embeddings=EMBEDDINGS, labels=LABELS)


def make_npz_of_texts(folder: Path) -> None:
    np.savez(folder / "bank.npz", embeddings=EMBEDDINGS.astype(">f8"), labels=np.array([*"abcabc"]))


def make_pt(folder: Path) -> None:
    torch.save({"embeddings": BANK.embeddings, "labels": [*"abcabc"], "epoch": 3}, folder / "bank.pt")


def make_foreign_safetensors(folder: Path) -> None:
    save_file({"embeddings": BANK.embeddings, "labels": BANK.labels}, folder / "bank.safetensors", {"format": "pt"})


def mend_safetensors(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                texts = json.loads((opened.metadata() or {}).get(tensor_file.ENTRY, "{}"))
            texts.pop(tensor_file.CHECKSUM, None)
            save_file(tensors, file, {tensor_file.ENTRY: tensor_file.sealed(tensors, texts)})
        except Exception:
            continue  # too broken to be mended


# --- checkpoints ------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def make_checkpoint(folder: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": [(1, 0.5)], "best": None}
    save_checkpoint(folder / "last.pt", state)


def make_embedder(folder: Path) -> None:
    export_embedder(folder / "embedder.safetensors", network())


def read_embedder(folder: Path) -> Any:
    model = network()
    load_embedder(folder / "embedder.safetensors", model)
    return dict(model.state_dict())


# --- galleries, tables, caches ----------------------------------------------------------------------------------------


def gallery_reader(index: str, count: int) -> Reader:
    def make(folder: Path) -> None:
        Gallery(EmbeddingBank(ROWS[:count], torch.arange(count)), index).save(folder / "gallery")

    return Reader(make, read_gallery, mend=mend_gallery)


def read_gallery(folder: Path) -> Any:
    gallery = Gallery.load(folder / "gallery")
    return gallery.search(ROWS[:5], min(3, len(gallery))), gallery.labels, str(gallery), gallery.ranking.kind


def mend_gallery(folder: Path) -> None:
    mend_safetensors(folder / "gallery")
    try:
        tensors, texts = tensor_file.read_tensors(folder / "gallery" / "labels.safetensors")
        about = json.loads(texts["gallery"])
        about["index"] = index_checksum(folder / "gallery" / "index.faiss")
        tensor_file.write_tensors(
            folder / "gallery" / "labels.safetensors", tensors, texts | {"gallery": json.dumps(about)}
        )
    except Exception:
        return  # too broken to be mended


def make_figures(folder: Path) -> None:
    common = {"count": 600, "split": "test", "classes": 20, "protocol": "inductive", "ways": 5, "shots": 1}
    rows = [
        ResultRow(method="ours, the best", figure="accuracy", value=0.5, ci95=0.01, seconds=1.5, seed=0, **common),
        ResultRow(method='a "quoted" one', figure="accuracy", value=0.25, ci95=float("nan"), note="ü\n", **common),
    ]
    ResultTable(rows).write(folder)
    for file in folder.iterdir():
        if file.name != "figures.csv":
            file.unlink()


def make_cache(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 3, 4), dtype=np.uint8)
    items = zip(images, [0, 0, 1, 1, 2], strict=True)
    source = cache.Source(items, 6, (1, 3, 4), lambda: {"class_names": ["ä", "b", "c"], "broken": []})
    cache.cached_images("set", (), "1", lambda: source, folder)


def read_cache(folder: Path) -> Any:
    def build() -> cache.Source:
        raise AssertionError("built again")

    cached = cache.cached_images("set", (), "1", build, folder)
    return cached.images, cached.labels, cached.about


def mend_cache(folder: Path) -> None:
    for about in folder.glob("*/about.json"):
        try:
            held = json.loads(about.read_text())
            images, labels = (np.load(about.with_name(f"{name}.npy")) for name in ("images", "labels"))
            held["checksums"] = cache._checksums(images, labels, held["facts"])
            about.write_text(json.dumps(held))
        except Exception:
            continue  # too broken to be mended


# --- run folders ------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> None:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        run(replace(TINY_EXPERIMENTS["protonet"], steps=4, run_dir=folder / "run"))
    for file in [file for file in (folder / "run").rglob("*") if file.is_file()]:
        if file.name not in (*DAMAGED_OF_A_RUN, "figures.csv"):
            file.unlink()


# (figures.csv, which is read too, has no checksum, and a reader of its own above)
DAMAGED_OF_A_RUN = ("config.json", "last.pt", "embedder.safetensors")


def mend_run(folder: Path) -> None:
    mend_safetensors(folder / "run")
    try:
        about = json.loads((folder / "run" / "config.json").read_text())
        about.pop("checksum", None)
        (folder / "run" / "config.json").write_text(provenance_text(about))
    except Exception:
        return  # too broken to be mended


def read_stored_run(folder: Path) -> Any:
    stored = read_run(folder / "run", "cpu", trusted=["tests"])
    elsewhere = replace(stored.config, run_dir=None, data_root=None)
    return repr(elsewhere), dict(stored.trainer.state_dict()), repr(stored.history)


def make_records(folder: Path) -> None:
    with patch("importlib.util.find_spec", return_value=None):  # TensorBoard's files are never read
        recorder = Recorder(folder)
        for step in range(1, 9):
            recorder.record("train", step, loss=step / 2)
            recorder.record("validation", step, accuracy=1 / step)
            recorder.save()


def read_records(folder: Path) -> Any:
    copied = folder / "cache"
    copied.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            copyfile(file, copied / file.name)
    Recorder(copied).forget_after(4, ("train", "validation"))
    with closing(sqlite3.connect(copied / "logs.db")) as connection:
        rows = [connection.execute(f"SELECT step FROM {name}").fetchall() for name in ("train", "validation")]
    assert all(step <= 4 for table in rows for (step,) in table if isinstance(step, int | float))
    return rows, [(file.name, file.read_bytes()) for file in sorted(copied.glob("*.csv"))]


READERS = {
    "run_folder": Reader(
        make_run, read_stored_run, mend=mend_run, damages=tuple(f"run/{name}" for name in DAMAGED_OF_A_RUN)
    ),
    "records": Reader(make_records, read_records, checked=False),
    "omniglot_zip": Reader(make_omniglot, read_omniglot),
    "mini_imagenet_zip": Reader(make_mini_imagenet_zip, read_mini_imagenet),
    "csv_splits": Reader(
        make_mini_imagenet_lists, read_mini_imagenet, checked=False, damages=("train.csv", "val.csv", "test.csv")
    ),
    "png": image_reader("png", "PNG"),
    "jpg": image_reader("jpg", "JPEG"),
    "tiff": image_reader("tiff", "TIFF"),
    "webp": image_reader("webp", "WEBP"),
    "image_folder": Reader(make_image_folder, read_image_folder, checked=False, mend=mend_png),
    "npy": Reader(make_npy, read_bank("bank.npy"), checked=False),
    "npz": Reader(make_npz, read_bank("bank.npz")),
    "npz_texts": Reader(make_npz_of_texts, read_bank("bank.npz")),
    "pt_bank": Reader(make_pt, read_bank("bank.pt")),
    "pt_checkpoint": Reader(make_checkpoint, lambda folder: load_checkpoint(folder / "last.pt")),
    "safetensors_bank": Reader(
        lambda folder: save_bank(folder / "bank.safetensors", BANK),
        read_bank("bank.safetensors"),
        mend=mend_safetensors,
    ),
    "safetensors_foreign": Reader(make_foreign_safetensors, read_bank("bank.safetensors"), checked=False),
    "safetensors_embedder": Reader(make_embedder, read_embedder, mend=mend_safetensors),
    "faiss_ivf": gallery_reader("ivf", 80),
    "faiss_ivfpq": gallery_reader("ivfpq", 650),
    "faiss_sq": gallery_reader("ivfpq", 80),
    "faiss_hnsw": gallery_reader("hnsw", 30),
    "figures_csv": Reader(
        make_figures, lambda folder: [asdict(r) for r in ResultTable.read(folder).rows], checked=False
    ),
    "cache": Reader(make_cache, read_cache, mend=mend_cache),
}
