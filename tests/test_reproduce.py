"""reproduce: the same figures come out of a run folder, and whatever was changed in it is said."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch

from pml_fewshot.checkpoint import export_embedder, load_checkpoint, save_checkpoint
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment import run
from pml_fewshot.parts import build
from pml_fewshot.provenance import provenance_text
from pml_fewshot.reproduce import reproduce
from tests.tiny_experiments import TINY_EXPERIMENTS

ROOT = Path(__file__).parent.parent
CONFIGS = {
    **TINY_EXPERIMENTS,
    "last_weights": replace(TINY_EXPERIMENTS["protonet"], name="last_weights", train_on_validation=True),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, config in CONFIGS.items():
        run(replace(config, run_dir=folder / name))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_trainer_gives_the_same_figures_again(name: str, runs: Path) -> None:
    torch.manual_seed(99)  # nothing may depend on what was drawn before
    before = {path: path.read_bytes() for path in sorted((runs / name).rglob("*")) if path.is_file()}
    done = reproduce(runs / name, trusted=["tests"])
    assert (done.differences, done.changes) == ([], [])
    assert done.table.rows == ResultTable.read(runs / name).rows
    assert "every one is the same" in str(done)
    assert {path: path.read_bytes() for path in sorted((runs / name).rglob("*")) if path.is_file()} == before


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    copytree(runs / "protonet", tmp_path / "run")
    return tmp_path / "run"


def other_weights(folder: Path) -> None:
    torch.manual_seed(5)
    export_embedder(folder / "embedder.safetensors", build(TINY_EXPERIMENTS["protonet"].trainer).embedder)


def other_weights_in_the_checkpoint(folder: Path) -> None:
    state = load_checkpoint(folder / "last.pt")
    state["best"]["embedder.trunk.1.bias"] += 1
    save_checkpoint(folder / "last.pt", state)


def other_episodes(folder: Path) -> None:
    change_about(folder, "config", "fields", "num_episodes", value=31)


def other_figure(folder: Path) -> None:
    with (folder / "figures.csv").open(newline="") as file:
        names, first, *rest = csv.reader(file)
    first[names.index("value")] = repr(float(first[names.index("value")]) + 1e-12)
    with (folder / "figures.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, first, *rest])


def line_less(folder: Path) -> None:
    lines = (folder / "figures.csv").read_bytes().splitlines(keepends=True)
    (folder / "figures.csv").write_bytes(b"".join(lines[:-1]))


def other_result(folder: Path) -> None:
    text = (folder / "results.csv").read_bytes()
    (folder / "results.csv").write_bytes(text.replace(b"0.", b"1.", 1))


def no_markdown(folder: Path) -> None:
    (folder / "results.md").unlink()


def other_latex(folder: Path) -> None:
    (folder / "results.tex").write_bytes(b"\xff")


CHANGED: list[tuple[Callable[[Path], None], str]] = [
    (other_weights, r"protonet, accuracy 5: value 0\.\d+ stored, 0\.\d+ now"),
    (other_weights_in_the_checkpoint, r"embedder\.safetensors has other weights than last\.pt"),
    (other_episodes, "protonet, accuracy 5: count 30 stored, 31 now"),
    (other_figure, r"protonet, accuracy 5: value 0\.\d+ stored, 0\.\d+ now"),
    (line_less, "3 figures are stored, 4 come out now"),
    (other_result, r"results\.csv is not what these figures give"),
    (no_markdown, r"results\.md is missing"),
    (other_latex, r"results\.tex is not what these figures give"),
]


@pytest.mark.parametrize(("change", "said"), CHANGED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_was_changed_is_said(change: Callable[[Path], None], said: str, copied: Path) -> None:
    change(copied)
    done = reproduce(copied, trusted=["tests"])
    assert re.search(said, "\n".join(done.differences))
    assert "differences" in str(done)


def test_a_result_of_another_size_is_not_read(copied: Path) -> None:
    """Whatever its size: this one is larger than the machine's memory."""
    with (copied / "results.md").open("r+b") as file:
        file.truncate(2**42)
    assert reproduce(copied, trusted=["tests"]).differences == ["results.md is not what these figures give"]


def of_another_layout(folder: Path) -> None:
    save_checkpoint(folder / "last.pt", {**load_checkpoint(folder / "last.pt"), "layout": 1})


def change_about(folder: Path, *keys: str, value: object) -> None:
    """Changes config.json and makes its checksum right again."""
    about = json.loads((folder / "config.json").read_text())
    del about["checksum"]
    place = about
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "config.json").write_text(provenance_text(about))


def other_checksum(folder: Path) -> None:
    change_about(folder, "data", "test", "checksum", value="0" * 16)


def damaged_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_episodes": 30', '"num_episodes": 31'))


def nested_config(folder: Path) -> None:
    value: object = None
    for _ in range(300):
        value = {"list": [value]}
    change_about(folder, "config", "fields", "sampler", value=value)


def class_too_many(folder: Path) -> None:
    spec = {"object": "pml_fewshot.episodes:EpisodeSpec", "fields": {"ways": 5}}
    change_about(folder, "config", "fields", "train_spec", value=spec)


def other_arguments(folder: Path) -> None:
    trunk = {"partial": "torch.nn.modules.linear:Linear", "args": ["sixteen"], "keywords": {"out_features": 8}}
    trainer = {"partial": "pml_fewshot.trainers.protonet:ProtoNetTrainer", "args": [], "keywords": {"embedder": trunk}}
    change_about(folder, "config", "fields", "trainer", value=trainer)


def no_trainer(folder: Path) -> None:
    change_about(folder, "config", "fields", "trainer", value=None)


def too_many_weights(folder: Path) -> None:
    trunk = {"partial": "torch.nn.modules.linear:Linear", "args": [2**40, 2**30], "keywords": {}}
    change_about(folder, "config", "fields", "trainer", value=trunk)


def no_best(folder: Path) -> None:
    state = load_checkpoint(folder / "last.pt")
    del state["best"]
    save_checkpoint(folder / "last.pt", state)


def foreign_history(folder: Path) -> None:
    state = load_checkpoint(folder / "last.pt")
    state["history"]["laps"] = 3
    save_checkpoint(folder / "last.pt", state)


def history_of_texts(folder: Path) -> None:
    state = load_checkpoint(folder / "last.pt")
    state["history"]["steps"] = "24"
    save_checkpoint(folder / "last.pt", state)


def best_of_another_kind(folder: Path) -> None:
    save_checkpoint(folder / "last.pt", {**load_checkpoint(folder / "last.pt"), "best": [1, 2]})


def unfinished(folder: Path) -> None:
    (folder / "figures.csv").unlink()


def no_checkpoint(folder: Path) -> None:
    (folder / "last.pt").unlink()


def of_another_width(folder: Path) -> None:
    state = load_checkpoint(folder / "last.pt")
    state["best"] = {name: value[:3] if value.ndim else value for name, value in state["best"].items()}
    save_checkpoint(folder / "last.pt", state)


def half_a_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def no_weights(folder: Path) -> None:
    (folder / "embedder.safetensors").unlink()


BROKEN: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (of_another_layout, ValueError, "expected a training's state of layout 2, got layout 1"),
    (damaged_config, ValueError, r"expected a whole config\.json in .*, got one with another checksum"),
    (
        class_too_many,
        ValueError,
        r"expected the fields of .*:EpisodeSpec at config\.train_spec, got",
    ),
    *(
        (harm, ValueError, rf"expected a run that can be built again in .*run, got {error}: .*; restore config\.json")
        for harm, error in (
            (other_arguments, "TypeError"),
            (no_trainer, "AttributeError"),
            (too_many_weights, "RuntimeError"),
            (best_of_another_kind, "AttributeError"),
        )
    ),
    (no_best, ValueError, r"expected kinds, trainer, .* in a training's state, got no best; use another"),
    (foreign_history, ValueError, "expected a history of losses, .*, got none or another laps; use another"),
    (history_of_texts, ValueError, "expected a history of losses, .*, got none or another steps; use another"),
    (unfinished, FileNotFoundError, r"expected a finished run in .*, got one without figures\.csv"),
    (no_checkpoint, FileNotFoundError, r"expected a checkpoint at .*last\.pt"),
    (of_another_width, ValueError, r"expected \(8,\) for embedder\.trunk\.1\.bias, got \(3,\) in the checkpoint"),
    (other_checksum, ValueError, "expected the data of the run in .*, got other images, labels or classes in test"),
    (half_a_config, ValueError, r"expected a whole config\.json in"),
    (deep_config, ValueError, r"expected a whole config\.json in"),
    (no_weights, FileNotFoundError, "expected an exported embedder at"),
]


@pytest.mark.parametrize(("harm", "error", "said"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_broken_is_one_error(
    harm: Callable[[Path], None], error: type[Exception], said: str, copied: Path
) -> None:
    harm(copied)
    with pytest.raises(error, match=f"^{said}"):
        reproduce(copied, trusted=["tests"])


def test_untrusted_modules_are_not_imported(runs: Path) -> None:
    with pytest.raises(ValueError, match="--trust"):
        reproduce(runs / "protonet")


MINE = """
from dataclasses import replace
from functools import partial
from torch import nn
from pml_fewshot import Embedder, ProtoNetTrainer, main
from tests.tiny_experiments import TINY_EXPERIMENTS

class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, images):
        return self.linear(images.flatten(1))

CONFIG = replace(
    TINY_EXPERIMENTS["protonet"],
    name="mine",
    trainer=partial(ProtoNetTrainer, embedder=partial(Embedder, trunk=Trunk)),
)
if __name__ == "__main__":
    main(CONFIG)
"""


def test_experiment_of_ones_own_by_the_command_line(tmp_path: Path) -> None:
    """A class of the file that is run has the name __main__ there, and the file's own when it is imported."""
    (tmp_path / "mine.py").write_text(MINE)
    folder = tmp_path / "run"

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", *arguments]
        return subprocess.run(
            line, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, **paths}
        )

    assert python("mine", "--run-dir", str(folder)).returncode == 0
    again = ("pml_fewshot.reproduce", str(folder), "--trust", "tests", "mine")
    same = python(*again)
    assert same.returncode == 0, same.stderr
    assert "4 figures: every one is the same" in same.stdout
    other_result(folder)
    different = python(*again)
    assert different.returncode == 1
    assert "4 figures: 1 differences" in different.stdout
