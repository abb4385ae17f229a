"""MAMLTrainer: what it classifies by, its protocols, its variants, the trainer's contract, and what it refuses."""

import copy
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pml_fewshot import (
    Batch,
    BatchSpec,
    EpisodeSpec,
    EpisodeStream,
    EpisodicEvaluator,
    FewShotDataset,
    MAMLTrainer,
    Splits,
    fit,
    nearest_prototype,
)
from pml_fewshot.checks import UsageError
from pml_fewshot.training.interruption import TrainingDiverged
from tests.trainers.maml import small_maml as small
from tests.trainers.maml.small_maml import convolutions, episodes, perceptron, trainer

SPEC = EpisodeSpec(small.WAYS, small.SHOTS, small.QUERIES)
EMBEDDING = {"make": partial(convolutions, 7), "head": nearest_prototype, "loss": SupConLoss()}


def dataset(prefix: str = "") -> FewShotDataset:
    """Each of four classes is bright somewhere else, plus noise."""
    images = torch.randint(0, 90, (4, 8, 1, small.SIZE, small.SIZE), generator=torch.Generator().manual_seed(0))
    for label in range(4):
        images[label, :, :, 4 * label : 4 * label + 4] += 120
    names = [f"{prefix}{label}" for label in range(4)]
    return FewShotDataset(images.flatten(0, 1).byte(), torch.arange(4).repeat_interleave(8), names)


def classified(maml: MAMLTrainer, inner_steps: int | None = None, tasks: int = small.TASKS) -> Tensor:
    batch = episodes(tasks)
    return maml.classify(batch.support, batch.query.flatten(1, 2), inner_steps)


def tied() -> nn.Module:
    network = perceptron(nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    network[5].weight = network[3].weight
    return network


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (0, {}),
        (1, {"task_chunk": 2}),
        (3, {"eval_inner_steps": 3}),
        *((2, {"make": tied, "parallel": parallel}) for parallel in ("loop", "vmap", "threads")),
    ],
)
def test_classify_is_plain_training_of_a_copy_on_the_support_set(steps: int, options: dict[str, Any]) -> None:
    maml, batch = trainer(**options), episodes()
    before = copy.deepcopy(maml.state_dict())
    logits = classified(maml, None if steps == maml.eval_inner_steps else steps)
    for own, support, query in zip(logits, batch.support, batch.query, strict=True):
        expected = small.trained_copy(maml.network, support, steps)(query.flatten(0, 1))
        torch.testing.assert_close(own, expected.detach())
    assert maml.training
    assert all(torch.equal(value, before[name]) for name, value in maml.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in maml.parameters())


def test_the_bank_is_the_images_themselves() -> None:
    """As uint8, a quarter of the floats that 0.5 made of a whole set at each validation."""
    maml, data, evaluator = trainer().float(), dataset(), EpisodicEvaluator(SPEC, 20)
    assert maml.bank(data).dtype == torch.uint8
    assert maml.bank(data).data_ptr() == data.images.data_ptr()
    floats = evaluator.evaluate(maml, data, bank=data.images.float() / 255)
    assert torch.equal(evaluator.evaluate(maml, data).per_episode, floats.per_episode)


def test_inductive_queries_do_not_matter_to_each_other_and_transductive_ones_do() -> None:
    maml, batch = trainer(), episodes()
    queries = batch.query.flatten(1, 2)
    changed = torch.cat([queries[:, :1], 1 - queries[:, 1:]], dim=1)
    for protocol in ("inductive", "transductive"):
        other = maml.with_batch_norm(protocol)
        one, two = (other.classify(batch.support, each)[:, 0] for each in (queries, changed))
        assert torch.allclose(one, two) == (protocol == "inductive")
        assert other.transductive == (protocol == "transductive")
        assert all(a is b for a, b in zip(maml.parameters(), other.parameters(), strict=True))
    assert not trainer(perceptron).transductive  # without batch norm
    with pytest.raises(UsageError, match="did you mean 'inductive'"):
        maml.with_batch_norm("inductiv")


def test_one_query_alone_has_no_batch_statistics_of_its_own() -> None:
    def normalizing() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(small.SIZE**2, 4), nn.BatchNorm1d(4), nn.Linear(4, small.WAYS))

    maml, batch = trainer(normalizing), episodes(1)
    one = batch.query.flatten(1, 2)[:, :1]
    with pytest.raises(UsageError, match=r"expected at least 2 values per channel .*with_batch_norm\(\"inductive\"\)"):
        maml.classify(batch.support, one)
    assert maml.with_batch_norm("inductive").classify(batch.support, one).shape[:2] == (1, 1)


def test_inductive_normalizes_by_the_support_set() -> None:
    def normalizing() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten(), nn.Linear(small.SIZE**2, small.WAYS))

    maml, batch = trainer(normalizing, batch_norm="inductive"), episodes(1)
    query = (batch.query - batch.support.mean()) / (batch.support.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(classified(maml, 0, tasks=1), maml.network[2](query.flatten(3)).flatten(1, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 2, "learn_inner_lr": "per_layer_per_step", "step_weights": [0.3, 0.7]},
        pytest.param({"reptile": True, "inner_steps": 3}, marks=pytest.mark.long),
        pytest.param({**EMBEDDING, "inner_lr": 0.01}, marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_training_learns(options: dict[str, Any]) -> None:
    maml, data, evaluator = trainer(**options).float(), dataset(), EpisodicEvaluator(SPEC, 50)
    before = evaluator.evaluate(maml, data).mean
    batches = EpisodeStream(data, SPEC, 0, episodes_per_batch=4)
    fit(maml, batches, torch.optim.Adam(maml.parameters(), 1e-2), 15, progress=False)
    assert evaluator.evaluate(maml, data).mean > max(before, 0.9)


def test_learned_rates_of_layers_and_steps_are_used_at_test_time() -> None:
    maml = trainer(inner_steps=2, learn_inner_lr="per_layer_per_step")
    assert maml.inner.learned_lr.shape == (2, 1 + 2 * 4)  # steps x (linear, and convolution and norm of four blocks)
    usual = [classified(maml, steps) for steps in range(4)]
    with torch.no_grad():
        maml.inner.learned_lr[1] = 0
    changed = [classified(maml, steps) for steps in range(4)]
    torch.testing.assert_close(changed[1], usual[1])
    torch.testing.assert_close(changed[3], usual[1])  # steps beyond those of training use the last one's rates
    assert not torch.allclose(changed[2], usual[2])


@pytest.mark.parametrize("adapt", [["1."], "1."])
def test_anil_adapts_the_head_alone(adapt: Any) -> None:
    maml, batch = trainer(adapt=adapt), episodes()
    start = maml.inner.weights(small.TASKS)
    (adapted,) = maml.inner.steps(start, batch.support, 1, second_order=True)
    assert {name for name in start if adapted[name] is not start[name]} == {"1.weight", "1.bias"}
    maml(batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in maml.parameters())  # the outer loop trains all


def test_frozen_parameters_are_neither_adapted_nor_trained() -> None:
    maml = trainer(learn_inner_lr="per_layer")
    maml(episodes())
    maml.network[0].requires_grad_(False)  # after it was built, and used
    assert maml.inner.adapted == ["1.weight", "1.bias"]
    maml(episodes()).backward()
    assert all((p.grad is None) == name.startswith("0.") for name, p in maml.network.named_parameters())
    maml.network.requires_grad_(False)
    with pytest.raises(UsageError, match="expected parameters to adapt, got frozen ones only; unfreeze some"):
        maml(episodes())


@pytest.mark.parametrize("options", [{}, {"checkpoint_steps": True}, {"reptile": True}, {"first_order": True}], ids=str)
def test_parameters_without_use_stay_as_they_are(options: dict[str, Any]) -> None:
    def forgetful() -> nn.Module:
        network = perceptron()
        network.register_parameter("unused", nn.Parameter(torch.ones(3)))
        return network

    maml = trainer(forgetful, inner_steps=2, **options)
    maml(episodes()).backward()
    assert all((p.grad.abs().sum() > 0) == (name != "unused") for name, p in maml.network.named_parameters())


def test_dropout_draws_from_torchs_generator_and_is_off_at_test_time() -> None:
    maml, losses = trainer(partial(perceptron, nn.Dropout(0.5)), inner_steps=2), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(maml(episodes()).item())
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(classified(maml), classified(maml))


def test_the_loss_may_be_a_function_a_module_or_a_partial_of_either() -> None:
    given = (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        partial(nn.CrossEntropyLoss, label_smoothing=0.1),
        partial(F.cross_entropy, label_smoothing=0.1),
        lambda outputs, labels: F.cross_entropy(outputs, labels, label_smoothing=0.1),
        None,
    )
    losses = [trainer(loss=loss)(episodes()).item() for loss in given]
    assert losses[0] == losses[1] == losses[2] == losses[3] != losses[4]


@pytest.mark.parametrize("options", [{}, {"batch_norm": "inductive"}, {"first_order": True, "inner_steps": 2}], ids=str)
def test_the_accuracy_is_that_of_classify_and_costs_no_second_pass(options: dict[str, Any]) -> None:
    maml, batch, passes = trainer(task_chunk=2, **options), episodes(8), []
    assert maml.accuracy(batch) is None
    maml(batch)
    maml.network.register_forward_hook(lambda *_: passes.append(1))
    accuracy = maml.accuracy(batch).item()
    assert passes == []
    chosen = classified(maml, tasks=8).argmax(dim=2)
    assert accuracy == pytest.approx((chosen == small.labels_of(batch.query[0])).float().mean().item())
    assert 0 < accuracy < 1


def test_the_head_has_the_distance_of_the_loss() -> None:
    loss = SupConLoss(distance=LpDistance(p=1, normalize_embeddings=False))
    maml, batch = trainer(**{**EMBEDDING, "loss": loss}), episodes()
    assert maml.distance is loss.distance
    assert trainer().distance is None
    logits, network = classified(maml, 0), maml.network.train()
    for own, support, query in zip(logits, batch.support, batch.query, strict=True):
        prototypes = network(support.flatten(0, 1)).unflatten(0, support.shape[:2]).mean(dim=1)
        torch.testing.assert_close(own, -torch.cdist(network(query.flatten(0, 1)), prototypes, p=1).detach())


def test_exports_parameter_groups_and_threads() -> None:
    maml = trainer(loss=small.Tempered(), learn_inner_lr="per_layer")
    assert maml.exports() == {"network.safetensors": maml.network}
    assert not maml.thread_safe
    rest, own = maml.parameter_groups({"loss": 0.5})
    assert own == {"name": "loss", "params": [maml.loss.temperature], "lr": 0.5}
    assert {id(p) for p in rest["params"]} == {id(p) for p in (*maml.network.parameters(), maml.inner.learned_lr)}
    assert len(trainer().parameter_groups({"loss": 0.5})) == 1  # the loss is a function


def test_a_diverging_inner_loop_is_named() -> None:
    maml = trainer(inner_lr=1e30, inner_steps=3).float()
    with pytest.raises(TrainingDiverged, match=r"inner learning rate \(1e\+30\)"):
        fit(maml, EpisodeStream(dataset(), SPEC, 0), torch.optim.Adam(maml.parameters()), 5, progress=False)
    with pytest.raises(UsageError, match=r"expected finite logits .* lower the inner learning rate \(1e\+30\)"):
        EpisodicEvaluator(SPEC, 10).evaluate(maml, dataset())


def test_a_network_is_checked_against_the_specs_without_a_trace() -> None:
    maml, splits = trainer(partial(perceptron, nn.Dropout(0.5))), Splits(dataset("a"), None, dataset("b"))
    drawn, three = torch.get_rng_state(), EpisodeSpec(3, 1, 1)
    maml.check(splits, (SPEC, SPEC))
    for specs in ((three, SPEC), (SPEC, SPEC, three)):
        with pytest.raises(
            UsageError, match=r"network with at least 3 outputs, one a way, got outputs of shape \(2,\)"
        ):
            maml.check(splits, specs)
    with pytest.raises(UsageError, match="expected train_spec as an EpisodeSpec"):
        maml.check(splits, (BatchSpec(2, 2), SPEC))
    assert torch.equal(torch.get_rng_state(), drawn)
    trainer(**EMBEDDING).check(splits, (SPEC, three))


@pytest.mark.parametrize("options", [{}, {"reptile": True}, {"batch_norm": "inductive"}], ids=str)
def test_a_network_with_too_few_outputs_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected a network with at least 2 outputs"):
        trainer(partial(convolutions, 1), **options)(episodes())


@pytest.mark.parametrize("options", [{}, {"reptile": True}, {"parallel": "vmap"}, {"parallel": "loop"}], ids=str)
def test_tasks_of_fewer_ways_use_the_first_outputs(options: dict[str, Any]) -> None:
    wide, narrow = (trainer(partial(convolutions, outputs), **options) for outputs in (5, 2))
    for own, of_wide in zip(narrow.parameters(), wide.parameters(), strict=True):
        own.data = of_wide.data[: len(own)].clone()
    losses = [maml(episodes()) for maml in (wide, narrow)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for own, of_wide in zip(narrow.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(of_wide.grad[: len(own)], own.grad)
        assert not of_wide.grad[len(own) :].any()
    logits = [maml.classify(episodes().support, episodes().query.flatten(1, 2)) for maml in (wide, narrow)]
    torch.testing.assert_close(*logits)


def test_an_inner_loss_that_learns_nothing_from_one_shot_is_refused() -> None:
    maml = trainer(**EMBEDDING)
    for use in (maml, lambda batch: maml.classify(batch.support, batch.query.flatten(1, 2))):
        with pytest.raises(UsageError, match="learns from one image of each class, got SupConLoss"):
            use(episodes(shots=1))
    maml(episodes())  # two shots have a positive pair


def test_classify_is_the_same_in_any_mode_and_needs_a_number_of_steps() -> None:
    expected = classified(trainer())
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert torch.equal(classified(trainer()), expected)
    with pytest.raises(UsageError, match="expected inner_steps of at least 0, got -1"):
        classified(trainer(), -1)


def test_steps_of_classify_keep_nothing_of_those_before() -> None:
    maml, seen = trainer(learn_inner_lr="per_layer"), []
    with torch.no_grad():
        for weights in maml.inner.steps(maml.inner.weights(small.TASKS), episodes().support, 3, second_order=False):
            seen.append(weakref.ref(weights["1.weight"]))
    assert [weight() is None for weight in seen] == [True, True, False]


class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU: a number for Python, a comparison of tensors, a list of places."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"):
            self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parallel", ["loop", "vmap"])
def test_only_the_first_step_waits_for_a_gpu(parallel: str) -> None:
    maml = trainer(parallel=parallel, inner_steps=2, checkpoint_steps=True, learn_inner_lr="per_layer")
    for step in range(2):
        with Waits() as waits:
            maml(episodes(shots=1)).backward()
        assert hasattr(waits, "seen") == (step == 0)  # at first it is seen that the inner loss learns


@pytest.mark.parametrize("parallel", ["auto", "loop"])
def test_bfloat16_autocast_trains_and_has_distances_in_float32(parallel: str) -> None:
    maml = trainer(parallel=parallel).float()
    head = trainer(**{**EMBEDDING, "loss": SupConLoss(distance=LpDistance(p=1))}, parallel=parallel).float()
    batch = episodes()
    batch = type(batch)(batch.support.float(), batch.query.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = maml(batch)
        head(batch).backward()  # torch.cdist takes no bfloat16
    loss.backward()
    assert maml.inner._modes == {"cpu": "loop" if parallel == "loop" else "threads"}
    assert loss.item() == pytest.approx(trainer().float()(batch).item(), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": convolutions}, "expected network as an nn.Module, got <function convolutions"),
        ({"network": nn.Flatten()}, "expected parameters to adapt"),
        ({"adapt": []}, "expected parameters to adapt"),
        ({"adapt": ["1.", "head"]}, "expected parameters to adapt"),
        ({"inner_lr": float("inf")}, "expected a finite inner_lr above 0, got inf"),
        ({"inner_steps": 0}, "expected inner_steps"),
        ({"eval_inner_steps": 0}, "expected eval_inner_steps"),
        ({"task_chunk": -1}, "expected task_chunk"),
        ({"parallel": "vmapped"}, "did you mean 'vmap'"),
        ({"batch_norm": "inductiv"}, "did you mean 'inductive'"),
        ({"learn_inner_lr": "per_step"}, "did you mean 'per_layer_per_step'"),
        ({"step_weights": [1, 1]}, "expected 1 step_weights"),
        ({"step_weights": [0]}, "expected 1 step_weights"),
        ({"step_weights": [-1, 2], "inner_steps": 2}, "expected 2 step_weights"),
        ({"reptile": True, "adapt": ["1."]}, "expected reptile alone"),
        ({"inner_loss": CrossBatchMemory(SupConLoss(), 2)}, "remembers nothing, got CrossBatchMemory"),
        ({"loss": nn.CrossEntropyLoss}, r"got the class CrossEntropyLoss; write CrossEntropyLoss\(\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MAMLTrainer(**{"network": convolutions(), "inner_lr": 0.1, **options})


def test_losses_of_each_item_and_ordinary_batches_are_refused() -> None:
    for where in ("loss", "inner_loss"):
        with pytest.raises(UsageError, match=r"expected a loss that is one number .* use reduction=\"mean\""):
            trainer(**{where: nn.CrossEntropyLoss(reduction="none")})(episodes())
    with pytest.raises(UsageError, match="expected an Episode, got a Batch; use train_spec=EpisodeSpec"):
        trainer()(Batch(torch.rand(2, 1, small.SIZE, small.SIZE), torch.tensor([0, 1])))
