"""Photos with labels, from a folder or zip with a subfolder a class."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pml_fewshot.data.image_folder import classes_in, existing
from pml_fewshot.data.images import Read, open_images
from pml_fewshot.data.listing import common_folder, what_is_left_out


@dataclass(frozen=True)
class PhotoFile:
    """An image in a folder or a zip; takes the role of `Path` for both."""

    root: Path
    name: str
    read: Read

    def __str__(self) -> str:
        return f"{self.root}/{self.name}"

    def read_bytes(self) -> bytes:
        return self.read(self.name)


@contextmanager
def labeled_photos(folder: str | Path) -> Iterator[tuple[Sequence[PhotoFile], np.ndarray]]:
    """Yields the photos below a folder, or in a zip that stays open meanwhile, and their class names (n,)."""
    with open_images(existing(folder)) as found:
        top = common_folder(found.names)
        said = what_is_left_out(found, top, top.count("/"))
        classes = classes_in(found, top, said)
        for line in said:
            warnings.warn(f"{folder}: {line}", stacklevel=4)
        photos = [PhotoFile(found.path, name, found.read) for names in classes.values() for name in names]
        yield photos, np.repeat(list(classes), [len(names) for names in classes.values()])


def source_of(photo: Any) -> str:
    """Where a photo came from; empty if not known."""
    return str(photo) if isinstance(photo, str | Path | PhotoFile) else getattr(photo, "filename", "")
