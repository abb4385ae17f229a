"""structured_classifier: prototypes fitted to the support under a distance (DeepEMD's structured layer)."""

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.distances.episodic_distance import similarity_batch
from pml_fewshot.embedders.modes import in_float32, ordinary_modes
from pml_fewshot.evaluation.heads import Scores, Similarities, fitted_by
from pml_fewshot.evaluation.support import Support


def fit_structured(
    support: Support,
    distance: BaseDistance | None = None,
    epochs: int = 100,
    batch_size: int = 4,
    lr: float = 100.0,
    scale: float = 12.5,
    seed: int = 0,
) -> Scores:
    if distance is None:
        raise UsageError("expected a distance to fit prototypes by, got none; give distance=EarthMoversDistance(..)")
    check_at_least_one("epochs", epochs)
    check_at_least_one("batch_size", batch_size)
    if not (lr > 0 and scale > 0):
        raise UsageError(f"expected lr and scale above 0, got {lr} and {scale}; raise them")
    items, labels = support.items.detach(), support.labels
    # one order for all episodes, so that the result of one does not depend on which others share its chunk
    generator = torch.Generator().manual_seed(seed)
    with ordinary_modes():
        items = items.clone()  # (inference-mode tensors accept no gradient)
        prototypes = support.prototypes.detach().clone().requires_grad_()
        # as published, with a dampening that takes 0.1 of each new gradient
        optimizer = torch.optim.SGD([prototypes], lr=lr, momentum=0.9, dampening=0.9)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=generator).to(labels.device).split(batch_size):
                values = similarity_batch(distance, items[:, batch], prototypes)  # (E, B, W)
                own = labels[batch].expand(len(items), -1)
                losses = F.cross_entropy(scale * values.mT, own, reduction="none").mean(dim=1)
                (prototypes.grad,) = torch.autograd.grad(losses.sum(), prototypes)
                optimizer.step()
    return Similarities(prototypes.detach(), distance)


@fitted_by(fit_structured)
@in_float32
def structured_classifier(
    support: Tensor,
    query: Tensor,
    distance: BaseDistance | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 4,
    lr: float = 100.0,
    scale: float = 12.5,
    seed: int = 0,
) -> Tensor:
    """Scores by the similarity to prototypes that start at the class means and are fitted to the support.

    They are fitted by gradient steps on the cross-entropy of the support items over the prototypes. With
    EarthMoversDistance and several shots this is the structured fully connected layer of DeepEMD, whose prototypes are
    feature maps; with one shot the prototypes already are the support. It is expensive: at 5 ways and 5 shots, 12,500
    comparisons per episode, 33 times the cost of classifying its 75 queries.

    Args:
        support, query: as for every head.
        distance: to compare by; there is no default.
        epochs: passes over the support.
        batch_size: support items per step.
        lr: of SGD with momentum 0.9 and dampening 0.9. DeepEMD's authors tune it: 100 suits scores from -1 to 1 of maps
            with a length in the tens; shorter maps and squared distances need far less.
        scale: of the similarities in the softmax.
        seed: for the order of the support items, the same for all episodes.

    Raises:
        UsageError: no distance, or a number that is not above 0.

    Source: Zhang et al. 2020, "DeepEMD", section 3.5; the numbers are those of the authors' evaluation code.
    """
    return fit_structured(Support.of(support), distance, epochs, batch_size, lr, scale, seed)(query)
