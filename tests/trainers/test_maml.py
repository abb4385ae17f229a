"""MAMLTrainer: what it classifies by, its protocols, its variants, and what it says to bad input."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import CrossBatchMemory, DynamicSoftMarginLoss, SupConLoss
from torch import Tensor, nn

from experiments.benchmarks.maml_step import peak_memory
from pml_fewshot.batches import BatchSpec
from pml_fewshot.data.batch_stream import BatchStream
from pml_fewshot.data.episode_stream import EpisodeStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.episodes import Episode, EpisodeSpec
from pml_fewshot.evaluation.adaptation_curve import adaptation_curve
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.heads import nearest_prototype
from pml_fewshot.trainers.divergence import TrainingDiverged
from pml_fewshot.trainers.fit import fit
from pml_fewshot.trainers.maml import MAMLTrainer
from pml_fewshot.trainers.weight_penalty import weight_penalty

TASKS, WAYS, SHOTS, QUERIES, SIZE = 3, 2, 2, 3, 16
SPEC = EpisodeSpec(WAYS, SHOTS, QUERIES)


def convolutions(outputs: int = WAYS) -> nn.Module:
    return nn.Sequential(Conv4(channels=4), nn.Linear(4, outputs))


def perceptron(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 4), *between, nn.Linear(4, WAYS))


def trainer(make=convolutions, seed: int = 0, **options) -> MAMLTrainer:
    torch.manual_seed(seed)
    return MAMLTrainer(make, **{"inner_lr": 0.3, **options})


def episodes(tasks: int = TASKS) -> Episode:
    images = torch.rand(tasks, WAYS, SHOTS + QUERIES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return Episode(images[:, :, :SHOTS], images[:, :, SHOTS:])


def dataset(classes: int = 4, seed: int = 0) -> FewShotDataset:
    """Each class is bright somewhere else, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (classes * 8, 1, SIZE, SIZE), generator=generator)
    labels = torch.arange(classes).repeat_interleave(8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 * (label % 4) : 4 * (label % 4) + 4, 4 * (label // 4) :] += 120
    return FewShotDataset(images.to(torch.uint8), labels, [str(c) for c in range(classes)])


def labels_of(items: Tensor) -> Tensor:
    return torch.arange(items.shape[0]).repeat_interleave(items.shape[1])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_classify_is_plain_training_of_a_copy_on_the_support_set(steps):
    maml, batch = trainer(task_chunk=2), episodes()
    queries = batch.query.flatten(1, 2)
    logits = maml.classify(batch.support, queries, inner_steps=steps)
    assert logits.shape == (TASKS, WAYS * QUERIES, WAYS)
    for task, (support, query) in enumerate(zip(batch.support, queries, strict=True)):
        network = copy.deepcopy(maml.network).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(support.flatten(0, 1)), labels_of(support)).backward()
            optimizer.step()
        torch.testing.assert_close(logits[task], network(query).detach(), rtol=1e-3, atol=1e-4)


def test_evaluation_leaves_the_network_untouched():
    maml = trainer(eval_inner_steps=3).train()
    before = copy.deepcopy(maml.state_dict())
    result = EpisodicEvaluator(SPEC, 20).evaluate(maml, dataset())
    assert len(result.per_episode) == 20
    assert maml.training
    for name, value in maml.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in maml.parameters())


def test_inductive_queries_do_not_matter_to_each_other_and_transductive_ones_do():
    batch = episodes()
    queries = batch.query.flatten(1, 2)
    changed = queries.clone()
    changed[:, 1:] = 1 - changed[:, 1:]
    for batch_norm in ("inductive", "transductive"):
        maml = trainer(batch_norm=batch_norm)
        together = maml.classify(batch.support, queries)[:, 0]
        others = maml.classify(batch.support, changed)[:, 0]
        assert torch.allclose(together, others, atol=1e-5) == (batch_norm == "inductive")
        assert maml.transductive == (batch_norm == "transductive")


def test_inductive_normalises_by_the_support_set():
    def normalising() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten(), nn.Linear(SIZE * SIZE, WAYS))

    maml, batch = trainer(normalising, batch_norm="inductive"), episodes(1)
    logits = maml.classify(batch.support, batch.query.flatten(1, 2), inner_steps=0)
    support, query = batch.support[0].flatten(0, 1), batch.query[0].flatten(0, 1)
    normalised = (query - support.mean()) / (support.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(logits[0], maml.network[2](normalised.flatten(1)))


def test_without_batch_norm_both_protocols_are_inductive():
    assert not trainer(perceptron).transductive
    assert not trainer(perceptron).with_batch_norm("inductive").transductive


def test_with_batch_norm_shares_the_weights():
    maml = trainer()
    other = maml.with_batch_norm("inductive")
    assert (maml.batch_norm, other.batch_norm) == ("transductive", "inductive")
    assert all(a is b for a, b in zip(maml.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="did you mean 'inductive'"):
        maml.with_batch_norm("inductiv")


@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 2, "learn_inner_lr": "per_layer_per_step", "step_weights": [0.3, 0.7]},
        {"first_order": True},
        {"reptile": True, "inner_steps": 3},
        {"adapt": ["1."]},
        {"head": nearest_prototype, "loss": SupConLoss, "network": partial(convolutions, 7), "inner_lr": 0.01},
    ],
    ids=str,
)
def test_training_learns(options):
    torch.manual_seed(0)
    maml = MAMLTrainer(**{"network": convolutions, "inner_lr": 0.3, **options})
    data = dataset()
    before = EpisodicEvaluator(SPEC, 100).evaluate(maml, data).mean
    stream = EpisodeStream(data, SPEC, 0, tasks=4)
    fit(maml, stream, torch.optim.Adam(maml.parameters(), 1e-2), 40, progress=False)
    assert EpisodicEvaluator(SPEC, 100).evaluate(maml, data).mean > max(before, 0.9)
    assert maml.batch_accuracy > 0.8


def test_learned_rates_of_layers_and_steps_are_used_at_test_time():
    maml, batch = trainer(inner_steps=2, learn_inner_lr="per_layer_per_step"), episodes()
    queries = batch.query.flatten(1, 2)
    assert maml.inner.learned_lr.shape == (2, 1 + 2 * 4)  # steps x (linear, and convolution and norm of four blocks)
    usual = [maml.classify(batch.support, queries, steps) for steps in range(4)]
    with torch.no_grad():
        maml.inner.learned_lr[1] = 0
    changed = [maml.classify(batch.support, queries, steps) for steps in range(4)]
    torch.testing.assert_close(changed[1], usual[1])
    torch.testing.assert_close(changed[3], usual[1])  # steps beyond those of training use the last one's rates
    assert not torch.allclose(changed[2], usual[2])


def test_adaptation_curve_ends_at_what_the_evaluator_says():
    maml, data = trainer(eval_inner_steps=2), dataset()
    curve = adaptation_curve(maml, data, SPEC, num_episodes=30)
    assert [len(result.per_episode) for result in curve] == [30] * 3
    assert len({result.episodes_hash for result in curve}) == 1
    assert torch.equal(curve[2].per_episode, EpisodicEvaluator(SPEC, 30).evaluate(maml, data).per_episode)
    assert not torch.equal(curve[0].per_episode, curve[2].per_episode)


def test_anil_adapts_the_head_alone():
    maml = trainer(adapt=["1."])
    assert maml.inner.adapted == ["1.weight", "1.bias"]
    start = maml.inner.weights(TASKS)
    batch = episodes()
    (adapted,) = maml.inner.steps(start, batch.support, 1, second_order=True)
    assert all((adapted[name] is start[name]) == name.startswith("0.") for name in start)
    maml(batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in maml.parameters())  # the body is trained by the outer loop


def test_a_single_beginning_may_be_a_string():
    assert trainer(adapt="1.").inner.adapted == ["1.weight", "1.bias"]


def test_weight_penalties_are_of_the_network_alone():
    maml = trainer(learn_inner_lr="per_layer_per_step")
    weights = [p for p in maml.network.parameters() if p.ndim > 1]
    penalty = weight_penalty(maml, l2=1.0, l1=0.0)
    torch.testing.assert_close(penalty, sum(w.square().sum() for w in weights))


def test_frozen_parameters_are_neither_adapted_nor_trained():
    maml = trainer(learn_inner_lr="per_layer")
    maml(episodes())
    maml.network[0].requires_grad_(False)  # after it was built, and used
    assert maml.inner.adapted == ["1.weight", "1.bias"]
    maml(episodes()).backward()
    assert all(p.grad is None for p in maml.network[0].parameters())
    assert all(p.grad is not None for p in maml.network[1].parameters())


class Tied(nn.Module):
    """Two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.first = nn.Linear(SIZE * SIZE, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.third.weight = self.second.weight
        self.last = nn.Linear(4, WAYS)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.third(self.second(self.first(self.flat(images)).tanh()).tanh()))


@pytest.mark.parametrize("parallel", ["loop", "vmap", "grouped"])
def test_tied_weights_stay_tied(parallel):
    maml, batch = trainer(Tied, parallel=parallel), episodes(1)
    logits = maml.classify(batch.support, batch.query.flatten(1, 2), 2)
    network = copy.deepcopy(maml.network)
    assert network.third.weight is network.second.weight
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(network(batch.support[0].flatten(0, 1)), labels_of(batch.support[0])).backward()
        optimizer.step()
    torch.testing.assert_close(logits[0], network(batch.query[0].flatten(0, 1)).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_draws_from_torchs_generator_and_is_off_at_test_time(recompute):
    maml, batch = trainer(partial(perceptron, nn.Dropout(0.5)), checkpoint_steps=recompute, inner_steps=2), episodes()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(maml(batch).item())
    assert losses[0] == losses[1] != losses[2]
    queries = batch.query.flatten(1, 2)
    assert torch.equal(maml.classify(batch.support, queries), maml.classify(batch.support, queries))


class Forgetful(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(SIZE * SIZE, WAYS), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.used(images.flatten(1))


@pytest.mark.parametrize("options", [{}, {"checkpoint_steps": True}, {"reptile": True}, {"first_order": True}], ids=str)
def test_parameters_without_use_stay_as_they_are(options):
    maml = trainer(Forgetful, inner_steps=2, **options)
    maml(episodes()).backward()
    assert all(p.grad.abs().sum() == 0 for p in maml.network.unused.parameters())
    assert all(p.grad.abs().sum() > 0 for p in maml.network.used.parameters())


def test_the_loss_may_be_a_function_a_module_or_a_factory():
    smoothed = partial(F.cross_entropy, label_smoothing=0.1)
    module = partial(nn.CrossEntropyLoss, label_smoothing=0.1)
    losses = [trainer(loss=loss)(episodes()).item() for loss in (smoothed, module, module())]
    assert losses[0] == losses[1] == losses[2]
    assert (
        trainer()(episodes())
        == trainer(loss=F.cross_entropy)(episodes())
        == trainer(loss=nn.CrossEntropyLoss)(episodes())
    )
    assert trainer(loss=smoothed)(episodes()) != trainer()(episodes())


class Counting(nn.Module):
    """A buffer that changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(SIZE * SIZE, WAYS)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(images.flatten(1)) / self.calls


@pytest.mark.parametrize("parallel", ["loop", "vmap", "auto"])
def test_changes_of_buffers_are_thrown_away(parallel):
    maml = trainer(Counting, parallel=parallel)
    first, second = maml(episodes()), maml(episodes())
    assert first == second
    assert maml.network.calls == 0


def test_a_network_that_cannot_be_grouped_is_looped_over():
    maml = trainer(partial(perceptron, nn.LayerNorm(4)))
    maml(episodes())
    assert maml.inner.parallel == "loop"


def test_a_diverging_inner_loop_is_named():
    maml = trainer(inner_lr=1e30, inner_steps=3)
    stream = EpisodeStream(dataset(), SPEC, 0, tasks=2)
    with pytest.raises(TrainingDiverged, match=r"inner learning rate \(1e\+30\)"):
        fit(maml, stream, torch.optim.Adam(maml.parameters()), 5, progress=False)
    with pytest.raises(ValueError, match=r"expected finite logits .* lower the inner learning rate \(1e\+30\)"):
        EpisodicEvaluator(SPEC, 10).evaluate(maml, dataset())


def test_a_head_of_the_wrong_width_says_what_to_do():
    with pytest.raises(ValueError, match=r"expected a network with 2 outputs, one for each way, got .*5"):
        trainer(partial(convolutions, 5))(episodes())
    for outputs in (1, 5):
        for options in ({}, {"reptile": True}, {"parallel": "loop"}, {"batch_norm": "inductive"}):
            with pytest.raises(ValueError, match="expected a network with 2 outputs"):
                trainer(partial(convolutions, outputs), **options)(episodes())
        with pytest.raises(ValueError, match="expected a network with 2 outputs"):
            EpisodicEvaluator(SPEC, 10).evaluate(trainer(partial(convolutions, outputs)), dataset())


def test_a_network_is_checked_against_a_spec_without_a_trace():
    maml = trainer(partial(perceptron, nn.Dropout(0.5)))
    drawn = torch.get_rng_state()
    maml.check(WAYS, (1, SIZE, SIZE))
    with pytest.raises(ValueError, match="expected a network with 3 outputs"):
        maml.check(3, (1, SIZE, SIZE))
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("options", [{}, {"reptile": True}], ids=str)
def test_a_network_that_was_frozen_after_it_was_built_says_what_to_do(options):
    maml, batch = trainer(**options), episodes()
    maml.network.requires_grad_(False)
    for use in (lambda: maml(batch), lambda: maml.classify(batch.support, batch.query.flatten(1, 2))):
        with pytest.raises(ValueError, match="expected parameters to adapt, got frozen ones only; unfreeze some"):
            use()


@pytest.mark.parametrize("where", ["loss", "inner_loss"])
def test_losses_of_each_item_are_refused(where):
    maml = trainer(**{"loss": nn.CrossEntropyLoss, where: partial(nn.CrossEntropyLoss, reduction="none")})
    with pytest.raises(ValueError, match=r"expected a loss that is one number .* use reduction=\"mean\""):
        maml(episodes())


def one_shot() -> Episode:
    batch = episodes()
    return Episode(batch.support[:, :, :1], batch.query)


def test_an_inner_loss_that_learns_nothing_from_one_shot_is_refused():
    maml = trainer(partial(convolutions, 7), loss=SupConLoss, head=nearest_prototype)
    with pytest.raises(ValueError, match="learns from one image of each class, got SupConLoss"):
        maml(one_shot())
    with pytest.raises(ValueError, match="learns from one image of each class, got SupConLoss"):
        maml.classify(one_shot().support, one_shot().query.flatten(1, 2))
    maml(episodes())  # two shots have a positive pair
    trainer()(one_shot())


def test_classify_needs_gradients_and_a_number_of_steps():
    maml, batch = trainer(), episodes()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad"):
        maml.classify(batch.support, batch.query.flatten(1, 2))
    with pytest.raises(ValueError, match="expected inner_steps of at least 0, got -1"):
        maml.classify(batch.support, batch.query.flatten(1, 2), inner_steps=-1)


@pytest.mark.parametrize("options", [{}, {"learn_inner_lr": "per_layer"}], ids=str)
def test_more_steps_of_classify_take_no_more_memory(options):
    maml, batch = trainer(**options), episodes()
    queries = batch.query.flatten(1, 2)
    few, many = (
        peak_memory(lambda steps=steps: maml.classify(batch.support, queries, steps), "cpu") for steps in (2, 20)
    )
    assert many < 1.1 * few


@pytest.mark.parametrize("options", [{}, {"batch_norm": "inductive"}, {"first_order": True, "inner_steps": 2}], ids=str)
def test_accuracy_of_a_batch_is_that_of_classify(options):
    maml, batch = trainer(task_chunk=2, **options), episodes(8)
    maml(batch)
    chosen = maml.classify(batch.support, batch.query.flatten(1, 2)).argmax(dim=2)
    assert maml.batch_accuracy.item() == pytest.approx((chosen == labels_of(batch.query[0])).float().mean().item())
    assert 0 < maml.batch_accuracy < 1


def test_the_head_has_the_distance_of_the_loss():
    loss = SupConLoss(distance=LpDistance(p=1, normalize_embeddings=False))
    maml, batch = trainer(partial(convolutions, 7), loss=loss, head=nearest_prototype, inner_lr=0.01), episodes()
    queries = batch.query.flatten(1, 2)
    logits = maml.classify(batch.support, queries, inner_steps=0)
    network = maml.network.train()
    for task in range(TASKS):
        prototypes = network(batch.support[task].flatten(0, 1)).unflatten(0, (WAYS, SHOTS)).mean(dim=1)
        expected = -torch.cdist(network(queries[task]), prototypes, p=1)
        torch.testing.assert_close(logits[task], expected.detach(), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains_and_keeps_the_fastest_way():
    maml = trainer()
    with torch.autocast("cpu", torch.bfloat16):
        loss = maml(episodes())
    loss.backward()
    assert maml.inner.parallel == "grouped"
    exact = trainer()(episodes())
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


class Rearranged(nn.Module):
    """Does what needs the layout of memory that it asks for."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.convolution, self.layout = nn.Conv2d(1, 2, 3), layout
        self.linear = nn.Linear(2 * (SIZE - 2) ** 2, WAYS)

    def forward(self, images: Tensor) -> Tensor:
        features = self.convolution(images)
        if self.layout == torch.channels_last:
            features = features.contiguous(memory_format=self.layout).permute(0, 2, 3, 1)
        else:
            features = features.permute(0, 2, 3, 1).contiguous(memory_format=self.layout)
        return self.linear(features.view(len(images), -1))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_network_gets_the_layout_of_memory_that_it_asks_for(layout):
    maml, batch = trainer(partial(Rearranged, layout)), episodes(1)
    maml(batch).backward()
    logits = maml.classify(batch.support, batch.query.flatten(1, 2), inner_steps=0)
    torch.testing.assert_close(logits[0], maml.network(batch.query[0].flatten(0, 1)).detach())


class MovingAverage(nn.Module):
    """A buffer that changes with the images."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(SIZE * SIZE))
        self.linear = nn.Linear(SIZE * SIZE, WAYS)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        self.average.mul_(0.9).add_(0.1 * flat.detach().mean(dim=0))
        return self.linear(flat - self.average)


def test_what_vmap_cannot_run_says_so_and_is_looped_over_by_itself():
    with pytest.raises(RuntimeError, match=r"expected a network that torch.func.vmap can run, .* parallel='loop'"):
        trainer(MovingAverage, parallel="vmap")(episodes())
    maml = trainer(MovingAverage)
    assert maml(episodes()) == trainer(MovingAverage, parallel="loop")(episodes())
    assert maml.network.average.abs().sum() == 0


def test_ordinary_batches_are_refused():
    batch = next(BatchStream(dataset(), BatchSpec(2, 2), 0))
    with pytest.raises(ValueError, match="expected an Episode, got a Batch; use train_spec=EpisodeSpec"):
        trainer()(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": 0}, "expected a finite inner_lr above 0, got 0"),
        ({"inner_lr": float("inf")}, "expected a finite inner_lr above 0, got inf"),
        ({"adapt": []}, "expected parameters to adapt, got none named in adapt"),
        ({"reptile": True, "adapt": ["1."]}, "expected reptile alone"),
        ({"inner_steps": 0}, "expected inner_steps to be an integer of at least 1, got 0"),
        ({"eval_inner_steps": 0}, "eval_inner_steps"),
        ({"task_chunk": -1}, "task_chunk"),
        ({"batch_norm": "running"}, "expected batch_norm as one of"),
        ({"parallel": "vmapped"}, "did you mean 'vmap'"),
        ({"learn_inner_lr": "per_step"}, "did you mean 'per_layer"),
        ({"step_weights": [1, 1]}, "expected 1 step_weights"),
        ({"step_weights": [0]}, "expected 1 step_weights"),
        ({"step_weights": [-1, 2], "inner_steps": 2}, "expected 2 step_weights"),
        (
            {"adapt": ["1.", "head"]},
            "expected parameters to adapt, got none whose name begins with 'head'",
        ),
        ({"loss": partial(CrossBatchMemory, loss=SupConLoss(), embedding_size=2)}, "remembers nothing .* CrossBatch"),
        ({"inner_loss": DynamicSoftMarginLoss}, "remembers nothing of other tasks, got DynamicSoftMarginLoss"),
        ({"reptile": True, "first_order": True}, "expected reptile alone"),
        ({"network": nn.Flatten}, "expected parameters to adapt"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MAMLTrainer(**{"network": convolutions, "inner_lr": 0.1, **options})
