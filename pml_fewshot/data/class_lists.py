"""Assignment of classes to splits: by lists of names, as published, or by a seeded draw."""

import csv
import difflib
import json
import operator
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pml_fewshot.checks import MissingFileError, UsageError, UsageTypeError, check_disjoint

ROLES = {  # common names of splits, in upper or lower case
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}
SUFFIXES = (".txt", ".csv", ".json")

# {"train": names or a file of names, ..}, or a folder with train.txt, val.txt and test.txt (or .csv, .json)
ClassLists = Mapping[str, Sequence[str] | str | Path] | str | Path


def divide_classes(
    names: Sequence[str], splits: ClassLists | None, val_fraction: float, test_fraction: float, seed: int
) -> tuple[dict[str, list[str]], str]:
    """Returns the classes of train, val and test, by lists or else by a draw, and a note if some are in no list."""
    if splits is None:
        return draw_classes(names, val_fraction, test_fraction, seed), ""
    lists = read_class_lists(splits, names)
    unlisted = len(names) - sum(map(len, lists.values()))
    return lists, f"{unlisted} of {len(names)} classes in no list" if unlisted else ""


def read_class_lists(splits: ClassLists, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the classes of train, val and test, in the order of `names`, which must include them.

    Args:
        splits: for each split, its class names or a file of them; or a folder of such files, named train, val (valid,
            validation) and test. A .txt has one name per line; a .csv has a column `label`, or else the names in its
            first column; a .json has a list, or one under `class_names` or `label_names`.
        names: all existing classes.

    Raises:
        UsageError: a list that cannot be read, an unknown split or class, a class in two lists, or an empty list.
    """
    if not isinstance(splits, Mapping):
        folder = Path(splits)
        found = (path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES)
        files = {path.name: path for path in found if role_of(path.stem)}
        if not files:
            wanted = f"a mapping of splits to names, or a folder with train, val and test as {', '.join(SUFFIXES)}"
            raise MissingFileError(f"expected {wanted}, got {splits}; list the classes of each split")
        splits = {path.stem: path for path in files.values()}
        if len(splits) < len(files):
            raise UsageError(f"expected one list a split in {folder}, got {', '.join(files)}; take the others away")
    place = {name: number for number, name in enumerate(names)}
    known = {unicodedata.normalize("NFC", name): name for name in names}  # (macOS separates letters and accents)
    lists: dict[str, list[str]] = {}
    for role, given in splits.items():
        if role_of(role) in ("", *lists):
            raise UsageError(f"expected splits named train, val and test, each once, got {', '.join(splits)}")
        if given is None:
            continue
        listed = _names_in(Path(given)) if isinstance(given, str | Path) else list(map(str, given))
        listed = [known.get(unicodedata.normalize("NFC", name), name) for name in listed]
        if unknown := [name for name in listed if name not in place]:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            do = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:3])}, .."
            got = f"{len(unknown)} of {len(listed)} that are not, first {unknown[0]!r}"
            raise UsageError(f"expected the names of {role} as classes of the data, got {got}; {do}")
        if not listed:
            raise UsageError(f"expected at least one class in {role}, got none; name some, or leave {role} out")
        lists[role_of(role)] = sorted(dict.fromkeys(listed), key=place.__getitem__)
    check_disjoint(list(lists.items()))
    return {role: lists[role] for role in ("train", "val", "test") if role in lists}


def role_of(name: str) -> str:
    """Returns train, val or test for any of their names; "" for others."""
    return ROLES.get(name.lower(), "")


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"expected UTF-8 in {path}, got another encoding ({error}); save it as UTF-8") from error


def _names_in(path: Path) -> list[str]:
    if not path.is_file():
        raise MissingFileError(f"expected a file of class names at {path}, got none; check the path")
    text = read_text(path)
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = None
        if isinstance(found, dict):
            found = found.get("class_names", found.get("label_names"))
        if not isinstance(found, list):
            wanted = "a list of names, or one as class_names or label_names"
            raise UsageTypeError(f"expected {wanted} in {path}, got {text[:50]!r}; write one")
        return list(map(str, found))
    if path.suffix == ".csv":
        rows = [row for row in csv.reader(text.splitlines()) if row]
        column = rows[0].index("label") if rows and "label" in rows[0] else None
        if short := [row for row in rows if len(row) <= (column or 0)]:
            raise UsageError(f"expected a label in every line of {path}, got {short[0]}; complete it")
        return list(dict.fromkeys(row[column or 0] for row in rows[column is not None :]))
    return [line.strip() for line in text.splitlines() if line.strip()]


def draw_classes(names: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[str]]:
    """Returns the classes of train, val and test drawn with a seed: the same in every version and on every machine."""
    seed = operator.index(seed)
    shares = [share if 0 < share < 1 else 0 for share in (val_fraction, test_fraction)]
    val, test = (max(1, round(share * len(names))) if share else 0 for share in shares)
    if shares != [val_fraction, test_fraction] or test == 0 or val + test >= len(names):
        raise UsageError(
            f"expected val_fraction >= 0 and test_fraction > 0 that leave classes for train, got {val_fraction} and "
            f"{test_fraction} of {len(names)} classes ({', '.join(names[:5])}); add classes or lower the fractions"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
    return {split: [names[c] for c in sorted(own)] for split, own in drawn.items() if own}
