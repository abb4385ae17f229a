"""ResultRow: one figure with all that is needed to read and to repeat it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One figure with all that is needed to read and to repeat it; what does not apply is None or empty."""

    method: str
    """what was judged"""
    figure: str
    """accuracy, precision_at_1, ..."""
    value: float
    """mean, a fraction of 1"""
    ci95: float
    """half the 95 % interval of the mean"""
    ways: int | None = None
    """of the episodes"""
    shots: int | None = None
    queries: int | None = None
    count: int
    """episodes, or queries for retrieval, that the mean is over"""
    seed: int | None = None
    """of the episodes"""
    split: str
    """classes judged on: test or val"""
    classes: int
    """in that split"""
    protocol: Literal["inductive", "transductive", "leave-one-out", "gallery"]
    """inductive: each query alone; transductive: queries inform each other; leave-one-out: each searches the rest;
    gallery: each searches a set of references"""
    ranking: str = ""
    """index and distance of a retrieval"""
    episodes_hash: str = ""
    """equal for results on the same episodes"""
    note: str = ""
    """what a reader must know of the data"""
    trained: int = 1
    """trainings (seeds) that the figure is averaged over"""
    seconds: float | None = None
    """that judging the method took, all its figures and embedding together, where it was timed"""
