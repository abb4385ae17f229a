"""Runnable experiments, one per file: `python -m experiments.NAME`."""

import pml_fewshot as pml_fewshot  # first: it makes importing PML half a second faster
