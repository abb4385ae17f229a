"""The trained trainer of a run folder: loaded (load_trained), and evaluated on other episodes, data or metrics."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from filelock import FileLock, Timeout

from pml_fewshot.checks import LockedError, UsageError
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.data.image_folder import load_images
from pml_fewshot.distributed import together, world
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.command_line import EvalSpec, one_line_errors
from pml_fewshot.experiment.config import Device, ExperimentConfig
from pml_fewshot.experiment.evaluate import notes_on_training
from pml_fewshot.experiment.prepare import for_evaluation, instance, load_data, made_trainer, own_parts, resolve_device
from pml_fewshot.experiment.run_folder import check_data, check_same, read_config
from pml_fewshot.experiment.stored_config import find_config, with_stored_options
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.training.state import history_of, restore_trained

EVALUATIONS = "evaluations"  # subfolder of a run folder for tables made after the run


def load_trained(folder: str | Path, config: ExperimentConfig | None = None, device: Device = "auto") -> FewShotTrainer:
    """Returns the trainer of a run folder with its trained weights (the best by validation), in eval mode.

    Args:
        folder: run folder, finished or not.
        config: the run's config; when None, it is looked up in the module of `experiments` that the run recorded.
            Nothing in the folder is executed, and the data are not read.
        device: device for the trainer.

    Raises:
        MissingFileError: (a FileNotFoundError) the folder lacks config.json or last.pt.
        UsageError: one of them is damaged, or the config's trainer is not the run's.
    """
    trainer, _ = trained_with_config(Path(folder), config, device)
    return trainer


def trained_with_config(
    folder: Path, config: ExperimentConfig | None, device: Device
) -> tuple[FewShotTrainer, ExperimentConfig]:
    """Returns the trainer with its config, which has the numbers stored in the folder."""
    stored = read_config(folder)
    config = own_parts(with_stored_options(config or find_config(folder), stored["config"]))
    check_same(config, stored, folder, [each.name for each in fields(config) if each.name != "trainer"])
    state = load_checkpoint(folder / "last.pt")
    with torch.random.fork_rng(devices=[]):  # weights about to be replaced must not move the caller's generator
        trainer = made_trainer(config, num_classes=stored["num_classes"])
    restore_trained(trainer, state)
    return trainer.to(resolve_device(device)).eval(), config


def with_data_root(config: ExperimentConfig, data_root: str | Path | None) -> ExperimentConfig:
    """The config with another data root, if one is given."""
    return config if data_root is None else replace(config, data_root=Path(data_root))


def evaluate_again(
    folder: str | Path,
    config: ExperimentConfig | None = None,
    data: Splits | FewShotDataset | str | Path | None = None,
    eval_specs: Sequence[EpisodeSpec] | None = None,
    retrieval: RetrievalTester | None = None,
    num_episodes: int | None = None,
    eval_seed: int | None = None,
    split: Literal["train", "val", "test"] | None = None,
    device: Device = "auto",
    data_root: str | Path | None = None,
) -> ResultTable:
    """Evaluates the trained weights of a run on other episodes, data or metrics, even if its own evaluation failed.

    The rows are added to the table in the folder's `evaluations/`, with their origin in their notes; the run's own
    figures do not change. Returns the new rows.

    Args:
        folder, config, device: as for load_trained.
        data: datasets to evaluate on, or a folder of images with a subfolder per class, all classes of which are used,
            at the size of the run's images. The run's own data when None, which must be the same to the pixel.
        eval_specs, num_episodes, eval_seed: settings of the episodes; as in the run when None.
        retrieval: retrieval tester; the config's when None.
        split: which classes of Splits to use; the test classes when None.
        data_root: where the run's own data are now.

    Raises:
        MissingFileError, UsageError: as for load_trained and benchmark; data that are not the run's.
        LockedError: another process is writing the folder.
    """
    folder = Path(folder)
    trainer, config = trained_with_config(folder, config, device)
    stored = read_config(folder)
    history = history_of(load_checkpoint(folder / "last.pt"))
    step = history.best_step or history.steps
    notes = [*notes_on_training(config, trainer, history), f"weights of step {step}, evaluated after the run"]
    evaluated: Splits | FewShotDataset
    if data is None:
        loaded = load_data(with_data_root(config, data_root))
        check_data(loaded, stored, folder)
        evaluated = loaded
    elif isinstance(data, str | Path):
        channels, *size = stored["data"]["test"]["item"]
        if len(size) != 2:
            got = f"a folder of images for a run of features of {channels} numbers"
            raise UsageError(f"expected a bank as data, got {got}; embed them, and give data=bank.as_dataset()")
        given = getattr(config.data, "keywords", {})
        form = {name: given[name] for name in ("resize", "depth") if name in given}
        evaluated = load_images(data, size, channels, **form)
        notes.append(f"data {Path(data).name}")
    else:
        evaluated = data
    evaluated = for_evaluation(config, evaluated)
    if isinstance(evaluated, Splits) and split == "val" and evaluated.val is None:
        raise UsageError(f"expected val among the splits of {folder}, got none; evaluate test or train")
    if data is not None:
        own = getattr(evaluated, split or "test") if isinstance(evaluated, Splits) else evaluated
        notes.append(f"data checksum {own.checksum()}")
    table = benchmark(
        {config.name: trainer},
        evaluated,
        eval_specs or config.eval_specs,
        instance(config.retrieval) if retrieval is None else retrieval,
        config.num_episodes if num_episodes is None else num_episodes,
        config.eval_seed if eval_seed is None else eval_seed,
        timed=False,
        note="; ".join(notes),
        split=split,
    )
    with together():
        if world().is_first:
            _keep(table, folder)
    return table


def _keep(table: ResultTable, folder: Path) -> None:
    try:
        with FileLock(folder / ".lock", timeout=0):
            place = folder / EVALUATIONS
            place.mkdir(exist_ok=True)
            before = ResultTable.read(place).rows if (place / "figures.csv").exists() else []
            ResultTable([*before, *(row for row in table.rows if row not in before)]).write(place)
    except Timeout as error:
        raise LockedError(f"expected a run folder that no other process writes, got {folder}; wait for it") from error


def _command(
    folder: Annotated[Path, tyro.conf.Positional],
    experiment: Annotated[str, tyro.conf.Positional] = "",
    data: Path | None = None,
    eval_spec: EvalSpec = EvalSpec(),  # noqa: B008 (frozen)
    num_episodes: int | None = None,
    eval_seed: int | None = None,
    retrieval: tuple[str, ...] = (),
    split: Literal["train", "val", "test"] | None = None,
    device: Device = "auto",
    data_root: Path | None = None,
) -> None:
    """Evaluates a run's trained weights on other episodes, data or metrics, and adds the figures to the run folder.

    Args:
        folder: the run folder
        experiment: module of its config, like experiments.quickstart; the one that the run recorded when not given
        data: a folder of images with a subfolder per class; the run's own data when not given
        eval_spec: evaluate on a single spec; values not given come from the experiment's first one
        num_episodes: number of episodes; as in the run when not given
        eval_seed: seed of the episodes; as in the run when not given
        retrieval: metrics, like recall_at_1 NMI; those of the run when not given
        split: which classes of the run's data; test when not given
        device: auto: CUDA if available
        data_root: folder of the data; PML_FEWSHOT_DATA, else data/, when not given
    """
    config = find_config(folder, experiment)
    specs = eval_spec.of(with_stored_options(config, read_config(folder)["config"]).eval_specs)
    tester = RetrievalTester(retrieval) if retrieval else None
    options = (num_episodes, eval_seed, split, device, data_root)
    print(evaluate_again(folder, config, data, specs, tester, *options))
    print(f"added to {folder / EVALUATIONS / 'results.md'}")


def main() -> None:
    with one_line_errors():
        tyro.cli(_command)
