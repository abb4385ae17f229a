"""Recorder: what happens in a run, written as SQLite, CSV and (when it is installed) TensorBoard by record-keeper."""

import importlib.util
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from record_keeper import RecordKeeper, RecordWriter

from pml_fewshot.atomic import to_disk, whole_file, writing

# record-keeper makes an unquoted SQL table and a file of each group's name, so a plain word it must be
_GROUP = re.compile(r"[a-z][a-z_]*")
_FIRST_COLUMN = b"~iteration~"  # as record-keeper calls the step
# every word that SQLite refuses as an unquoted name of a table
_SQL_WORDS = re.compile(
    "add|all|alter|and|as|autoincrement|between|case|check|collate|commit|constraint|create|default|deferrable|delete|"
    "distinct|drop|else|escape|except|exists|foreign|from|group|having|if|in|index|insert|intersect|into|is|isnull|"
    "join|limit|not|nothing|notnull|null|on|or|order|primary|references|returning|select|set|table|then|to|transaction|"
    "union|unique|update|using|values|when|where|sqlite_.*"
)


class Recorder:
    """Records numbers by group and step into `folder`: logs.db (a table for each group), <group>.csv, TensorBoard.

    TensorBoard's event files are written when the package `tensorboard` is installed, which it need not be; SQLite
    and CSV are always written.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._keeper = RecordKeeper(record_writer=RecordWriter(str(folder)))
        self._groups: set[str] = set()  # that were recorded in this sitting
        self._first_step = 0  # later ones of another sitting are hidden in TensorBoard

    def record(self, group: str, step: int, **values: float) -> None:
        """Notes values of one step; `save` puts them on disk.

        Raises:
            ValueError: the group's name is not a plain lower-case word or is a word of SQL.
            CannotWriteError: (an OSError) TensorBoard could not write rows from before.
        """
        if not _GROUP.fullmatch(group) or _SQL_WORDS.fullmatch(group):
            raise ValueError(
                f"expected a group of lower-case letters and underscores that is no word of SQL, got {group!r}; "
                "name it train, validation or the like"
            )
        self._groups.add(group)
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        with writing(self._folder):  # TensorBoard writes in a thread, whose errors come with the next row
            if self._keeper.tensorboard_writer is None:
                self._keeper.tensorboard_writer = self._tensorboard()
            self._keeper.update_records(row, global_iteration=step, parent_name=group)

    def save(self) -> None:
        """Writes what was recorded since the last time.

        Raises:
            CannotWriteError: (an OSError) the disk is full, or the folder read-only.
        """
        with writing(self._folder):
            self._keeper.save_records()
            for group in self._groups & {file.stem for file in self._folder.glob("*.csv")}:
                to_disk(self._folder / f"{group}.csv")  # as SQLite does by itself
            if self._keeper.tensorboard_writer is not None:
                self._keeper.tensorboard_writer.flush()

    def forget_after(self, step: int, groups: Sequence[str]) -> None:
        """Drops what was recorded in some groups of later steps, and lines that a killed process left half-written.

        What is not yet saved is dropped from all groups. TensorBoard's curves of all groups go on from there too.

        Raises:
            ValueError: the records on disk are broken.
            CannotWriteError: (an OSError) the disk is full, or the folder read-only.
        """
        self._keeper.record_writer.records = self._keeper.record_writer.get_empty_nested_dict()
        if self._keeper.tensorboard_writer is not None:
            self._keeper.tensorboard_writer.close()
            self._keeper.tensorboard_writer = None
        self._first_step = step + 1
        database = self._folder / "logs.db"
        try:
            if database.exists():
                with writing(database), closing(sqlite3.connect(database)) as connection, connection:
                    _delete_later_rows(connection, step, groups)
            for file in (self._folder / f"{group}.csv" for group in groups):
                if file.is_file():
                    with file.open("rb") as lines, whole_file(file) as unfinished, unfinished.open("wb") as kept:
                        kept.writelines(_lines_until(lines, step))
        except (sqlite3.Error, ValueError) as error:
            raise ValueError(
                f"expected whole records in {self._folder}, got broken ones ({error}); restore logs.db and the CSV "
                "files from a copy, or take them away to go on without what was recorded"
            ) from error

    def close(self) -> None:
        """Saves, and closes TensorBoard's file."""
        self.save()
        if self._keeper.tensorboard_writer is not None:
            self._keeper.tensorboard_writer.close()

    def _tensorboard(self) -> Any:
        if importlib.util.find_spec("tensorboard") is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=str(self._folder / "tensorboard"), purge_step=self._first_step)


def _delete_later_rows(connection: sqlite3.Connection, step: int, groups: Sequence[str]) -> None:
    # else damage would show when somebody reads the curves; 10,000 records take 1 ms
    (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if said != "ok":
        raise ValueError(said)
    for kind, name in connection.execute("SELECT type, name FROM sqlite_master").fetchall():
        if kind in ("trigger", "view"):  # a stranger's could keep SQLite busy for ever
            raise ValueError(f"the {kind} {name!r}")
        if kind == "table" and name in groups:
            connection.execute(f"DELETE FROM {name} WHERE step > ?", (step,))
            # rows are numbered on from the last that stays, as if there had been no others
            connection.execute(
                f"UPDATE sqlite_sequence SET seq = (SELECT coalesce(max(id), 0) FROM {name}) WHERE name = ?", (name,)
            )


def _lines_until(lines: Iterable[bytes], step: int) -> Iterator[bytes]:
    """The lines of a CSV file that are whole and of no later step, each header before the first of its rows."""
    header = b""
    for line in lines:
        first = line.split(b",")[0]
        if not line.endswith(b"\n"):  # cut off while it was written
            continue
        if first == _FIRST_COLUMN:
            header = line
        elif int(first) <= step:
            yield header + line
            header = b""
