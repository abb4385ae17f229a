"""Judging a finished run once more from what its folder holds: do the same figures come out?

    python -m pml_fewshot.reproduce RUN_FOLDER --data-root DIR

It builds the experiment from config.json, loads the weights, and evaluates them on the same episodes.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from pml_fewshot.checkpoint import load_checkpoint, load_embedder
from pml_fewshot.checks import require
from pml_fewshot.evaluation.result_row import ResultRow
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.exit_codes import one_line_errors
from pml_fewshot.experiment import device_of, exported, judge, load_splits
from pml_fewshot.experiment_config import Device, ExperimentConfig
from pml_fewshot.parts import build
from pml_fewshot.provenance import changes, check_data, read_provenance
from pml_fewshot.stored_config import from_data
from pml_fewshot.trainers.training_state import History, history_of, load_trained

TEXTS = {"results.csv": ResultTable.csv, "results.md": ResultTable.markdown, "results.tex": ResultTable.latex}


@dataclass(frozen=True)
class Reproduction:
    """What came of judging a run once more.

    Args:
        table: the figures as they come out now.
        differences: a line for each stored figure, or file, that is not the same to the last digit; none is success.
        changes: what is another version, commit, device or number of threads than in the run.
    """

    table: ResultTable
    differences: list[str]
    changes: list[str]

    def __str__(self) -> str:
        verdict = f"{len(self.table.rows)} figures: "
        verdict += f"{len(self.differences)} differences" if self.differences else "every one is the same"
        changed = [f"changed since: {change}" for change in self.changes]
        return "\n".join([str(self.table), *changed, *self.differences, verdict])


def reproduce(
    folder: str | Path, data_root: str | Path | None = None, device: Device = "auto", trusted: Sequence[str] = ()
) -> Reproduction:
    """Builds the experiment of a run folder again, evaluates its stored weights and compares every figure.

    Nothing in the folder is changed, and nothing in it can run code of its own: what its config may name is limited
    (`from_data`), and its weights are read as data. Sizes of networks and numbers of episodes are the folder's own; and
    as with any Python, do not work in a stranger's folder, where modules are looked for first.

    Args:
        folder: of a finished run.
        data_root: where the data are now; where they were then when None.
        device: auto: CUDA where there is one. Another one than the run's may change the last digits.
        trusted: modules of your own that the config may name too.

    Raises:
        FileNotFoundError: the folder lacks config.json, last.pt, the embedder or figures.csv.
        ValueError: one of them is broken or changed, names what is not trusted, or the data are others.
    """
    folder = Path(folder)
    stored = read_run(folder, device, trusted)
    config = replace(stored.config, data_root=Path(data_root) if data_root else stored.config.data_root)
    on = device_of(device)
    splits = load_splits(config)
    check_data(splits, stored.about, folder)
    table = judge(config, stored.trainer, build(config.retrieval), splits.to(on), stored.history)
    differences = stored.differences + _differences(stored.table.rows, table.rows)
    for name, text in TEXTS.items():
        if not (folder / name).is_file():
            differences.append(f"{name} is missing")
        elif not _holds(folder / name, text(table).encode()):
            differences.append(f"{name} is not what these figures give")
    return Reproduction(table, differences, changes(stored.about, on))


@dataclass(frozen=True)
class StoredRun:
    """What a run folder holds: config, what else the run stood on, figures, and the trainer with the exported weights.

    `differences` says where last.pt has other weights than the exported file.
    """

    config: ExperimentConfig
    about: dict[str, Any]
    table: ResultTable
    trainer: Any
    history: History
    differences: list[str]


def read_run(folder: Path, device: Device = "auto", trusted: Sequence[str] = ()) -> StoredRun:
    """Reads a finished run; arguments and errors as in `reproduce`."""
    about = read_provenance(folder)
    if not (folder / "figures.csv").is_file():
        raise FileNotFoundError(
            f"expected a finished run in {folder}, got one without figures.csv; go on with --resume"
        )
    with _clear_errors(folder):
        config = from_data(about["config"], trusted)
    require(isinstance(config, ExperimentConfig), "an ExperimentConfig", type(config).__name__, "name a run folder")
    config = replace(config, device=device)
    table = ResultTable.read(folder)
    state = load_checkpoint(folder / "last.pt")
    differences = []
    with _clear_errors(folder):
        trainer = build(config.trainer).to(device_of(device))
        load_trained(trainer, state)
        for name, part in exported(trainer).items():
            weights = {key: value.clone() for key, value in part.state_dict().items()}
            load_embedder(folder / name, part)
            if any(not torch.equal(weights[key], value) for key, value in part.state_dict().items()):
                differences.append(f"{name} has other weights than last.pt")
        return StoredRun(config, about, table, trainer.eval(), history_of(state), differences)


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """Makes one ValueError of whatever parts raise that a config or checkpoint gives wrong arguments or states."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        said = str(error)
        if isinstance(error, ValueError) and said.startswith("expected "):  # one of ours
            raise
        raise ValueError(
            f"expected a run that can be built again in {folder}, got {type(error).__name__}: "
            f"{said.splitlines()[0] if said else 'no more'}; restore config.json and last.pt, or use the versions of "
            "the run"
        ) from error


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file has just this content; one of another size, perhaps far too large, is not read."""
    return path.stat().st_size == len(content) and path.read_bytes() == content


def _differences(then: Sequence[ResultRow], now: Sequence[ResultRow]) -> list[str]:
    found = [f"{len(then)} figures are stored, {len(now)} come out now"] if len(then) != len(now) else []
    for before, after in zip(then, now, strict=False):
        for field in fields(ResultRow):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if old != new:
                found.append(f"{after.method}, {after.figure} {after.ways or ''}: {field.name} {old} stored, {new} now")
    return found


def _command(
    folder: Annotated[Path, tyro.conf.Positional],
    data_root: Path | None = None,
    device: Device = "auto",
    trust: tuple[str, ...] = (),
) -> int:
    """Judges a finished run once more and says whether every figure comes out the same.

    Exit codes: 0 all are the same, 1 not, or an error.

    Args:
        folder: the run folder
        data_root: where the data are now; where they were then when not given
        device: auto: CUDA where there is one
        trust: modules of your own that the stored config may name
    """
    done = reproduce(folder, data_root, device, trust)
    print(done)
    return 1 if done.differences else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(tyro.cli(_command))
