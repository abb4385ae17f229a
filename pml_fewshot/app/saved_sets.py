"""Saves and loads taught sets: set.json, examples.safetensors, and the pictures, one folder per class."""

import json
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from pml_fewshot.app.pictures import Picture, PictureEmbedder
from pml_fewshot.app.taught_set import Known, checked_name
from pml_fewshot.checks import ExistingFileError, MissingFileError, UsageError
from pml_fewshot.io.atomic import fsync, translate_write_errors
from pml_fewshot.io.tensors import CHECKSUM, checksum, checksum_of, json_checksum, read_tensors, write_tensors

ABOUT = "set.json"
EXAMPLES = "examples.safetensors"
PICTURES = "pictures"
VERSION = 1
LONGEST_NAME = 80
MOST_BYTES = 200  # of a file's name in UTF-8; file systems have 255
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|thumbs\.db|desktop\.ini|__macosx", re.IGNORECASE)


class Saved(NamedTuple):
    """The contents of a set's folder."""

    labels: Sequence[str]
    pictures: Sequence[Picture]
    embeddings: Sequence[np.ndarray]
    name: str


class SavedSets:
    """The sets in a folder. One thread at a time; a set is always complete, in its old or its new version.

    Args:
        folder: of the sets; created at the first save.
        embedder: only sets taught with it can be loaded.
    """

    def __init__(self, folder: Path, embedder: PictureEmbedder) -> None:
        self.folder, self.embedder = folder, embedder
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        with self._lock:
            for left in self.folder.glob(".*.old"):
                self._recover(left.name[1:-4])
            found = [path.parent.name for path in self.folder.glob(f"*/{ABOUT}")]
        return sorted((name for name in found if is_safe(name)), key=str.casefold)

    def save(self, name: str, known: Known, replace: bool = False) -> str:
        """Writes what is known under a name, which it returns; a set of that name is replaced only if requested.

        Raises:
            ExistingFileError: there is a set of that name.
            CannotWriteError: the disk is full or the folder read-only; the earlier contents are unharmed.
            UsageError: an invalid name, or nothing to save.
        """
        name = checked_set_name(name)
        if not known.examples:
            raise UsageError("expected something to save, got no examples; teach some first")
        target, beside, old = (self.folder / each for each in (name, f".{name}.tmp", f".{name}.old"))
        with self._lock, translate_write_errors(target):
            self._recover(name)
            if target.exists() and not replace:
                raise ExistingFileError(f"expected a new name, got {name!r}, which is there; choose another or replace")
            shutil.rmtree(beside, ignore_errors=True)
            try:
                self._write(beside, known)
                if target.exists():  # a folder cannot be renamed onto another
                    target.rename(old)
                beside.rename(target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
                self._recover(name)
            fsync(self.folder)
        return name

    def load(self, name: str) -> Saved:
        """Reads a set, including its embeddings.

        Raises:
            MissingFileError: there is no set of that name.
            UsageError: the set is damaged, or was taught with another embedder.
        """
        with self._lock:
            folder = self._existing(name)
            about = _about(folder)
            try:
                self._check_embedder(name, about["embedder"])
                labels, pictures = [], []
                for each in about["classes"]:
                    for file, written in zip(each["files"], each["checksums"], strict=True):
                        labels.append(each["name"])
                        pictures.append(_picture(folder, file, written))
                embeddings = read_tensors(folder / EXAMPLES)[0]["embeddings"]
                if checksum_of({"embeddings": embeddings}) != about["embeddings"]:
                    raise ValueError("other embeddings than were saved")
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                if isinstance(error, UsageError):
                    raise
                raise _damaged(folder, str(error) or type(error).__name__) from error
        if embeddings.ndim != 2 or len(embeddings) != len(labels) or not torch.isfinite(embeddings).all():
            raise _damaged(folder, f"embeddings of shape {tuple(embeddings.shape)} of {len(labels)} pictures")
        return Saved(labels, pictures, list(embeddings.float().numpy()), folder.name)

    def delete(self, name: str) -> None:
        """Removes a set for good."""
        with self._lock:
            folder = self._existing(name)
            with translate_write_errors(folder):
                (folder / ABOUT).unlink()  # first: a half-deleted folder is not a set
                shutil.rmtree(folder)

    def _existing(self, name: str) -> Path:
        name = checked_set_name(name)
        self._recover(name)
        if not (self.folder / name / ABOUT).is_file():
            raise MissingFileError(f"expected a saved set, got none named {name!r}; choose one of the list")
        return self.folder / name

    def _recover(self, name: str) -> None:
        """Completes what a killed process began: restores the old version if the new one did not take its place."""
        target, old = self.folder / name, self.folder / f".{name}.old"
        if (old / ABOUT).is_file():
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(target)

    def _write(self, folder: Path, known: Known) -> None:
        folder.mkdir(parents=True)
        classes, used = [], set[str]()
        for number, (label, examples) in enumerate(known.classes.items(), start=1):
            place = _folder_for(label, number, used)
            files = [f"{PICTURES}/{place}/{n:04}{each.picture.suffix}" for n, each in enumerate(examples, start=1)]
            (folder / PICTURES / place).mkdir(parents=True)
            for file, example in zip(files, examples, strict=True):
                (folder / file).write_bytes(example.picture.content)
                fsync(folder / file)
            checksums = [checksum([each.picture.content]) for each in examples]
            classes.append({"name": label, "files": files, "checksums": checksums})
        rows = np.stack([each.embedding for examples in known.classes.values() for each in examples])
        tensors = {"embeddings": torch.from_numpy(rows)}
        write_tensors(folder / EXAMPLES, tensors)
        embedder = {"name": self.embedder.name, "fingerprint": self.embedder.fingerprint}
        about = {"version": VERSION, "embedder": embedder, "classes": classes, "embeddings": checksum_of(tensors)}
        text = json.dumps({**about, CHECKSUM: json_checksum(about)}, indent=1, ensure_ascii=False)
        (folder / ABOUT).write_text(text, encoding="utf-8")
        fsync(folder / ABOUT)

    def _check_embedder(self, name: str, saved: dict[str, str]) -> None:
        if saved["fingerprint"] != self.embedder.fingerprint:
            same = saved["name"] == self.embedder.name
            got = f"{saved['name']} with other weights or options" if same else saved["name"]
            do = f"start the app with --embedder {saved['name']}"
            raise UsageError(f"expected a set taught with {self.embedder.name}, got {name!r} with {got}; {do}")


def checked_set_name(text: Any) -> str:
    """A name under which a set can be saved: a safe file name.

    Raises:
        UsageError: it is not.
    """
    name = checked_name(text)
    if len(name) > LONGEST_NAME or not is_safe(name):
        do = "use letters, digits, blanks, - and _"
        raise UsageError(f"expected a set's name that can be a folder's, got {name[:LONGEST_NAME]!r}; {do}")
    return name


def is_safe(name: str) -> bool:
    """Whether a file of that name can be created on every system, within its folder."""
    plain = not re.search(r'[\x00-\x1f/\\:*?"<>|]', name) and name == name.strip(" .") and name != ""
    return plain and not name.startswith("~") and not RESERVED.fullmatch(name) and len(name.encode()) <= MOST_BYTES


def _folder_for(label: str, number: int, used: set[str]) -> str:
    """The class's name if a folder can have it, otherwise class-N; some systems do not distinguish a from A."""
    place = label if is_safe(label) else f"class-{number}"
    while place.casefold() in used:
        place, number = f"class-{number}", number + 1
    used.add(place.casefold())
    return place


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        if about.pop(CHECKSUM) != json_checksum(about):
            raise ValueError("other content than its checksum says")
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']}, not {VERSION}")
        for each in about["classes"]:
            if checked_name(each["name"]) != each["name"]:
                raise ValueError(f"the class {each['name']!r}")
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _damaged(folder, str(error) or type(error).__name__) from error
    return about


def _picture(folder: Path, file: str, written: str) -> Picture:
    parts = PurePosixPath(file).parts
    if len(parts) != 3 or parts[0] != PICTURES or not all(map(is_safe, parts)) or parts[2][-4:] not in (".png", ".jpg"):
        raise _damaged(folder, f"the file name {file!r}")
    path = folder.joinpath(*parts)
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise _damaged(folder, f"no {file}")
    content = path.read_bytes()
    if checksum([content]) != written:
        raise _damaged(folder, f"another content of {file} than was saved")
    return Picture(content, path.suffix)


def _damaged(folder: Path, got: str) -> UsageError:
    return UsageError(f"expected a whole set in {folder}, got a damaged one ({got}); restore it, or delete the set")
