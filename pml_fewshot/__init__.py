"""Few-shot and metric learning on pytorch-metric-learning: episodes, trainers, and evaluation that can be trusted."""

import lazy_loader

from pml_fewshot.environment import prepare_imports

__version__ = "0.6.0"

prepare_imports()

# PML takes longer to import than torch (it imports scipy.stats), so each name of __init__.pyi is imported at first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
