"""WandbRecorder: sends the records of a run to Weights & Biases."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from pml_fewshot.checks import import_extra
from pml_fewshot.io.atomic import write_text

RUN_FILE = "wandb_run_id.txt"
# W&B writes its file every 15 s, and a killed process loses what is not in it. The setting is private.
FLUSH_SETTING, FLUSH_SECONDS = "x_transaction_log_flush_interval", 0.1


class WandbRecorder:
    """Sends numbers by group and step to a W&B run, as "train/loss" over "step".

    A run resumed in the same folder continues the same W&B run: `wandb_run_id.txt` there holds its id and, for each
    group, the last step sent, up to which later saves send nothing again. The steps of a group must therefore increase,
    and if steps are repeated with other options (a lower rate after a NaN), W&B keeps the first values.

    With WANDB_MODE=offline, everything goes to `wandb/` in the folder, one part per session, for `wandb sync` to send.

    Args:
        folder: run folder.
        project: W&B project.
        name: name of the W&B run; the folder's when empty.
        options: further arguments of `wandb.init`: entity, tags, notes and so on.

    Raises:
        MissingPackageError: (an ImportError) wandb is not installed.
    """

    def __init__(self, folder: str | Path, project: str = "pml_fewshot", name: str = "", **options: Any) -> None:
        wandb = import_extra("wandb", "for WandbRecorder", "wandb")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / RUN_FILE
        self._id, *sent = self._file.read_text().splitlines() if self._file.exists() else [uuid4().hex]
        self._sent = {group: int(step) for group, step in (line.rsplit(" ", 1) for line in sent)}
        self._rows: list[tuple[str, int, dict[str, float]]] = []
        self._write()  # first: a process killed after this point continues this run
        settings = wandb.Settings()
        if hasattr(settings, FLUSH_SETTING):
            setattr(settings, FLUSH_SETTING, FLUSH_SECONDS)
        given = {"project": project, "name": name or folder.resolve().name, "dir": str(folder), "settings": settings}
        # "create_new": another run may be open in this process, the user's or that of a sweep
        self._run = wandb.init(**given | options, id=self._id, resume="allow", reinit="create_new")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # W&B's own step counts rows, of all groups

    def record(self, group: str, step: int, **values: float) -> None:
        """Stores the values of one step; `save` sends them."""
        self._rows.append((group, step, {f"{group}/{name}": float(value) for name, value in values.items()}))

    def save(self) -> None:
        """Sends what was recorded since the last save, except what an earlier session has sent."""
        new = [row for row in self._rows if row[1] > self._sent.get(row[0], -1)]
        for group, step, values in new:
            self._run.log({"step": step, **values})
            self._sent[group] = max(step, self._sent.get(group, step))
        if new:
            self._write()
        self._rows.clear()

    def forget_after(self, step: int, groups: Sequence[str]) -> None:
        """Drops unsaved values of all groups; W&B cannot forget what it has received."""
        self._rows.clear()

    def close(self) -> None:
        """Saves and ends this session of the W&B run."""
        self.save()
        self._run.finish()

    def _write(self) -> None:
        write_text(self._file, "\n".join([self._id, *(f"{group} {step}" for group, step in self._sent.items())]))
