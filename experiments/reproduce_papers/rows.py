"""Row: a line of a table of results, and the folders that its figures come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
    """A method in a table: one training for all sizes of episodes, or one for each size whose figures make one line.

    Args:
        name: `table/method`, the folder of its runs; the table is the file of docs/results.
        method: as the table shows it.
        trainings: experiments, each run by every seed.
        trained_by: the row whose weights are evaluated here once more, by `evaluate`; the row's own when None.
        evaluate: called with such a trainer and its config for a table, which replaces that of the training.
        networks: how many it evaluates as one (Ensemble): that of the seed and those of the next seeds.
        published: figures by column and source, from papers with the same setup; the trainings' own when None.
        note: what a reader must know of the data.
        options: what the command needs beside the row's name.
        long: takes days without a GPU, so that without one it is run only where its own name asks for it.
    """

    name: str
    method: str
    trainings: tuple[ExperimentConfig, ...]
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

    def place(self, folder: Path, training: ExperimentConfig, seed: int) -> Path:
        """The folder of the figures of a training by a seed, below that of all runs."""
        part = training.name if len(self.trainings) > 1 else ""
        return folder / self.name / part / f"seed{seed}"

    def run_dir(self, folder: Path, training: ExperimentConfig, seed: int) -> Path:
        """The run folder that the figures' weights come from."""
        return (self.trained_by or self).place(folder, training, seed)

    def seeds(self, folder: Path, *trainings: ExperimentConfig) -> list[int]:
        """Seeds for which all trainings (or those given) have figures."""
        places = (folder / self.name).rglob("seed*")
        found = sorted({int(place.name.removeprefix("seed")) for place in places if place.name[4:].isdigit()})
        return [
            seed for seed in found if all(self.finished(folder, each, seed) for each in trainings or self.trainings)
        ]

    def finished(self, folder: Path, training: ExperimentConfig, seed: int) -> bool:
        """Whether there are figures of this training; if its run folder is there, of the weights that it ended with."""
        place, run_dir = self.place(folder, training, seed), self.run_dir(folder, training, seed)
        if not (place / "figures.csv").exists():
            return False
        try:
            stored = finished_config(place)
            if (run_dir / "last.pt").exists() and read_config(run_dir) != stored:
                return False
        except UsageError:  # resumed for more steps, or damaged, which resuming it will say
            return False
        return not changed_fields(replace(training, seed=seed), stored)

    def make(self, folder: Path, training: ExperimentConfig, seed: int, data_root: Path | None) -> None:
        """Runs a training, or continues it, and evaluates; what is finished stays. Raises what `run` does.

        `evaluate` is tried before a training, by an untrained trainer and 2 episodes, as `run` tries all else.
        """
        place, run_dir = self.place(folder, training, seed), self.run_dir(folder, training, seed)
        config = replace(training, seed=seed, data_root=data_root, run_dir=run_dir, report=False)
        if self.evaluate is not None and not (run_dir / "figures.csv").exists():
            with torch.random.fork_rng(devices=[]):
                untrained = instance(training.trainer).eval()
            self.evaluate(self.as_one([untrained] * self.networks), replace(config, num_episodes=2))
        configs = [
            replace(config, seed=each, run_dir=self.run_dir(folder, training, each))
            for each in range(seed, seed + self.networks)
        ]
        for each in configs:
            run(each, resume=True)
        if self.evaluate is not None:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / ".lock"):
                if not self.finished(folder, training, seed):
                    stored = read_config(run_dir)
                    trained = [load_trained(each.run_dir, each) for each in configs if each.run_dir is not None]
                    self.evaluate(self.as_one(trained), config).write(place)
                    write_config(place, stored)

    def as_one(self, trainers: Sequence[FewShotTrainer]) -> FewShotTrainer:
        """A trainer whose embedder is the ensemble of those of all; the only one as it is."""
        if len(trainers) > 1:
            trainers[0].embedder = Embedder(Ensemble([each.embedder for each in trainers]))
        return trainers[0]
