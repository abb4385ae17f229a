"""reproduce: the same figures come out of a run folder, whatever was changed is reported, and nothing in it is run."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import quickstart, swap_losses
from pml_fewshot import ExperimentConfig, ResultTable, UsageError, export_embedder, main, run
from pml_fewshot.checks import MissingFileError
from pml_fewshot.experiment import reproduction
from pml_fewshot.experiment.reproduction import find_config, reproduce
from pml_fewshot.experiment.run_folder import read_config
from pml_fewshot.io.checkpoint import load_checkpoint, save_checkpoint
from pml_fewshot.parts.describe import describe
from pml_fewshot.parts.instantiate import instantiate
from tests.experiment.test_run_folder import rewrite
from tests.tiny_experiments import TINY_EXPERIMENTS, Finished

ROOT = Path(__file__).parents[2]
TINY = TINY_EXPERIMENTS["protonet"]


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
    options = (
        "--train-spec.ways 4 --eval-spec.ways 3 --eval-spec.shots 2 --steps 3 --seed 5 --num-episodes 20 --run-dir"
    )
    monkeypatch.setattr(sys, "argv", ["tiny", *options.split(), str(tmp_path)])
    table = main(TINY)
    done = reproduce(tmp_path, TINY)
    assert done.differences == []
    assert done.table.rows == table.rows


Harm = Callable[[Path], object]


def other_weights(folder: Path) -> None:
    torch.manual_seed(5)
    export_embedder(folder / "embedder.safetensors", instantiate(TINY.trainer).embedder)


def in_the_checkpoint(change: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    def harm(folder: Path) -> None:
        state = load_checkpoint(folder / "last.pt")
        state["best"] = {name: change(value) for name, value in state["best"].items()}
        save_checkpoint(folder / "last.pt", state)

    return harm


def other_episodes(folder: Path) -> None:
    stored = read_config(folder)
    rewrite(folder, **{key: stored[key] | {"num_episodes": 31} for key in ("config", "finished")})


def other_figure(folder: Path) -> None:
    text = (folder / "figures.csv").read_text()
    value = re.search(r"accuracy,(0\.\d+)", text)[1]
    (folder / "figures.csv").write_text(text.replace(value, repr(float(value) + 1e-12), 1))


def one_row_less(folder: Path) -> None:
    lines = (folder / "figures.csv").read_bytes().splitlines(keepends=True)
    (folder / "figures.csv").write_bytes(b"".join(lines[:-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, r"protonet, accuracy 5: value 0\.\d+ stored, 0\.\d+ now"),
        (in_the_checkpoint(lambda weights: weights + 1), r"embedder\.safetensors has other weights than last\.pt"),
        (other_episodes, "protonet, accuracy 5: count 30 stored, 31 now"),
        (other_figure, r"protonet, accuracy 5: value 0\.\d+ stored, 0\.\d+ now"),
        (one_row_less, "3 figures are stored, 4 come out now"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_changed_is_reported(change: Harm, message: str, copied: Finished) -> None:
    change(copied.folder)
    done = reproduce(copied.folder, TINY)
    assert re.search(message, "\n".join(done.differences))
    assert "differences" in str(done)


def without(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def of_config(**changes: object) -> Harm:
    return lambda folder: rewrite(folder, config=read_config(folder)["config"] | changes)


def other_data(folder: Path) -> None:
    data = read_config(folder)["data"]
    rewrite(folder, data=data | {"test": data["test"] | {"checksum": "0" * 16}})


OF_MAML = of_config(trainer=describe(TINY_EXPERIMENTS["maml"].trainer))
NARROW = in_the_checkpoint(lambda weights: weights[:3] if weights.ndim else weights)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (without("figures.csv"), MissingFileError, "expected a finished run in .*, got one without a table"),
        (of_config(steps=48), MissingFileError, "expected a finished run in .*, got one without a table"),
        (without("last.pt"), MissingFileError, r"expected a checkpoint at .*last\.pt"),
        (without("embedder.safetensors"), MissingFileError, r"expected .* at .*embedder\.safetensors"),
        (NARROW, UsageError, r"expected .*\(8,\) for embedder\.trunk\.1\.bias, got .*\(3,\) in the checkp"),
        (other_data, UsageError, "expected the data of the run in .*, got other images, labels or classes in test"),
        (OF_MAML, UsageError, "expected the config of the run in .*, got another trainer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_or_of_another_run_is_one_error(
    harm: Harm, error: type, message: str, copied: Finished
) -> None:
    harm(copied.folder)
    with pytest.raises(error, match=f"^{message}"):
        reproduce(copied.folder, TINY)


def found(copied: Finished, module: str, name: str, given: str = "") -> ExperimentConfig:
    rewrite(copied.folder, module=module, config=read_config(copied.folder)["config"] | {"name": name})
    return find_config(copied.folder, given)


def test_the_config_is_found_in_the_readers_modules_by_name(copied: Finished) -> None:
    assert found(copied, "experiments.quickstart", "quickstart") is quickstart.CONFIG
    ntxent = next(config for config in swap_losses.CONFIGS if config.name == "NTXentLoss")
    assert found(copied, "experiments.swap_losses", "NTXentLoss") is ntxent
    assert found(copied, "mine", "quickstart", "experiments.quickstart") is quickstart.CONFIG
    with pytest.raises(UsageError, match=r"expected a config named 'other' in experiments\.quickstart, got \['quicks"):
        found(copied, "experiments.quickstart", "other")
    with pytest.raises(UsageError, match=r"expected a module experiments\.nowhere of your own, got none"):
        found(copied, "experiments.nowhere", "other")


@pytest.mark.parametrize("module", ["os", "experiments", "experiments..x", "experiments.x y", "", "pytest.__main__"])
def test_a_module_that_the_folder_names_is_imported_only_from_experiments(module: str, copied: Finished) -> None:
    with pytest.raises(UsageError, match="expected a run of a module of experiments"):
        found(copied, module, "protonet")


@pytest.mark.parametrize("given", ["", "experiments.evil"])
def test_nothing_in_the_run_folder_is_imported(given: str, copied: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks into the working folder first, and a stranger's run folder may bring a package of that name."""
    (copied.folder / "experiments").mkdir()
    for name in ("__init__.py", "evil.py"):
        (copied.folder / "experiments" / name).write_text("raise SystemExit('run')")
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(copied.folder))
    with pytest.raises(UsageError, match="expected a module experiments of your own, got one in the run folder"):
        found(copied, "experiments.evil", "evil", given)


def test_the_command_says_whether_all_is_the_same(
    copied: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduction, "find_config", lambda folder, module: TINY if module == "mine" else None)
    monkeypatch.setattr(sys, "argv", ["reproduce", str(copied.folder), "mine"])
    for change, code, message in ((Path, 0, "4 figures: every one"), (other_figure, 1, "4 figures: 1 differ")):
        change(copied.folder)
        with pytest.raises(SystemExit, match=f"^{code}$"):
            reproduction.main()
        assert message in capsys.readouterr().out


MINE = """
from dataclasses import replace
from functools import partial
from torch import nn
from pml_fewshot import Embedder, ProtoNetTrainer, main
from tests.tiny_experiments import TINY_EXPERIMENTS

class Trunk(nn.Linear):
    def forward(self, images):
        return super().forward(images.flatten(1))

TRAINER = partial(ProtoNetTrainer, embedder=partial(Embedder, trunk=partial(Trunk, 16, 8)))
CONFIG = replace(TINY_EXPERIMENTS["protonet"], name="mine", trainer=TRAINER)
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
