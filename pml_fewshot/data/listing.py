"""Listing: image files by class and split, and the datasets built from them, decoded once and cached."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pml_fewshot.checks import UsageError
from pml_fewshot.data.cache import Source, cached_images
from pml_fewshot.data.dataset import FewShotDataset, items_at, joined_notes
from pml_fewshot.data.images import Form, ImageFiles, Read, read_images

Classes = dict[str, list[str]]  # class name -> names of its images, below one folder or zip, with "/" between folders


@dataclass
class Listing:
    """Image files by split and class, and what to warn about.

    Args:
        path: the folder, zip or table, for messages and as the cache's key.
        names: names of all images, including those in no split.
        splits: split -> class -> its images' names.
        read: returns the content of a named image.
        files: the files the images are read from.
        said: warnings about what was left out or interpreted differently than it looks, with counts.
        key: anything else that distinguishes this listing from others of the same path.
    """

    path: Path
    names: Sequence[str]
    splits: dict[str, Classes]
    read: Read
    files: Sequence[Path]
    said: list[str] = field(default_factory=list)
    key: tuple[object, ...] = ()

    def sets(
        self,
        name: str,
        form: Form,
        skip_broken: bool = False,
        memory_map: bool = False,
        cache_dir: str | Path | None = None,
        note: str = "",
    ) -> dict[str, FewShotDataset]:
        """Returns the datasets of the splits, each with its own copy of its images unless they are memory-mapped.

        A single cache entry with all images serves every division into splits.
        """
        broken: list[str] = []

        def items() -> Iterator[np.ndarray]:
            decoded = read_images(self.names, self.read, form, self.path, skip_broken)
            for name, image in zip(self.names, decoded, strict=True):
                if image is None:
                    broken.append(name)
                else:
                    yield image

        def source() -> Source:
            return Source(items(), len(self.names), form.shape, {"broken": broken}, form.dtype)

        key = (self.path, *form, skip_broken, *self.key)
        stored = cached_images(name, key, self.files, source, cache_dir, memory_map)
        lost = set(stored.notes["broken"])
        if lost:
            skipped = f"{len(lost)} broken image{'s' if len(lost) > 1 else ''} skipped"
            more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
            note = joined_notes(note, skipped)
            self.said.append(f"{skipped}: {', '.join(sorted(lost)[:10])}{more}")
        row = {name: row for row, name in enumerate(name for name in self.names if name not in lost)}
        sets = {}
        for split, classes in self.splits.items():
            rows = [[row[name] for name in own if name not in lost] for own in classes.values()]
            if empty := [name for name, own in zip(classes, rows, strict=True) if not own]:
                got = f"got only broken ones in {', '.join(empty[:3])}"
                raise UsageError(f"expected an image in every class of {self.path}, {got}; replace them")
            labels = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(own) for own in rows]))
            index = torch.tensor([row for own in rows for row in own])
            first, last = rows[0][0], rows[-1][-1]
            if memory_map and last - first + 1 == len(index) and bool((index.diff() == 1).all()):
                sets[split] = FewShotDataset(stored.images[first : last + 1], labels, list(classes), note)
            elif memory_map:
                sets[split] = FewShotDataset(stored.images, labels, list(classes), note, index)
            else:
                sets[split] = FewShotDataset(items_at(stored.images, index), labels, list(classes), note)
            sets[split].mapped = memory_map
            sets[split].digests = stored.digests[index]
        return sets

    def warn(self) -> None:
        """Issues everything in `said` as one warning."""
        if self.said:
            warnings.warn(f"{self.path}: {'; '.join(self.said)}", stacklevel=3)


def note_twins(sets: Mapping[str, FewShotDataset]) -> None:
    """Notes how many images have the same pixels as another, and how many of these are in another class or split."""
    names = [f"{split}/{name}" for split, part in sets.items() for name in part.class_names]
    digests, owners, start = [], [], 0
    for part in sets.values():
        digests += [] if part.digests is None else [part.digests.numpy()]
        owners.append(part.labels.numpy() + start)
        start += len(part.class_names)
    owner = np.concatenate(owners)
    _, first, group = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[group] != np.arange(len(group)))
    if not len(copies):
        return
    text = f"copies of other images: {len(copies)}"
    if len(apart := copies[owner[first[group[copies]]] != owner[copies]]):
        pair = f"{names[owner[first[group[apart[0]]]]]} and {names[owner[apart[0]]]}"
        text += f", {len(apart)} of them in another class or split, as {pair}"
    for part in sets.values():
        part.note = joined_notes(part.note, text)


def by_folder(names: Sequence[str], path: Path, said: list[str], depth: int = 0) -> Classes:
    """Groups images by their folder at `depth`; deeper images belong to it, which is added to `said`."""
    classes: Classes = {}
    deeper = []
    for name in names:
        parts = name.split("/")
        if len(parts) < depth + 2:
            raise UsageError(f"expected images of {path} in class folders, got {name} in none; move it into one")
        deeper += [name] if len(parts) > depth + 2 else []
        classes.setdefault(parts[depth], []).append(name)
    if deeper:
        said.append(f"{len(deeper)} images in deeper folders belong to the class above, first {deeper[0]}")
    return dict(sorted(classes.items()))


def what_is_left_out(found: ImageFiles, top: str, depth: int) -> list[str]:
    """Returns warnings about files below `top` whose extensions are not images', in class folders at `depth`."""
    others = [name for name in found.others if name.startswith(top)]
    inside = [name for name in others if name.count("/") > depth and not name.endswith("/")]
    said = []
    if inside:
        endings = Counter(Path(name).suffix.lower() or "without ending" for name in inside)
        counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
        said.append(f"left out {len(inside)} files that are no images by their ending ({counts}), first {inside[0]}")
    folders = {_above(name, depth) for name in others if name.count("/") > depth}
    if without := sorted(folders - {_above(name, depth) for name in found.names}):
        said.append(f"left out {len(without)} folders without an image: {', '.join(without[:5])}")
    if found.repeated:
        said.append(f"left out {found.repeated} entries of names that come again in the zip; the last one counts")
    return said


def _above(name: str, depth: int) -> str:
    return "/".join(name.split("/")[: depth + 1])


def common_folder(names: Iterable[str]) -> str:
    """Returns the folder, ending in "/", that holds all class folders: usually "", "images/" for CUB."""
    parents = {name.rpartition("/")[0] for name in names}
    common = os.path.commonpath(parents) if parents and "" not in parents else ""
    if common in parents:  # it holds images: it is a class
        common = common.rpartition("/")[0]
    return f"{common}/" if common else ""
