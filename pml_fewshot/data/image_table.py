"""Images listed in a table (load_image_table): a CSV or DataFrame of paths, classes and optionally splits."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pml_fewshot.checks import MissingFileError, UsageError, UsageTypeError, check_disjoint, import_extra
from pml_fewshot.data.cache import short_hash
from pml_fewshot.data.class_lists import ClassLists, read_text, role_of
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.image_folder import divided
from pml_fewshot.data.images import Form, Resize, Size
from pml_fewshot.data.listing import Classes, Listing, note_twins

# common names of these columns; the first one present counts
PATH_COLUMNS = ("path", "filename", "file", "filepath", "file_name", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


def load_image_table(
    table: Any,
    root: str | Path | None = None,
    image_size: Size = 84,
    channels: int = 3,
    path: str | None = None,
    label: str | None = None,
    split: str | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    skip_broken: bool = False,
    memory_map: bool = False,
    cache_dir: str | Path | None = None,
    splits: ClassLists | None = None,
    resize: Resize = "crop",
    depth: int = 8,
    shared_classes: bool = False,
) -> Splits:
    """Reads images listed in a table, one per row: its path, its class and, optionally, its split.

    Args:
        table: a .csv (a .tsv, or with semicolons), a .parquet where pandas is installed, or a DataFrame.
        root: the folder that the paths are relative to; when None, the file's, or the working folder for a DataFrame.
        path: the path column; when None, the first of path, filename, file, filepath, file_name, image, ...
        label: the class column; when None, the first of label, class, class_name, category, target.
        split: the column of train, val (valid, validation) and test; when None, split, set, subset, partition. Without
            such a column, or with `splits` instead, the classes are divided as in load_image_folder.
        image_size, channels, val_fraction, test_fraction, seed, skip_broken, memory_map: as in load_image_folder.
        cache_dir, splits, resize, depth, shared_classes: as in load_image_folder.

    A warning counts duplicate rows, which are read once.

    Raises:
        UsageError: a missing table or image (MissingFileError) or column, an empty cell, an unknown split, both
            `split` and `splits`, or a path with two classes or splits; also as in load_image_folder.
    """
    form = Form.of(image_size, channels, resize, depth)
    if split is not None and splits is not None:
        raise UsageError(f"expected a column of splits or `splits`, got {split!r} and `splits`; leave one of them out")
    rows, name = _rows(table)
    folder = Path(root if root is not None else name.parent if isinstance(table, str | Path) else ".").resolve()
    if not rows:
        raise UsageError(f"expected rows in {name}, got none; list the images")
    path = _column(path, PATH_COLUMNS, rows[0], "path", name)
    label = _column(label, LABEL_COLUMNS, rows[0], "label", name)
    if split is not None or (splits is None and any(column in rows[0] for column in SPLIT_COLUMNS)):
        split = _column(split, SPLIT_COLUMNS, rows[0], "split", name)
    else:
        split = None
    place: dict[str, tuple[str, str]] = {}  # image -> split, class
    twice = 0
    for number, row in enumerate(rows, start=1):
        cells = [_cell(row, column, number, name) for column in (path, label, split) if column is not None]
        cells[0] = os.path.normpath(cells[0])
        role = role_of(cells[2]) if split is not None else ""
        if split is not None and not role:
            got = f"{cells[2]!r} in row {number}"
            raise UsageError(f"expected train, val or test as {split!r} in {name}, got {got}; rename it")
        twice += cells[0] in place
        if place.setdefault(cells[0], (role, cells[1])) != (role, cells[1]):
            other = "/".join(filter(None, place[cells[0]]))
            got = f"{cells[0]} as {other} and in row {number} as {'/'.join(filter(None, (role, cells[1])))}"
            raise UsageError(f"expected one class and split of each image in {name}, got {got}; take one row out")
    missing = [image for image in place if not (folder / image).is_file()]
    if missing:
        got = f"{len(missing)} of {len(place)} that are not there, first {missing[0]}"
        raise MissingFileError(f"expected the images of {name} in {folder}, got {got}; give root=")
    own, note = _by_class(place, splits, split is not None, val_fraction, test_fraction, seed)
    if not shared_classes:
        check_disjoint([(role, tuple(classes)) for role, classes in own.items()])
    said = [f"{twice} rows name an image that an earlier one names; it is read once"] if twice else []
    names = sorted(place)
    listing = Listing(
        folder,
        names,
        own,
        lambda image: (folder / image).read_bytes(),
        [folder / n for n in names],
        said,
        (short_hash(names),),
    )
    sets = listing.sets("image_table", form, skip_broken, memory_map, cache_dir, note)
    note_twins(sets)
    listing.warn()
    return Splits.of(sets, shared_classes)


def _rows(table: Any) -> tuple[Sequence[Mapping[str, Any]], Path]:
    """Returns the table's rows and its name."""
    if hasattr(table, "to_dict") and hasattr(table, "columns"):
        return table.to_dict("records"), Path("the table")
    if not isinstance(table, str | Path):
        raise UsageTypeError(f"expected a table as a path or a DataFrame, got {type(table).__name__}; give one of them")
    path = Path(table)
    if not path.is_file():
        raise MissingFileError(f"expected a table of images at {path}, got none; check the path")
    if path.suffix.lower() == ".parquet":
        pandas = import_extra("tables", f"to read {path}", "pandas", "pyarrow")
        return pandas.read_parquet(path).to_dict("records"), path
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)), path


def _column(given: str | None, usual: Sequence[str], row: Mapping[str, Any], argument: str, table: Path) -> str:
    for name in [given] if given is not None else usual:
        if name in row:
            return name
    wanted, got = repr(given or usual[0]), ", ".join(map(str, row))
    raise UsageError(f"expected a column {wanted} in {table}, got {got}; name yours as {argument}=...")


def _cell(row: Mapping[str, Any], column: str, number: int, table: Path) -> str:
    value = row.get(column)
    if value is None or value != value or not str(value).strip():  # pandas reads an empty cell as NaN
        wanted = f"a value of {column!r} in every row of {table}"
        raise UsageError(f"expected {wanted}, got none in row {number}; fill it in")
    return str(value).strip()


def _by_class(
    place: Mapping[str, tuple[str, str]],
    splits: ClassLists | None,
    by_column: bool,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> tuple[dict[str, Classes], str]:
    """Returns split -> class -> images, classes sorted, and a note."""
    found: dict[str, Classes] = {}
    for image in sorted(place):
        role, name = place[image]
        found.setdefault(role, {}).setdefault(name, []).append(image)
    order = sorted(found, key=["train", "val", "test", ""].index)
    own = {role: dict(sorted(found[role].items())) for role in order}
    if by_column:
        return own, "" if "test" in own else "no test classes: val's in their place"
    return divided(own[""], splits, val_fraction, test_fraction, seed)
