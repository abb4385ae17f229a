"""Row: a line of a table of results, and the folders that its figures come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pml_fewshot import Embedder, Ensemble, ExperimentConfig, ResultTable, load_trained, run
from pml_fewshot.checks import UsageError
from pml_fewshot.experiment.prepare import instance
from pml_fewshot.experiment.run_folder import changed_fields, finished_config, read_config, write_config
from pml_fewshot.trainers.base import FewShotTrainer

Evaluation = Callable[[FewShotTrainer, ExperimentConfig], ResultTable]
PAPER_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """A method in a table.

    Args:
        name: `table/method`, the folder of its runs; the table is the file of docs/results.
        method: as the table shows it.
        training: experiment, run by every seed.
        trained_by: the row whose weights are evaluated here once more, by `evaluate`; the row's own when None.
        evaluate: called with such a trainer and its config for a table, which replaces that of the training.
        networks: how many are evaluated as one (Ensemble): seed 0 is the first so many seeds of `trained_by`, seed 1
            the next ones, so that no two share a network.
        published: figures by column and source, from papers with the same setup; the training's own when None.
        note: what a reader must know of the data.
        options: what the command needs beside the row's name.
        long: takes days without a GPU, so that without one it is run only where its own name asks for it.
    """

    name: str
    method: str
    training: ExperimentConfig
    trained_by: "Row | None" = None
    evaluate: Evaluation | None = None
    networks: int = 1
    published: Mapping[str, Mapping[str, str]] | None = None
    note: str = ""
    options: str = ""
    long: bool = False

    @property
    def table(self) -> str:
        return self.name.split("/")[0]

    def command(self, *others: str) -> str:
        """What computes its figures again."""
        names = " ".join(dict.fromkeys((self.name, *others)))
        return f"python -m experiments.reproduce_papers --data-root DIR {self.options}--only {names}"

    def place(self, folder: Path, seed: int) -> Path:
        """The folder of the figures of a seed, below that of all runs."""
        return folder / self.name / f"seed{seed}"

    def runs(self, folder: Path, seed: int) -> list[Path]:
        """The run folders that the figures' weights come from."""
        first = seed * self.networks
        return [(self.trained_by or self).place(folder, each) for each in range(first, first + self.networks)]

    def seeds(self, folder: Path) -> list[int]:
        """Seeds that have figures."""
        places = (folder / self.name).glob("seed*")
        found = sorted(int(place.name.removeprefix("seed")) for place in places if place.name[4:].isdigit())
        return [seed for seed in found if self.finished(folder, seed)]

    def finished(self, folder: Path, seed: int) -> bool:
        """Whether there are figures of this row; if its run folders are there, of the weights that they ended with."""
        place, runs = self.place(folder, seed), self.runs(folder, seed)
        if not (place / "figures.csv").exists():
            return False
        try:
            stored = finished_config(place)
            if all((each / "last.pt").exists() for each in runs) and self.made_by(folder, seed) != stored:
                return False
        except UsageError:  # resumed for more steps, or damaged, which resuming it will say
            return False
        first = replace(self.training, seed=seed * self.networks)
        return len(stored.get("others", ())) == self.networks - 1 and not changed_fields(first, stored)

    def made_by(self, folder: Path, seed: int) -> dict[str, Any]:
        """What config.json beside the figures has: that of the run; of several, the others' too, and their number."""
        stored, *others = map(read_config, self.runs(folder, seed))
        if others:
            stored["config"]["networks"] = self.networks  # which tells it from one network where runs are compared
            stored["others"] = others
        return stored

    def make(self, folder: Path, seed: int, data_root: Path | None) -> None:
        """Runs the training, or continues it, and evaluates; what is finished stays. Raises what `run` does.

        `evaluate` is tried before a training, by an untrained trainer and 2 episodes, as `run` tries all else.
        """
        place, runs = self.place(folder, seed), self.runs(folder, seed)
        configs = [
            replace(
                self.training, seed=int(each.name.removeprefix("seed")), data_root=data_root, run_dir=each, report=False
            )
            for each in runs
        ]
        if self.evaluate is not None and not all((each / "figures.csv").exists() for each in runs):
            with torch.random.fork_rng(devices=[]):
                untrained = [instance(self.training.trainer).eval() for _ in runs]
            self.evaluate(as_one(untrained), replace(configs[0], num_episodes=2))
        for config in configs:
            run(config, resume=True)
        if self.evaluate is not None:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / ".lock"):
                if not self.finished(folder, seed):
                    stored = self.made_by(folder, seed)
                    trained = [load_trained(each, config) for each, config in zip(runs, configs, strict=True)]
                    self.evaluate(as_one(trained), configs[0]).write(place)
                    write_config(place, stored)


def as_one(trainers: Sequence[FewShotTrainer]) -> FewShotTrainer:
    """The first trainer, whose embedder becomes the ensemble of those of all where there are several."""
    if len(trainers) > 1:
        trainers[0].embedder = Embedder(Ensemble([each.embedder for each in trainers]))
    return trainers[0]
