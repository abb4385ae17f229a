"""Recorder: what happens in a run, written as SQLite, CSV and (when it is installed) TensorBoard by record-keeper."""

import importlib.util
import re
from pathlib import Path

from record_keeper import RecordKeeper, RecordWriter

# record-keeper makes an unquoted SQL table and a file of each group's name, so a plain word it must be
_GROUP = re.compile(r"[a-z][a-z_]*")
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
        tensorboard = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            tensorboard = SummaryWriter(log_dir=str(Path(folder) / "tensorboard"))
        self._tensorboard = tensorboard
        self._keeper = RecordKeeper(tensorboard_writer=tensorboard, record_writer=RecordWriter(str(folder)))

    def record(self, group: str, step: int, **values: float) -> None:
        """Notes values of one step; `save` puts them on disk.

        Raises:
            ValueError: the group's name is not a plain lower-case word or is a word of SQL.
        """
        if not _GROUP.fullmatch(group) or _SQL_WORDS.fullmatch(group):
            raise ValueError(
                f"expected a group of lower-case letters and underscores that is no word of SQL, got {group!r}; "
                "name it train, validation or the like"
            )
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        self._keeper.update_records(row, global_iteration=step, parent_name=group)

    def save(self) -> None:
        """Writes what was recorded since the last time."""
        self._keeper.save_records()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Saves, and closes TensorBoard's file."""
        self.save()
        if self._tensorboard is not None:
            self._tensorboard.close()
