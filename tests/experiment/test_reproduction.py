"""reproduce: the same figures come out of a run folder, whatever was changed is reported, and nothing in it is run."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import quickstart, swap_losses
from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment import reproduction
from pml_fewshot.experiment.command_line import main
from pml_fewshot.experiment.config import describe
from pml_fewshot.experiment.reproduction import find_config, reproduce
from pml_fewshot.experiment.run import run
from pml_fewshot.experiment.run_folder import read_config
from pml_fewshot.instantiate import instantiate
from pml_fewshot.io.checkpoint import export_embedder, load_checkpoint, save_checkpoint
from tests.experiment.test_run_folder import rewrite
from tests.tiny_experiments import TINY_EXPERIMENTS, Finished

ROOT = Path(__file__).parents[2]
TINY = TINY_EXPERIMENTS["protonet"]


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", TINY_EXPERIMENTS)
def test_every_trainer_gives_the_same_figures_again(name: str, tmp_path: Path) -> None:
    config = replace(TINY_EXPERIMENTS[name], train_on_validation=name == "metric")  # which ends with its last weights
    run(replace(config, run_dir=tmp_path, steps=8))
    torch.manual_seed(99)  # nothing may depend on what was drawn before
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    done = reproduce(tmp_path, config)
    assert (done.differences, done.changes) == ([], [])
    assert done.table.rows == ResultTable.read(tmp_path).rows
    assert "every one is the same" in str(done)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_numbers_of_the_command_line_come_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = ["--train-spec.ways", "4", "--eval-spec.ways", "3", "--eval-spec.shots", "2"]
    options = ["--steps", "3", "--seed", "5", "--num-episodes", "20", "--run-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tiny", *specs, *options])
    table = main(TINY)
    done = reproduce(tmp_path, TINY)
    assert done.differences == []
    assert done.table.rows == table.rows


def other_weights(folder: Path) -> None:
    torch.manual_seed(5)
    export_embedder(folder / "embedder.safetensors", instantiate(TINY.trainer).embedder)


def other_weights_in_the_checkpoint(folder: Path) -> None:
    state = load_checkpoint(folder / "last.pt")
    state["best"]["embedder.trunk.1.bias"] += 1
    save_checkpoint(folder / "last.pt", state)


def other_episodes(folder: Path) -> None:
    stored = read_config(folder)
    rewrite(folder, **{key: stored[key] | {"num_episodes": 31} for key in ("config", "finished")})


def other_figure(folder: Path) -> None:
    text = (folder / "figures.csv").read_text()
    value = re.search(r"accuracy,(0\.\d+)", text)[1]  # type: ignore[index]
    (folder / "figures.csv").write_text(text.replace(value, repr(float(value) + 1e-12), 1))


def one_row_less(folder: Path) -> None:
    lines = (folder / "figures.csv").read_bytes().splitlines(keepends=True)
    (folder / "figures.csv").write_bytes(b"".join(lines[:-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, r"protonet, accuracy 5: value 0\.\d+ stored, 0\.\d+ now"),
        (other_weights_in_the_checkpoint, r"embedder\.safetensors has other weights than last\.pt"),
        (other_episodes, "protonet, accuracy 5: count 30 stored, 31 now"),
        (other_figure, r"protonet, accuracy 5: value 0\.\d+ stored, 0\.\d+ now"),
        (one_row_less, "3 figures are stored, 4 come out now"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_was_changed_is_reported(change: Callable[[Path], None], message: str, copied: Path) -> None:
    change(copied)
    done = reproduce(copied, TINY)
    assert re.search(message, "\n".join(done.differences))
    assert "differences" in str(done)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def being_trained_longer(folder: Path) -> None:
    rewrite(folder, config=read_config(folder)["config"] | {"steps": 48})


def of_another_width(folder: Path) -> None:
    state = load_checkpoint(folder / "last.pt")
    state["best"] = {name: value[:3] if value.ndim else value for name, value in state["best"].items()}
    save_checkpoint(folder / "last.pt", state)


def other_data(folder: Path) -> None:
    data = read_config(folder)["data"]
    rewrite(folder, data=data | {"test": data["test"] | {"checksum": "0" * 16}})


def other_trainer(folder: Path) -> None:
    rewrite(folder, config=read_config(folder)["config"] | {"trainer": describe(TINY_EXPERIMENTS["maml"].trainer)})


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (without("figures.csv"), MissingFileError, "expected a finished run in .*, got one without a table"),
        (being_trained_longer, MissingFileError, "expected a finished run in .*, got one without a table"),
        (without("last.pt"), MissingFileError, r"expected a checkpoint at .*last\.pt"),
        (without("embedder.safetensors"), MissingFileError, r"expected .* at .*embedder\.safetensors"),
        (of_another_width, UsageError, r"expected .*\(8,\) for embedder\.trunk\.1\.bias, got .*\(3,\) in the checkp"),
        (other_data, UsageError, "expected the data of the run in .*, got other images, labels or classes in test"),
        (other_trainer, UsageError, "expected the config of the run in .*, got another trainer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_missing_or_of_another_run_is_one_error(
    harm: Callable[[Path], None], error: type[Exception], message: str, copied: Path
) -> None:
    harm(copied)
    with pytest.raises(error, match=f"^{message}"):
        reproduce(copied, TINY)


def named(folder: Path, module: str, name: str) -> Path:
    rewrite(folder, module=module, config=read_config(folder)["config"] | {"name": name})
    return folder


def test_the_config_is_found_in_the_readers_modules_by_name(copied: Path) -> None:
    assert find_config(named(copied, "experiments.quickstart", "quickstart")) is quickstart.CONFIG
    found = find_config(named(copied, "experiments.swap_losses", "NTXentLoss"))
    assert found is next(config for config in swap_losses.CONFIGS if config.name == "NTXentLoss")
    assert find_config(named(copied, "mine", "quickstart"), "experiments.quickstart") is quickstart.CONFIG
    with pytest.raises(UsageError, match=r"expected a config named 'other' in experiments\.quickstart, got \['quicks"):
        find_config(named(copied, "experiments.quickstart", "other"))
    with pytest.raises(UsageError, match=r"expected a module experiments\.nowhere of your own, got none"):
        find_config(named(copied, "experiments.nowhere", "other"))


@pytest.mark.parametrize("module", ["os", "experiments", "experiments..x", "experiments.x y", "", "pytest.__main__"])
def test_a_module_that_the_folder_names_is_imported_only_from_experiments(module: str, copied: Path) -> None:
    with pytest.raises(UsageError, match="expected a run of a module of experiments"):
        find_config(named(copied, module, "protonet"))


@pytest.mark.parametrize("given", ["", "experiments.evil"])
def test_nothing_in_the_run_folder_is_imported(given: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks into the working folder first, and a stranger's run folder may bring a package of that name."""
    (copied / "experiments").mkdir()
    for name in ("__init__.py", "evil.py"):
        (copied / "experiments" / name).write_text("raise SystemExit('run')")
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(copied))
    with pytest.raises(UsageError, match="expected a module experiments of your own, got one in the run folder"):
        find_config(named(copied, "experiments.evil", "evil"), given)


def test_the_command_says_whether_all_is_the_same(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduction, "find_config", lambda folder, module: TINY if module == "mine" else None)
    monkeypatch.setattr(sys, "argv", ["reproduce", str(copied), "mine"])
    for change, code, message in ((Path, 0, "4 figures: every one"), (other_figure, 1, "4 figures: 1 differ")):
        change(copied)
        with pytest.raises(SystemExit) as stopped:
            reproduction.main()
        assert stopped.value.code == code
        assert message in capsys.readouterr().out


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
    trainer=partial(ProtoNetTrainer, embedder=partial(Embedder, trunk=partial(Trunk))),
)
if __name__ == "__main__":
    main(CONFIG)
"""


@pytest.mark.slow
def test_an_experiment_of_ones_own_by_the_command_line(tmp_path: Path) -> None:
    """A class of the file that is run has the name __main__ there, and the file's own when it is imported."""
    (tmp_path / "mine.py").write_text(MINE)

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, *arguments]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, env=variables)

    for number, start in enumerate((["-m", "mine"], ["mine.py"])):
        folder = str(tmp_path / f"run{number}")
        assert python(*start, "--run-dir", folder, "--steps", "3").returncode == 0
        done = python("-m", "pml_fewshot.reproduce", folder, "mine")
        assert done.returncode == 0, done.stderr
        assert "4 figures: every one is the same" in done.stdout
