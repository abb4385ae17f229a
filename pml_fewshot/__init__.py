"""Few-shot and metric learning on pytorch-metric-learning: episodes, trainers, and trustworthy evaluation."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (a copy of the sources, or a forced install)
    raise ImportError(f"pml_fewshot needs Python 3.11 or newer, got {sys.version.split()[0]}; use a newer one")

import lazy_loader

from pml_fewshot.environment import prepare_imports

__version__ = "0.6.0"

prepare_imports()

# PML takes nearly as long to import as torch, so each name of __init__.pyi is imported at its first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
