"""WandbRecorder and MLflowRecorder: each service gets every value once, however often a run is killed and resumed.

W&B works offline here, and its files are read by their format; MLflow has a database of its own in a temporary folder.
"""

import csv
import importlib
import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Adam

from pml_fewshot import EpisodeSpec, EpisodeStream, ProtoNetTrainer
from pml_fewshot.checks import UsageError
from pml_fewshot.experiment.mlflow_recorder import MLflowRecorder
from pml_fewshot.experiment.recorder import Recorder
from pml_fewshot.experiment.wandb_recorder import WandbRecorder
from pml_fewshot.training.fit import fit
from pml_fewshot.training.state import RECORDED
from tests.tiny_experiments import EMBEDDER, tiny_set

# of MLflow's tables under SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

BLOCK, HEAD = 2**15, 7  # of W&B's files: bytes in a block, and of the head of the file and of each piece
WHOLE, LAST = 1, 4  # kinds of pieces that end a record

Curves = dict[str, list[tuple[int, float]]]  # (step, value) of each metric, in the order of the steps


class Wandb:
    """How a test looks at this service, and at the other."""

    recorder = WandbRecorder
    id_file = "wandb_run_id.txt"

    def curves(self, folder: Path) -> Curves:
        found = defaultdict(list)
        for record in wandb_records(folder):
            if record.HasField("history"):
                values = {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
                metrics = {name: value for name, value in values.items() if "/" in name}
                assert metrics
                for name, value in metrics.items():
                    found[name].append((int(values["step"]), value))
        return {name: sorted(points) for name, points in found.items()}

    def abandon(self, recorder: Any) -> None:
        """What W&B has it keeps, and the recorder is not asked to save what it holds: as if it had been killed."""
        recorder._run.finish()


class MLflow:
    id_file = "mlflow_run_id.txt"

    def __init__(self, uri: str) -> None:
        self.client: Any = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)
        self.recorder = partial(MLflowRecorder, tracking_uri=uri)

    def curves(self, folder: Path) -> Curves:
        run = (folder / self.id_file).read_text()
        histories = {name: self.client.get_metric_history(run, name) for name in self.client.get_run(run).data.metrics}
        return {name: sorted((row.step, row.value) for row in rows) for name, rows in histories.items()}

    def abandon(self, recorder: Any) -> None:
        pass


Service = Wandb | MLflow


def wandb_records(folder: Path) -> Iterator[Any]:
    """All records in the files of a folder's W&B run: LevelDB's log format, where ends of blocks cut records."""
    importlib.import_module("wandb").teardown()  # waits until its process has written all: finish() does not, offline
    record_type: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    run = (folder / "wandb_run_id.txt").read_text().split()[0]
    for file in (folder / "wandb").glob("offline-run-*/*.wandb"):
        assert file.name == f"run-{run}.wandb"  # one run, of any number of sessions
        content, place, record = file.read_bytes(), HEAD, b""
        while place + HEAD <= len(content):
            if BLOCK - place % BLOCK < HEAD:  # no head fits into the rest of this block
                place += BLOCK - place % BLOCK
                continue
            length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
            record += content[place + HEAD : place + HEAD + length]
            place += HEAD + length
            if kind in (WHOLE, LAST):
                yield record_type.FromString(record)
                record = b""


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}
    folders = {f"{name}_DIR": str(tmp_path / "elsewhere") for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    for name, value in (settings | folders).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests here: MLflow needs seconds to make it."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(params=["wandb", "mlflow"])
def service(request: pytest.FixtureRequest, mlflow_database: str) -> Service:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return Wandb() if request.param == "wandb" else MLflow(mlflow_database)


def record_some(recorder: Any, steps: Sequence[int]) -> None:
    for step in steps:
        recorder.record("train", step, loss=1 / step, learning_rate=0.1)
        if step % 2 == 0:
            recorder.record("validation", step, accuracy=step / 7)


def expected(last: int) -> Curves:
    steps = range(1, last + 1)
    return {
        "train/loss": [(step, 1 / step) for step in steps],
        "train/learning_rate": [(step, 0.1) for step in steps],
        "validation/accuracy": [(step, step / 7) for step in steps if step % 2 == 0],
    }


def test_values_come_under_their_group_and_step_once_saved(service: Service, tmp_path: Path) -> None:
    recorder = service.recorder(tmp_path / "run")
    record_some(recorder, range(1, 5))
    recorder.save()
    recorder.save()
    record_some(recorder, range(5, 7))
    service.abandon(recorder)
    assert service.curves(tmp_path / "run") == expected(4)


def test_close_saves(service: Service, tmp_path: Path) -> None:
    recorder = service.recorder(str(tmp_path))
    record_some(recorder, range(1, 5))
    recorder.close()
    assert service.curves(tmp_path) == expected(4)


def test_more_than_a_block_of_a_file_holds(service: Service, tmp_path: Path) -> None:
    recorder = service.recorder(tmp_path)
    record_some(recorder, range(1, 701))
    recorder.close()
    assert service.curves(tmp_path) == expected(700)


def test_mlflow_gets_a_thousand_metrics_at_a_time(
    mlflow_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a server takes; a database of one's own would take any number."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    sizes: list[int] = []
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", lambda *args, **options: sizes.append(len(args[2])))
    recorder = MLflowRecorder(tmp_path, tracking_uri=mlflow_database)
    record_some(recorder, range(1, 1001))
    recorder.close()
    assert sizes == [1000, 1000, 500]


@pytest.mark.parametrize("checkpoint", [0, 2, 4, 6])
def test_a_resumed_run_goes_on_and_repeats_nothing(service: Service, checkpoint: int, tmp_path: Path) -> None:
    first = service.recorder(tmp_path)
    record_some(first, range(1, 5))
    first.save()
    record_some(first, range(5, 7))
    if checkpoint == 6:
        first.save()
    service.abandon(first)
    identity = (tmp_path / service.id_file).read_text().split()[0]
    second = service.recorder(tmp_path)
    second.forget_after(checkpoint, RECORDED)
    record_some(second, range(checkpoint + 1, 9))
    second.close()
    third = service.recorder(tmp_path)  # of a run that had finished
    record_some(third, range(9, 11))
    third.close()
    assert service.curves(tmp_path) == expected(10)
    assert (tmp_path / service.id_file).read_text().split()[0] == identity


def test_what_is_forgotten_is_not_sent(service: Service, tmp_path: Path) -> None:
    """A training that diverged goes back in the same session, and its next values are others."""
    recorder = service.recorder(tmp_path)
    record_some(recorder, range(1, 5))
    recorder.save()
    recorder.record("train", 5, loss=1e9)
    recorder.record("validation", 6, accuracy=0)
    recorder.forget_after(3, RECORDED)  # the checkpoint that should have followed the save was not written
    record_some(recorder, range(4, 7))
    recorder.close()
    assert service.curves(tmp_path) == expected(6)


def test_two_runs_open_at_a_time_are_two(service: Service, tmp_path: Path) -> None:
    recorders = [service.recorder(tmp_path / name) for name in "ab"]
    for recorder, last in zip(recorders, (2, 4), strict=True):
        record_some(recorder, range(1, last + 1))
    for recorder in recorders:
        recorder.close()
    assert [service.curves(tmp_path / name) for name in "ab"] == [expected(2), expected(4)]


def test_fit_sends_what_the_ordinary_recorder_writes(service: Service, tmp_path: Path) -> None:
    def train(recorder: Any, steps: int, resume: bool, name: str) -> None:
        random.seed(0)
        torch.manual_seed(0)
        trainer = ProtoNetTrainer(EMBEDDER())
        stream = EpisodeStream(tiny_set("a", 8, 0), EpisodeSpec(ways=4, shots=1, queries=3), 0)
        optimizer, checkpoint = Adam(trainer.parameters(), lr=0.1), tmp_path / f"{name}.pt"
        options = partial(fit, checkpoint=checkpoint, checkpoint_every=1, resume=resume, progress=False)
        options(trainer, stream, optimizer, steps, recorder=recorder)
        recorder.close()

    train(Recorder(tmp_path / "ordinary"), 3, False, "ordinary")
    train(service.recorder(tmp_path / "sent"), 2, False, "sent")
    train(service.recorder(tmp_path / "sent"), 3, True, "sent")
    with (tmp_path / "ordinary" / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves = service.curves(tmp_path / "sent")
    assert curves.keys() == {f"train/{name}" for name in ("loss", "accuracy", "learning_rate", "skipped")}
    for name, points in curves.items():
        assert points == [(int(row["step"]), float(row[name.removeprefix("train/")])) for row in rows]
    assert len(rows) == 3


KILLED = """
import os, signal, sys, time
from tests.experiment.test_trackers import MLflow, Wandb, record_some

folder, database, name = sys.argv[1:]
recorder = (Wandb() if name == "Wandb" else MLflow(database)).recorder(folder)
record_some(recorder, range(1, 5))
recorder.save()
record_some(recorder, range(5, 7))
time.sleep(5)  # W&B writes its file ten times a second, left to itself every 15 s
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_was_saved_outlasts_a_kill(service: Service, mlflow_database: str, tmp_path: Path) -> None:
    # without W&B's process of this one, which would hold the run open
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), mlflow_database, type(service).__name__]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert service.curves(tmp_path / "run") == expected(4)
    recorder = service.recorder(tmp_path / "run")
    recorder.forget_after(2, RECORDED)
    record_some(recorder, range(3, 7))
    recorder.close()
    assert service.curves(tmp_path / "run") == expected(6)


def test_wandb_is_told_which_step_is_meant_and_what_the_run_is_called(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    WandbRecorder(tmp_path / "seed3", project="mine", tags=["a"]).close()
    WandbRecorder(tmp_path / "seed4", name="other").close()
    runs = [
        [each.run for each in wandb_records(tmp_path / name) if each.HasField("run")] for name in ("seed3", "seed4")
    ]
    assert [(run[0].project, run[0].display_name, list(run[0].tags)) for run in runs] == [
        ("mine", "seed3", ["a"]),
        ("pml_fewshot", "other", []),
    ]
    metrics = [each.metric for each in wandb_records(tmp_path / "seed3") if each.HasField("metric")]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]


def test_mlflow_has_the_run_under_its_experiment_and_its_name(mlflow_database: str, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    client = mlflow.MlflowClient(tracking_uri=mlflow_database)
    for folder, name in (("seed3", ""), ("seed3", ""), ("seed4", "other")):
        recorder = MLflowRecorder(tmp_path / folder, "mine", name, mlflow_database)
        run = client.get_run((tmp_path / folder / "mlflow_run_id.txt").read_text())
        assert run.info.status == "RUNNING"
        recorder.close()
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {(run.info.run_name, run.info.status) for run in runs} == {("seed3", "FINISHED"), ("other", "FINISHED")}
    assert len(runs) == 2
    (tmp_path / "seed3" / "mlflow_run_id.txt").write_text("0" * 32)
    with pytest.raises(UsageError, match=r"expected MLflow's run 0+, got an error .*; name the tracking URI"):
        MLflowRecorder(tmp_path / "seed3", tracking_uri=mlflow_database)


@pytest.mark.parametrize("kind", [WandbRecorder, MLflowRecorder])
def test_a_missing_package_is_one_clear_error(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = kind.__name__.removesuffix("Recorder").lower()
    monkeypatch.setitem(sys.modules, package, None)
    pip = rf"pip install 'pml_fewshot\[{package}\]'"
    message = f"expected {package} for {kind.__name__}, got no {package} installed; {pip}"
    with pytest.raises(UsageError, match=message):
        kind(tmp_path / "run")
    assert not (tmp_path / "run").exists()
