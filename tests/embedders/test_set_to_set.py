"""SetToSet against its formula, one prototype at a time, and against easyfsl's FEAT on the same weights."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.set_to_set import SetToSet

DIMS = 6


def episodes() -> tuple[Tensor, Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return draw(3, 4, 2, DIMS), draw(3, 5, DIMS)


def network(heads: int = 1) -> SetToSet:
    """All weights and biases drawn large, so that none is without effect."""
    made, generator = SetToSet(DIMS, heads).double().eval(), torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return made


def written_out(made: SetToSet, support: Tensor) -> Tensor:
    """Of one episode (W, K, D): each prototype, plus what each head read for it, in layer norm."""
    prototypes, rows = support.mean(dim=1), []
    for prototype in prototypes:
        read = []
        for head in range(made.heads):
            to_query, to_key, to_value = (
                linear.weight[head * DIMS : (head + 1) * DIMS] for linear in (made.w_qs, made.w_ks, made.w_vs)
            )
            shares = [((to_query @ prototype) @ (to_key @ other) / math.sqrt(DIMS)).exp() for other in prototypes]
            values = [to_value @ other for other in prototypes]
            read.append(sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares))
        row = prototype + made.fc.weight @ torch.cat(read) + made.fc.bias
        row = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
        rows.append(made.layer_norm.weight * row + made.layer_norm.bias)
    return torch.stack(rows).unsqueeze(1)


@pytest.mark.parametrize("heads", [1, 3])
def test_prototypes_and_gradients_equal_the_formula_and_queries_stay(heads: int) -> None:
    made, (support, query) = network(heads), episodes()
    leaves = [support.requires_grad_(), *made.parameters()]
    (got, same), expected = made(support, query), torch.stack([written_out(made, each) for each in support])
    assert same is query
    torch.testing.assert_close(got, expected)
    gradients, wanted = (torch.autograd.grad(each.sin().sum(), leaves) for each in (got, expected))
    torch.testing.assert_close(gradients, wanted)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients)


@pytest.mark.parametrize("heads", [1, 3])
def test_it_equals_easyfsls_feat_whose_weights_it_loads(heads: int) -> None:
    attention_modules = pytest.importorskip("easyfsl.modules.attention_modules")
    torch.manual_seed(0)
    theirs = attention_modules.MultiHeadAttention(heads, DIMS, DIMS, DIMS).double().eval()
    made, (support, query) = SetToSet(DIMS, heads).double().eval(), episodes()
    made.load_state_dict(theirs.state_dict())
    prototypes = support.mean(dim=2)
    torch.testing.assert_close(made(support, query)[0].squeeze(2), theirs(prototypes, prototypes, prototypes)[0])
    ours = SetToSet(500, heads)
    theirs = attention_modules.MultiHeadAttention(heads, 500, 500, 500)
    for name, weight in theirs.state_dict().items():  # initial weights are as large
        torch.testing.assert_close(ours.state_dict()[name].std(), weight.std(), rtol=0.03, atol=0)


def test_permuting_classes_permutes_prototypes_and_the_order_of_shots_does_not_matter() -> None:
    made, (support, query) = network(), episodes()
    prototypes, _ = made(support, query)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(made(support[:, order], query)[0], prototypes[:, order])
    torch.testing.assert_close(made(support.flip(2), query)[0], prototypes)
    assert (made(support[:, :3], query)[0] - prototypes[:, :3]).abs().max() > 1e-3  # which read the fourth


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_each_dropout_acts_in_train_mode_alone_and_draws_from_torchs_generator(kind: str) -> None:
    shares = {"dropout": 0.0, "attention_dropout": 0.0}
    made, (support, query) = SetToSet(DIMS, **{**shares, kind: 0.5}).double(), episodes()
    torch.manual_seed(0)
    first, second = (made(support, query)[0] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(made(support, query)[0], first)
    assert not torch.equal(first, second)
    if kind == "dropout":  # of what is added, not of the prototype
        made.dropout.p = 1.0
        torch.testing.assert_close(made(support, query)[0], made.layer_norm(support.mean(dim=2, keepdim=True)))
    made.eval()
    plain = SetToSet(DIMS, **shares).double()
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(support, query)[0], plain(support, query)[0])
    assert (SetToSet(DIMS).dropout.p, SetToSet(DIMS).attention_dropout) == (0.5, 0.1)  # the authors'


def test_wrong_sizes_and_shapes_are_refused() -> None:
    for name, wrong in (("dim", 0), ("heads", 0), ("dropout", 1.0), ("dropout", -0.1), ("attention_dropout", 1.0)):
        with pytest.raises(UsageError, match=f"expected {name} "):
            SetToSet(**{"dim": DIMS, name: wrong})
    support, query = episodes()
    for wrong in (support[..., :5], support[0]):
        with pytest.raises(UsageError, match=r"expected a support of shape \(E, W, K, 6\), got shape .*; set dim"):
            network()(wrong, query)
