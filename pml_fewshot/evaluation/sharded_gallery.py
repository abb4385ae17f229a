"""build_gallery: a Gallery larger than memory, built by any number of worker processes that share a folder."""

import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from pytorch_metric_learning.distances import BaseDistance

from pml_fewshot.checks import ExistingFileError, UsageError, check_at_least_one
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.gallery import ADD_ROWS, Gallery
from pml_fewshot.evaluation.mapped_index import compares_floats, encoded, inverted_lists, record_type, write_lists
from pml_fewshot.evaluation.search import Ranking
from pml_fewshot.io.atomic import atomic_write, fsync, translate_write_errors, write_text
from pml_fewshot.io.tensors import checksum

PLAN = "build.json"
WRITE_ROWS = 2**16  # records at a time


def build_gallery(
    bank: EmbeddingBank,
    folder: str | Path,
    index: str = "ivf",
    parameters: str = "",
    distance: BaseDistance | None = None,
    seed: int = 0,
    shards: int = 8,
) -> Gallery:
    """Builds a Gallery of inverted lists in a folder, together with all other processes that call the same.

    Start any number of workers, on one machine or on several with a common disk whose locks work: each makes the same
    call and returns the same finished gallery. The first trains the index; each then takes shards, slices of the
    bank's rows, that nobody has taken yet; one of them merges all shards. A lock is held by a file, and freed by the
    system when its process dies, however it dies: another worker then takes over. What is done is not done again, so
    that after a crash the same call goes on, and with a finished folder it opens the gallery.

    The index is the same, bit for bit, as that of `Gallery(bank, index, parameters, distance, seed)`, whatever the
    number of shards and workers; its lists and floats stay on the disk and are mapped into memory. `Gallery.load`
    opens the folder, wherever it was moved. Nothing can be added to it or removed.

    Args:
        bank: the references; `load_bank` of a .npy maps a file larger than memory. Each worker reads it once whole for
            its checksum, and then the rows of its shards.
        folder: new, or begun by the same call.
        index, parameters, distance, seed: as of Gallery. An index with inverted lists: "ivf", "ivfpq", or a description
            such as "IVF4096,SQ8", "OPQ32,IVF4096,PQ32" or "IVF4096,PQ16x4fsr,RFlat".
        shards: into which the rows are divided, by 65,536 rows at least: 8 are enough for up to 8 workers. While a
            worker makes one it holds the codes of its rows and 20 bytes a row in memory, so more shards take less. On
            the disk all shards and the finished lists lie side by side until the shards are removed.

    Raises:
        UsageError: another bank, index, parameter, distance, seed or number of shards than the folder was begun with;
            an index without inverted lists; what Gallery refuses.
        ExistingFileError: a folder with a gallery that Gallery.save wrote.
        CannotWriteError: the disk is full or the folder read-only. Free space, and call again.
    """
    check_at_least_one("shards", shards)
    folder, seed = Path(folder), operator.index(seed)
    if (folder / "labels.safetensors").exists() and not (folder / PLAN).exists():
        got = f"{folder} with a gallery that was saved there"
        raise ExistingFileError(f"expected a new folder or one that build_gallery began, got {got}; name another")
    plan = {
        "bank": _bank_checksum(bank),
        "references": f"{' x '.join(map(str, bank.embeddings.shape))} {bank.embeddings.dtype}".replace("torch.", ""),
        "index": index,
        "parameters": parameters,
        "distance": str(Ranking.of(distance)),
        "seed": seed,
        "shards": int(shards),
    }
    _check_plan(folder, plan)
    if not _finished(folder):
        with translate_write_errors(folder):
            (folder / "shards").mkdir(parents=True, exist_ok=True)
        build = _Build(folder, bank, Gallery.empty_like(bank, index, parameters, distance))
        with _lock(folder, "train"):
            _check_plan(folder, plan)
            if not (folder / PLAN).exists():
                build.train(index, parameters, distance, seed)
                write_text(folder / PLAN, json.dumps(plan, indent=2))
        build.make_shards(int(shards))
        with _lock(folder, "merge"):
            if not _finished(folder):
                build.merge()
    return Gallery.load(folder)
