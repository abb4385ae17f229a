"""Row: a line of a results table, and the folders that its figures come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock

from pml_fewshot import ExperimentConfig, ResultTable, load_trained, run
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
        name: `table/method`, the folder of its runs; `table` names the file in docs/results.
        method: the method's name in the table.
        training: experiment, run with every seed.
        trained_by: the row whose weights are evaluated again here, by `evaluate`; the row itself when None.
        evaluate: called with the trained trainer and its config; the table it returns replaces the training's.
        published: figures by column and source, from papers with the same setup; the training's own when None.
        note: what a reader must know about the data.
        options: what the command needs besides the row's name.
        long: takes days without a GPU, so without one it runs only if requested by its own name.
    """

    name: str
    method: str
    training: ExperimentConfig
    trained_by: "Row | None" = None
    evaluate: Evaluation | None = None
    published: Mapping[str, Mapping[str, str]] | None = None
    note: str = ""
    options: str = ""
    long: bool = False

    @property
    def table(self) -> str:
        return self.name.split("/")[0]

    def command(self, seeds: Sequence[int], *others: str) -> str:
        """Returns the command that recomputes its figures of these seeds, and those of the other rows named."""
        names = " ".join(dict.fromkeys((self.name, *others)))
        some = "" if tuple(seeds) == PAPER_SEEDS else f" --seeds {' '.join(map(str, seeds))}"
        return f"python -m experiments.reproduce_papers --data-root DIR {self.options}--only {names}{some}"

    def place(self, folder: Path, seed: int) -> Path:
        """Returns the folder of a seed's figures, below that of all runs."""
        return folder / self.name / f"seed{seed}"

    def run_folder(self, folder: Path, seed: int) -> Path:
        """Returns the run folder of the weights behind the figures."""
        return (self.trained_by or self).place(folder, seed)

    def seeds(self, folder: Path) -> list[int]:
        """Returns the seeds that have figures."""
        places = (folder / self.name).glob("seed*")
        found = sorted(int(place.name.removeprefix("seed")) for place in places if place.name[4:].isdigit())
        return [seed for seed in found if self.finished(folder, seed)]

    def finished(self, folder: Path, seed: int) -> bool:
        """Whether this row has figures and, if its run folder exists, whether they are of its final weights."""
        place, run_folder = self.place(folder, seed), self.run_folder(folder, seed)
        if not (place / "figures.csv").exists():
            return False
        try:
            stored = finished_config(place)
            if (run_folder / "last.pt").exists() and read_config(run_folder) != stored:
                return False
        except UsageError:  # resumed for more steps, or damaged, which resuming it will report
            return False
        return not changed_fields(replace(self.training, seed=seed), stored)

    def make(self, folder: Path, seed: int, data_root: Path | None) -> None:
        """Runs or resumes the training, and evaluates; what is finished is kept. Raises what `run` does.

        `evaluate` is tried before training, with an untrained trainer and 2 episodes, as `run` tries everything else.
        """
        place, run_folder = self.place(folder, seed), self.run_folder(folder, seed)
        config = replace(self.training, seed=seed, data_root=data_root, run_dir=run_folder, report=False)
        if self.evaluate is not None and not (run_folder / "figures.csv").exists():
            with torch.random.fork_rng(devices=[]):
                untrained = instance(self.training.trainer).eval()
            self.evaluate(untrained, replace(config, num_episodes=2))
        run(config, resume=True)
        if self.evaluate is not None:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / ".lock"):
                if not self.finished(folder, seed):
                    stored = read_config(run_folder)
                    self.evaluate(load_trained(run_folder, config), config).write(place)
                    write_config(place, stored)
