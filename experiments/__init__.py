"""Runnable experiments, one a file; `python -m experiments.NAME`."""

import pml_fewshot as pml_fewshot  # first: it makes the import of PML half a second shorter
