"""Our losses, embedder, distance and data set inside PML's own trainers, testers, hooks and inference.

PML's trainers are held against plain loops, its tester against RetrievalTester, its inference against loops over
`Embedder.encode`.
"""

import copy
import csv
import importlib.util
import itertools
import logging
import math
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import NTXentLoss, TripletMarginLoss
from pytorch_metric_learning.miners import HDCMiner, TripletMarginMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester, GlobalTwoStreamEmbeddingSpaceTester
from pytorch_metric_learning.trainers import (
    BaseTrainer,
    CascadedEmbeddings,
    DeepAdversarialMetricLearning,
    MetricLossOnly,
    TrainWithClassifier,
    TwoStreamMetricLoss,
)
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel, MatchFinder
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from pml_fewshot.batches import Batch
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.data.glyphs import load_glyphs
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import EpisodeSampler, EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.retrieval_metrics import METRICS
from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.trainers.metric import MetricTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad"),  # PML's progress bar does
    pytest.mark.filterwarnings("ignore:faiss's OpenBLAS"),  # of the machine
]

CPU = torch.device("cpu")
CLASSES, PER_CLASS, BATCH, DIMS = 6, 4, 24, 8
ITERATIONS, EPOCHS = 8, 2
LOG_FREQ = 3  # of 8 iterations an epoch those numbered 0, 3 and 6 are recorded
LOGGED = [0, 3, 6, 8, 11, 14]

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "prototypical": PrototypicalLoss,
    "prototypical with learned scale": partial(PrototypicalLoss, CosineSimilarity, scale=5, learn_scale=True),
    "matching": partial(MatchingLoss, scale=5, learn_scale=True),
    "dense NTXent": DenseNTXentLoss,
    "dense triplet": DenseTripletMarginLoss,
    "pair verification": PairVerificationLoss,
    "pair verification by MLP": partial(
        PairVerificationLoss, partial(WeightedL1Similarity, DIMS, hidden=3), balanced=False
    ),
}
EMBEDDINGS = torch.randn(BATCH, DIMS, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(CLASSES).repeat(PER_CLASS)
each_loss = pytest.mark.parametrize("make_loss", LOSSES.values(), ids=list(LOSSES))


@pytest.fixture(scope="module")
def glyphs() -> Splits:
    return load_glyphs()


@pytest.fixture(scope="module")
def train_set(glyphs: Splits) -> FewShotDataset:
    return glyphs.train.of_classes(range(0, 12 * CLASSES, 12))  # Latin letters that are not neighbours


@pytest.fixture(scope="module")
def test_set(glyphs: Splits) -> FewShotDataset:
    return glyphs.test.of_classes(range(20))


def seed_all() -> None:
    """PML's samplers draw from numpy's generator, and torch's data loaders and PML's triplets from torch's."""
    c_f.NUMPY_RANDOM = np.random.RandomState(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both global generators are as before afterwards. One thread: what is computed here is too small for two."""
    monkeypatch.setattr(c_f, "NUMPY_RANDOM", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        seed_all()
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_tensorboard_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """`get_record_keeper` imports tensorboard (seconds, where it is installed) even when it is to write none of it."""
    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)


# --- helpers ----------------------------------------------------------------------------------------------------------


def small_embedder() -> Embedder:
    """28 x 28 to 8 dimensions, in a tenth of the time that a convolution takes; train and eval mode differ."""
    torch.manual_seed(1)
    return Embedder(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, DIMS), nn.BatchNorm1d(DIMS)))


def conv_embedder(projection: int | None = None) -> Embedder:
    """28 x 28 to 8 dimensions, or to as many as the projection has."""
    torch.manual_seed(1)
    return Embedder(Conv4(channels=DIMS), None if projection is None else nn.Linear(DIMS, projection))


def has_weights_to_train(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


def adam(part: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in part.parameters() if p.requires_grad], lr=0.01)


def sampler(dataset: FewShotDataset) -> MPerClassSampler:
    return MPerClassSampler(dataset.labels, PER_CLASS, BATCH, length_before_new_iter=BATCH * ITERATIONS * EPOCHS)


def pml_trainer(
    models: dict[str, nn.Module],
    losses: dict[str, nn.Module],
    dataset: Any,
    kind: type[BaseTrainer] = MetricLossOnly,
    labels: FewShotDataset | None = None,
    **options: Any,
) -> BaseTrainer:
    """A trainer of PML with an optimizer for everything that has parameters."""
    optimizers = {
        f"{name}_optimizer": adam(part) for name, part in (models | losses).items() if has_weights_to_train(part)
    }
    return kind(
        models=models,
        optimizers=optimizers,
        batch_size=BATCH,
        loss_funcs=losses,
        dataset=dataset,
        sampler=sampler(dataset if labels is None else labels),
        iterations_per_epoch=options.pop("iterations_per_epoch", ITERATIONS),
        dataloader_num_workers=0,
        data_device=CPU,
        **options,
    )


def train(trainer: BaseTrainer, epochs: int = EPOCHS) -> list[dict[str, float]]:
    """Trains from a fixed seed; the values of all the trainer's losses at each iteration, after its own hook."""
    losses: list[dict[str, float]] = []
    own_hook = trainer.end_of_iteration_hook

    def hook(trainer: BaseTrainer) -> None:
        losses.append({name: float(value) for name, value in trainer.losses.items()})
        own_hook(trainer)

    trainer.end_of_iteration_hook = hook
    seed_all()
    trainer.train(num_epochs=epochs)
    return losses


def batches(dataset: FewShotDataset) -> Iterator[Batch]:
    """The batches that `train` will take, read from the images' tensor."""
    seed_all()
    for index in torch.tensor(list(sampler(dataset))).split(BATCH):
        yield Batch(dataset.images[index] / 255, dataset.labels[index])


def first_embeddings(embedder: Embedder, dataset: FewShotDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Trunk's output, embeddings and labels of the batch that a trainer takes first."""
    batch = next(batches(dataset))
    part = copy.deepcopy(embedder).train()
    with torch.no_grad():
        trunk = part.trunk(batch.images)
        return trunk, trunk if part.projection is None else part.projection(trunk), batch.labels


def weights(*parts: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for part in parts for p in part.parameters()]


def moved(part: nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(p, old) for p, old in zip(part.parameters(), before, strict=True)]


def assert_learned(dataset: FewShotDataset, embedder: Embedder) -> None:
    """EpisodicEvaluator judges what a trainer of PML left: the figure is that of a loop, and far above chance."""
    spec = EpisodeSpec(ways=5, shots=1, queries=3)
    bank = embedder.encode(dataset)
    result = EpisodicEvaluator(spec, num_episodes=40, seed=5).evaluate(bank)
    index = EpisodeSampler(dataset.labels, spec, torch.Generator().manual_seed(5)).sample(40)
    rows = bank.embeddings.double().numpy()
    right = []
    for support, query in zip(index.support.tolist(), index.query.tolist(), strict=True):
        for way, items in enumerate(query):
            for item in items:
                far = [((rows[item] - rows[other]) ** 2).sum() for (other,) in support]
                right.append(far.index(min(far)) == way)
    assert result.mean == pytest.approx(sum(right) / len(right))
    assert result.mean > 0.4  # chance is 0.2


def recorded(folder: Path, table: str) -> dict[str, list[Any]]:
    """Column -> values of one table of record-keeper's database."""
    with closing(sqlite3.connect(folder / "logs.db")) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
    assert rows, f"nothing in {table}"
    return {name: [row[name] for row in rows] for name in rows[0]}


def tables(folder: Path) -> set[str]:
    with closing(sqlite3.connect(folder / "logs.db")) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return names - {"sqlite_sequence"}


def pml_tester(**options: Any) -> GlobalEmbeddingSpaceTester:
    knn = options.pop("knn_func", None)
    calculator = AccuracyCalculator(include=METRICS, k="max_bin_count", device=CPU, knn_func=knn)
    return GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0, data_device=CPU, accuracy_calculator=calculator, **options
    )


def figures(accuracies: dict[str, float]) -> dict[str, float]:
    """PML's figures under our names."""
    return {metric: accuracies[f"{metric}_level0"] for metric in METRICS}


# --- our losses in MetricLossOnly -------------------------------------------------------------------------------------


def euclid(q: np.ndarray, r: np.ndarray) -> float:
    return math.sqrt(float(((q - r) ** 2).sum()))


def cosine(q: np.ndarray, r: np.ndarray) -> float:
    return float(q @ r) / math.sqrt(float(q @ q) * float(r @ r))


def unit(row: np.ndarray) -> np.ndarray:
    return row / math.sqrt(float(row @ row))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def score_by_hand(similarity: WeightedL1Similarity, q: np.ndarray, r: np.ndarray) -> float:
    """The logit of one pair from the weights: a sum over |q - r|, or an MLP of it."""
    values, parameters = np.abs(q - r), [p.detach().double().numpy() for p in similarity.parameters()]
    for layer in range(0, len(parameters), 2):
        weight, bias = np.atleast_2d(parameters[layer]), parameters[layer + 1]
        values = np.maximum(values, 0)  # ReLU of what the layer before gave; |q - r| has no negative numbers
        values = np.array([sum(w * v for w, v in zip(row, values, strict=True)) for row in weight]) + bias
    return float(values[0])


def shares_by_hand(labels: list[int], score: Callable[[int, int], float]) -> list[float]:
    """For each item minus the logarithm of the share of its class by the exponentials of score(item, class)."""
    losses = []
    for i, own in enumerate(labels):
        shares = {c: math.exp(score(i, c)) for c in set(labels)}
        losses.append(-math.log(shares[own] / sum(shares.values())))
    return losses


def prototypical_by_hand(
    rows: np.ndarray, labels: list[int], similarity: Callable[[np.ndarray, np.ndarray], float]
) -> list[float]:
    """Loss of each item, its own class's prototype being the mean of the others."""

    def score(i: int, c: int) -> float:
        return similarity(rows[i], np.mean([rows[j] for j in range(len(rows)) if labels[j] == c and j != i], axis=0))

    return shares_by_hand(labels, score)


def loss_by_hand(name: str, loss: nn.Module, rows: np.ndarray, labels: list[int]) -> float:
    """Each loss on an ordinary batch, item by item from its paper."""
    items = range(len(labels))
    if name == "prototypical":
        return np.mean(prototypical_by_hand(rows, labels, lambda q, r: -(euclid(q, r) ** 2)))
    if name == "prototypical with learned scale":
        return np.mean(prototypical_by_hand(rows, labels, lambda q, r: 5 * cosine(q, r)))
    if name == "matching":
        attention = [[math.exp(5 * cosine(q, r)) for r in rows] for q in rows]
        return np.mean(
            shares_by_hand(
                labels, lambda i, c: math.log(sum(attention[i][j] for j in items if labels[j] == c and j != i))
            )
        )
    matching = [(i, j) for i in items for j in items if labels[i] == labels[j] and i != j]
    different = [(i, j) for i in items for j in items if labels[i] != labels[j]]
    if name == "dense NTXent":
        scores = [[math.exp(cosine(q, r) / 0.07) for r in rows] for q in rows]
        negatives = [sum(scores[i][j] for j in items if labels[i] != labels[j]) for i in items]
        losses = [-math.log(scores[i][j] / (scores[i][j] + negatives[i])) for i, j in matching]
    elif name == "dense triplet":
        far = [[euclid(unit(q), unit(r)) for r in rows] for q in rows]
        all_losses = [far[a][p] - far[a][n] + 0.05 for a, p in matching for n in items if labels[n] != labels[a]]
        losses = [x for x in all_losses if x > 0]
    else:
        losses = [softplus(-score_by_hand(loss.distance, rows[i], rows[j])) for i, j in matching]
        losses += [softplus(score_by_hand(loss.distance, rows[i], rows[j])) for i, j in different]
    return np.mean(losses)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"pair verification"}))  # which draws pairs at random
def test_the_first_loss_in_the_trainer_of_pml_is_that_of_the_paper(name: str, train_set: FewShotDataset) -> None:
    embedder, loss = small_embedder(), LOSSES[name]()
    _, embeddings, labels = first_embeddings(embedder, train_set)
    expected = loss_by_hand(name, loss, embeddings.double().numpy(), labels.tolist())
    losses = train(pml_trainer({"trunk": embedder}, {"metric_loss": loss}, train_set, iterations_per_epoch=1), epochs=1)
    assert losses[0]["metric_loss"] == pytest.approx(expected, rel=1e-4)


@each_loss
def test_the_trainer_of_pml_takes_the_steps_of_a_plain_loop_with_ours(
    make_loss: Callable[[], nn.Module], train_set: FewShotDataset
) -> None:
    """Same batches, losses and weights as our MetricTrainer under a loop: nothing of ours depends on who trains."""
    embedder, loss = small_embedder(), make_loss()
    twin = MetricTrainer(copy.deepcopy(embedder), copy.deepcopy(loss))
    losses = train(pml_trainer({"trunk": embedder}, {"metric_loss": loss}, train_set, iterations_per_epoch=2))
    optimizers = [adam(twin.embedder), *([adam(twin.loss)] if has_weights_to_train(twin.loss) else [])]
    expected = []
    for batch in itertools.islice(batches(train_set), 4):
        value = twin.train()(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        expected.append(value.item())
    assert [each["metric_loss"] for each in losses] == pytest.approx(expected, rel=1e-4)
    for theirs, ours in zip(weights(embedder, loss), weights(twin.embedder, twin.loss), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


@each_loss
def test_the_trainer_of_pml_lowers_our_loss_and_moves_all_weights(
    make_loss: Callable[[], nn.Module], train_set: FewShotDataset
) -> None:
    embedder, loss = small_embedder(), make_loss()
    fixed = next(batches(train_set))
    all_pairs = lmu.get_all_pairs_indices(fixed.labels) if isinstance(loss, PairVerificationLoss) else None

    def on_fixed_batch() -> float:
        with torch.no_grad():
            return loss(copy.deepcopy(embedder).train()(fixed.images), fixed.labels, all_pairs).item()

    first = on_fixed_batch()  # gives the similarity its weights, too
    before, loss_before = weights(embedder), weights(loss)
    losses = train(pml_trainer({"trunk": embedder}, {"metric_loss": loss}, train_set))
    assert all(math.isfinite(each["total_loss"]) and each["total_loss"] == each["metric_loss"] for each in losses)
    assert len(losses) == ITERATIONS * EPOCHS
    assert all(moved(embedder, before))
    assert moved(loss, loss_before) == [p.requires_grad for p in loss.parameters()]
    assert on_fixed_batch() < 0.9 * first


RESUMED = ["prototypical with learned scale", "pair verification", "pair verification by MLP"]


@pytest.mark.parametrize("name", RESUMED)
def test_what_the_hooks_of_pml_save_goes_on_as_if_never_interrupted(
    name: str, train_set: FewShotDataset, tmp_path: Path
) -> None:
    """Embedder and loss, its generator of pairs and its lazy weights too, come back from PML's .pth files."""
    hooks = logging_presets.HookContainer(record_keeper=None)
    trainer, again = (
        pml_trainer({"trunk": small_embedder()}, {"metric_loss": LOSSES[name]()}, train_set, iterations_per_epoch=2)
        for _ in range(2)
    )
    train(trainer, epochs=1)
    hooks.save_models(trainer, str(tmp_path), 1)
    nn.init.zeros_(again.models["trunk"].trunk[2].weight)
    assert hooks.load_latest_saved_models(again, str(tmp_path), CPU) == 2
    trainer.sampler = sampler(train_set)  # PML's shuffles its own list of classes: each pass begins from the last one
    for theirs, ours in zip(train(again, epochs=1), train(trainer, epochs=1), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)


PLAIN = {DenseNTXentLoss: NTXentLoss, DenseTripletMarginLoss: TripletMarginLoss}  # PML's own


class Noting(nn.Module):
    """A miner that keeps what it was given and what it found."""

    def __init__(self, miner: nn.Module) -> None:
        super().__init__()
        self.miner = miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        found = self.miner(embeddings, labels)
        self.noted = (embeddings.detach().clone(), labels, found)
        return found


@each_loss
def test_miner_of_the_trainer_of_pml_serves_our_losses(
    make_loss: Callable[[], nn.Module], train_set: FewShotDataset
) -> None:
    loss, miner = make_loss(), Noting(TripletMarginMiner(margin=0, type_of_triplets="hard"))
    with torch.no_grad():
        loss(EMBEDDINGS, LABELS)  # gives a similarity its weights
    twin = PLAIN.get(type(loss), lambda: copy.deepcopy(loss))()
    options = {"mining_funcs": {"tuple_miner": miner}, "iterations_per_epoch": 1}
    losses = train(pml_trainer({"trunk": small_embedder()}, {"metric_loss": loss}, train_set, **options), epochs=1)
    embeddings, labels, found = miner.noted
    assert 0 < len(found[0]) < BATCH * (PER_CLASS - 1) * (BATCH - PER_CLASS)
    with torch.no_grad():
        assert losses[0]["metric_loss"] == pytest.approx(twin(embeddings, labels, found).item(), rel=1e-5)
        assert losses[0]["metric_loss"] != pytest.approx(twin(embeddings, labels).item(), rel=1e-5)


# --- PML's hooks and record-keeper ------------------------------------------------------------------------------------


RECORDED = ["prototypical", "matching", "dense NTXent", "dense triplet", "pair verification"]


@pytest.mark.usefixtures("no_tensorboard_import")
@pytest.mark.parametrize("name", RECORDED)
def test_the_hooks_of_pml_record_judge_and_save(
    name: str, train_set: FewShotDataset, test_set: FewShotDataset, tmp_path: Path
) -> None:
    """Every third loss of an epoch, the tester's figures after each and the models are on disk afterwards."""
    records, models = tmp_path / "records", tmp_path / "models"
    keeper, _, tensorboard = logging_presets.get_record_keeper(str(records))
    hooks = logging_presets.get_hook_container(keeper, log_freq=LOG_FREQ, primary_metric="r_precision")
    assert tensorboard is None
    assert isinstance(hooks, logging_presets.HookContainer)
    tester = pml_tester(end_of_testing_hook=hooks.end_of_testing_hook)
    judge = hooks.end_of_epoch_hook(tester, {"val": test_set}, str(models))
    embedder, loss = small_embedder(), LOSSES[name]()
    ours: list[dict[str, float]] = []  # our tester's figures after each epoch

    def end_of_epoch(trainer: BaseTrainer) -> bool:
        ours.append(dict(RetrievalTester(distance=LpDistance()).test(embedder, test_set)))
        return judge(trainer)

    trainer = pml_trainer(
        {"trunk": embedder},
        {"metric_loss": loss},
        train_set,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=end_of_epoch,
    )
    losses = train(trainer)

    history = recorded(records, "loss_histories")
    assert history["~iteration~"] == LOGGED
    for column in ("metric_loss", "total_loss"):
        assert history[column] == [losses[iteration][column] for iteration in LOGGED]
    with (records / "loss_histories.csv").open(newline="") as file:
        written = [float(row["total_loss"]) for row in csv.DictReader(file) if row["total_loss"] != "total_loss"]
    assert written == history["total_loss"]
    assert hooks.get_loss_history(["total_loss"])["total_loss"] == history["total_loss"]

    judged = recorded(records, "accuracies_normalized_GlobalEmbeddingSpaceTester_level_0_VAL_vs_self")
    assert judged["epoch"] == [1, 2]
    for metric in METRICS:
        assert judged[f"{metric}_level0"] == pytest.approx([epoch[metric] for epoch in ours], abs=1e-3)
    assert judged["best_accuracy"] == [judged["r_precision_level0"][0], max(judged["r_precision_level0"])]

    fresh = pml_trainer({"trunk": small_embedder()}, {"metric_loss": LOSSES[name]()}, train_set)
    assert hooks.load_latest_saved_models(fresh, str(models), CPU) == EPOCHS + 1
    assert all(map(torch.equal, weights(*fresh.models.values()), weights(embedder)))
    assert (models / f"trunk_best{judged['best_epoch'][-1]}.pth").is_file()
    assert_learned(test_set, fresh.models["trunk"])


@pytest.mark.usefixtures("no_tensorboard_import")
@pytest.mark.parametrize("kind", [PrototypicalLoss, MatchingLoss])
def test_learned_scale_is_among_the_records_of_pml(
    kind: type[nn.Module], train_set: FewShotDataset, tmp_path: Path
) -> None:
    keeper, *_ = logging_presets.get_record_keeper(str(tmp_path))
    hooks = logging_presets.get_hook_container(keeper, log_freq=1)
    loss = kind(CosineSimilarity(), scale=5, learn_scale=True)
    scales: list[float] = []

    def hook(trainer: BaseTrainer) -> None:
        scales.append(trainer.loss_funcs["metric_loss"].scale.item())
        hooks.end_of_iteration_hook(trainer)

    train(
        pml_trainer(
            {"trunk": small_embedder()},
            {"metric_loss": loss},
            train_set,
            end_of_iteration_hook=hook,
            end_of_epoch_hook=lambda trainer: keeper.save_records(),
            iterations_per_epoch=4,
        ),
        epochs=1,
    )
    logarithms = recorded(tmp_path, f"metric_loss_{kind.__name__}__parameters")["log_scale"]
    assert [math.exp(x) for x in logarithms] == pytest.approx(scales, rel=1e-5)
    assert len(set(scales)) == 4


def test_without_tensorboard_the_presets_of_pml_give_no_hooks(
    train_set: FewShotDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PML imports its two packages in one breath: without tensorboard there is no SQLite either. Training goes on."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as Python has it where an import fails
    with caplog.at_level(logging.WARNING, logger="PML"):
        keeper, writer, tensorboard = logging_presets.get_record_keeper(str(tmp_path / "records"))
        hooks = logging_presets.get_hook_container(keeper)
    assert (keeper, writer, tensorboard) == (None, None, None)
    assert "There won't be any logging or model saving." in caplog.text
    assert isinstance(hooks, logging_presets.EmptyContainer)
    trainer = pml_trainer(
        {"trunk": small_embedder()},
        {"metric_loss": PrototypicalLoss()},
        train_set,
        iterations_per_epoch=2,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(None, {}, str(tmp_path / "models")),
    )
    assert len(train(trainer)) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the package tensorboard is not installed")
def test_the_presets_of_pml_write_tensorboard_where_it_is_installed(train_set: FewShotDataset, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keeper, _, tensorboard = logging_presets.get_record_keeper(str(tmp_path / "records"), str(tmp_path / "events"))
    hooks = logging_presets.get_hook_container(keeper, log_freq=1)
    trainer = pml_trainer(
        {"trunk": small_embedder()},
        {"metric_loss": PrototypicalLoss()},
        train_set,
        iterations_per_epoch=3,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
    )
    losses = train(trainer, epochs=1)
    tensorboard.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    got = [(event.step, event.value) for event in events.Scalars("loss_histories/metric_loss")]
    assert got == [(step, pytest.approx(each["metric_loss"])) for step, each in enumerate(losses)]


# --- collect_stats ----------------------------------------------------------------------------------------------------


def called(make_loss: Callable[[], nn.Module]) -> tuple[nn.Module, float, Tensor]:
    """A loss that has been called once, its value and its gradient."""
    torch.manual_seed(2)  # a similarity draws its weights when it is first called
    loss, embeddings = make_loss(), EMBEDDINGS.clone().requires_grad_()
    value = loss(embeddings, LABELS)
    value.backward()
    assert embeddings.grad is not None
    return loss, value.item(), embeddings.grad


def recordable(part: nn.Module) -> dict[str, Any]:
    """What PML's logger reads of a part."""
    lists = [getattr(part, name, []) for name in c_f.list_of_recordable_attributes_list_names()]
    return {name: getattr(part, name) for name in itertools.chain(*lists)}


def statistics_by_hand(loss: nn.Module) -> dict[str, float]:
    """What the parts of a loss that was called once should have noted: sizes of its losses and norms."""
    rows, p = EMBEDDINGS.double(), 1 if isinstance(loss.distance, WeightedL1Similarity) else 2
    norm = (rows.abs() ** p).sum(1).pow(1 / p).mean().item()
    matching, other = BATCH * (PER_CLASS - 1), BATCH * (BATCH - PER_CLASS)
    expected = {"initial_avg_query_norm": norm, "final_avg_query_norm": norm}
    if loss.distance.normalize_embeddings:
        expected["final_avg_query_norm"] = 1.0
    if isinstance(loss, PrototypicalLoss | MatchingLoss):
        return expected | {"losses_size": BATCH}
    if isinstance(loss, DenseNTXentLoss):
        return expected | {"losses_size": matching}
    if isinstance(loss, PairVerificationLoss):
        return expected | {"losses_size": 2 * matching if loss.balanced else matching + other}
    labels, above = LABELS.tolist(), 0
    far = [[euclid(unit(x), unit(y)) for y in rows.numpy()] for x in rows.numpy()]
    for a, positive, n in itertools.product(range(BATCH), repeat=3):
        if a != positive and labels[a] == labels[positive] != labels[n]:
            above += far[a][positive] - far[a][n] + loss.margin > 0
    return expected | {"losses_size": matching * (BATCH - PER_CLASS), "num_past_filter": above, "num_above_low": above}


@each_loss
def test_collected_statistics_change_no_loss_and_are_right(
    make_loss: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, value, gradient = called(make_loss)
    assert not any(getattr(part, "_record_these_stats", []) for part in plain.modules())
    monkeypatch.setattr(c_f, "COLLECT_STATS", True)
    noting, same_value, same_gradient = called(make_loss)
    assert same_value == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(same_gradient, gradient)
    seen: dict[str, Any] = {}
    for part in noting.modules():
        seen |= recordable(part) if isinstance(part, ModuleWithRecords) else {}
    assert all(isinstance(x, int | float) and math.isfinite(x) for x in seen.values() if x is not None)
    expected = statistics_by_hand(noting)
    assert {name: seen[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@each_loss
@pytest.mark.parametrize("collect", [True, False])
def test_collect_stats_of_a_loss_is_its_own(
    make_loss: Callable[..., nn.Module], collect: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c_f, "COLLECT_STATS", not collect)
    assert make_loss(collect_stats=collect).collect_stats is collect
    assert make_loss().collect_stats is not collect


@pytest.mark.usefixtures("no_tensorboard_import")
@each_loss
def test_record_keeper_of_pml_reads_the_statistics_of_our_losses(
    make_loss: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As HookContainer does it: everything recordable below a loss comes to lie in the database."""
    monkeypatch.setattr(c_f, "COLLECT_STATS", True)
    loss, *_ = called(make_loss)
    keeper, *_ = logging_presets.get_record_keeper(str(tmp_path))
    keeper.update_records({"metric_loss": loss}, 7, recursive_types=[nn.Module, dict])
    keeper.save_records()
    on_disk: dict[str, Any] = {}
    for table in tables(tmp_path):
        on_disk |= {name: values[0] for name, values in recorded(tmp_path, table).items()}
    expected = statistics_by_hand(loss)
    assert {name: on_disk[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert on_disk["p"] == (1 if isinstance(loss, PairVerificationLoss) else 2)
    assert on_disk["~iteration~"] == 7


# --- PML's tester -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven_set(test_set: FewShotDataset) -> FewShotDataset:
    """Classes of 1 to 20 drawings: the class of one is judged by neither tester."""
    order = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(4))
    place = torch.zeros(len(test_set.class_names), dtype=torch.int64)
    kept = []
    for item in order.tolist():
        label = int(test_set.labels[item])
        place[label] += 1
        if place[label] <= label + 1:
            kept.append(item)
    return FewShotDataset(test_set.images[kept], test_set.labels[kept], test_set.class_names)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_tester_of_pml_and_ours_agree(
    normalize: bool, uneven: bool, test_set: FewShotDataset, uneven_set: FewShotDataset
) -> None:
    dataset, embedder = uneven_set if uneven else test_set, conv_embedder()
    theirs = pml_tester(normalize_embeddings=normalize).test({"test": dataset}, 1, embedder)["test"]
    ours = RetrievalTester(distance=LpDistance(normalize_embeddings=normalize)).test(embedder, dataset)
    assert ours.num_left_out == int(uneven)
    assert dict(ours) == pytest.approx(figures(theirs), abs=1e-3)  # a tie that rounding broke would be 0.0002 or less
    assert ours["mean_average_precision_at_r"] > 0.05  # chance is about 0.01


def test_the_tester_of_pml_and_ours_agree_on_a_normalised_projection_and_on_a_gallery(test_set: FewShotDataset) -> None:
    """Queries and gallery are different drawings; trunk and projection go to PML apart, and each as a whole."""
    first = torch.arange(len(test_set)) % 20 < 8
    query, gallery = (
        FewShotDataset(test_set.images[kept], test_set.labels[kept], test_set.class_names) for kept in (first, ~first)
    )
    embedder = conv_embedder(projection=5)
    whole = Embedder(embedder.trunk, embedder.projection, normalize=True)
    ours = dict(RetrievalTester().test(whole, query, gallery))
    sets, splits = {"query": query, "gallery": gallery}, [("query", ["gallery"])]
    as_one = pml_tester(normalize_embeddings=False).test(sets, 1, whole, splits_to_eval=splits)
    apart = pml_tester().test(sets, 1, embedder.trunk, embedder.projection, splits_to_eval=splits)
    assert figures(as_one["query"]) == pytest.approx(ours, abs=2e-3)
    assert figures(apart["query"]) == pytest.approx(ours, abs=2e-3)
    trunk_alone = pml_tester(use_trunk_output=True).test(sets, 1, embedder.trunk, embedder.projection, splits)
    assert figures(trunk_alone["query"]) != pytest.approx(ours, abs=2e-3)
    of_trunk = RetrievalTester(distance=LpDistance()).test(Embedder(embedder.trunk), query, gallery)
    assert figures(trunk_alone["query"]) == pytest.approx(dict(of_trunk), abs=2e-3)


@pytest.mark.parametrize("hidden", [None, 3], ids=["sum", "MLP"])
def test_the_tester_of_pml_ranks_by_our_similarity(hidden: int | None, test_set: FewShotDataset) -> None:
    embedder, similarity = small_embedder(), random_similarity(hidden)
    tester = pml_tester(normalize_embeddings=False, knn_func=CustomKNN(similarity))
    with torch.no_grad():
        theirs = tester.test({"test": test_set}, 1, embedder)["test"]
    ours = RetrievalTester(distance=similarity).test(embedder, test_set)
    assert dict(ours) == pytest.approx(figures(theirs), abs=3e-3)
    by_euclid = RetrievalTester().test(embedder, test_set)
    assert dict(by_euclid) != pytest.approx(figures(theirs), abs=3e-3)


# --- PML's inference --------------------------------------------------------------------------------------------------


def random_similarity(hidden: int | None = None) -> WeightedL1Similarity:
    """A similarity with weights of both signs, as training makes them."""
    similarity, generator = WeightedL1Similarity(DIMS, hidden), torch.Generator().manual_seed(6)
    for parameter in similarity.parameters():
        nn.init.normal_(parameter, generator=generator)
    return similarity


def in_a_gap(values: list[list[float]]) -> float:
    """A threshold near the middle of the values that rounding cannot move one of them across."""
    ordered = sorted(itertools.chain(*values))
    middle = ordered[len(ordered) // 3 : -len(ordered) // 3]
    _, low = max((high - low, low) for low, high in itertools.pairwise(middle))
    return low + max(high - low for low, high in itertools.pairwise(middle)) / 2


@pytest.fixture(scope="module")
def query(test_set: FewShotDataset) -> FewShotDataset:
    return FewShotDataset(test_set.images[::20], test_set.labels[::20], test_set.class_names)


@pytest.fixture(scope="module")
def gallery(test_set: FewShotDataset) -> FewShotDataset:
    rest = torch.arange(len(test_set)) % 20 > 11
    return FewShotDataset(test_set.images[rest], test_set.labels[rest], test_set.class_names)


def rows(embedder: Embedder, dataset: FewShotDataset, normalize: bool = False) -> np.ndarray:
    embeddings = embedder.encode(dataset).embeddings.double().numpy()
    return embeddings / np.sqrt((embeddings**2).sum(1, keepdims=True)) if normalize else embeddings


def stacked(dataset: FewShotDataset) -> Tensor:
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


SOURCES: dict[str, Callable[[FewShotDataset], Any]] = {
    "tensor": stacked,
    "list of tensors": lambda dataset: list(stacked(dataset)),
    "subset": lambda dataset: Subset(dataset, range(len(dataset))),
    "data set": lambda dataset: dataset,
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))
def test_nearest_neighbours_of_the_inference_model_are_those_of_a_loop(
    source: Callable[[FewShotDataset], Any], normalize: bool, query: FewShotDataset, gallery: FewShotDataset
) -> None:
    embedder = small_embedder()
    model = InferenceModel(embedder, normalize_embeddings=normalize, data_device=CPU)
    model.train_knn(source(gallery))
    distances, nearest = model.get_nearest_neighbors(stacked(query), k=4)
    references = rows(embedder, gallery, normalize)
    for i, q in enumerate(rows(embedder, query, normalize)):
        far = [float(((q - r) ** 2).sum()) for r in references]
        order = sorted(range(len(far)), key=far.__getitem__)[:4]
        assert nearest[i].tolist() == order
        assert distances[i].tolist() == pytest.approx([far[j] for j in order], rel=1e-3, abs=1e-5)


def test_gallery_of_the_inference_model_grows_and_is_kept_in_a_file(
    query: FewShotDataset, gallery: FewShotDataset, tmp_path: Path
) -> None:
    images = stacked(gallery)
    whole, parts, loaded = (InferenceModel(small_embedder(), data_device=CPU) for _ in range(3))
    whole.train_knn(images)
    parts.train_knn(images[:70])
    parts.add_to_knn(images[70:])
    whole.save_knn_func(str(tmp_path / "index"))
    loaded.load_knn_func(str(tmp_path / "index"))
    expected = whole.get_nearest_neighbors(stacked(query), k=3)
    assert (expected[1] >= 70).any()
    for model in (parts, loaded):
        distances, nearest = model.get_nearest_neighbors(stacked(query), k=3)
        assert torch.equal(nearest, expected[1])
        torch.testing.assert_close(distances, expected[0])


def test_matches_of_the_inference_model_are_those_of_a_loop(query: FewShotDataset, gallery: FewShotDataset) -> None:
    """With PML's own parts, cosine of normalised embeddings, in all three of its ways to ask."""
    embedder = small_embedder()
    cosines = [[cosine(q, r) for r in rows(embedder, gallery)] for q in rows(embedder, query)]
    threshold = in_a_gap(cosines)
    model = InferenceModel(embedder, match_finder=MatchFinder(CosineSimilarity(), threshold), data_device=CPU)
    assert_matches(model, cosines, threshold, stacked(query), stacked(gallery))
    default = InferenceModel(embedder, data_device=CPU)
    assert default.match_finder.threshold == 0.9
    assert default.get_matches(stacked(query), stacked(gallery)).tolist() == [
        [value >= 0.9 for value in row] for row in cosines
    ]


@pytest.mark.parametrize("hidden", [None, 3], ids=["sum", "MLP"])
def test_matches_by_our_similarity_are_those_of_a_loop(
    hidden: int | None, query: FewShotDataset, gallery: FewShotDataset
) -> None:
    embedder, similarity = small_embedder(), random_similarity(hidden)
    scores = [[score_by_hand(similarity, q, r) for r in rows(embedder, gallery)] for q in rows(embedder, query)]
    threshold = in_a_gap(scores)
    finder = MatchFinder(similarity, threshold)
    model = InferenceModel(embedder, match_finder=finder, normalize_embeddings=False, data_device=CPU)
    assert_matches(model, scores, threshold, stacked(query), stacked(gallery))


def assert_matches(
    model: InferenceModel, values: list[list[float]], threshold: float, query: Tensor, gallery: Tensor
) -> None:
    """A matrix of matches, a list of index pairs, and pairs that lie side by side; one pair is a bool."""
    expected = [[value >= threshold for value in row] for row in values]
    matching = [(i, j) for i, row in enumerate(expected) for j, is_match in enumerate(row) if is_match]
    assert 0 < len(matching) < len(query) * len(gallery)
    assert model.get_matches(query, gallery).tolist() == expected
    assert [(int(i), int(j)) for i, j in model.get_matches(query, gallery, return_tuples=True)] == matching
    assert model.is_match(query, gallery[: len(query)]).tolist() == [expected[i][i] for i in range(len(query))]
    one = model.is_match(query[:1], gallery[5:6])
    assert one is expected[0][5]
    assert not model.get_matches(query, gallery, threshold=max(map(max, values)) + 1).any()


def test_our_similarity_cannot_be_the_search_of_the_inference_model(gallery: FewShotDataset) -> None:
    """PML's CustomKNN keeps no references and so has no `train`; for a search by similarity there is our Gallery."""
    model = InferenceModel(small_embedder(), knn_func=CustomKNN(random_similarity()), data_device=CPU)
    with pytest.raises(AttributeError, match="'CustomKNN' object has no attribute 'train'"):
        model.train_knn(stacked(gallery))


# --- PML's other trainers ---------------------------------------------------------------------------------------------


def assert_trained(
    losses: list[dict[str, float]], parts: dict[str, nn.Module], before: dict[str, list[Tensor]]
) -> None:
    assert all(math.isfinite(value) for each in losses for value in each.values())
    still = [name for name, part in parts.items() if not all(moved(part, before[name]))]
    assert still == []


def test_train_with_classifier(train_set: FewShotDataset, test_set: FewShotDataset) -> None:
    embedder = conv_embedder(projection=6)
    models = {"trunk": embedder.trunk, "embedder": embedder.projection, "classifier": nn.Linear(6, CLASSES)}
    _, embeddings, labels = first_embeddings(embedder, train_set)
    with torch.no_grad():
        metric = PrototypicalLoss()(embeddings, labels).item()
        cross_entropy = F.cross_entropy(models["classifier"](embeddings), labels).item()
    before = {name: weights(part) for name, part in models.items()}
    trainer = pml_trainer(
        models,
        {"metric_loss": PrototypicalLoss(), "classifier_loss": nn.CrossEntropyLoss()},
        train_set,
        TrainWithClassifier,
        loss_weights={"metric_loss": 1, "classifier_loss": 0.5},
    )
    losses = train(trainer)
    expected = {
        "metric_loss": metric,
        "classifier_loss": 0.5 * cross_entropy,
        "total_loss": metric + 0.5 * cross_entropy,
    }
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1]["classifier_loss"] < losses[0]["classifier_loss"]
    assert_trained(losses, models, before)
    assert_learned(test_set, Embedder(embedder.trunk))
    assert_learned(test_set, embedder)


def test_cascaded_embeddings(train_set: FewShotDataset, test_set: FewShotDataset) -> None:
    """Two halves of an embedding, each with a loss of ours; the second learns from what was hard for the first."""
    embedder = conv_embedder(projection=10)
    models = {"trunk": embedder.trunk, "embedder": embedder.projection, "classifier_1": nn.Linear(6, CLASSES)}
    _, embeddings, labels = first_embeddings(embedder, train_set)
    with torch.no_grad():
        first, second = embeddings.split([4, 6], dim=1)
        easy_left_out = hardest_pairs(first, labels, lmu.get_all_pairs_indices(labels))
        expected = {
            "metric_loss_0": DenseNTXentLoss()(first, labels, easy_left_out).item(),
            "metric_loss_1": MatchingLoss()(second, labels, hardest_pairs(second, labels, easy_left_out)).item(),
            "classifier_loss_1": F.cross_entropy(models["classifier_1"](second), labels).item(),
        }
    before = {name: weights(part) for name, part in models.items()}
    trainer = pml_trainer(
        models,
        {
            "metric_loss_0": DenseNTXentLoss(),
            "metric_loss_1": MatchingLoss(),
            "classifier_loss_1": nn.CrossEntropyLoss(),
        },
        train_set,
        partial(CascadedEmbeddings, [4, 6]),
        mining_funcs={"tuple_miner_0": HDCMiner(0.5), "tuple_miner_1": HDCMiner(0.5)},
    )
    losses = train(trainer)
    assert losses[0] == pytest.approx(expected | {"total_loss": sum(expected.values())}, rel=1e-4)
    assert_trained(losses, models, before)
    assert_learned(test_set, Embedder(embedder.trunk))
    assert_learned(test_set, embedder)


def hardest_pairs(embeddings: Tensor, labels: Tensor, pairs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The farther half of the matching pairs and the nearer half of the others, by PML's default distance."""
    rows = F.normalize(embeddings, dim=1)
    a1, p, a2, n = pairs
    far = (rows[a1] - rows[p]).norm(dim=1).argsort(descending=True)[: math.ceil(len(a1) / 2)]
    near = (rows[a2] - rows[n]).norm(dim=1).argsort()[: math.ceil(len(a2) / 2)]
    return a1[far], p[far], a2[near], n[near]


def test_deep_adversarial_metric_learning(train_set: FewShotDataset, test_set: FewShotDataset) -> None:
    """First the metric alone, then the generator of hard negatives alone, then both: each epoch moves its own parts."""
    embedder = conv_embedder(projection=6)
    models = {
        "trunk": embedder.trunk,
        "embedder": embedder.projection,
        "classifier": nn.Linear(6, CLASSES),
        "generator": nn.Linear(3 * DIMS, DIMS),
    }
    metric_losses = {"metric_loss", "classifier_loss"}
    generator_losses = {"g_adv_loss", "g_hard_loss", "g_reg_loss"}
    state = {name: weights(part) for name, part in models.items()}
    phases: list[set[str]] = []

    def end_of_epoch(trainer: BaseTrainer) -> None:
        phases.append({name for name, part in models.items() if all(moved(part, state[name]))})
        assert phases[-1] == {name for name, part in models.items() if any(moved(part, state[name]))}
        state.update({name: weights(part) for name, part in models.items()})

    _, embeddings, labels = first_embeddings(embedder, train_set)
    with torch.no_grad():
        metric = PrototypicalLoss()(embeddings, labels).item()
    trainer = pml_trainer(
        models,
        {
            "metric_loss": PrototypicalLoss(),
            "classifier_loss": nn.CrossEntropyLoss(),
            "synth_loss": DenseTripletMarginLoss(margin=0.2),
            "g_adv_loss": DenseTripletMarginLoss(margin=0.2),  # PML asks for a TripletMarginLoss, which ours is
        },
        train_set,
        partial(DeepAdversarialMetricLearning, 1, 1, 3),
        iterations_per_epoch=5,
        end_of_epoch_hook=end_of_epoch,
    )
    assert isinstance(trainer.loss_funcs["g_adv_loss"], TripletMarginLoss)
    losses = train(trainer, epochs=3)
    assert phases == [{"trunk", "embedder", "classifier"}, {"generator"}, set(models)]
    assert losses[0]["metric_loss"] == pytest.approx(metric, rel=1e-4)
    for each, running in zip(
        losses,
        [metric_losses] * 5 + [generator_losses] * 5 + [metric_losses | generator_losses | {"synth_loss"}] * 5,
        strict=True,
    ):
        assert {name for name, value in each.items() if value != 0} == running | {"total_loss"}
        assert all(math.isfinite(value) for value in each.values())
    assert_learned(test_set, Embedder(embedder.trunk))
    assert_learned(test_set, embedder)


class Pairs(Dataset):
    """A FewShotDataset as (image, another of its class, label), as PML's two-stream parts want it."""

    def __init__(self, dataset: FewShotDataset) -> None:
        self.dataset = dataset
        self.partner = torch.empty_like(dataset.labels)
        for label in range(len(dataset.class_names)):
            items = (dataset.labels == label).nonzero().flatten()
            self.partner[items] = items.roll(1)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, int]:
        image, label = self.dataset[item]
        return image, self.dataset[int(self.partner[item])][0], label


TWO_STREAM_LOSSES = {
    "dense triplet": DenseTripletMarginLoss,
    "dense NTXent": DenseNTXentLoss,
    "pair verification": PairVerificationLoss,
    "prototypical": PrototypicalLoss,
    "matching": MatchingLoss,
}


@pytest.mark.parametrize("make_loss", TWO_STREAM_LOSSES.values(), ids=list(TWO_STREAM_LOSSES))
def test_two_stream_metric_loss(
    make_loss: type[nn.Module], train_set: FewShotDataset, test_set: FewShotDataset
) -> None:
    """Anchors and their partners are one batch of twice the size; each anchor's triplets lie among the partners."""
    embedder, loss, pairs = small_embedder(), make_loss(), Pairs(train_set)
    seed_all()
    index = torch.tensor(list(sampler(train_set)))[:BATCH]
    images = torch.cat([train_set.floats(index), train_set.floats(pairs.partner[index])])
    labels = train_set.labels[index]
    of = labels.tolist()
    triplets = [
        (a, p + BATCH, n + BATCH) for a, p, n in itertools.product(range(BATCH), repeat=3) if of[a] == of[p] != of[n]
    ]
    with torch.no_grad():
        part = copy.deepcopy(embedder).train()
        embeddings = torch.cat([part(images[:BATCH]), part(images[BATCH:])])  # one after the other, as batch norm sees
        judge = PLAIN.get(make_loss, make_loss)()
        expected = judge(embeddings, labels.repeat(2), torch.tensor(triplets).unbind(1)).item()
    if isinstance(loss, PrototypicalLoss):  # each item counts as often as it occurs in a triplet
        each = prototypical_by_hand(embeddings.double().numpy(), of + of, lambda q, r: -(euclid(q, r) ** 2))
        counts = np.bincount(np.array(triplets).flatten(), minlength=2 * BATCH)
        expected = np.mean(np.array(each) * counts / counts.max())
    before = {"trunk": weights(embedder)}
    trainer = pml_trainer(
        {"trunk": embedder},
        {"metric_loss": loss},
        pairs,
        TwoStreamMetricLoss,
        labels=train_set,
        iterations_per_epoch=4,
    )
    losses = train(trainer)
    assert losses[0]["metric_loss"] == pytest.approx(expected, rel=1e-4)
    assert_trained(losses, {"trunk": embedder}, before)
    assert_learned(test_set, Embedder(embedder))


def test_two_stream_tester_of_pml_and_ours_agree(test_set: FewShotDataset) -> None:
    """PML searches the partners for each anchor: our tester with a gallery of them."""
    embedder, pairs = small_embedder(), Pairs(test_set)
    calculator = AccuracyCalculator(include=METRICS, k="max_bin_count", device=CPU)
    tester = GlobalTwoStreamEmbeddingSpaceTester(
        dataloader_num_workers=0, data_device=CPU, accuracy_calculator=calculator
    )
    theirs = tester.test({"test": pairs}, 1, embedder)["test"]
    partners = FewShotDataset(test_set.images[pairs.partner], test_set.labels, test_set.class_names)
    ours = RetrievalTester(distance=LpDistance()).test(embedder, test_set, partners)
    assert dict(ours) == pytest.approx(figures(theirs), abs=1e-3)
