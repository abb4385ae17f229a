"""load_image_table: images by a CSV, a Parquet file or a DataFrame."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.image_table import load_image_table
from tests.data.loading import by_class, entries

ROWS = [
    f"{c}{i}.png,{c},{split}" for c, split in zip("abcd", ("train", "train", "val", "test"), strict=True) for i in "01"
]


def table(folder: Path, *lines: str, header: str = "path,label,split") -> Path:
    """A CSV beside eight images, of shade 10 times their place."""
    folder.mkdir(exist_ok=True)
    for place, name in enumerate(f"{c}{i}.png" for c in "abcd" for i in "01"):
        Image.new("L", (6, 6), 10 * place).save(folder / name)
    (folder / "photos.csv").write_text("\n".join([header, *(lines or ROWS)]) + "\n", encoding="utf-8-sig")
    return folder / "photos.csv"


def load(source: object, **options: object) -> Splits:
    return load_image_table(source, **{"image_size": 6, "channels": 1} | options)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PML_FEWSHOT_CACHE", str(tmp_path / "cache"))


def shades(splits: Splits) -> dict[str, list[int]]:
    return {name: images[:, 0, 0, 0].tolist() for name, images in by_class(splits).items()}


EXPECTED = {"a": [0, 10], "b": [20, 30], "c": [40, 50], "d": [60, 70]}


def test_a_csv_gives_each_image_its_class_and_split(tmp_path: Path):
    splits = load(table(tmp_path / "set"))
    assert [part.class_names for part in vars(splits).values()] == [("a", "b"), ("c",), ("d",)]
    assert shades(splits) == EXPECTED
    mapped = load(tmp_path / "set" / "photos.csv", memory_map=True)
    assert shades(mapped) == EXPECTED
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("header", "delimiter", "options"),
    [
        ("filename,class,set", ",", {}),
        ("file;category;partition", ";", {}),
        ("image\ttarget\tsubset", "\t", {}),
        ("where,what,role", ",", {"path": "where", "label": "what", "split": "role"}),
    ],
)
def test_columns_go_by_their_usual_names_or_by_yours(
    tmp_path: Path, header: str, delimiter: str, options: dict[str, str]
):
    lines = [row.replace(",", delimiter) for row in ROWS]
    assert shades(load(table(tmp_path / "set", *lines, header=header), **options)) == EXPECTED


def test_data_frames_and_parquet_are_the_same_table(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = table(tmp_path / "set")
    frame = pandas.read_csv(path)
    frame.to_parquet(path.with_suffix(".parquet"))
    assert shades(load(path.with_suffix(".parquet"))) == EXPECTED
    assert shades(load(frame, root=path.parent)) == EXPECTED
    frame["path"] = [str(path.parent / name) for name in frame["path"]]
    assert shades(load(frame)) == EXPECTED
    frame.loc[3, "label"] = np.nan
    with pytest.raises(UsageError, match="a value of 'label' in every row of the table, got none in row 4; fill it in"):
        load(frame)


def test_without_a_split_column_classes_are_drawn_or_listed(tmp_path: Path):
    path = table(tmp_path / "set", *(row.rpartition(",")[0] for row in ROWS), header="path,label")
    drawn = load(path, seed=1)
    assert shades(drawn) == EXPECTED
    assert [len(part.class_names) for part in vars(drawn).values()] == [2, 1, 1]
    listed = load(path, splits={"train": ["d"], "test": ["a"]})
    assert (listed.train.class_names, listed.val, listed.test.class_names) == (("d",), None, ("a",))
    assert listed.test.note == "2 of 4 classes in no list"
    assert len(entries(tmp_path / "cache")) == 1


def test_a_column_of_splits_and_lists_of_splits_exclude_each_other(tmp_path: Path):
    path = table(tmp_path / "set")
    with pytest.raises(UsageError, match="expected a column of splits or `splits`, got 'split' and `splits`"):
        load(path, split="split", splits={"train": ["d"], "test": ["a"]})
    listed = load(path, splits={"train": ["d"], "test": ["a"]})  # a column that was not named does not count
    assert (listed.train.class_names, listed.test.class_names) == (("d",), ("a",))


def test_rows_that_are_there_twice_are_counted_aloud(tmp_path: Path):
    with pytest.warns(UserWarning, match="set: 2 rows name an image that an earlier one names; it is read once"):
        assert shades(load(table(tmp_path / "set", *ROWS, ROWS[0], ROWS[5]))) == EXPECTED


def test_images_of_the_same_pixels_in_two_splits_are_noted(tmp_path: Path):
    path = table(tmp_path / "set")
    (path.parent / "d1.png").write_bytes((path.parent / "a0.png").read_bytes())
    note = "copies of other images: 1, 1 of them in another class or split, as train/a and test/d"
    assert load(path).test.note == note


def test_the_same_classes_in_train_and_test_are_taken_where_they_are_meant(tmp_path: Path):
    path = table(tmp_path / "set", "a0.png,a,train", "a1.png,a,test", "b0.png,b,train", "b1.png,b,test")
    with pytest.raises(UsageError, match=r"class 'a' in train and in test; .*shared_classes=True"):
        load(path)
    splits = load(path, shared_classes=True)
    assert [part.images[:, 0, 0, 0].tolist() for part in (splits.train, splits.test)] == [[0, 20], [10, 30]]


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("path,what,split", ROWS, "a column 'label' in .*photos.csv, got path, what, split; name yours as label="),
        ("path,label,split", ["a0.png,,train"], "a value of 'label' in every row of .*, got none in row 1; fill it in"),
        ("path,label,split", ["a0.png,a"], "a value of 'split' in every row of .*, got none in row 1"),
        (
            "path,label,split",
            ["a0.png,a,holdout"],
            "train, val or test as 'split' in .*, got 'holdout' in row 1; rename it",
        ),
        (
            "path,label,split",
            [*ROWS, "a0.png,b,train"],
            "one class and split of .*, got a0.png as train/a and in row 9 as",
        ),
        ("path,label,split", [*ROWS, "x.png,a,train", "y.png,a,train"], "got 2 of 10 that are not there, first x.png"),
        ("path,label,split", ["a0.png,a,val"], "expected parts train and test or val, got val"),
    ],
)
def test_what_does_not_fit_names_the_row_or_column(tmp_path: Path, header: str, lines: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        load(table(tmp_path / "set", *lines, header=header))


def test_no_table_is_an_error(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"a table of images at .*none\.csv, got none"):
        load(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="a table as a path or a DataFrame, got list"):
        load([1])
    (tmp_path / "empty.csv").write_text("path,label\n")
    with pytest.raises(UsageError, match=r"rows in .*empty\.csv, got none; list the images"):
        load(tmp_path / "empty.csv")
