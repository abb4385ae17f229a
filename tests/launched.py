"""An experiment of `tests.tiny_experiments` from the command line, as torchrun starts it; of one process with a fault.

torchrun --nproc-per-node 2 -m tests.launched FAULT NAME --run-dir DIR
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pml_fewshot import main
from pml_fewshot.data.dataset import Splits
from pml_fewshot.experiment.config import ExperimentConfig
from tests.tiny_experiments import TINY_EXPERIMENTS, tiny_set, tiny_splits

CONFIG = TINY_EXPERIMENTS["protonet"]


def other_test_classes() -> Splits:
    return replace(tiny_splits(), test=tiny_set("c", 6, 9))


def no_data() -> Splits:
    raise FileNotFoundError("no such data here")


def stops_half_way(images: Tensor, generator: object) -> Tensor:
    """In its fifth batch one process waits for longer than the other does."""
    calls.append(1)
    if len(calls) == 5 and os.environ.get("RANK") == "1":
        time.sleep(120)
    return images


calls: list[int] = []
FAULTS = {
    "config": {"clip_norm": 3.0},
    "data": {"data": other_test_classes},
    "loader": {"data": no_data},
}


def config_of(fault: str, name: str) -> ExperimentConfig:
    config = replace(TINY_EXPERIMENTS[name], augment=stops_half_way if fault == "hang" else None)
    if os.environ.get("RANK") != "1":
        return config
    if fault == "folder":  # a machine with a disk of its own
        Path("other").mkdir(exist_ok=True)
        os.chdir("other")
        return config
    return replace(config, **FAULTS.get(fault, {}))  # type: ignore[arg-type]


if __name__ == "__main__":
    _, fault, name, *rest = sys.argv
    sys.argv[1:] = rest
    main(config_of(fault, name))
