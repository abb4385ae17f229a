"""`pml-fewshot COMMAND`: each wraps what exists, and the experiments are copied with what they import."""

import importlib
import os
import re
import runpy
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pml_fewshot
from pml_fewshot import __main__ as commands
from pml_fewshot.checks import UsageError
from pml_fewshot.data import cache
from tests.tiny_experiments import few_glyphs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in an empty folder; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["pml-fewshot", *arguments])
        code: object = 0
        try:
            commands.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def test_help_names_every_command_and_an_unknown_one_is_refused(command: Any) -> None:
    code, text = command("--help")
    assert code == 0
    assert all(f"  {name:15} {what}" in text for name, what in commands.COMMANDS.items())
    assert command("--version") == (0, f"{pml_fewshot.__version__}\n")
    code, text = command("trian")
    assert code == 2
    assert "invalid choice: 'trian'" in text


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_options_of_its_own(command: Any, name: str) -> None:
    code, text = command(name, "--help")
    assert code in (0, None)
    assert "--help" in text


def test_a_demo_is_recorded_as_the_experiment_that_reproduce_finds(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pml_fewshot, "load_glyphs", few_glyphs)
    name = f"{commands.package()}.quickstart"
    with monkeypatch.context() as fresh:
        fresh.delitem(sys.modules, name, raising=False)
        small = ["--steps", "1", "--num-episodes", "4", "--val-episodes", "4", "--no-report"]
        code, text = command("demo", *small, "--run-dir", "mine")
    assert code == 0, text
    assert "| quickstart |" in text
    monkeypatch.setitem(vars(importlib.import_module(name).CONFIG), "data", few_glyphs)
    assert command("reproduce", "mine")[1].endswith("6 figures: every one is the same\n")
    shutil.copytree("mine", "other")
    assert "| quickstart (other) |" in command("compare", "mine", "other")[1]
    assert "added to mine" in command("evaluate", "mine", "--num-episodes", "3")[1]


def test_benchmark_takes_the_file_first(command: Any, tmp_path: Path) -> None:
    labels = np.arange(60) % 6
    np.savez(tmp_path / "mine.npz", embeddings=np.eye(6, dtype=np.float32)[labels], labels=labels)
    code, text = command("benchmark", "mine.npz", "--num-episodes", "5", "--queries", "4")
    assert code == 0
    assert "| nearest prototype | 100.00 +- 0.00 |" in text
    assert "embeddings or labels at none.npz, got none; check the path" in str(command("benchmark", "none.npz")[0])


def test_cache_lists_and_empties_the_folder_of_the_user(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PML_FEWSHOT_CACHE", "kept")
    assert command("cache") == (0, "0 entries, 0 MiB, in kept\n")


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(UsageError, match=r"expected a folder for the cache, got ~nobody/x .*; name a full path"):
        cache.cache_folder("~nobody/x")
    for name in ("PML_FEWSHOT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert not cache.cache_folder().parent.is_dir()


def test_experiments_are_listed_with_their_first_lines_and_copied_with_what_they_import(command: Any) -> None:
    code, text = command("experiments")
    assert code == 0
    listed = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert listed.keys() == {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    assert listed["quickstart"].startswith("ProtoNet on the built-in glyphs")
    assert command("experiments", "--copy", "swap_miners")[0] == 0
    assert {path.name for path in Path("experiments").iterdir()} == {"__init__.py", "swap_losses.py", "swap_miners.py"}
    for path in Path("experiments").iterdir():
        assert path.read_text() == (ROOT / "experiments" / path.name).read_text()
    assert command("experiments", "--copy", "swap_miners")[0] == 0  # once more: they are the same


def test_without_names_all_experiments_are_copied(command: Any) -> None:
    code, text = command("experiments", "--copy")
    assert code == 0, text
    assert {path.name for path in Path("experiments").iterdir()} == {
        path.name for path in (ROOT / "experiments").glob("*.py")
    }


def test_a_file_that_the_user_has_edited_is_not_overwritten(command: Any) -> None:
    Path("mine").mkdir()
    Path("mine/quickstart.py").write_text("edited")
    code, _ = command("experiments", "--copy", "quickstart", "--to", "mine")
    assert code == "error: expected no mine/quickstart.py, got one that differs; rename it, or copy with --to elsewhere"
    assert Path("mine/quickstart.py").read_text() == "edited"
    Path("mine/__init__.py").write_text("")  # every package has one
    assert command("experiments", "--copy", "swap_miners", "--to", "mine")[1].endswith(
        f"python -m mine.NAME` in {Path.cwd()}\n"
    )
    assert Path("mine/__init__.py").read_text() == ""
    Path("mine/head_penalties.py").mkdir()
    code, _ = command("experiments", "--copy", "head_penalties", "--to", "mine")
    assert str(code).startswith("error: expected to write mine/head_penalties.py")
    code, _ = command("experiments", "--copy", "quikstart")
    assert re.fullmatch("error: expected an experiment as one of .*, got 'quikstart'; did you mean 'quickstart'.", code)


def test_the_working_folder_is_searched_last(command: Any) -> None:
    before = list(sys.path)
    command("cache", "--help")
    assert sys.path == [*before, str(Path.cwd())]


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_copied_experiment_needs_nothing_of_the_checkout(path: Path) -> None:
    assert not re.search(r"^(?:from|import) experiments\b", path.read_text(), re.MULTILINE)


def test_the_wheel_has_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "pml_fewshot").rglob("__init__.py")}
    assert set(listed) == found | {"pml_fewshot.experiments"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("__init__", "pml_fewshot needs Python 3.11 or newer, got .*; use a newer one"),
        ("environment", "pml_fewshot needs torch 2.5 or newer, got .*; pip install -U torch"),
    ],
)
def test_an_old_python_or_torch_says_so_in_one_line(place: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10))
    monkeypatch.delattr(torch.serialization, "safe_globals")
    with pytest.raises(ImportError, match=message) as caught:
        runpy.run_path(os.fspath(ROOT / "pml_fewshot" / f"{place}.py"))
    assert "\n" not in str(caught.value)
