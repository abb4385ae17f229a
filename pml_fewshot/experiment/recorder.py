"""Recorder: writes the records of a run as SQLite, CSV and (if installed) TensorBoard with record-keeper."""

import importlib.util
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from record_keeper import RecordKeeper, RecordWriter
from record_keeper.db_utils import DBManager

from pml_fewshot.checks import UsageError
from pml_fewshot.io.atomic import atomic_write, fsync, translate_write_errors

STEP_COLUMN = b"~iteration~"  # record-keeper's name for the step, in the first column of its CSV files


class Recorder:
    """Records numbers by group and step in a folder: logs.db (one table per group), <group>.csv, TensorBoard."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        writer = RecordWriter(str(folder))
        writer.local_db = ClosedDatabase(writer.local_db.db_path)
        self._keeper = RecordKeeper(record_writer=writer)
        self._groups: set[str] = set()  # recorded in this session
        self._has_tensorboard = importlib.util.find_spec("tensorboard") is not None
        self._first_step = 0  # TensorBoard hides what earlier sessions recorded from here on

    def record(self, group: str, step: int, **values: float) -> None:
        """Stores the values of one step; `save` writes them to disk. A group is a lower-case word, no SQL keyword."""
        if group not in self._groups:
            _check_name(group)
            self._groups.add(group)
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        # TensorBoard writes in its own thread, whose errors surface with the next row
        with translate_write_errors(self._folder):
            if self._has_tensorboard and self._keeper.tensorboard_writer is None:
                self._keeper.tensorboard_writer = self._tensorboard()
            self._keeper.update_records(row, global_iteration=step, parent_name=group)

    def save(self) -> None:
        """Writes what was recorded since the last save."""
        with translate_write_errors(self._folder):
            self._keeper.save_records()
            for group in self._groups & {file.stem for file in self._folder.glob("*.csv")}:
                fsync(self._folder / f"{group}.csv")  # as SQLite does by itself
            if self._keeper.tensorboard_writer is not None:
                self._keeper.tensorboard_writer.flush()

    def forget_after(self, step: int, groups: Sequence[str]) -> None:
        """Drops later steps from the given groups, and lines that a killed process left half-written.

        Unsaved values are dropped from all groups. TensorBoard's curves of all groups continue from there too.
        Damaged records raise a UsageError.
        """
        self._keeper.record_writer.records = self._keeper.record_writer.get_empty_nested_dict()
        self._close_tensorboard()
        self._first_step = step + 1
        database = self._folder / "logs.db"
        try:
            if database.exists():
                with translate_write_errors(database), closing(sqlite3.connect(database)) as connection, connection:
                    _delete_later_rows(connection, step, groups)
            for file in (self._folder / f"{group}.csv" for group in groups):
                if file.is_file():
                    with file.open("rb") as lines, atomic_write(file) as temporary, temporary.open("wb") as kept:
                        kept.writelines(_lines_until(lines, step))
        except UsageError:
            raise
        except (sqlite3.Error, ValueError) as error:
            got = f"got damaged ones ({error}); restore logs.db and the CSV files from a copy, or remove them"
            raise UsageError(f"expected the records in {self._folder} as they were written, {got}") from error

    def close(self) -> None:
        self.save()
        self._close_tensorboard()

    def _close_tensorboard(self) -> None:
        if self._keeper.tensorboard_writer is not None:
            self._keeper.tensorboard_writer.close()
            self._keeper.tensorboard_writer = None

    def _tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=str(self._folder / "tensorboard"), purge_step=self._first_step)


class Recorders:
    """Several recorders used as a single one."""

    def __init__(self, recorders: Sequence[Any]) -> None:
        self.recorders = recorders

    def record(self, group: str, step: int, **values: float) -> None:
        for each in self.recorders:
            each.record(group, step, **values)

    def save(self) -> None:
        for each in self.recorders:
            each.save()

    def forget_after(self, step: int, groups: Sequence[str]) -> None:
        for each in self.recorders:
            each.forget_after(step, groups)


class ClosedDatabase(DBManager):
    """Record-keeper's database, with its connection closed after errors too: each new column begins with one."""

    def execute(self, *args: Any, **options: Any) -> Any:
        try:
            return super().execute(*args, **options)
        finally:
            self.conn.close()


def _check_name(group: str) -> None:
    """Raises a UsageError unless record-keeper can use a group's name for a file and an unquoted SQL table."""
    with closing(sqlite3.connect(":memory:")) as connection, suppress(sqlite3.OperationalError):  # from an SQL keyword
        if re.fullmatch(r"[a-z][a-z_]*", group):
            connection.execute(f"CREATE TABLE {group} (step)")
            return
    raise UsageError(f"expected a group named in lower-case letters, no SQL keyword, got {group!r}; call it train")


def _delete_later_rows(connection: sqlite3.Connection, step: int, groups: Sequence[str]) -> None:
    # otherwise damage would only show when somebody reads the curves; 10,000 records take 1 ms
    (message,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if message != "ok":
        raise ValueError(message)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        if name in groups:
            connection.execute(f"DELETE FROM {name} WHERE step > ?", (step,))
            # new rows continue the ids of those that stay, as if there had been no others
            connection.execute(
                f"UPDATE sqlite_sequence SET seq = (SELECT coalesce(max(id), 0) FROM {name}) WHERE name = ?", (name,)
            )


def _lines_until(lines: Iterable[bytes], step: int) -> Iterator[bytes]:
    """The complete lines of a CSV file up to a step, each header before the first of its rows."""
    header = b""
    for line in lines:
        first = line.split(b",")[0]
        if not line.endswith(b"\n"):  # cut off while being written
            continue
        if first == STEP_COLUMN:
            header = line
        elif int(first) <= step:
            yield header + line
            header = b""
