"""The one-shot classification task of Lake et al. 2015: 20 runs, each with 20 new characters of one alphabet."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pml_fewshot import EpisodeSpec, ExperimentConfig, FewShotDataset, ResultTable, UsageError
from pml_fewshot.checks import MissingFileError
from pml_fewshot.data.images import Form, read_images
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.statistics import average
from pml_fewshot.evaluation.table import RowContext
from pml_fewshot.trainers.base import FewShotTrainer

LABELS = "class_labels.txt"


def load_runs(folder: Path, image_size: int) -> tuple[FewShotDataset, Tensor]:
    """Reads the unpacked `all_runs.zip` of Lake et al.: run01/training/class01.png, run01/test/item01.png and so on.

    Each run's class_labels.txt has one line per test item: "run01/test/item01.png run01/training/class14.png".

    Returns:
        For R runs of W characters, the images (R * 2 W, ...), for each run its W training drawings and its W items,
        with high values for ink; and the index (R, W) of the run's drawing that each item shows.

    Raises:
        MissingFileError: no run in the folder, or a file named in one is missing.
        UsageError: runs of different sizes, a line without an item and one of the run's drawings, or another
            number of items than drawings.
    """
    files: list[Path] = []
    answers: list[list[int]] = []
    for file in sorted(folder.glob(f"*/{LABELS}")):
        pairs = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if wrong := [pair for pair in pairs if len(pair) != 2]:
            raise UsageError(f"expected an item and a drawing in each line of {file}, got {wrong[0]}; restore the file")
        drawings = sorted((file.parent / "training").glob("*.png"))
        named = [drawing.relative_to(folder).as_posix() for drawing in drawings]
        if unknown := [drawing for _, drawing in pairs if drawing not in named]:
            raise UsageError(f"expected drawings of {file.parent / 'training'} in {file}, got {unknown[0]}; restore it")
        files += drawings + [folder / item for item, _ in pairs]
        answers.append([named.index(drawing) for _, drawing in pairs])
        if len(pairs) != len(drawings):
            got = f"{len(pairs)} items and {len(drawings)} drawings in {file.parent}"
            raise UsageError(f"expected as many items as drawings, got {got}; unpack the runs again")
    if not files:
        raise MissingFileError(f"expected run01/{LABELS} and others in {folder}, got none; unpack all_runs.zip there")
    if missing := [file for file in files if not file.is_file()]:
        raise MissingFileError(f"expected {missing[0]}, got no such file; unpack all_runs.zip again")
    if len(sizes := {len(own) for own in answers}) > 1:
        raise UsageError(f"expected runs of one size in {folder}, got {sorted(sizes)} characters; restore them")
    form, names = Form.of(image_size, channels=1), [file.relative_to(folder).as_posix() for file in files]
    read = read_images(names, lambda name: (folder / name).read_bytes(), form, folder, resampling=Image.Resampling.BOX)
    images = torch.from_numpy(np.stack([255 - np.asarray(drawing) for drawing in read]))
    return FewShotDataset(images, torch.zeros(len(images), dtype=torch.int64), ["any"]), torch.tensor(answers)


def evaluate_lake(trainer: FewShotTrainer, config: ExperimentConfig, folder: Path) -> ResultTable:
    """Evaluates one-shot accuracy within alphabets, each item by itself, averaged over the runs."""
    items, answers = load_runs(folder, image_size=28)
    runs, ways = answers.shape
    bank = trainer.bank(items).unflatten(0, (runs, 2, ways))  # (R, 2, W, D)
    with torch.no_grad():
        logits = trainer.classify(bank[:, 0].unsqueeze(2), bank[:, 1])  # (R, W, W)
    correct = (logits.argmax(dim=2).cpu() == answers).double().mean(dim=1)  # (R,)
    spec, which = EpisodeSpec(ways, shots=1, queries=1), items.checksum()
    result = EpisodicResult(*average([correct]), correct, spec, 0, which, trainer.classifier)
    table = ResultTable()
    table.add_episodic(RowContext(config.name, "test", runs * ways, f"{runs} runs"), result)
    return table
