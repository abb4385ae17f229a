"""Classes of each split by lists, in every published form."""

import json
from pathlib import Path

import pytest

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data.class_lists import read_class_lists
from tests.data.loading import shared_data

NAMES = ["ant", "bee", "cat", "dog", "eel"]
EXPECTED = {"train": ["ant", "cat"], "val": ["bee"], "test": ["dog"]}


def test_names_may_be_given_or_stand_in_files_of_every_form(tmp_path: Path):
    (tmp_path / "a.txt").write_text("cat\n\n ant \n", encoding="utf-8-sig")
    (tmp_path / "b.csv").write_text("filename,label\n1.jpg,bee\n2.jpg,bee\n")
    (tmp_path / "tiered.csv").write_text("dog,animal\n")
    (tmp_path / "c.json").write_text(json.dumps({"class_names": ["dog"], "class_roots": ["x/dog"]}))
    (tmp_path / "d.json").write_text('["dog"]')
    for train in (["cat", "ant"], ("ant", "cat"), tmp_path / "a.txt", str(tmp_path / "a.txt")):
        for test in (tmp_path / "tiered.csv", tmp_path / "c.json", tmp_path / "d.json"):
            found = read_class_lists({"test": test, "train": train, "valid": tmp_path / "b.csv"}, NAMES)
            assert list(found.items()) == list(EXPECTED.items())


def test_a_folder_holds_a_file_a_split(tmp_path: Path):
    for name, text in (("train.txt", "ant\ncat"), ("validation.csv", "bee"), ("test.json", '{"label_names": ["dog"]}')):
        (tmp_path / name).write_text(text)
    (tmp_path / "readme.txt").write_text("of no split")
    assert read_class_lists(tmp_path, NAMES) == EXPECTED
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"or a folder with train, val and test as .*, got .*empty; list"):
        read_class_lists(tmp_path / "empty", NAMES)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train": ["ant", "catt", "x"]},
            "names of train as classes of the data, got 2 of 3 .*'catt'; did you mean 'cat'",
        ),
        ({"train": ["qqqq"]}, "first 'qqqq'; there are ant, bee, cat, .."),
        ({"train": []}, "at least one class in train, got none"),
        ({"holdout": ["ant"]}, "splits named train, val and test, each once, got holdout"),
        ({"val": ["ant"], "valid": ["bee"]}, "each once, got val, valid"),
        ({"train": ["ant"], "test": ["ant"]}, "got class 'ant' in train and in test"),
        ({"train": "nowhere.txt"}, "a file of class names at nowhere.txt, got none"),
    ],
)
def test_lists_that_do_not_fit_are_errors(splits: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        read_class_lists(splits, NAMES)


@pytest.mark.parametrize("text", ["{", '"ant"', '{"names": ["ant"]}'])
def test_a_json_of_another_kind_is_named(tmp_path: Path, text: str):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(UsageError, match=r"expected a list of names, or one as class_names .* in .*train\.json, got"):
        read_class_lists(tmp_path, NAMES)


@pytest.mark.parametrize(
    ("folder", "numbers"),
    [
        ("cifar_fs", (64, 16, 20)),
        ("cub_easyfsl", (140, 30, 30)),
        ("tieredimagenet", (351, 97, 160)),
        ("miniimagenet_ravi", (64, 16, 20)),
    ],
)
def test_published_lists_are_read(folder: str, numbers: tuple[int, ...]):
    path = shared_data(f"splits/{folder}")
    every = {name for file in path.glob("t*.*") for name in names_in(file)} | set(names_in(next(path.glob("val.*"))))
    found = read_class_lists(path, sorted(every))
    assert tuple(len(found[split]) for split in ("train", "val", "test")) == numbers


def names_in(path: Path) -> list[str]:
    if path.suffix == ".json":
        return json.loads(path.read_text())["class_names"]
    lines = path.read_text().splitlines()
    if lines[0] == "filename,label":
        return [line.split(",")[1] for line in lines[1:]]
    return [line.split(",")[0] for line in lines]
