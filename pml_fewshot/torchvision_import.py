"""Makes `import torchvision` work where its compiled operators do not fit the installed torch.

A CPU build of torch beside the registry's CUDA build of torchvision cannot load torchvision's C++ operators, and the
import then fails with "operator torchvision::nms does not exist". Nothing here uses those operators (they are for
detection), so declaring their schemas is enough for transforms, models and downloads to work.
"""

import importlib
import sys

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def ensure_torchvision() -> None:
    """Imports torchvision, declaring the missing operators only when the plain import fails for the lack of them.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the import fails for any other reason than a missing operator.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # half-imported by the failed attempt
        for name, schema in _SCHEMAS.items():
            torch.library.define(f"torchvision::{name}", schema)
        importlib.import_module("torchvision")
