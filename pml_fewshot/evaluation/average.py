"""Means over episodes or queries and over trainings, with intervals that hold both kinds of chance."""

from collections.abc import Sequence

import scipy.stats
import torch
from torch import Tensor

from pml_fewshot.checks import require
from pml_fewshot.evaluation.retrieval_result import RetrievalResult


def average(trainings: Sequence[Tensor]) -> tuple[float, float]:
    """Mean of a figure and half its 95 % interval.

    Args:
        trainings: for each training (seed) of a method the values (N,) of the same N episodes or queries.

    Returns:
        The mean over all, and the root of the sum of two squares: 1.96 standard errors over the N (of each one's mean
        over the trainings), and where there are several trainings Student's t times the standard error of their means.

    Raises:
        ValueError: trainings judged on different numbers of episodes.
    """
    sizes = {len(values) for values in trainings}
    require(len(sizes) == 1, "all trainings judged on the same episodes", f"{sorted(sizes)} of them", "use one spec")
    values = torch.stack([values.double() for values in trainings])  # (S, N)
    ci95 = (1.96 * values.mean(dim=0).std() / values.shape[1] ** 0.5).item() if values.shape[1] > 1 else float("nan")
    return values.mean().item(), _joined(ci95, values.mean(dim=1))


def averaged_metric(metric: str, results: Sequence[RetrievalResult]) -> tuple[float, float]:
    """The same for a figure of retrieval; NMI and AMI are one value a training and have an interval over trainings."""
    if metric in results[0].per_query:
        return average([result.per_query[metric] for result in results])
    means = torch.tensor([result[metric] for result in results], dtype=torch.float64)
    return means.mean().item(), _joined(float("nan") if len(means) == 1 else 0.0, means)


def _joined(ci95: float, means: Tensor) -> float:
    """Half the interval over episodes, joined with that over the means (S,) of the trainings."""
    trainings = len(means)
    if trainings == 1:
        return ci95
    quantile = float(scipy.stats.t.ppf(0.975, trainings - 1))
    return float((ci95**2 + (quantile * means.std().item()) ** 2 / trainings) ** 0.5)
