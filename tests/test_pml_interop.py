"""Our losses, embedder, distance and data set inside PML's own trainer, hooks, tester and inference."""

import copy
import math
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel, MatchFinder
from torch import Tensor, nn

from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.retrieval_metrics import METRICS
from pml_fewshot.experiment.recorder import ClosedDatabase
from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.batches import Batch
from pml_fewshot.trainers.metric import MetricTrainer

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # PML's progress bar does

CPU = torch.device("cpu")
CLASSES, PER_CLASS, BATCH, DIMS = 6, 4, 24, 8
MATCHING = partial(MatchingLoss, scale=5, learn_scale=True)
LOSSES = [PrototypicalLoss, MATCHING, DenseNTXentLoss, DenseTripletMarginLoss, PairVerificationLoss]


def noisy_set(classes: int, per_class: int, seed: int) -> FewShotDataset:
    """Each class is a pattern with as much noise upon it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    pattern = torch.randint(128, (classes, 1, 8, 8), generator=generator)[labels]
    images = pattern + torch.randint(128, pattern.shape, generator=generator)
    return FewShotDataset(images.byte(), labels, [f"class {c}" for c in range(classes)])


TRAIN, TEST = noisy_set(CLASSES, 12, seed=1), noisy_set(10, 20, seed=2)


def seed_all() -> None:
    """PML's samplers draw from numpy's generator, and torch's data loaders and PML's triplets from torch's."""
    c_f.NUMPY_RANDOM = np.random.RandomState(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both global generators are as before afterwards."""
    monkeypatch.setattr(c_f, "NUMPY_RANDOM", None)
    with torch.random.fork_rng(devices=[]):
        seed_all()
        yield


def small_embedder() -> Embedder:
    """8 x 8 to 8 dimensions; train and eval mode differ."""
    torch.manual_seed(1)
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(64, DIMS), nn.BatchNorm1d(DIMS)))


def random_similarity(hidden: int | None = None) -> WeightedL1Similarity:
    """A similarity with weights of both signs, as training makes them."""
    similarity, generator = WeightedL1Similarity(DIMS, hidden), torch.Generator().manual_seed(6)
    for parameter in similarity.parameters():
        nn.init.normal_(parameter, generator=generator)
    return similarity


def adam(*parts: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for part in parts for p in part.parameters()], lr=0.01)


def sampler() -> MPerClassSampler:
    return MPerClassSampler(TRAIN.labels, PER_CLASS, BATCH, length_before_new_iter=BATCH * 6)


def pml_trainer(embedder: Embedder, loss: nn.Module, **options: Any) -> MetricLossOnly:
    return MetricLossOnly(
        models={"trunk": embedder},
        optimizers={"trunk_optimizer": adam(embedder, loss)},
        batch_size=BATCH,
        loss_funcs={"metric_loss": loss},
        dataset=TRAIN,
        sampler=sampler(),
        iterations_per_epoch=3,
        dataloader_num_workers=0,
        data_device=CPU,
        **options,
    )


def train(trainer: MetricLossOnly, epochs: int = 2) -> list[float]:
    """Trains from a fixed seed; the loss of each iteration."""
    losses: list[float] = []
    own_hook = trainer.end_of_iteration_hook

    def hook(trainer: MetricLossOnly) -> None:
        losses.append(float(trainer.losses["metric_loss"]))
        own_hook(trainer)

    trainer.end_of_iteration_hook = hook
    seed_all()
    trainer.train(num_epochs=epochs)
    return losses


def weights(*parts: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for part in parts for p in part.parameters()]


@pytest.mark.parametrize("make", LOSSES)
def test_the_trainer_of_pml_takes_the_steps_of_a_plain_loop(make: Callable[[], nn.Module]) -> None:
    """Same batches, losses and weights as our MetricTrainer under a loop: nothing of ours depends on who trains."""
    embedder, loss = small_embedder(), make()
    before, twin = weights(embedder), MetricTrainer(copy.deepcopy(embedder), copy.deepcopy(loss))
    losses, expected, optimizer = train(pml_trainer(embedder, loss)), [], adam(twin)
    seed_all()
    for index in torch.tensor(list(sampler())).split(BATCH):
        value = twin.train()(Batch(TRAIN.images[index] / 255, TRAIN.labels[index]))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(value.item())
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(weights(embedder, loss), weights(twin), rtol=1e-3, atol=1e-4)
    assert not any(torch.equal(p, old) for p, old in zip(embedder.parameters(), before, strict=True))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [MATCHING, PairVerificationLoss])
def test_what_the_hooks_of_pml_save_is_trained_further_as_if_never_interrupted(make: Any, tmp_path: Path) -> None:
    """Embedder and loss, its generator of pairs and its lazy weights too, come back from PML's .pth files."""
    hooks = logging_presets.HookContainer(record_keeper=None)
    trainer, again = (pml_trainer(small_embedder(), make()) for _ in range(2))
    train(trainer, epochs=1)
    hooks.save_models(trainer, str(tmp_path), 1)
    nn.init.zeros_(again.models["trunk"].trunk[1].weight)
    assert hooks.load_latest_saved_models(again, str(tmp_path), CPU) == 2
    for each in (trainer, again):  # PML's sampler shuffles its own list of classes: each pass begins from the last one
        each.sampler = sampler()
    assert train(again, epochs=1) == pytest.approx(train(trainer, epochs=1), rel=1e-5)


def recorded(folder: Path, table: str) -> dict[str, list[Any]]:
    """Column -> values of one table of record-keeper's database."""
    with closing(sqlite3.connect(folder / "logs.db")) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
    return {name: [row[name] for row in rows] for name in rows[0]}


def pml_tester(knn: Any = None, **options: Any) -> GlobalEmbeddingSpaceTester:
    calculator = AccuracyCalculator(include=METRICS, k="max_bin_count", device=CPU, knn_func=knn)
    return GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0, data_device=CPU, accuracy_calculator=calculator, **options
    )


def figures(accuracies: dict[str, float]) -> dict[str, float]:
    """PML's figures under our names."""
    return {metric: accuracies[f"{metric}_level0"] for metric in METRICS}


def test_the_hooks_of_pml_record_evaluate_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second loss, the learned scale, the tester's figures after each epoch and the models are on disk."""
    # `get_record_keeper` imports tensorboard (seconds, where it is installed) even when it is to write none of it
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=None))
    records, models = tmp_path / "records", tmp_path / "models"
    keeper, _, tensorboard = logging_presets.get_record_keeper(str(records))
    # as our Recorder has it: record-keeper's own leaves connections open, of which Python 3.13 warns at any later time
    keeper.record_writer.local_db = ClosedDatabase(keeper.record_writer.local_db.db_path)
    hooks = logging_presets.get_hook_container(keeper, log_freq=2, primary_metric="r_precision")
    assert tensorboard is None
    tester = pml_tester(end_of_testing_hook=hooks.end_of_testing_hook)
    evaluate = hooks.end_of_epoch_hook(tester, {"val": TEST}, str(models))
    embedder, loss = small_embedder(), MATCHING()
    ours, scales = [], []  # our tester's figures after each epoch, the scale at each step

    def end_of_epoch(trainer: MetricLossOnly) -> bool:
        ours.append(dict(RetrievalTester(distance=LpDistance()).test(embedder, TEST)))
        return evaluate(trainer)

    def end_of_iteration(trainer: MetricLossOnly) -> None:
        scales.append(loss.scale.item())
        hooks.end_of_iteration_hook(trainer)

    own = {"end_of_iteration_hook": end_of_iteration, "end_of_epoch_hook": end_of_epoch}
    losses = train(pml_trainer(embedder, loss, **own))
    history = recorded(records, "loss_histories")
    logged = [0, 2, 3, 5]  # of 3 iterations an epoch those numbered 0 and 2
    assert history["~iteration~"] == logged
    assert history["metric_loss"] == [losses[iteration] for iteration in logged]
    logarithms = recorded(records, "metric_loss_MatchingLoss__parameters")["log_scale"]
    assert [math.exp(x) for x in logarithms] == pytest.approx([scales[i] for i in logged], rel=1e-5)
    evaluated = recorded(records, "accuracies_normalized_GlobalEmbeddingSpaceTester_level_0_VAL_vs_self")
    assert evaluated["epoch"] == [1, 2]
    for metric in METRICS:
        assert evaluated[f"{metric}_level0"] == pytest.approx([epoch[metric] for epoch in ours], abs=1e-3)
    fresh = pml_trainer(small_embedder(), MATCHING())
    assert hooks.load_latest_saved_models(fresh, str(models), CPU) == 3
    assert all(map(torch.equal, weights(*fresh.models.values()), weights(embedder)))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_tester_of_pml_and_ours_agree(normalize: bool) -> None:
    """On classes of 1 to 10 images: the class of one is evaluated by neither tester. And on a gallery of its own."""
    kept = [i for i, label in enumerate(TEST.labels.tolist()) if i % 20 <= label]
    uneven = FewShotDataset(TEST.images[kept], TEST.labels[kept], TEST.class_names)
    embedder = small_embedder()
    tester = RetrievalTester(distance=LpDistance(normalize_embeddings=normalize))
    ours = tester.test(embedder, uneven)
    assert ours.num_excluded == 1
    sets = {"query": uneven, "gallery": TEST}
    for found, gallery in ((ours, "query"), (tester.test(embedder, uneven, TEST), "gallery")):
        tester_of_pml = pml_tester(normalize_embeddings=normalize)
        theirs = tester_of_pml.test(sets, 1, embedder, splits_to_eval=[("query", [gallery])])["query"]
        assert dict(found) == pytest.approx(figures(theirs), abs=1e-3)  # a tie that rounding broke is 0.0002 or less


@pytest.mark.parametrize("hidden", [None, 3], ids=["sum", "MLP"])
def test_the_tester_of_pml_ranks_by_our_similarity(hidden: int | None) -> None:
    embedder, similarity = small_embedder(), random_similarity(hidden)
    tester = pml_tester(normalize_embeddings=False, knn=CustomKNN(similarity))
    with torch.no_grad():
        theirs = figures(tester.test({"test": TEST}, 1, embedder)["test"])
    assert dict(RetrievalTester(distance=similarity).test(embedder, TEST)) == pytest.approx(theirs, abs=3e-3)
    assert dict(RetrievalTester().test(embedder, TEST)) != pytest.approx(theirs, abs=3e-3)


def rows(embedder: Embedder, dataset: FewShotDataset) -> Tensor:
    return embedder.encode(dataset).embeddings.double()


def stacked(dataset: FewShotDataset) -> Tensor:
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


@pytest.mark.parametrize("source", [stacked, lambda dataset: dataset], ids=["tensor", "data set"])
def test_nearest_neighbors_of_the_inference_model_are_the_nearest(source: Callable[[FewShotDataset], Any]) -> None:
    embedder = small_embedder()
    model = InferenceModel(embedder, normalize_embeddings=False, data_device=CPU)
    model.train_knn(source(TEST))
    distances, nearest = model.get_nearest_neighbors(stacked(TRAIN)[:30], k=4)
    far = (rows(embedder, TRAIN)[:30].unsqueeze(1) - rows(embedder, TEST)).square().sum(dim=2).sort(dim=1)
    assert torch.equal(nearest, far.indices[:, :4])
    torch.testing.assert_close(distances.double(), far.values[:, :4], rtol=1e-3, atol=1e-5)


def test_matches_by_our_similarity_are_those_of_its_formula() -> None:
    embedder, similarity = small_embedder(), random_similarity()
    query, gallery = rows(embedder, TRAIN)[:20], rows(embedder, TEST)[:50]
    scores = ((query.unsqueeze(1) - gallery).abs() * similarity.score.weight).sum(dim=2) + similarity.score.bias
    finder = MatchFinder(similarity, scores.median().item() + 1e-3)  # rounding moves no score across it
    model = InferenceModel(embedder, match_finder=finder, normalize_embeddings=False, data_device=CPU)
    images, others = stacked(TRAIN)[:20], stacked(TEST)[:50]
    expected = scores >= finder.threshold
    assert model.get_matches(images, others).tolist() == expected.tolist()
    assert model.is_match(images, others[:20]).tolist() == expected.diagonal().tolist()
