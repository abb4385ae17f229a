"""Row: a line of a table of results, and the folders that its figures come from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pml_fewshot import ExperimentConfig, Splits, benchmark, load_trained, run
from pml_fewshot.experiment.prepare import instance, load_data


@dataclass(frozen=True)
class Row:
    """A method in a table: one training for all sizes of episodes, or one for each size whose figures make one line.

    Args:
        name: `table/method`, the folder of its runs; the table is the file of docs/results.
        method: as the table shows it.
        trainings: experiments, each run by every seed.
        trained_by: the name of the row whose weights are evaluated here, on other data; the row's own when empty.
        data: loader of those other data, of which the test classes count.
        note: what a reader must know, shown in a column.
    """

    name: str
    method: str
    trainings: tuple[ExperimentConfig, ...]
    trained_by: str = ""
    data: Callable[..., Splits] | None = None
    note: str = ""

    @property
    def table(self) -> str:
        return self.name.split("/")[0]

    def place(self, folder: Path, training: ExperimentConfig, seed: int) -> Path:
        """The folder of the figures of a training by a seed, below that of all runs."""
        part = training.name if len(self.trainings) > 1 else ""
        return folder / self.name / part / f"seed{seed}"

    def make(self, folder: Path, training: ExperimentConfig, seed: int, data_root: Path | None) -> None:
        """Runs a training, or continues it; one that is finished stays. Raises what `run` does."""
        place = self.place(folder, training, seed)
        trained = replace(self, name=self.trained_by or self.name).place(folder, training, seed)
        own = replace(training, seed=seed, data_root=data_root, run_dir=trained, report=False)
        run(own, resume=True)
        if self.data is None or (place / "figures.csv").exists():
            return
        test = load_data(replace(own, data=self.data)).test
        methods, tester = {training.name: load_trained(trained, own)}, instance(training.retrieval)
        sizes = training.eval_specs, tester, training.num_episodes, training.eval_seed
        place.mkdir(parents=True, exist_ok=True)
        benchmark(methods, Splits(test, None, test, shared_classes=True), *sizes, timed=False).write(place)
