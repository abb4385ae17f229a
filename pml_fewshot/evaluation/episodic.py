"""EpisodicEvaluator: the accuracy of a method over thousands of episodes, from embeddings computed once.

Letters: E episodes, W ways, K shots, Q queries per class, N = W*Q, M items in the bank.
"""

import inspect
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm.auto import tqdm

from pml_fewshot.checks import UsageError, UsageTypeError, check_at_least_one, check_finite
from pml_fewshot.data.dataset import FewShotDataset, as_floats
from pml_fewshot.distributed import alone, summed, together, told_by_all, world
from pml_fewshot.embedders.bank import ClassName, EmbeddingBank, names_of
from pml_fewshot.embedders.embedder import encode, is_embedder
from pml_fewshot.embedders.modes import evaluating, widened
from pml_fewshot.environment import keep_memory, one_thread_each
from pml_fewshot.evaluation.heads import (
    Head,
    Scores,
    is_transductive,
    name_of_head,
    nearest_prototype,
    parts_of,
    takes_distance,
    unwrapped,
)
from pml_fewshot.evaluation.linear_heads import cosine_classifier, logistic_regression, ridge_regression
from pml_fewshot.evaluation.support import Support
from pml_fewshot.sampling.episodes import EpisodeIndex, EpisodeSampler, EpisodeSpec
from pml_fewshot.sampling.variable_episodes import VariableEpisodes, VariableEpisodeSampler, VariableEpisodeSpec

CPU_CHUNK = 2**20  # floats gathered at a time by default: 4 MiB stay in the cache while they are scored
IGNORE_DISTANCE = (cosine_classifier, ridge_regression, logistic_regression)  # although they are called with one
SHARE_OF_FREE_MEMORY = 1 / 32  # of a GPU: heads need several times the floats gathered, some for every pair of items


class FewShotMethod(Protocol):
    """Anything that can be evaluated: every trainer, or any object with these two methods.

    It may also have `distance`, passed to the evaluator's head; `divergence_hint`, what to try if logits are NaN;
    `transductive` and `classifier`, for the result table; and `thread_safe`, whether `classify` may run in several
    threads at once.
    """

    def bank(self, dataset: FewShotDataset) -> Tensor:
        """Returns (M, *item): a dataset's embeddings, or its uint8 images for methods that adapt to each episode."""

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Maps support (E, W, K, *item) and query (E, N, *item), images in [0, 1], to logits (E, N, W)."""


Method = FewShotMethod | EmbeddingBank | nn.Module  # a trainer; embeddings; or an embedder, wrapped or not
Labeled = FewShotDataset | EmbeddingBank
Spec = EpisodeSpec | VariableEpisodeSpec
Classify = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class EpisodicResult:
    """Accuracy over episodes, as fractions of 1.

    `ci95` is half the width of the mean's 95 % interval, 1.96 standard errors over the episodes; `per_episode` (E,) is
    on the CPU, for paired comparisons; results with equal `episodes_hash` are on the same episodes. If requested,
    `confusion` (C, C) counts how many queries of each class (row) were predicted as each class (column) of `classes`, C
    names (labels where there are no names), over all episodes. `classifier` names the classifier, its head and
    distance; `transductive` says whether the queries of an episode informed each other.
    """

    mean: float
    ci95: float
    per_episode: Tensor
    spec: Spec
    seed: int
    episodes_hash: str
    classifier: str = ""
    classes: tuple[ClassName, ...] = ()
    confusion: Tensor | None = None
    transductive: bool = False

    def per_class(self) -> dict[ClassName, float]:
        """Returns the accuracy on each class's queries, by class name (label if it has none); NaN without queries."""
        if self.confusion is None:
            raise UsageError("expected a result with its confusion matrix, got none; use evaluate(..., confusion=True)")
        accuracies = self.confusion.diagonal() / self.confusion.sum(dim=1)
        return dict(zip(self.classes, accuracies.tolist(), strict=True))

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} +- {100 * self.ci95:.2f} % ({self.spec}, {len(self.per_episode)} episodes)"


@dataclass(eq=False)
class EpisodicEvaluator:
    """Evaluates on a fixed list of episodes: the same seed gives the same episodes on every machine and device.

    Args:
        spec: size of the episodes. Those of a VariableEpisodeSpec are scored one by one, by a head with a `fit`.
        num_episodes: with the 600 of many papers, the interval is wider than the difference between most methods (0.2
            points at 98.9 %).
        seed: of the episodes; results are comparable in pairs only if theirs are equal.
        chunk: episodes scored at a time, one chunk after another. If None, as many as fill a CPU's cache (in each
            thread), or a share of a GPU's free memory. The result does not depend on it.
        head: replaces the method's own `classify`, and nearest_prototype for embedders and banks. It is called
            `head(support (E, W, K, D), query (E, N, D), distance)` with the method's own distance, or without it if the
            head accepts only two: `partial(nearest_prototype, distance=CosineSimilarity())` keeps its own. On a CPU,
            functions run in several threads at once, so they must not keep anything between calls.
    """

    spec: Spec
    num_episodes: int = 10_000
    seed: int = 0
    chunk: int | None = None
    head: Head | Classify | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.spec, Spec):
            do = "write EpisodeSpec(ways=5, shots=1, queries=15)"
            raise UsageTypeError(f"expected the size of an episode, got {self.spec!r}; {do}")
        check_at_least_one("num_episodes", self.num_episodes)
        self.seed = operator.index(self.seed)  # torch's generators reject numpy's integers
        if self.num_episodes == 1:
            raise UsageError("expected num_episodes above 1, got 1; an interval needs at least two episodes")
        if self.chunk is not None:
            check_at_least_one("chunk", self.chunk)

    def check(self, dataset: Labeled) -> None:
        """Raises the UsageError that `evaluate` would if the set has too few classes or items for the spec."""
        self._sampler(dataset.labels, dataset.class_names)

    def evaluate(
        self, trainer: Method, dataset: Labeled | None = None, bank: Tensor | None = None, confusion: bool = False
    ) -> EpisodicResult:
        """Evaluates a method in eval mode and restores its modes; pass an EmbeddingBank alone: `evaluate(bank)`.

        Args:
            trainer: a trainer, or anything with `bank(dataset)` and `classify(support, query)`; or an Embedder, or an
                EmbeddingBank from any tool, which the head classifies.
            dataset: the classes to evaluate on, as images or as embeddings.
            bank: `trainer.bank(dataset)` if it is already computed (for several specs on one set).
            confusion: count which class was predicted as which; 8 bytes for each pair of classes.

        Raises:
            UsageError: the set has too few classes or items for the spec, or the bank or the logits hold NaN.
        """
        with evaluating(*modules_of(trainer, self.head)):
            if confusion and not isinstance(self.spec, EpisodeSpec):
                got = str(self.spec)
                raise UsageError(f"expected episodes of one size for a confusion matrix, got {got}; use an EpisodeSpec")
            if isinstance(self.spec, VariableEpisodeSpec):
                _fit_of(trainer, self.head)  # rejects invalid combinations before images are embedded
            labeled, bank = embed(trainer, dataset, bank)
            labels = labeled.labels.cpu()
            if len(bank) != len(labels):
                raise UsageError(f"expected a bank of {len(labels)} items, got {len(bank)}; encode this very data set")
            keep_memory(bank.device)
            check_finite(bank, "bank")
            with one_thread_each():
                drawn = self._sampler(labels, labeled.class_names).sample(self.num_episodes)
            classifier = Classifier.of(trainer, self.head)
            classes: tuple[ClassName, ...] = ()
            counts = None
            if isinstance(drawn, EpisodeIndex):
                per_episode, predicted = self._score(classifier, bank, drawn.to(bank.device), confusion)
                if confusion:
                    classes, counts = _confusion(labeled, drawn, predicted)
            else:
                per_episode = self._score_variable(trainer, bank, drawn, classifier.divergence_hint)
        return EpisodicResult(
            per_episode.mean().item(),
            (1.96 * per_episode.std() / len(per_episode) ** 0.5).item(),
            per_episode,
            self.spec,
            self.seed,
            drawn.hash(labeled.fingerprint()),
            classifier.name,
            classes,
            counts,
            classifier.transductive,
        )

    def _sampler(self, labels: Tensor, names: Sequence[str]) -> EpisodeSampler | VariableEpisodeSampler:
        generator = torch.Generator().manual_seed(self.seed)
        if isinstance(self.spec, EpisodeSpec):
            return EpisodeSampler(labels, self.spec, generator, names)
        return VariableEpisodeSampler(labels, self.spec, generator, names)

    def _score(
        self, classifier: "Classifier", bank: Tensor, episodes: EpisodeIndex, predictions: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the accuracies (E,) and, if requested, the predicted ways (E, N), else (E, 0); on the CPU."""
        ways, queries = episodes.query.shape[1:]
        true_ways = episodes.true_ways.expand(len(episodes), -1)
        # one tensor: small ones left between a chunk's large blocks would make the process grow by gigabytes
        accuracies = torch.zeros(len(episodes), dtype=torch.float64, device=bank.device)
        predicted = torch.zeros(len(episodes), ways * queries * predictions, dtype=torch.int64, device=bank.device)
        chunk = self.chunk or min(told_by_all(self._default_chunk(bank, ways * (episodes.support.shape[2] + queries))))

        @torch.no_grad()  # like all modes, this one is per thread
        def score(start: int) -> None:
            part = episodes[start : start + chunk]
            logits = classifier.classify(_gather(bank, part.support), _gather(bank, part.query).flatten(1, 2))
            wanted, got = (len(part), ways * queries, ways), tuple(logits.shape)
            if got != wanted:
                raise UsageError(f"expected logits (E, N, W) of shape {wanted}, got {got}; return one a query and way")
            own = logits.argmax(dim=2)
            # argmax over NaN would give an accuracy of 1 / ways; kept on the device so that nothing waits for a copy
            finite = torch.isfinite(logits.sum(dim=(1, 2), dtype=torch.float64))
            right = (own == true_ways[start : start + chunk]).double().mean(dim=1)
            accuracies[start : start + chunk] = right.where(finite, torch.nan)
            if predictions:
                predicted[start : start + chunk] = own

        in_threads = classifier.thread_safe and bank.ndim == 2 and bank.device.type == "cpu" and self.chunk is None
        threads = torch.get_num_threads() if in_threads else 1
        starts = range(0, len(episodes), chunk)
        own = starts[world().share(len(starts))]  # whole chunks, so that results are equal to the bit
        with (
            together(),
            alone(),  # what a method embeds or fits for its episodes is its own
            ThreadPoolExecutor(threads) as pool,
            one_thread_each() if in_threads else nullcontext(),
            threadpool_limits(1, "blas") if in_threads else nullcontext(),  # for heads that use numpy
        ):
            score(starts[0])  # before the threads start: a lazy distance gets its weights here, in each process
            if starts[0] not in own:
                accuracies.zero_()
                predicted.zero_()
            rest = [start for start in own if start]
            scored = (pool.map if threads > 1 else map)(score, rest)
            # delay: most take less than three seconds
            hidden = not world().is_first
            list(tqdm(scored, "evaluating", len(rest), False, unit="chunk", delay=3, mininterval=1, disable=hidden))
        accuracies = summed(accuracies).cpu()  # zeros where another process scored
        check_finite(accuracies, "logits of each episode", classifier.divergence_hint)
        return accuracies, summed(predicted).cpu()

    def _score_variable(self, method: Any, bank: Tensor, episodes: VariableEpisodes, hint: str) -> Tensor:
        """Returns the accuracies (E,), scoring one episode after another in each thread."""
        fit, distance = _fit_of(method, self.head)
        accuracies = torch.zeros(len(episodes), dtype=torch.float64, device=bank.device)

        @torch.no_grad()
        def score(number: int) -> None:
            episode = episodes.episodes[number]
            items, query = (
                widened(_gather(bank, index.to(bank.device).flatten())).unsqueeze(0)
                for index in (episode.support, episode.query)
            )
            logits = fit(Support(items, episode.sizes), **distance)(query)
            ways, queries = episode.query.shape
            true_way = torch.arange(ways, device=bank.device).repeat_interleave(queries)
            right = (logits[0].argmax(dim=1) == true_way).double().mean()
            accuracies[number] = right.where(torch.isfinite(logits).all(), torch.nan)

        threads = 1 if bank.is_cuda else torch.get_num_threads()
        own = range(len(episodes))[world().share(len(episodes))]
        with together(), alone(), ThreadPoolExecutor(threads) as pool, one_thread_each():
            score(0)  # before the threads start: a lazy distance gets its weights here, in each process
            if 0 not in own:
                accuracies.zero_()
            list(pool.map(score, [number for number in own if number]))
        accuracies = summed(accuracies).cpu()
        check_finite(accuracies, "logits of each episode", hint)
        return accuracies

    def _default_chunk(self, bank: Tensor, items: int) -> int:
        floats = CPU_CHUNK
        if bank.is_cuda:
            unused = torch.cuda.memory_reserved(bank.device) - torch.cuda.memory_allocated(bank.device)  # held by torch
            free = torch.cuda.mem_get_info(bank.device)[0] + unused
            floats = int(free * SHARE_OF_FREE_MEMORY) // max(4, bank.element_size())
        return max(1, floats // (items * bank[0].numel()))


def adaptation_curve(
    trainer: Any, dataset: FewShotDataset, spec: EpisodeSpec, num_episodes: int = 1000, seed: int = 0
) -> list[EpisodicResult]:
    """Evaluates a MAMLTrainer before the inner loop and after each of its `eval_inner_steps`, on the same episodes.

    1,000 episodes show the shape of the curve. Each number of steps starts from scratch, so S of them take about S + 1
    times as long as one evaluation. The arguments are those of EpisodicEvaluator and its `evaluate`.

    Returns:
        Results after 0, 1, ..., S = `trainer.eval_inner_steps` steps.
    """
    if not hasattr(trainer, "eval_inner_steps"):
        raise UsageTypeError(
            f"expected a MAMLTrainer, got {type(trainer).__name__}, which has no inner steps; give one"
        )
    bank = trainer.bank(dataset)
    after = [partial(trainer.classify, inner_steps=steps) for steps in range(trainer.eval_inner_steps + 1)]
    evaluators = [EpisodicEvaluator(spec, num_episodes, seed, head=head) for head in after]
    together = trainer.transductive  # its classify does not say so
    return [replace(each.evaluate(trainer, dataset, bank), transductive=together) for each in evaluators]


def embed(method: Any, dataset: Labeled | None, bank: Tensor | None = None) -> tuple[Labeled, Tensor]:
    """Returns the labeled set that a method is evaluated on, and the method's bank (M, *item) of it."""
    if isinstance(method, EmbeddingBank):
        if dataset is not None or bank is not None:
            raise UsageError("expected a bank alone, got a data set beside it; leave one out")
        return method, method.embeddings
    if dataset is None:
        what = f"a data set to evaluate {type(method).__name__} on"
        raise UsageTypeError(f"expected {what}, got none; give images or an EmbeddingBank")
    if bank is not None:
        return dataset, bank.embeddings if isinstance(bank, EmbeddingBank) else bank
    if isinstance(dataset, EmbeddingBank):
        return dataset, dataset.embeddings
    return dataset, encode(method, dataset).embeddings if is_embedder(method) else method.bank(dataset)


def modules_of(method: object, head: object = None) -> tuple[nn.Module, ...]:
    """Returns the parts that have modes: a method, if it is a module, and a head's distance."""
    return tuple(each for each in (method, *parts_of(head)) if isinstance(each, nn.Module))


@dataclass(frozen=True)
class Classifier:
    """The function that computes logits, whether it is thread-safe, its name for tables, and what to do about NaN."""

    classify: Classify
    thread_safe: bool
    name: str
    divergence_hint: str
    transductive: bool

    @classmethod
    def of(cls, method: Any, head: Head | Classify | None) -> "Classifier":
        """Returns a method's own classifier, or the head instead, with the method's distance if it accepts one."""
        hint = getattr(method, "divergence_hint", "")
        if head is None and not isinstance(method, EmbeddingBank) and not is_embedder(method):
            name = getattr(method, "classifier", type(method).__name__)
            together = getattr(method, "transductive", False)
            return cls(method.classify, getattr(method, "thread_safe", False), name, hint, together)
        head = nearest_prototype if head is None else head
        function = parts_of(head)[0]
        more = (getattr(method, "distance", None),) if takes_distance(head) else ()
        name = name_of_head(head, *(more if function not in IGNORE_DISTANCE else ()))
        safe = inspect.isfunction(function)
        return cls(lambda support, query: head(support, query, *more), safe, name, hint, is_transductive(head))


def _fit_of(method: Any, head: Any) -> tuple[Callable[..., Scores], dict[str, Any]]:
    """Returns the function that fits a head to classes of any size, with its options, and its distance argument.

    Raises:
        UsageError: a plain function, or a method's own classifier, which need equally many shots of each class.
    """
    if head is None and not isinstance(method, EmbeddingBank) and not is_embedder(method):
        got = f"{type(method).__name__}'s own way"
        raise UsageError(f"expected a head for classes of different sizes, got {got}; give head=nearest_prototype")
    function, options = unwrapped(nearest_prototype if head is None else head)
    fit = getattr(function, "fit", None)
    if fit is None:
        got = f"{name_of_head(function)}, which takes classes of one size"
        raise UsageError(f"expected a head with a fit, for classes of different sizes, got {got}; see fitted_by")
    takes = "distance" in inspect.signature(fit).parameters and "distance" not in options
    return partial(fit, **options), {"distance": getattr(method, "distance", None)} if takes else {}


def _gather(bank: Tensor, index: Tensor) -> Tensor:
    """Returns bank[index], four times as fast on a CPU; float32 at least (float16 squares overflow), images up to 1."""
    return as_floats(bank.index_select(0, index.flatten()).unflatten(0, index.shape))


def _confusion(labeled: Labeled, episodes: EpisodeIndex, predicted: Tensor) -> tuple[tuple[ClassName, ...], Tensor]:
    """Returns the C classes and their confusion counts (C, C), from the predicted ways (E, N)."""
    classes, class_of_item = torch.unique(labeled.labels.cpu(), return_inverse=True)
    true_class = class_of_item[episodes.query].flatten(1)  # (E, N)
    predicted_class = class_of_item[episodes.support[:, :, 0]].gather(1, predicted)
    pairs = (true_class * len(classes) + predicted_class).flatten()
    counts = torch.bincount(pairs, minlength=len(classes) ** 2).unflatten(0, (-1, len(classes)))
    return tuple(names_of(classes, labeled.class_names)), counts
