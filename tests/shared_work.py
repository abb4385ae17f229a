"""What `tests.several` has several processes do, each a function that returns what can be compared."""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor, nn

from pml_fewshot import (
    EmbeddingBank,
    EpisodicEvaluator,
    MAMLTrainer,
    MatchingTrainer,
    MetricTrainer,
    ProtoNetTrainer,
    PrototypicalLoss,
    RetrievalTester,
    SetToSet,
    SiameseTrainer,
    WeightedL1Similarity,
    fit,
)
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.distributed import alone, check_same, processes, together, told_by_all, world
from pml_fewshot.embedders.bank import load_bank
from pml_fewshot.embedders.embedder import Embedder, encode, encode_to_file
from pml_fewshot.evaluation.linear_heads import ridge_regression
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.sampling.variable_episodes import VariableEpisodeSpec
from tests.tiny_experiments import few_glyphs

EPISODES = EpisodeSpec(ways=5, shots=1, queries=3)  # 20 images, which 3 does not divide
BATCHES = BatchSpec(classes=7, per_class=4)  # 28

glyphs = cache(few_glyphs)  # by the process that the others are forked from


class Double(nn.Module):
    """Makes of rounding what can be told from a mistake."""

    def forward(self, images: Tensor) -> Tensor:
        return images.double()


def trunk(dropout: float = 0.0) -> nn.Sequential:
    """Two blocks of a Conv4 with few channels."""
    layers: list[nn.Module] = [Double()]
    for channels in (1, 6):
        conv = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        layers += [conv, nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(24, 16)).double()


def fixed() -> Embedder:
    """With batch norm as it is, in training too."""
    return Embedder(trunk(), frozen=("2", "6"))


TRAINERS: dict[str, Callable[[Callable[[], Embedder]], Any]] = {
    "protonet": lambda embedder: ProtoNetTrainer(embedder(), support_rotations=2),
    "matching": lambda embedder: MatchingTrainer(embedder()),
    "siamese": lambda embedder: SiameseTrainer(embedder(), PairVerificationLoss(seed=3)),
    "metric": lambda embedder: MetricTrainer(
        embedder(), CrossBatchMemory(MultiSimilarityLoss(), 16, memory_size=90, miner=MultiSimilarityMiner())
    ),
    "context": lambda embedder: ProtoNetTrainer(embedder(), context=SetToSet(16)),  # its dropout draws
    "maml": lambda _: MAMLTrainer(
        nn.Sequential(trunk(), nn.Linear(16, 5).double()), 0.1, inner_steps=2, learn_inner_lr="per_layer", task_chunk=1
    ),
}


def stream(name: str, data: FewShotDataset) -> Any:
    if name in ("siamese", "metric"):
        return BatchStream(data, BATCHES, 0, RandomAffine())
    return EpisodeStream(data, EPISODES, 0, RandomAffine(), episodes_per_batch=4 if name == "maml" else 1)


def trained(name: str, embedder: Callable[[], Embedder] = fixed, sync: bool = False, steps: int = 20) -> dict[str, Any]:
    """The state of a trainer, its losses and the accuracy of its last log, after some steps."""
    torch.manual_seed(0)
    with processes("cpu", sync):
        trainer = TRAINERS[name](embedder).double()
        optimizer = torch.optim.SGD(trainer.parameters(), lr=0.05, momentum=0.9)
        history = fit(trainer, stream(name, glyphs().train), optimizer, steps, clip_norm=5.0, progress=False)
        accuracy = trainer.accuracy(None)
    state = {key: each for key, each in trainer.state_dict().items() if isinstance(each, Tensor)}
    return {"state": state, "losses": history.losses, "accuracy": accuracy, "skipped": history.skipped}


def evaluated() -> dict[str, Any]:
    """A bank, and the figures of many kinds from it."""
    torch.manual_seed(0)
    data = glyphs().test
    embedder = Embedder(trunk())
    lazy = ProtoNetTrainer(fixed(), PrototypicalLoss(WeightedL1Similarity(hidden=8).double()))
    with processes("cpu"):
        bank = encode(embedder, data, batch_size=50)  # 480 images: 10 batches, the last of 30
        file = Path(told_by_all(tempfile.mkdtemp())[0]) / "bank.npy"
        mapped = encode_to_file(embedder, data, file, batch_size=50)
        spec, variable = EpisodeSpec(5, 1, 4), VariableEpisodeSpec(5, 8, max_support=100)
        plain = EpisodicEvaluator(spec, 1000, chunk=64).evaluate(bank, confusion=True)
        episodic = {
            "plain": plain,
            "default chunk": EpisodicEvaluator(spec, 3000).evaluate(embedder, data),
            "ridge": EpisodicEvaluator(EpisodeSpec(5, 3, 4), 200, head=ridge_regression).evaluate(bank),
            "variable": EpisodicEvaluator(variable, 50).evaluate(bank),
            "two": EpisodicEvaluator(spec, 2).evaluate(bank),  # fewer than processes
            "maml": EpisodicEvaluator(spec, 40, chunk=4).evaluate(TRAINERS["maml"](fixed), data),
            "images": EpisodicEvaluator(spec, 50, chunk=10).evaluate(OfImages(fixed()), data),  # 5 chunks
            "a lazy distance": EpisodicEvaluator(spec, 20).evaluate(lazy, data),  # 1 chunk
            "the same, made": EpisodicEvaluator(spec, 1000).evaluate(lazy, data),
        }
        metrics = ("precision_at_1", "mean_average_precision_at_r", "mean_reciprocal_rank", "NMI")
        retrieval = RetrievalTester(metrics=metrics).test(bank)
        sample = RetrievalTester(num_queries=2).test(bank)
        first = EmbeddingBank(bank.embeddings[:41], bank.labels[:41], class_names=bank.class_names)
        few = RetrievalTester().test(first, bank)
    return {
        "bank": bank.embeddings,
        "mapped": load_bank(file).embeddings.clone(),
        "same map": torch.equal(mapped.embeddings, bank.embeddings) and mapped.class_names == bank.class_names,
        "confusion": plain.confusion,
        "episodes": {name: each.per_episode for name, each in episodic.items()},
        "means": {name: (each.mean, each.ci95, each.episodes_hash) for name, each in episodic.items()},
        "queries": {**retrieval.per_query, "sample": sample.per_query["precision_at_1"]},
        "retrieval": (dict(retrieval), dict(sample), dict(few)),
    }


class OfImages(ProtoNetTrainer):
    """Embeds the images of each episode when it is evaluated."""

    def bank(self, dataset: FewShotDataset) -> Tensor:
        return dataset.images

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        return super().classify(self.embed(support), self.embed(query))


class Noted(nn.Module):
    """Keeps the items that it was given, and what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.items: list[Tensor] = []
        self.drawn: list[Tensor] = []

    def forward(self, items: Tensor) -> Tensor:
        self.items.append(items.detach())
        self.drawn.append(torch.rand(3))
        return items.flatten(1)[:, :16] * self.weight


def drawn() -> dict[str, Any]:
    """What each process was given in a step, what its embedder drew, and what all draw after it."""
    torch.manual_seed(7)
    with processes("cpu"):
        noted = Noted()
        trainer = ProtoNetTrainer(noted)
        fit(trainer, stream("protonet", glyphs().train), torch.optim.SGD(trainer.parameters(), 0.1), 2)
        rank = world().rank
    return {"rank": rank, "items": noted.items[0], "drawn": noted.drawn, "after": torch.rand(3)}


def errors() -> dict[str, str]:
    """The texts of errors that one process has, or all have."""
    texts = {}
    with processes("cpu"):
        if world().size == 1:
            return {}
        with alone(), processes("cpu") as nested:
            texts["alone"] = str(nested.size)
        last = world().size - 1
        try:
            with together():
                if world().rank == last:
                    raise ValueError("the disk of this one is broken")
        except ValueError as error:
            texts["together"] = str(error)
        try:
            check_same({"steps": 3, "seed": world().rank}, "do it")
        except ValueError as error:
            texts["same"] = str(error)
        torch.manual_seed(world().rank)
        trainer = ProtoNetTrainer(fixed())
        try:
            fit(trainer, stream("protonet", glyphs().train), torch.optim.SGD(trainer.parameters(), 0.1), 1)
        except ValueError as error:
            texts["weights"] = str(error)
        same = ProtoNetTrainer(fixed().requires_grad_(True))
        same.load_state_dict(told_by_all(same.state_dict())[0])
        other = EpisodeStream(glyphs().train, EPISODES, seed=world().rank)
        try:
            fit(same, other, torch.optim.SGD(same.parameters(), 0.1), 1)
        except ValueError as error:
            texts["batch"] = str(error)
        lazy = ProtoNetTrainer(Embedder(nn.Sequential(nn.Flatten(), nn.LazyLinear(4))))
        try:
            fit(lazy, stream("protonet", glyphs().train), torch.optim.SGD(lazy.parameters(), 0.1), 1)
        except ValueError as error:
            texts["lazy"] = str(error)
        try:
            trainer.train().embed(torch.rand(1, 1, 28, 28))
        except ValueError as error:
            texts["few"] = str(error)
    return texts


WORK: dict[str, Callable[[], Any]] = {
    **{f"fixed {name}": partial(trained, name) for name in TRAINERS},
    "synced": partial(trained, "protonet", lambda: Embedder(trunk()), True, 6),
    "local": partial(trained, "protonet", lambda: Embedder(trunk(0.3)), False, 6),
    "evaluated": evaluated,
    "drawn": drawn,
    "errors": errors,
}
