"""Benchmarks of `python -m experiments.speed`: each function makes a contest between this library and a peer.

Peers are called as their docs say, or are the code that most repositories have, written here. Both are checked to do
the same before the clock starts, or by the results of their first run.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

# isort: off
import pml_fewshot  # noqa: F401  before faiss, whose BLAS it sets right
# isort: on

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from experiments.speed import maml_step
from experiments.speed.main_path import busy_processes, training_step
from experiments.speed.retrieval_worker import KNN, clusters, neighbors
from experiments.speed.side_by_side import check_accuracy, check_equal, random_images
from pml_fewshot import (
    Conv4,
    Embedder,
    EmbeddingBank,
    EpisodeSampler,
    EpisodeSpec,
    EpisodeStream,
    EpisodicEvaluator,
    FewShotDataset,
    MAMLTrainer,
    ProtoNetTrainer,
    RetrievalTester,
    load_omniglot,
)
from pml_fewshot.evaluation.episodic import EpisodicResult

SPEC = EpisodeSpec(ways=5, shots=1, queries=15)
SAME_LOSS = 1e-4  # relative, in float32; also the largest difference between logits in float64


@dataclass(frozen=True)
class Sizes:
    """How much each benchmark does."""

    tasks: int = 32  # per MAML step
    adapted: int = 200  # episodes evaluated by MAML
    episodes: int = 10_000  # episodes from a 64-d bank
    wide_episodes: int = 10_000  # episodes from a 1,600-d bank
    wide_items: int = 12_000  # items in that bank
    peer_episodes: int = 1000  # episodes from that bank by easyfsl
    retrieved: int = 60_502  # items searched among themselves
    drawn: int = 300  # episodes with many queries
    ways: int = 1692  # ways of one episode
    steps: int = 5  # training steps, timed together


QUICK = Sizes(tasks=4, adapted=6, wide_episodes=2000, wide_items=2000, peer_episodes=200, retrieved=8000, steps=1)


def unchecked(ours: Any, theirs: Any) -> None:
    """Accepts results that were compared before, or do not exist."""


@dataclass(frozen=True)
class Contest:
    """Two actions that do the same; `theirs` is None if there is no peer to compare with.

    A run of ours does `work` steps, episodes or searches, and one of theirs `their_work`. `wanted` is the target ratio,
    times as fast as the peer, or describes another target. `check(ours, theirs)` raises if results disagree.
    """

    what: str
    ours: Callable[[], Any]
    peer: str
    theirs: Callable[[], Any] | None
    wanted: str
    unit: str = "s"  # seconds for one; or episodes/s
    work: int = 1
    their_work: int = 1
    check: Callable[[Any, Any], None] = unchecked


class Benchmark(Protocol):
    def __call__(self, sizes: Sizes, data_root: Path | None, stack: ExitStack) -> Contest:
        """Makes a contest; the stack ends the processes that belong to it."""


def characters(data_root: Path | None) -> FewShotDataset:
    """Returns Omniglot's test classes, or random images of their size if there is no dataset."""
    return load_omniglot(data_root, rotations=False).test if data_root else random_images(100, 20, 28, 1)


# --- MAML -------------------------------------------------------------------------------------------------------------


def maml_training(
    sizes: Sizes, data_root: Path | None, stack: ExitStack, inner_steps: int, first_order: bool, wanted: str
) -> Contest:
    peer = f"{maml_step.PEERS[0]}, usual network"
    maml_step.check_gradients(maml_step.episodes(2, 1, 1, "cpu"), inner_steps, first_order, (peer,))
    batch = maml_step.episodes(sizes.tasks, SPEC.shots, SPEC.queries, "cpu")
    steps = maml_step.contenders(maml_step.both_networks("cpu"), batch, inner_steps, first_order)
    order = f"{'first' if first_order else 'second'} order, {inner_steps} inner step{'s' * (inner_steps > 1)}"
    what = f"MAML step of {sizes.tasks} tasks, {order}"
    return Contest(what, steps["MAMLTrainer"], peer, steps[peer], wanted)


def maml_evaluated(sizes: Sizes, data_root: Path | None, stack: ExitStack) -> Contest:
    dataset, networks = characters(data_root), maml_step.both_networks("cpu")
    trainer = MAMLTrainer(networks["Conv4"], maml_step.INNER_LR, inner_steps=3)
    index = EpisodeSampler(dataset.labels, SPEC, torch.Generator().manual_seed(0)).sample(sizes.adapted)

    def adapted(network: nn.Module, support: Tensor, query: Tensor) -> Tensor:
        return maml_step.step_by_step(network, support, query, 3, first_order=True)[0].detach()

    def plain_loop() -> None:
        for support, query in zip(index.support, index.query, strict=True):
            logits = adapted(networks["usual network"], dataset.floats(support), dataset.floats(query))
            (logits.argmax(dim=1) == maml_step.labels_of(query)).double().mean().item()

    same = maml_step.both_networks("cpu")
    support, query = (dataset.floats(each[0]).double() for each in (index.support, index.query))
    ours = MAMLTrainer(same["Conv4"].double(), maml_step.INNER_LR, 3).classify(support[None], query.flatten(0, 1)[None])
    torch.testing.assert_close(adapted(same["usual network"].double(), support, query), ours[0], rtol=0, atol=SAME_LOSS)
    evaluator = EpisodicEvaluator(SPEC, sizes.adapted)
    return Contest(
        "MAML evaluated, 5-way 1-shot 15-query, 3 inner steps",
        lambda: evaluator.evaluate(trainer, dataset),
        "learn2learn's way, a task at a time",
        plain_loop,
        "75 episodes/s",
        "episodes/s",
        sizes.adapted,
        sizes.adapted,
    )


# --- episodes and retrieval -------------------------------------------------------------------------------------------


def episodes_beside_busy(sizes: Sizes, data_root: Path | None, stack: ExitStack) -> Contest:
    """Compares one thread that has the machine to itself with all threads next to one busy process."""
    generator = torch.Generator().manual_seed(0)
    bank = EmbeddingBank(torch.randn(33_840, 64, generator=generator), torch.arange(33_840) // 20)
    evaluator, threads = EpisodicEvaluator(SPEC, sizes.episodes), torch.get_num_threads()
    [process] = stack.enter_context(busy_processes(1))
    process.send_signal(signal.SIGSTOP)

    def alone() -> EpisodicResult:
        torch.set_num_threads(1)
        try:
            return evaluator.evaluate(bank)
        finally:
            torch.set_num_threads(threads)

    def beside_busy() -> EpisodicResult:
        process.send_signal(signal.SIGCONT)
        try:
            return evaluator.evaluate(bank)
        finally:
            process.send_signal(signal.SIGSTOP)

    def check(ours: EpisodicResult, theirs: EpisodicResult) -> None:
        assert torch.equal(ours.per_episode, theirs.per_episode), "threads change the result"

    what = f"{sizes.episodes:,} episodes from a 64-d bank, one idle thread"
    peer = f"the same, beside a busy process, threads: {threads}"
    return Contest(what, alone, peer, beside_busy, "at most 1.5", check=check)


def wide_episodes(sizes: Sizes, data_root: Path | None, stack: ExitStack) -> Contest:
    bank = clusters(sizes.wide_items, 1600, 20, 8.0)
    evaluator, peer, theirs = EpisodicEvaluator(SPEC, sizes.wide_episodes), "easyfsl, from features", None
    try:
        from experiments.speed import peers

        labels = bank.labels.tolist()
        features = peers.easyfsl_features(bank.embeddings, labels, [f"class {c}" for c in range(20)])
        theirs = peers.easyfsl_episodes(features, nn.Identity(), SPEC, sizes.peer_episodes)
    except ModuleNotFoundError as error:
        peer = f"{peer} ({error.name} is not installed)"

    def check(ours: EpisodicResult, accuracy: float) -> None:
        check_accuracy(peer, accuracy, sizes.peer_episodes, ours)

    what = "episodes, 5-way 1-shot 15-query, from a 1,600-d bank"
    work = sizes.wide_episodes, sizes.peer_episodes
    return Contest(what, lambda: evaluator.evaluate(bank), peer, theirs, "12", "episodes/s", *work, check)


@contextmanager
def in_turns(*arguments: str) -> Iterator[Callable[[], Any]]:
    """Yields an action of retrieval_worker, in a separate process whose faiss has the BLAS it was installed with."""
    command = [sys.executable, "-m", "experiments.speed.retrieval_worker", *arguments, "--turns"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        told, figures = process.stdin, process.stdout

        def action() -> Any:
            print(file=told, flush=True)
            return json.loads(figures.readline())["figures"]

        try:
            figures.readline()  # the first run is slower
            yield action
        finally:
            process.kill()


def retrieval(
    sizes: Sizes, data_root: Path | None, stack: ExitStack, contender: str, peer: str, wanted: str
) -> Contest:
    items, dims, classes, noise = sizes.retrieved, 512, max(2, sizes.retrieved * 11_318 // 60_502), 2.0
    bank = clusters(items, dims, classes, noise)
    if contender == "faiss":  # this library has set its BLAS right in this process
        most = int(torch.bincount(bank.labels).max()) - 1
        theirs: Callable[[], Any] = partial(neighbors, bank, most)
    else:
        given = (f"--items={items}", f"--dims={dims}", f"--classes={classes}", f"--noise={noise}")
        theirs = stack.enter_context(in_turns(f"--contender={contender}", *given, "--as-installed"))

    def check(ours: dict[str, float], figures: dict[str, float] | None) -> None:
        check_equal(peer, figures or ours, ours)

    what = f"P@1, R-precision and MAP@R of {items:,} x {dims} among themselves"
    return Contest(what, lambda: dict(RetrievalTester(KNN).test(bank)), peer, theirs, wanted, check=check)


# --- drawing and training ---------------------------------------------------------------------------------------------


def drawing(
    sizes: Sizes, data_root: Path | None, stack: ExitStack, of: Callable[[Sizes], tuple[EpisodeSpec, int]], wanted: str
) -> Contest:
    spec, count = of(sizes)
    per_class = spec.shots + spec.queries
    items = max(20, per_class)
    labels = torch.arange(max(20, spec.ways)).repeat_interleave(items)
    generator, numpys = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def class_by_class() -> None:
        for _ in range(count):
            classes = numpys.choice(len(labels) // items, spec.ways, replace=False)
            np.stack([c * items + numpys.choice(items, per_class, replace=False) for c in classes])

    what = f"{count:,} episode{'s' * (count > 1)} drawn, {spec}"
    ours = lambda: EpisodeSampler(labels, spec, generator).sample(count)  # noqa: E731
    return Contest(what, ours, "numpy's Generator.choice, class by class", class_by_class, wanted)


def protonet_step(sizes: Sizes, data_root: Path | None, stack: ExitStack) -> Contest:
    dataset, spec = characters(data_root), EpisodeSpec(60, 1, 5)
    torch.manual_seed(0)
    trainer = ProtoNetTrainer(Embedder(Conv4(in_channels=1)))
    plain = nn.Sequential(*list(maml_step.usual().children())[:-1])  # without the linear layer
    for own, same in zip(trainer.embedder.parameters(), plain.parameters(), strict=True):
        same.data.copy_(own.data)
    target = torch.arange(spec.ways).repeat_interleave(spec.queries)

    def plain_loss(support: Tensor, query: Tensor) -> Tensor:
        """Loss of support (W, K, *item) and query (W, Q, *item)."""
        embedded = plain(torch.cat([support.flatten(0, 1), query.flatten(0, 1)]))
        prototypes = embedded[: spec.ways * spec.shots].unflatten(0, (spec.ways, spec.shots)).mean(dim=1)
        queries = embedded[spec.ways * spec.shots :]
        return F.cross_entropy(-(queries.unsqueeze(1) - prototypes.unsqueeze(0)).pow(2).sum(dim=2), target)

    episode = next(EpisodeStream(dataset, spec, seed=0))
    ours, theirs = trainer(episode), plain_loss(episode.support[0], episode.query[0])
    torch.testing.assert_close(theirs, ours, rtol=SAME_LOSS, atol=0)
    images, generator = dataset.floats(torch.arange(len(dataset))), torch.Generator().manual_seed(0)
    rows = [(dataset.labels == c).nonzero().flatten() for c in range(len(dataset.class_names))]
    optimizer = Adam(plain.parameters(), lr=1e-3)

    def plain_step() -> None:
        classes = torch.randperm(len(rows), generator=generator)[: spec.ways].tolist()
        drawn = torch.stack([rows[c][torch.randperm(len(rows[c]), generator=generator)[:6]] for c in classes])
        optimizer.zero_grad()
        plain_loss(images[drawn[:, : spec.shots]], images[drawn[:, spec.shots :]]).backward()
        optimizer.step()

    step = training_step(trainer, EpisodeStream(dataset, spec, seed=0))
    what = "ProtoNet training step, 60-way 1-shot 5-query, Conv4, 28 x 28"
    peer = "plain torch, as most repositories have it"

    def several(action: Callable[[], object]) -> None:
        for _ in range(sizes.steps):
            action()

    both = partial(several, step), partial(several, plain_step)
    return Contest(what, both[0], peer, both[1], "2.5", "s", sizes.steps, sizes.steps)


BENCHMARKS: dict[str, Benchmark] = {
    "maml-second-order": partial(maml_training, inner_steps=1, first_order=False, wanted="2.0"),
    "maml-first-order": partial(maml_training, inner_steps=1, first_order=True, wanted="2.0"),
    "maml-five-steps": partial(maml_training, inner_steps=5, first_order=False, wanted="1.8"),
    "maml-evaluated": maml_evaluated,
    "episodes-beside-busy": episodes_beside_busy,
    "episodes-wide": wide_episodes,
    "retrieval-pml": partial(retrieval, contender="pml", peer="PML's AccuracyCalculator, as installed", wanted="5"),
    "retrieval-faiss": partial(
        retrieval, contender="faiss", peer="faiss's flat index, neighbors alone, BLAS set right", wanted="1.5"
    ),
    "draw-many-queries": partial(drawing, of=lambda sizes: (EpisodeSpec(5, 5, 595), sizes.drawn), wanted="0.5 s"),
    "draw-many-ways": partial(drawing, of=lambda sizes: (EpisodeSpec(sizes.ways, 1, 5), 1), wanted="0.05 s"),
    "protonet-step": protonet_step,
}
