"""No training step and no chunk of an evaluation waits for a GPU, which `fit` does at its log steps alone.

With a GPU torch itself tells. Without one the same runs on the meta device, whose tensors have no values: what looks at
one (`item`, `if`, `nonzero`, a mask as an index, `unique`) is an error of torch, and the modes below add what waits for
other reasons. Neither sees the wait that a copy from memory which is not pinned may be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pml_fewshot import (
    BatchSpec,
    BatchStream,
    EpisodeSpec,
    EpisodeStream,
    EpisodicEvaluator,
    MAMLTrainer,
    MatchingTrainer,
    MetricTrainer,
    ProtoNetTrainer,
    PrototypicalLoss,
    RandomAffine,
    RandomWarp,
    SiameseTrainer,
)
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.evaluation import episodic, heads, transductive_heads, tuned_heads
from pml_fewshot.evaluation.linear_heads import cosine_classifier, ridge_regression
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.reconstruction import ReconstructionLoss
from pml_fewshot.sampling.episodes import EpisodeSampler
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.trainers.frn import FRNTrainer
from pml_fewshot.training.fit import fit
from pml_fewshot.training.state import TrainingState
from tests.trainers import material as m

aten = torch.ops.aten
gpu = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
each_device = pytest.mark.parametrize("device", ["meta", gpu])
SPEC = EpisodeSpec(m.WAYS, m.SHOTS, m.QUERIES)


class Waits(RuntimeError):
    """What was done would make a GPU's host wait."""


class NoBlockingOperation(TorchDispatchMode):
    """Refuses copies between devices that wait for their end, values put by a mask, and checks of a factorization."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func in (aten._to_copy.default, aten.copy_.default):
            waits = given[-1].device != result.device and not kwargs.get("non_blocking", args[2:] == (True,))
        elif isinstance(result, Tensor) and not result.is_cpu:  # an index on the CPU, which is copied; not a number
            waits = any(each.is_cpu and each.ndim > 0 for each in given)
        else:
            waits = func is aten._linalg_check_errors.default
        if func is aten.index_put_.default and args[2].numel() > 1:  # (one value is filled in)
            waits |= any(each is not None and each.dtype == torch.bool for each in args[1])
        if waits:
            raise Waits(f"{func} of tensors on {[str(each.device) for each in given]}")
        return result


class NoCopyFromPython(TorchFunctionMode):
    """Refuses tensors made of Python's numbers on another device than the CPU, which are copied there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if (made or func is Tensor.new_tensor) and not result.is_cpu:
            raise Waits(f"{func.__name__} on {result.device}; take full or new_full")
        return result


@contextmanager
def without_waits(device: str) -> Iterator[None]:
    if device == "meta":
        with NoBlockingOperation(), NoCopyFromPython():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _autocast_knows_meta(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "put by mask": lambda x: x.__setitem__(x > 0, x.flatten()),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "repeats": lambda x: x[0].repeat_interleave(x[0].long()),
    "bincount": lambda x: x[0].long().bincount(),
    "to": lambda x: torch.ones(3).to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(2, 2)),
    "index": lambda x: x[torch.tensor([0, 1])],
    "tensor": lambda x: torch.tensor(3.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor([3.0]),
    "cholesky": lambda x: torch.linalg.cholesky(x),
}


@each_device
@pytest.mark.parametrize("what", WAITING)
def test_what_waits_is_seen(what: str, device: str) -> None:
    given = torch.eye(2).to(device)
    with pytest.raises((RuntimeError, NotImplementedError)), without_waits(device):
        WAITING[what](given)


@each_device
def test_what_does_not_wait_is_left_alone(device: str) -> None:
    given, double = torch.eye(2).to(device), torch.tensor(2.0)
    with without_waits(device):
        given[given > 0] = 3.0
        given[0] = given.where(given > 0, torch.nan)[1] * double
        given.copy_(given.clone())
        given.add_(torch.full((2, 2), 3.0, device=device)).index_select(0, torch.arange(2, device=device))
        torch.ones(2, 2).to(device, non_blocking=True)


def maml(**options: Any) -> MAMLTrainer:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(m.SIZE**2, m.WAYS))
    return MAMLTrainer(network, 0.1, 2, parallel="vmap", **options)


EPISODIC: dict[str, Callable[[], FewShotTrainer]] = {
    "protonet": lambda: ProtoNetTrainer(m.embedder(), support_rotations=3),
    "matching": lambda: MatchingTrainer(m.embedder(), context=FullContext(m.DIMS)),
    "metric": lambda: MetricTrainer(m.embedder(), PrototypicalLoss()),
    "frn": lambda: FRNTrainer(m.embedder(), ReconstructionLoss(nodes=2)),
    "maml": maml,
    "first-order": lambda: maml(first_order=True),
    "reptile": lambda: maml(reptile=True),
    "inductive": lambda: maml(batch_norm="inductive", learn_inner_lr="per_layer_per_step"),
}
# of a trainer whose loss waits, as PML's losses of pairs do, for a list of pairs
EVALUATED = {"siamese": lambda: SiameseTrainer(m.embedder(), PairVerificationLoss(WeightedL1Similarity(m.DIMS)))}
OF_BATCHES: dict[str, Callable[[], FewShotTrainer]] = {
    "softmax": lambda: MetricTrainer(m.embedder(), pml.NormalizedSoftmaxLoss(m.CLASSES, m.DIMS)),
}


@each_device
@pytest.mark.parametrize("name", EPISODIC | OF_BATCHES)
def test_fit_waits_at_its_log_steps_alone(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingState, "raise_if_diverged", lambda *_: None)
    monkeypatch.setattr(TrainingState, "log", lambda *_: {})
    trainer = (EPISODIC | OF_BATCHES)[name]().to(device)
    stream: Any = EpisodeStream(m.tiny_set(), SPEC, 0, RandomAffine(flip=True), episodes_per_batch=2)
    if name in OF_BATCHES:
        stream = BatchStream(m.tiny_set(), BatchSpec(3, 2), 0, RandomWarp(flip=True))
    next(stream)  # draws many on the CPU
    stream.dataset, stream._block = stream.dataset.to(device), stream._block.to(device)
    optimizer = Adam(trainer.parameters())
    train = partial(fit, trainer, stream, optimizer, clip_norm=1.0, progress=False)
    if device != "meta":
        train(1)  # what is set up once may wait
    with without_waits(device):
        train(3, scheduler=CosineAnnealingLR(optimizer, 3), ema=0.9)
        trainer.accuracy(next(stream))


HEADS = [
    heads.nearest_prototype,
    heads.nearest_neighbour,
    heads.mean_similarity,
    heads.soft_nearest_neighbour,
    heads.k_nearest_neighbours,
    cosine_classifier,
    ridge_regression,
    transductive_heads.bd_cspn,
    transductive_heads.laplacian_shot,
    partial(transductive_heads.alpha_tim, steps=2),
    partial(tuned_heads.fine_tuning, steps=2),
    partial(tuned_heads.transductive_fine_tuning, steps=2),
]


@each_device
@pytest.mark.parametrize(
    "method",
    [*EPISODIC, *EVALUATED, *HEADS],
    ids=lambda method: getattr(heads.unwrapped(method)[0], "__name__", method),
)
def test_chunks_of_an_evaluation_wait_at_their_end_alone(
    method: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodic, "summed", lambda each: torch.zeros(each.shape))  # which then is copied to the CPU
    head = None if isinstance(method, str) else method
    trainer, dataset = (EPISODIC | EVALUATED)["protonet" if head else method]().eval(), m.tiny_set()
    drawn = EpisodeSampler(dataset.labels, SPEC, torch.Generator().manual_seed(0)).sample(4).to(device)
    bank = trainer.bank(dataset)
    evaluator = EpisodicEvaluator(SPEC, 4, chunk=2)
    score = partial(evaluator._score, episodic.Classifier.of(trainer.to(device), head), bank.to(device), drawn, True)
    if device != "meta":
        score()
    with without_waits(device):
        score()
