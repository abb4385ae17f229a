"""Transductive heads: the queries of an episode inform each other, for all episodes of a chunk at once.

Each maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W), with all N queries of an episode seen together.
PT-MAP assumes that every class has equally many queries, and TIM favors it; both do worse where this does not hold.

Internally, values per class and item are (E, W, N): a softmax over the second-to-last axis is several times as fast as
over the last.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one, check_choice
from pml_fewshot.embedders.modes import in_float32
from pml_fewshot.evaluation.heads import Scores, fitted_by, transductive
from pml_fewshot.evaluation.support import Support
from pml_fewshot.evaluation.tuned_heads import (
    LOGITS,
    Similarity,
    check_above_zero,
    check_tuning,
    information_slope,
    tuned_with_queries,
)

LEAST = 1e-12  # the smallest length to divide by


def fit_bd_cspn(support: Support, scale: float = 10.0, top: int | None = None) -> Scores:
    check_above_zero(scale=scale)
    if top is not None:
        check_at_least_one("top", top)

    def scores(query: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(query, dim=2)
        classes = F.normalize(_rectified(support, query, lengths, scale, top), dim=2)
        return (classes @ query.mT / lengths.clamp(min=LEAST).unsqueeze(1)).mT

    return scores


@transductive
@fitted_by(fit_bd_cspn)
@in_float32
def bd_cspn(support: Tensor, query: Tensor, *, scale: float = 10.0, top: int | None = None) -> Tensor:
    """Scores by cosine to prototypes that are rectified by the queries (Liu, Song and Qin 2020, BD-CSPN).

    The queries are moved so that their mean is the support's, each is assigned to the nearest prototype by cosine, and
    a class's new prototype is the mean of its support items and these queries, weighted by the softmax, over them, of
    `scale` times the cosine to the old one. Then the original queries are scored. Expects embeddings centered by the
    training mean and L2-normalized.

    Args:
        support: (E, W, K, D)
        query: (E, N, D)
        scale: of the cosine; 10 in the code of Veilleux et al. 2021 and of LaplacianShot. easyfsl's setting: 1.
        top: only this many queries join each class, those with the highest cosine, as in the paper; if None, all join,
            as in the public implementations.

    Raises:
        UsageError: an invalid option.
    """
    return fit_bd_cspn(Support.of(support), scale, top)(query)


def _rectified(support: Support, query: Tensor, lengths: Tensor, scale: float, top: int | None) -> Tensor:
    """Returns prototypes (E, W, D), see `bd_cspn`; `lengths` (E, N) are those of the queries.

    The moved queries q + shift are never computed: what is needed follows from products of the queries with the
    prototypes and with the shift, and each pass over the queries, at 640 dimensions, costs as much as all the rest.
    """
    items, prototypes, ways = support.items, support.prototypes, len(support.sizes)
    shift = items.mean(dim=1, keepdim=True) - query.mean(dim=1, keepdim=True)
    directions = F.normalize(prototypes, dim=2)
    products = torch.cat([directions, shift], dim=1) @ query.mT
    along, shifted = products[:, :ways], products[:, ways:]
    squares = lengths.square().unsqueeze(1) + 2 * shifted + shift.square().sum(dim=2, keepdim=True)
    cosines = (along + directions @ shift.mT) / squares.clamp(min=LEAST**2).sqrt()  # (E, W, N)
    theirs = cosines == cosines.amax(dim=1, keepdim=True)  # all classes that tie; argmax takes 10 times as long
    if top is not None and top < query.shape[1]:
        sure = cosines.masked_fill(~theirs, -torch.inf)
        theirs &= sure >= sure.topk(top, dim=2).values[:, :, -1:]
    own = F.one_hot(support.labels, ways).T.bool()  # (W, S)
    to_items = F.normalize(items, dim=2) @ directions.mT
    # a cosine minus its maximum of 1: no overflow whatever the scale, and every class has its support
    to_items = (scale * (to_items.mT - 1)).masked_fill(~own, -torch.inf)
    to_queries = (scale * (cosines - 1)).masked_fill(~theirs, -torch.inf)
    shares = torch.cat([to_items, to_queries], dim=2).softmax(dim=2)
    of_items, of_queries = shares.split([items.shape[1], query.shape[1]], dim=2)
    return of_items @ items + of_queries @ query + of_queries.sum(dim=2, keepdim=True) * shift


def fit_laplacian_shot(
    support: Support,
    neighbors: int = 2,
    smoothness: float = 0.7,
    steps: int = 20,
    rectify: bool = True,
    scale: float = 10.0,
) -> Scores:
    check_at_least_one("neighbors", neighbors)
    check_at_least_one("steps", steps)
    check_above_zero(smoothness=smoothness, scale=scale)

    def scores(query: Tensor) -> Tensor:
        if neighbors >= (count := query.shape[1]):
            do = "lower neighbors, or ask about more queries at once"
            raise UsageError(f"expected more than {neighbors} queries, as neighbors says, got {count}; {do}")
        lengths = torch.linalg.vector_norm(query, dim=2)
        classes = _rectified(support, query, lengths, scale, None) if rectify else support.prototypes
        # for points near each other and far from the origin, squares cancel badly
        center = support.prototypes.mean(dim=1, keepdim=True)
        classes, query = classes - center, query - center
        lengths = torch.linalg.vector_norm(query, dim=2)
        # -|q - w|^2 without |q|^2, which is the same for all classes
        own = torch.baddbmm(classes.square().sum(dim=2, keepdim=True), classes, query.mT, beta=-1, alpha=2)
        near = _nearest(query, lengths, neighbors)
        logits = own
        for _ in range(steps):
            logits = torch.baddbmm(own, logits.softmax(dim=1), near, alpha=smoothness)
        return logits.mT

    return scores


def _nearest(query: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Returns (E, N, N) whether the row is at one of the `count` smallest distances from the column, ties included."""
    # 2 qr - |r|^2, which orders the rows r of a column q as their distances do
    close = torch.baddbmm(lengths.square().unsqueeze(2), query, query.mT, beta=-1, alpha=2)
    close.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    left = close
    for _ in range(count - 1):  # topk takes 20 times as long for the two nearest of 75
        left = left.masked_fill(left == left.amax(dim=1, keepdim=True), -torch.inf)
    return (close >= left.amax(dim=1, keepdim=True)).to(query)


@transductive
@fitted_by(fit_laplacian_shot)
@in_float32
def laplacian_shot(
    support: Tensor,
    query: Tensor,
    *,
    neighbors: int = 2,
    smoothness: float = 0.7,
    steps: int = 20,
    rectify: bool = True,
    scale: float = 10.0,
) -> Tensor:
    """Scores by squared distance to prototypes and by the classes of nearby queries (Ziko et al. 2020, LaplacianShot).

    Minimizes, over the queries' assignments to classes, their cost (the squared distance) minus `smoothness` times the
    agreement with the nearest other queries, by the bound updates of the paper (equation 12): logits are minus the cost
    plus `smoothness` times the sum of the neighbors' last shares, and the next shares are their softmax. Expects
    embeddings centered by the training mean and L2-normalized.

    Args:
        support: (E, W, K, D)
        query: (E, N, D)
        neighbors: number of nearest other queries. The authors' code uses `knn` = 3 and counts the query itself among
            them, so two others; easyfsl does the same.
        smoothness: the paper's lambda, which it tunes on validation classes: for a ResNet on balanced miniImageNet
            Veilleux et al. 2021 give 0.7 for one shot and 0.3 for five, and on unbalanced episodes 0.7 for both.
            easyfsl's setting is 0.7.
        steps: number of updates, all of them run; the authors' code stops before 20 if the bound stays the same.
        rectify: start from the prototypes of `bd_cspn`; `proto_rect` in the authors' code, whose script sets it.
            Veilleux et al. set it on balanced episodes only.
        scale: that of `bd_cspn`; easyfsl uses 1. The authors weight a query by a softmax over the classes instead.

    Raises:
        UsageError: an invalid option; no more queries than neighbors.
    """
    return fit_laplacian_shot(Support.of(support), neighbors, smoothness, steps, rectify, scale)(query)


def fit_alpha_tim(
    support: Support,
    alpha: float | None = None,
    support_weight: float = 1.0,
    marginal_weight: float = 1.0,
    conditional_weight: float = 1.0,
    similarity: Similarity = "squared",
    temperature: float = 15.0,
    steps: int = 1000,
    learning_rate: float = 1e-4,
) -> Scores:
    check_choice("similarity", similarity, tuple(LOGITS))
    check_tuning(temperature, steps, learning_rate)
    weights = {"support_weight": support_weight, "marginal_weight": marginal_weight}
    for name, weight in {**weights, "conditional_weight": conditional_weight}.items():
        if not 0 <= weight < math.inf:
            raise UsageError(f"expected {name} of at least 0 and finite, got {weight}; choose another")
    if alpha is None:
        shots = sum(support.sizes) / len(support.sizes)
        alpha = 2.0 if shots == 1 else 7.0 if shots >= 5 else 5.0
    check_above_zero(alpha=alpha)
    ways = len(support.sizes)
    slope = information_slope(support.labels, ways, support_weight, marginal_weight, conditional_weight, alpha)
    return tuned_with_queries(support, slope, similarity, temperature, steps, learning_rate)


@transductive
@fitted_by(fit_alpha_tim)
@in_float32
def alpha_tim(
    support: Tensor,
    query: Tensor,
    *,
    alpha: float | None = None,
    support_weight: float = 1.0,
    marginal_weight: float = 1.0,
    conditional_weight: float = 1.0,
    similarity: Similarity = "squared",
    temperature: float = 15.0,
    steps: int = 1000,
    learning_rate: float = 1e-4,
) -> Tensor:
    """Fine-tuning by the mutual information of queries and classes (Veilleux et al. 2021; TIM, Boudiaf et al. 2020).

    Adam minimizes the support's cross-entropy, plus the mean entropy of the queries' predictions, minus the entropy of
    their mean; each times its weight. The entropies are Tsallis's of order alpha, (1 - sum p^alpha) / (alpha - 1): the
    larger alpha, the smaller the cost of unequal numbers of queries per class. alpha=1 is Shannon's, and so TIM, which
    favors equal numbers; its authors' setting is alpha=1, support_weight=0.1, conditional_weight=0.1. (Veilleux et al.
    run TIM with these proportions on balanced episodes, and with equal weights on unbalanced ones.) Expects
    L2-normalized embeddings.

    Args:
        support: (E, W, K, D)
        query: (E, N, D)
        alpha: order of both entropies; the cross-entropy is Shannon's. If None, as in the authors' code: 2 for one
            shot, 7 for five or more, 5 in between.
        support_weight: of the cross-entropy.
        marginal_weight: of the entropy of the mean prediction.
        conditional_weight: of the mean entropy.
        similarity: "squared", minus half the squared Euclidean distance as in the papers, "cosine" or "euclidean".
        temperature: factor of the similarity; as in both papers.
        steps: of Adam; as in Veilleux et al., for TIM too (its own code sets 150 and its experiments' scripts 1000).
        learning_rate: of Adam; as in both papers. easyfsl's setting of TIM: alpha=1, conditional_weight=0.1,
            similarity="cosine", temperature=10, steps=50.

    Raises:
        UsageError: an invalid option.
    """
    options = alpha, support_weight, marginal_weight, conditional_weight, similarity, temperature, steps, learning_rate
    return fit_alpha_tim(Support.of(support), *options)(query)


def fit_pt_map(
    support: Support,
    power: float | None = 0.5,
    center: bool = True,
    sharpness: float = 10.0,
    steps: int = 20,
    learning_rate: float = 0.2,
    iterations: int = 100,
) -> Scores:
    check_at_least_one("steps", steps)
    check_at_least_one("iterations", iterations)
    check_above_zero(sharpness=sharpness, learning_rate=learning_rate)
    if power is not None:
        check_above_zero(power=power)

    def scores(query: Tensor) -> Tensor:
        if query.shape[1] == 1:
            do = "ask about several at once, or use another head"
            raise UsageError(f"expected several queries, which PT-MAP shares out among the classes, got one; {do}")
        items, query = _transformed(support.items, power, center), _transformed(query, power, center)
        middle = items.mean(dim=1, keepdim=True)  # far from the origin squares would cancel badly
        items, query = items - middle, query - middle
        ways, one = len(support.sizes), len(items)
        is_class = F.one_hot(support.labels, ways).T.to(items).expand(one, -1, -1)
        sizes = is_class.sum(dim=2, keepdim=True) + query.shape[1] / ways  # of a class, its queries included
        sums = is_class @ items
        classes, columns = support.means(items), query.mT.contiguous()
        potential = classes.new_zeros(one, ways, 1)
        for step in range(steps + 1):
            # -|q - w|^2 without |q|^2: a term common to all classes does not change the plan
            squares = classes.square().sum(dim=2, keepdim=True)
            gain = torch.baddbmm(squares, classes, columns, beta=-sharpness, alpha=2 * sharpness)
            log_plan, potential = _shared_out(gain, potential, iterations)
            if step < steps:
                classes = classes.lerp((sums + log_plan.exp() @ query) / sizes, learning_rate)
        return log_plan.mT

    return scores


def _transformed(items: Tensor, power: float | None, center: bool) -> Tensor:
    """Applies any power, keeping signs; with `center`, normalizes, subtracts the mean of the rows, normalizes again."""
    if power is not None:
        items = items.sign() * (items.abs() + 1e-6).pow(power)
    if center:
        items = F.normalize(items, dim=2)
        items = F.normalize(items - items.mean(dim=1, keepdim=True), dim=2)
    return items


def _shared_out(gain: Tensor, potential: Tensor, iterations: int, tolerance: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Returns the logarithm of the plan (E, W, N) near exp(gain) with sums of 1 per query and N / W per class.

    It is that of Sinkhorn's iterations, by the potentials of the classes alone (E, W, 1), in the log domain: nothing
    underflows wherever a query lies, and the potentials of a similar problem are a good start. One Sinkhorn iteration
    is followed by Newton steps on the convex dual, of which 2 to 14 do what Sinkhorn needs 10 to 1,000 for, the more
    the surer the plan. A step whose largest difference between two classes is t is scaled by log(1 + t) / t, and so
    never raises the dual (as its third derivative is at most t times its second; Sun and Tran-Dinh 2019).
    """
    ways, share = gain.shape[1], gain.shape[2] / gain.shape[1]
    gain = gain - gain.amax(dim=1, keepdim=True)  # a value large for all classes would only coarsen the rounding
    potential = potential + math.log(share) - (gain + potential).log_softmax(dim=1).logsumexp(dim=2, keepdim=True)
    level = gain.new_full((ways, ways), share / ways)  # the dual is flat where all potentials change alike
    level.diagonal().add_(share * 10 * torch.finfo(gain.dtype).eps)
    left, own, part = torch.arange(len(gain), device=gain.device), gain, potential.clone()  # the unfinished episodes
    for _ in range(iterations):
        plan = (own + part).softmax(dim=1)
        sums = plan.sum(dim=2, keepdim=True)
        missing = share - sums
        # a finished episode stays as it is, so that none depends on which others share its chunk
        moving = missing.abs().amax(dim=1, keepdim=True) > tolerance * share
        hessian = torch.diag_embed(sums.squeeze(2)) - plan @ plan.mT + level
        step = torch.linalg.solve_ex(hessian, missing)[0]
        spread = (step.amax(dim=1, keepdim=True) - step.amin(dim=1, keepdim=True)).clamp_(min=LEAST)
        part = part + step * (spread.log1p() / spread) * moving
        count = int(moving.sum())
        if count <= len(left) // 2:
            potential[left] = part
            if not count:
                break
            kept = moving.flatten()
            left, own, part = left[kept], own[kept], part[kept]
    potential[left] = part
    return (gain + potential).log_softmax(dim=1), potential


@transductive
@fitted_by(fit_pt_map)
@in_float32
def pt_map(
    support: Tensor,
    query: Tensor,
    *,
    power: float | None = 0.5,
    center: bool = True,
    sharpness: float = 10.0,
    steps: int = 20,
    learning_rate: float = 0.2,
    iterations: int = 100,
) -> Tensor:
    """Scores by optimal transport of the queries to the classes (Hu, Gripon and Pateux 2021, PT-MAP).

    Features are first transformed (power, normalization, minus the mean of the support or of the queries,
    normalization). Then, repeatedly, the queries are divided equally among the classes, at a cost of squared distances
    and with an entropy (the plan that Sinkhorn's iterations find), and the class centers move toward the means of
    their items. **It assumes that every class has equally many queries**, and does worse where this does not hold.
    Expects raw embeddings, preferably ones that end in a ReLU.

    Args:
        support: (E, W, K, D)
        query: (E, N, D)
        power: exponent of (x + 1e-6); keeps the sign of negative x, where the paper has none. None leaves features
            unchanged.
        center: normalize and center, as in the authors' code (its QR reduction keeps distances). easyfsl does neither.
        sharpness: the paper's lambda, the factor of the squared distances.
        steps: moves of the centers; easyfsl uses 10.
        learning_rate: the paper's alpha, how far the centers move toward the means.
        iterations: maximum for each plan; an episode is finished when each class is within 1e-4 of its share. The
            authors run at most 1,000 of Sinkhorn's, until no query's sum changes by more than 1e-6.

    Raises:
        UsageError: an invalid option; one query, which would be divided equally.
    """
    return fit_pt_map(Support.of(support), power, center, sharpness, steps, learning_rate, iterations)(query)
