"""MLflowRecorder: sends the records of a run to MLflow."""

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pml_fewshot.checks import UsageError, import_extra
from pml_fewshot.io.atomic import write_text

RUN_FILE = "mlflow_run_id.txt"
BATCH = 1000  # metrics per request; MLflow accepts no more


class MLflowRecorder:
    """Sends numbers by group and step to an MLflow run, as metrics such as "train/loss".

    A run resumed in the same folder continues the same MLflow run, whose id is in `mlflow_run_id.txt` there. Values
    that MLflow already has for a step are not sent again: if steps are repeated with other options (a lower rate after
    a NaN), it keeps the first values.

    Args:
        folder: run folder.
        experiment: MLflow experiment; created if there is none with this name.
        name: name of the MLflow run; the folder's when empty.
        tracking_uri: a server or database; MLflow's own setting (MLFLOW_TRACKING_URI) when None.

    Raises:
        MissingPackageError: (an ImportError) mlflow is not installed.
        UsageError: MLflow does not have the folder's run.
    """

    def __init__(
        self,
        folder: str | Path,
        experiment: str = "pml_fewshot",
        name: str = "",
        tracking_uri: str | None = None,
    ) -> None:
        mlflow = import_extra("mlflow", "for MLflowRecorder", "mlflow")
        self._metric: Any = importlib.import_module("mlflow.entities").Metric
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._metrics: list[Any] = []
        self._sent: dict[str, set[int]] = {}  # steps of each metric
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (file := folder / RUN_FILE).exists():
            self._id = file.read_text()
            try:
                self._client.update_run(self._id, status="RUNNING")
            except mlflow.MlflowException as error:
                do = f"name the tracking URI that it was begun with, or remove {file} to begin another"
                raise UsageError(f"expected MLflow's run {self._id}, got an error ({error}); {do}") from error
        else:
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            self._id = self._client.create_run(number, run_name=name or folder.resolve().name).info.run_id
            write_text(file, self._id)

    def record(self, group: str, step: int, **values: float) -> None:
        """Stores the values of one step; `save` sends them."""
        now = int(time.time() * 1000)
        self._metrics += [self._metric(f"{group}/{name}", float(value), now, step) for name, value in values.items()]

    def save(self) -> None:
        """Sends what was recorded since the last save, except what MLflow has; everything is stored on return."""
        new = [metric for metric in self._metrics if metric.step not in self._steps(metric.key)]
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            self._client.log_batch(self._id, batch, synchronous=True)
            for metric in batch:
                self._sent[metric.key].add(metric.step)
        self._metrics.clear()

    def forget_after(self, step: int, groups: Sequence[str]) -> None:
        """Drops unsaved values of all groups; MLflow cannot forget what it has received."""
        self._metrics.clear()

    def close(self) -> None:
        """Saves and marks the MLflow run as finished."""
        self.save()
        self._client.set_terminated(self._id)

    def _steps(self, key: str) -> set[int]:
        """The steps that MLflow has for a metric, queried once per session."""
        if key not in self._sent:
            self._sent[key] = {metric.step for metric in self._client.get_metric_history(self._id, key)}
        return self._sent[key]
