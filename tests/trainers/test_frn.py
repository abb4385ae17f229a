"""Feature map reconstruction: loss, head and trainer against ridge regression by scikit-learn, node by node."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.reconstruction import feature_map_reconstruction, fit_reconstruction
from pml_fewshot.evaluation.support import Support
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.losses.reconstruction import ReconstructionLoss
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.trainers.frn import FRNTrainer
from pml_fewshot.training.fit import fit
from tests.trainers import material as m

NODES, CHANNELS = 4, 6
ALPHA, BETA = 0.3, -0.2
LEARNED = {"log_penalty": ALPHA, "log_stretch": BETA}


def maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, CHANNELS * NODES, generator=generator, dtype=torch.float64)


def slow_logit(query: Tensor, support: Tensor) -> float:
    """Minus the mean squared error of rebuilding a query (D,) from support items (K, D) of one class."""
    rows = np.concatenate([np.asarray(item).reshape(CHANNELS, NODES).T for item in support])  # (K * nodes, C)
    penalty = len(rows) / CHANNELS * math.exp(ALPHA) + 1e-6
    errors = []
    for node in np.asarray(query).reshape(CHANNELS, NODES).T:
        rebuilt = rows.T @ Ridge(penalty, fit_intercept=False, solver="cholesky").fit(rows.T, node).coef_
        errors.append(((math.exp(BETA) * rebuilt - node) ** 2).sum())
    return -np.mean(errors)


@pytest.mark.parametrize("shots", [1, 3])  # fewer nodes than channels, and more
def test_the_head_is_ridge_regression_of_each_node(shots: int) -> None:
    support, query = maps(2, 3, shots), maps(2, 4, seed=1)
    logits = feature_map_reconstruction(support, query, nodes=NODES, scale=2.0, **LEARNED)
    expected = [
        [[2 * slow_logit(q, s) for s in classes] for q in qs] for qs, classes in zip(query, support, strict=True)
    ]
    assert logits.numpy() == pytest.approx(np.array(expected), rel=1e-6)


def test_classes_of_different_sizes() -> None:
    items, query = maps(1, 4), maps(1, 2, seed=1)
    logits = fit_reconstruction(Support(items, (1, 3)), nodes=NODES, **LEARNED)(query)
    for n in range(2):
        expected = [slow_logit(query[0, n], part) for part in (items[0, :1], items[0, 1:])]
        assert logits[0, n].tolist() == pytest.approx(expected, rel=1e-6)


def loss_of(**options: object) -> ReconstructionLoss:
    loss = ReconstructionLoss(NODES, **options).double()  # type: ignore[arg-type]
    loss.log_penalty.data.fill_(ALPHA)
    loss.log_stretch.data.fill_(BETA)
    return loss


def test_the_loss_is_the_cross_entropy_of_the_heads_logits() -> None:
    support, query = maps(3, 2), maps(5, seed=1)
    labels, order = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([3, 0, 5, 2, 1, 4])
    logits = torch.tensor([[2 * slow_logit(q, s) for s in support] for q in query], dtype=torch.float64)
    classes = torch.arange(3).repeat_interleave(2)[order]
    value = loss_of(scale=2.0)(query, labels, None, support.flatten(0, 1)[order], classes)
    assert value.item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_in_a_batch_each_item_is_rebuilt_from_the_others() -> None:
    items, labels = maps(7), torch.tensor([0, 1, 0, 1, 2, 2, 1])
    losses = []
    for i, (item, label) in enumerate(zip(items, labels, strict=True)):
        others = torch.arange(7) != i
        logits = [slow_logit(item, items[others & (labels == c)]) for c in range(3)]
        losses.append(nn.functional.cross_entropy(torch.tensor(logits, dtype=torch.float64), label).item())
    assert loss_of()(items, labels).item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_gradients_are_those_of_central_differences() -> None:
    loss, support, query = loss_of(), maps(3), maps(4, seed=1).requires_grad_()
    labels, classes = torch.tensor([0, 2, 1, 0]), torch.arange(3)

    def value(query: Tensor, support: Tensor, *learned: Tensor) -> Tensor:
        given = dict(zip(("log_scale", "log_penalty", "log_stretch"), learned, strict=True))
        return torch.func.functional_call(loss, given, (query, labels, None, support, classes))

    learned = (loss.log_scale, loss.log_penalty, loss.log_stretch)
    assert torch.autograd.gradcheck(value, (query, support.requires_grad_(), *learned), atol=1e-6)


class Maps(nn.Module):
    """A trunk of the tests' 5 x 5 images that ends in maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, CHANNELS, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(1)


def test_the_trainer_classifies_by_what_the_loss_has_learned() -> None:
    torch.manual_seed(0)
    trainer = FRNTrainer(Maps(), ReconstructionLoss(NODES))
    before = trainer(m.floats(m.episode())).item()
    fit(trainer, iter([m.floats(m.episode())] * 20), torch.optim.Adam(trainer.parameters(), 0.01), 20, progress=False)
    loss = trainer.loss
    assert trainer(m.floats(m.episode())).item() < before
    assert all(value != 0 for value in (loss.log_penalty, loss.log_stretch, loss.log_scale))
    bank = EmbeddingBank(maps(30).float(), torch.arange(30) % 3)
    head = {"log_penalty": loss.log_penalty.item(), "log_stretch": loss.log_stretch.item()}
    spec = EpisodeSpec(3, 2, 3)
    with torch.no_grad():
        support, query = maps(1, 3, 2).float(), maps(1, 4, seed=1).float()
        expected = feature_map_reconstruction(support, query, nodes=NODES, scale=loss.scale.item(), **head)
        assert torch.allclose(trainer.classify(support, query), expected, atol=1e-5)
    result = EpisodicEvaluator(spec, 20).evaluate(trainer, bank)
    assert result.classifier == "feature map reconstruction"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a ReconstructionLoss, got a PrototypicalLoss"):
        FRNTrainer(Maps(), PrototypicalLoss())
    with pytest.raises(UsageError, match="at least 2 nodes"):
        ReconstructionLoss(1)
    with pytest.raises(UsageError, match="multiple of 5 dimensions, got 24"):
        feature_map_reconstruction(maps(1, 2, 1), maps(1, 3), nodes=5)


def test_nan_in_a_support_is_nan_in_the_logits() -> None:
    support = maps(1, 2, 1)
    support[0, 1, 0, 3] = torch.nan
    logits = feature_map_reconstruction(support, maps(1, 3, seed=1), nodes=NODES, log_penalty=0.0)
    assert logits[..., 0].isfinite().all()
    assert logits[..., 1].isnan().all()


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
def test_the_heads_own_penalty_does_not_depend_on_the_length_of_embeddings(length: float) -> None:
    support, query = maps(1, 3, 2), maps(1, 4, seed=1)
    channels = support.square().mean().item()
    expected = feature_map_reconstruction(support, query, nodes=NODES, log_penalty=math.log(100 * channels))
    logits = feature_map_reconstruction(length * support, length * query, nodes=NODES) / length**2
    assert torch.allclose(logits, expected, rtol=1e-6)
    zeros = feature_map_reconstruction(0 * support, query, nodes=NODES)
    assert zeros.isfinite().all()
