"""What loaders give and leave: the parts of splits, the cache's entries; and where the real data sets are."""

import os
from pathlib import Path

import numpy as np
import pytest

from pml_fewshot.data.dataset import FewShotDataset, Splits


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def entries(cache: Path) -> list[str]:
    """The cache's entries and whatever else lies there, hidden too, but for the locks."""
    names = os.listdir(cache) if cache.exists() else []  # noqa: PTH208
    return sorted(name for name in names if not name.endswith("-lock"))


def parts(splits: Splits) -> dict[str, FewShotDataset]:
    return {name: part for name in ("train", "val", "test") if (part := getattr(splits, name)) is not None}


def by_class(splits: Splits) -> dict[str, np.ndarray]:
    """Class name -> its images (n, C, H, W), in the order stored."""
    return {
        name: part.images.numpy()[(part.labels == label).numpy()]
        for part in parts(splits).values()
        for label, name in enumerate(part.class_names)
    }


def shared_data(path: str) -> Path:
    """A file or folder of the real data sets; skips where it is not there."""
    root = Path(os.environ.get("PML_FEWSHOT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    if not (root / path).exists():
        pytest.skip(f"no {path} in {root}; set PML_FEWSHOT_DATA to the data folder")
    return root / path


def real_root(file: str) -> Path:
    """The folder of the real data sets; skips where the file is not there."""
    return shared_data(file).parents[file.count("/")]
