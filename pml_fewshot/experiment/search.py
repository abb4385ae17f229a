"""search: several workers find the best of many configs by validation accuracy; only it sees test classes."""

import copy
import csv
import io
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from filelock import FileLock, Timeout

from pml_fewshot.checks import LockedError, MissingPackageError, UsageError, check_at_least_one, import_extra
from pml_fewshot.data.dataset import Splits
from pml_fewshot.distributed import check_no_torchrun
from pml_fewshot.embedders.modes import ordinary_modes
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.command_line import one_line_errors, parse
from pml_fewshot.experiment.config import OPTIONS, ExperimentConfig
from pml_fewshot.experiment.prepare import load_data, prepare
from pml_fewshot.experiment.recorder import Recorders
from pml_fewshot.experiment.run import run, train
from pml_fewshot.experiment.run_folder import open_run
from pml_fewshot.io.atomic import CannotWriteError, translate_write_errors, write_text
from pml_fewshot.parts.describe import describe
from pml_fewshot.sampling.randomness import seeded
from pml_fewshot.training.interruption import TrainingDiverged, TrainingInterrupted
from pml_fewshot.training.state import History, Recorder

if TYPE_CHECKING:
    import optuna

ConfigOfTrial = Callable[["optuna.Trial"], ExperimentConfig]

POLL_SECONDS = 2.0  # between two checks on other workers
CONNECT_SECONDS = 10  # a database may take this long to answer
HOPELESS = 3  # failures of the first trials, or deaths of a trial's workers without a new checkpoint


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Args:
        table: table of the best trial, on test classes.
        config: config of the best trial, with its run folder.
        study: Optuna study with all trials.
    """

    table: ResultTable
    config: ExperimentConfig
    study: "optuna.Study"

    def __str__(self) -> str:
        best = self.study.best_trial
        return f"best of {len(self.study.trials)} trials: {best.number}, {_shown(best.params)}\n\n{self.table}"


def search(
    config_of_trial: ConfigOfTrial,
    trials: int,
    folder: str | Path,
    storage: "str | optuna.storages.BaseStorage | None" = None,
    sampler: "optuna.samplers.BaseSampler | None" = None,
    pruner: "optuna.pruners.BasePruner | None" = None,
) -> SearchResult:
    """Trains many configs and evaluates on test classes only the one that is best on validation classes.

    The same call in several processes, on one machine or many, shares the trials among them: each process is a worker.
    A repeated call continues: a trial whose worker was interrupted or killed is resumed by another from its checkpoint,
    with its parameters. More `trials` continue a search that has ended.

    A trial is a run folder, `trial_<number>`, in which no network sees the test classes. When all trials have ended,
    `run` evaluates the best one as if it had trained it itself. trials.csv and trials.md list the trials.

    Args:
        config_of_trial: suggests parameters and returns a config, the same one for the same parameters:
            `swap(CONFIG, loss=partial(TripletMarginLoss, margin=trial.suggest_float("margin", 0.01, 0.5)))`. All
            configs must be validated on the same episodes: with the same first eval spec, val_episodes and seed.
        trials: number of trials to run, over all workers, including pruned and failed ones.
        folder: search folder, seen by all workers.
        storage: where Optuna keeps the study: a file in the folder when None, the URL of a database,
            "postgresql+psycopg2://user@host/name", for many workers, or an Optuna storage.
        sampler: proposes parameters. When None, TPE, seeded by the config's seed and the trial's number, so that a
            search by one worker can be repeated. With several workers, a sampler of your own must not be seeded.
        pruner: ends trials early based on their validations during training, every `validate_every` steps. When None,
            MedianPruner: from the sixth trial on, those below the median of earlier ones at that step, but not in the
            first quarter of the steps, when a low rate has not yet shown what it can do.

    A trial that fails is listed with its reason, and the search continues. One that diverges counts as pruned, so that
    the sampler avoids what led there.

    Raises:
        UsageError: no validation classes, trials validated on different episodes, a folder of another search, a storage
            that does not answer, no completed trial, or three failures in a row here while none has a result.
        MissingPackageError: (an ImportError) optuna, or the driver of a database, is not installed.
        TrainingInterrupted: (a KeyboardInterrupt) Ctrl-C or SIGTERM; the same call continues.
        CannotWriteError: (an OSError) the disk is full or the folder read-only; the same call continues.
    """
    optuna = import_extra("search", "for a search", "optuna")
    check_at_least_one("trials", trials)
    check_no_torchrun("a search")
    example = _checked(_example(config_of_trial))
    _check_can_validate(example)
    folder = Path(folder)
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _storage_errors(storage):
            with FileLock(folder / ".lock"):  # two workers must not both create a database's tables
                study = optuna.create_study(
                    study_name=folder.resolve().name,
                    storage=_storage(storage, folder),
                    pruner=pruner or optuna.pruners.MedianPruner(n_warmup_steps=example.steps // 4),
                    direction="maximize",
                    load_if_exists=True,
                )
                _check_same_search(study, folder, example)
            worker = _Worker(config_of_trial, trials, folder, study, sampler, example)
            try:
                while (trial := worker.next()) is not None:
                    worker.work(trial)
            finally:
                worker.trial_lock.release()  # in a notebook, where the process lives on, others may take over the trial
            return worker.finish()
    except KeyboardInterrupt as stop:
        event = stop.event if isinstance(stop, TrainingInterrupted) else "interrupted"
        raise TrainingInterrupted(event, "the same command again continues") from stop


class _Worker:
    """One of the processes that share a search."""

    def __init__(
        self,
        config_of_trial: ConfigOfTrial,
        trials: int,
        folder: Path,
        study: "optuna.Study",
        sampler: "optuna.samplers.BaseSampler | None",
        example: ExperimentConfig,
    ) -> None:
        self.config_of_trial, self.trials, self.folder, self.study = config_of_trial, trials, folder, study
        self.sampler, self.example = sampler, example
        self.lock = FileLock(folder / ".lock")  # held while trials are assigned and their table is written
        self.trial_lock = FileLock(folder / ".none")  # later that of this process's current trial
        self.failures = 0  # in a row

    def next(self) -> "optuna.Trial | None":
        """Returns a trial, whose lock this process then holds; None when all have ended. Waits for those of others."""
        told = False
        while True:
            with self.lock:
                known = self._write_table()
                running = [each for each in known if each.state.name == "RUNNING"]
                for each in running:
                    if self._acquire(each.number):  # the lock of a dead process is free
                        return self._taken_over(each)
                ended = sum(each.state.is_finished() for each in known)
                if ended >= self.trials:
                    return None
                if ended + len(running) < self.trials:
                    return self._new(len(known), ended)
            if not told:
                print(f"waiting for {len(running)} trials of other workers", flush=True)
                told = True
            time.sleep(POLL_SECONDS)

    def _new(self, number: int, ended: int) -> "optuna.Trial":
        self._seed(number)
        trial = self.study.ask()
        self._acquire(trial.number)
        print(f"\n[{ended} of {self.trials} ended] trial {trial.number}", flush=True)
        return trial

    def _taken_over(self, dead: "optuna.trial.FrozenTrial") -> "optuna.Trial":
        """The same trial with its suggested parameters, for this process to continue."""
        import optuna

        self._seed(dead.number)
        # Optuna has no public way to get from a running trial's number to the object that suggests and reports
        trial = optuna.Trial(self.study, dead._trial_id)
        last = self.run_dir(dead.number) / "last.pt"
        state = last.stat().st_mtime_ns if last.exists() else 0
        trial.set_user_attr("taken_over", [*dead.user_attrs.get("taken_over", ()), state])
        print(f"\ntrial {dead.number} is taken over: its worker was interrupted or has died", flush=True)
        return trial

    def _seed(self, number: int) -> None:
        """Makes the proposals of a trial depend on its number, not on the process."""
        import optuna

        seed = int(np.random.SeedSequence([abs(self.example.seed), number]).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(seed=seed) if self.sampler is None else self.sampler

    def _acquire(self, number: int) -> bool:
        self.trial_lock = FileLock(self.folder / f".trial_{number}.lock", timeout=0)
        try:
            self.trial_lock.acquire()
        except Timeout:
            return False
        return True

    def run_dir(self, number: int) -> Path:
        return self.folder / f"trial_{number}"

    def work(self, trial: "optuna.Trial") -> None:
        """Trains a trial to its end, whatever the outcome, and reports it to Optuna."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        try:
            history = self._train(trial)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, CannotWriteError):
            raise  # not the fault of the trial, which another worker will take over
        except optuna.TrialPruned:
            self._tell(trial, "PRUNED")
        except TrainingDiverged as error:
            self._tell(trial, "PRUNED", f"diverged: {error}")
        except Exception as error:  # noqa: BLE001 (whatever it is, it must not cost hours of other trials)
            traceback.print_exc()
            self._tell(trial, "FAIL", f"{type(error).__name__}: {error}")
            self._give_up_if_hopeless(error)
        else:
            step, mean, ci95 = max(history.validations, key=lambda each: each[1])
            trial.set_user_attr("best", [mean, ci95, step])
            self._tell(trial, "COMPLETE", value=mean)

    def _train(self, trial: "optuna.Trial") -> History:
        takeovers = trial.user_attrs.get("taken_over", ())
        if len(takeovers) >= HOPELESS and len(set(takeovers[-HOPELESS:])) == 1:
            got = f"{HOPELESS} workers that died in it without a new checkpoint"
            raise UsageError(f"expected a trial that can be trained, got {got}; look for what killed them (memory?)")
        config = replace(_checked(self.config_of_trial(trial)), run_dir=self.run_dir(trial.number))
        print(f"trial {trial.number}: {_shown(trial.params)}", flush=True)
        if _validated_by(config) != _validated_by(self.example):
            got = f"{_validated_by(config)} after {_validated_by(self.example)}"
            do = "leave the first of eval_specs, val_episodes and seed the same in all trials"
            raise UsageError(f"expected trials that are validated on the same episodes, got {got}; {do}")
        with open_run(config, resume=True) as folder, ordinary_modes(), seeded(config.seed):
            loaded = load_data(config)
            for spec in config.eval_specs:
                EpisodicEvaluator(spec).check(loaded.test)
            prepared = prepare(_without_test(config, loaded))
            folder.begin(loaded, prepared.device, len(prepared.stream.dataset.class_names))
            recorder = partial(_TrialRecorder, config.recorder, trial, config.steps)
            prepared.config = replace(prepared.config, recorder=recorder)
            return train(prepared, folder)

    def _tell(self, trial: "optuna.Trial", state: str, failure: str = "", value: float | None = None) -> None:
        import optuna

        if failure:
            trial.set_user_attr("failure", failure)
        with self.lock:  # or another worker could see it running and, a moment later, its lock free
            try:
                self.study.tell(trial, value, state=optuna.trial.TrialState[state])
            except RuntimeError as error:  # from samplers that stop an exhausted study; the trial is reported by then
                if "Study.stop" not in str(error):
                    raise
            self.trial_lock.release()
            self._write_table()
        if state != "FAIL":
            self.failures = 0
        print(f"trial {trial.number}: {failure or _accuracy(trial.user_attrs)} ({state.lower()})", flush=True)

    def _give_up_if_hopeless(self, error: Exception) -> None:
        self.failures += 1
        ended = [each.state.name for each in self.study.get_trials(deepcopy=False)]
        if self.failures >= HOPELESS and not {"COMPLETE", "PRUNED"} & set(ended):
            raise UsageError(
                f"expected a trial that comes to its end, got {HOPELESS} in a row that failed, the last by "
                f"{type(error).__name__}: {error}; repair it, and raise the number of trials by those that failed"
            ) from error

    def finish(self) -> SearchResult:
        """Evaluates the best trial, or reads another worker's evaluation of it."""
        known = self.study.get_trials(deepcopy=False)
        if not any(each.state.name == "COMPLETE" for each in known):
            reasons = dict.fromkeys(each.user_attrs.get("failure", "pruned") for each in known)
            got = f"{len(known)} that did not ({'; '.join(reasons)[:300]})"
            raise UsageError(f"expected a trial that comes to its end, got {got}; repair it, and raise the number")
        best = self.study.best_trial
        # (a finished trial suggests what it was given)
        config = replace(_checked(self.config_of_trial(best)), run_dir=self.run_dir(best.number))  # type: ignore[arg-type]
        print(f"\n{(self.folder / 'trials.md').read_text(encoding='utf-8')}\nwritten to {self.folder / 'trials.md'}")
        print(f"the best is trial {best.number}: {_shown(best.params)}, {_accuracy(best.user_attrs)}", flush=True)
        while True:
            try:
                return SearchResult(run(config, resume=True), config, self.study)
            except LockedError:  # another worker is evaluating it
                time.sleep(POLL_SECONDS)

    def _write_table(self) -> "list[optuna.trial.FrozenTrial]":
        known = self.study.get_trials(deepcopy=False)
        names = list(dict.fromkeys(name for each in known for name in each.params))
        lines = [_line(each, names) for each in sorted(known, key=_rank)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["trial", "state", *names, "accuracy", "ci95", "step", "note"])
        writer.writerows(lines)
        write_text(self.folder / "trials.csv", out.getvalue())
        write_text(self.folder / "trials.md", _markdown(known, names, self.example))
        return known


class _TrialRecorder(Recorders):
    """Reports each validation to Optuna, which may end the trial; the user's own recorder receives everything first."""

    def __init__(
        self, make: Callable[[Path], Recorder] | None, trial: "optuna.Trial", steps: int, folder: Path
    ) -> None:
        super().__init__([] if make is None else [make(folder)])
        self.trial, self.steps = trial, steps
        frozen = trial.study.get_trials(deepcopy=False)[trial.number]
        self.reported = set(frozen.intermediate_values)  # by a worker that died before its checkpoint
        self.best = frozen.user_attrs.get("best", [-1.0])[0]

    def record(self, group: str, step: int, **values: float) -> None:
        super().record(group, step, **values)
        if group != "validation":
            return
        if values["accuracy"] > self.best:
            self.best = values["accuracy"]
            self.trial.set_user_attr("best", [self.best, values["ci95"], step])
        if step not in self.reported:
            self.trial.report(values["accuracy"], step)
        if step < self.steps and self.trial.should_prune():
            import optuna

            raise optuna.TrialPruned

    def close(self) -> None:
        for each in self.recorders:
            getattr(each, "close", each.save)()


class _JournalLock:
    """The lock of Optuna's file, which the operating system frees when its process dies; Optuna's own locks stay.

    A partial line left by a full disk or a power cut, which would make the file unreadable, is removed first.
    """

    def __init__(self, journal: Path) -> None:
        self.journal, self.lock = journal, FileLock(journal.with_name(f".{journal.name}.lock"))

    def acquire(self) -> bool:
        self.lock.acquire()
        with self.journal.open("rb+") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()


def _storage(storage: "str | optuna.storages.BaseStorage | None", folder: Path) -> "optuna.storages.BaseStorage":
    from optuna.storages import BaseStorage, JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.engine import make_url
    from sqlalchemy.pool import NullPool

    if storage is None:
        journal = folder / "study.journal"
        return JournalStorage(JournalFileBackend(str(journal), _JournalLock(journal)))  # type: ignore[arg-type]
    if isinstance(storage, BaseStorage):
        return storage
    if not isinstance(storage, str):
        got = f"got {storage!r}; leave it out for a file in the folder"
        raise UsageError(f"expected storage as a URL or one of Optuna's storages, {got}")
    url = make_url(storage)
    patience = {"sqlite": "timeout", "postgresql": "connect_timeout", "mysql": "connect_timeout"}
    name = patience.get(url.get_backend_name(), "")
    options = {name: CONNECT_SECONDS} if name and name not in url.query else {}
    try:
        # one connection per query: one that is kept while a trial trains for hours may be dead afterwards
        return RDBStorage(storage, engine_kwargs={"connect_args": options, "poolclass": NullPool})
    except ImportError as error:
        got = f"none for {url.drivername} installed; pip install psycopg2-binary for postgresql+psycopg2://"
        raise MissingPackageError(f"expected the driver of a database, got {got}") from error


@contextmanager
def _storage_errors(storage: Any) -> Iterator[None]:
    """Turns a database error, which may be 200 lines long, into a UsageError of one line."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        reason = " ".join(str(cause).partition("(Background on")[0].split())[:200]
        if isinstance(error, ArgumentError):
            shown, do = "a URL of a database", "write sqlite:///FILE or postgresql+psycopg2://USER@HOST/NAME"
        else:
            place = make_url(storage).render_as_string(hide_password=True) if isinstance(storage, str) else storage
            shown, do = (
                f"a storage that answers at {place}",
                "start it or correct the URL; the same call continues",
            )
        raise UsageError(f"expected {shown}, got: {reason}; {do}") from error


def _example(config_of_trial: ConfigOfTrial) -> Any:
    """The result of the user's function for arbitrary parameters, which nobody keeps."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return config_of_trial(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask())
    finally:
        optuna.logging.set_verbosity(before)


def _checked(config: object) -> ExperimentConfig:
    if not isinstance(config, ExperimentConfig):
        got = f"got {type(config).__name__}; return replace(CONFIG, ...) or swap(CONFIG, ...)"
        raise UsageError(f"expected an ExperimentConfig from config_of_trial, {got}")
    return config


def _check_can_validate(config: ExperimentConfig) -> None:
    splits = load_data(config)
    if splits.val is None or splits.test_is_val or config.train_on_validation:
        got = "train_on_validation" if config.train_on_validation else f"none beside the test classes of {splits.test}"
        raise UsageError(f"expected validation classes, by which trials are compared, got {got}; leave some for that")
    EpisodicEvaluator(config.eval_specs[0], config.val_episodes, config.seed).check(splits.val)
    for spec in config.eval_specs:
        EpisodicEvaluator(spec).check(splits.test)


def _without_test(config: ExperimentConfig, loaded: Splits) -> ExperimentConfig:
    """The config for a training that never sees test classes: the validation classes replace them."""
    splits = Splits(loaded.train, loaded.val, copy.copy(loaded.val), shared_classes=True)  # type: ignore[arg-type]
    parts = {"eval_specs": config.eval_specs[:1], "retrieval": None, "extra_evaluations": None}
    return replace(config, data=lambda: splits, **parts)  # type: ignore[arg-type]


def _validated_by(config: ExperimentConfig) -> dict[str, Any]:
    """The settings that make the validations of two trials comparable."""
    return {"spec": describe(config.eval_specs[0]), "val_episodes": config.val_episodes, "seed": config.seed}


def _check_same_search(study: "optuna.Study", folder: Path, example: ExperimentConfig) -> None:
    """Raises a UsageError if the study belongs to another folder, or trains or validates differently."""
    file = folder / ".search"
    if not file.exists():
        write_text(file, secrets.token_hex(8))
    now = {"folder": file.read_text(encoding="utf-8"), "steps": example.steps, **_validated_by(example)}
    then = study.user_attrs.get("begun_with")
    if then is None:
        study.set_user_attr("begun_with", now)
    elif differ := [name for name in now if now[name] != then.get(name)]:
        got = f"another {', '.join(differ)}"
        do = "share the folder among all workers, or name another folder for another search"
        raise UsageError(f"expected the search {study.study_name!r} in {folder} as it was begun, got {got}; {do}")


ORDER = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")


def _rank(trial: "optuna.trial.FrozenTrial") -> tuple[int, float, int]:
    """Sort key: the best first; pruned, failed and running trials below."""
    return ORDER.index(trial.state.name), -trial.user_attrs.get("best", [0.0])[0], trial.number


def _line(trial: "optuna.trial.FrozenTrial", names: Sequence[str]) -> list[Any]:
    """A line of trials.csv, at full precision."""
    parameters = [trial.params.get(name, "") for name in names]
    best = trial.user_attrs.get("best", ["", "", ""])
    note = " ".join(str(trial.user_attrs.get("failure", "")).split())
    return [trial.number, trial.state.name.lower(), *parameters, *best, note]


def _markdown(known: "Sequence[optuna.trial.FrozenTrial]", names: Sequence[str], example: ExperimentConfig) -> str:
    lines = [["trial", "state", *names, "validation accuracy", "step", "note"], ["---"] * (len(names) + 5)]
    for each in sorted(known, key=_rank):
        number, state, *parameters, _, _, step, note = _line(each, names)
        accuracy = _accuracy(each.user_attrs).partition(" %")[0] if "best" in each.user_attrs else ""
        lines.append([number, state, *map(_number, parameters), accuracy, step, note[:200].replace("|", r"\|")])
    spec = example.eval_specs[0]
    size = f"{example.val_episodes:,} episodes of {spec.ways}-way {spec.shots}-shot, seed {example.seed}"
    body = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    return f"{body}\n%, +- 95 % intervals; the best validation of each trial, {size}; no test classes\n"


def _accuracy(user_attrs: dict[str, Any]) -> str:
    mean, ci95, step = user_attrs.get("best", (0.0, 0.0, 0))
    return f"{100 * mean:.2f} +- {100 * ci95:.2f} % at step {step}" if step else "not validated"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in parameters.items()) or "no parameters"


@dataclass(frozen=True)
class _Options:
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    trials: int = 20
    """number of trials to run, over all workers; more continue a search that has ended"""
    storage: str | None = None
    """URL of a database that keeps the study, sqlite:///FILE or postgresql+psycopg2://USER@HOST/NAME; a file in the
    folder when not given"""


def search_main(name: str, config_of_trial: ConfigOfTrial, trials: int = 20) -> SearchResult:
    """Runs the search with the command line's changes to all its trials (`--help` lists the options).

    `--run-dir` is the search folder, by default named by steps and seed, so that repeating the command continues the
    search, and the same command elsewhere is another worker. Exit codes are those of `main`.
    """
    with one_line_errors():
        import_extra("search", "for a search", "optuna")
        example = _checked(_example(config_of_trial))
        options = parse(_Options(example, trials), f"Searches the best of {trials} trials: {name}.")
        own = options.config
        changes = {n: getattr(own, n) for n in OPTIONS if n != "run_dir" and getattr(own, n) != getattr(example, n)}
        folder = own.run_dir or Path("runs") / name / f"search_{own.steps}_steps_seed{own.seed}"

        def changed(trial: "optuna.Trial") -> ExperimentConfig:
            return replace(_checked(config_of_trial(trial)), **changes)

        return search(changed, options.trials, folder, options.storage)
