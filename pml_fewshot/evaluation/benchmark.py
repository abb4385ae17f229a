"""benchmark: methods judged by episodes and by retrieval, side by side in one table."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pml_fewshot.checks import require
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.episodic import Judged, evaluate_grid
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import Judgement, ResultTable
from pml_fewshot.parts import build

Method = Embedder | Judged | EmbeddingBank

SPECS = (EpisodeSpec(5, 1, 15), EpisodeSpec(5, 5, 15))  # what papers report


def benchmark(
    methods: Method | Mapping[str, Method | Sequence[Method]],
    data: Splits | FewShotDataset | None = None,
    specs: Sequence[EpisodeSpec] = SPECS,
    retrieval: RetrievalTester | Callable[[], RetrievalTester] | None = RetrievalTester,
    num_episodes: int = 10_000,
    seed: int = 0,
    head: Callable[[Tensor, Tensor], Tensor] | None = None,
    reference: EmbeddingBank | Gallery | None = None,
    timed: bool = True,
    note: str = "",
    split: str = "test",
) -> ResultTable:
    """Judges every method on the same episodes and by the same retrieval.

    Args:
        methods: an Embedder, a trainer (anything with `bank` and `classify`) or an EmbeddingBank; or a mapping of names
            to such, or to a sequence of such: trainings of one method from several seeds, whose figures are averaged.
        data: the classes to judge on, of Splits the test classes; not needed for banks, which bring their labels.
        specs: sizes of the episodes.
        retrieval: tester (or factory); without a distance of its own it ranks by that of a trainer's loss. None leaves
            retrieval out, as does a method whose bank is not of embeddings (MAML's is of images).
        num_episodes: of each spec.
        seed: of the episodes.
        head: classifies episodes in place of a trainer's own way, and embedders and banks (nearest_prototype when
            None).
        reference: gallery that retrieval searches; when None the judged set searches among itself.
        timed: note the seconds that each method took; off where two tables are to be the same byte by byte.
        note: what a reader must know beside the data set's own note.
        split: what the classes are called in the table.

    Returns:
        A table with a line a method, in the order given.

    Raises:
        ValueError: a set that cannot give the episodes, trainings of one method judged on different episodes, NaN.
        TypeError: an embedder or a trainer without data, or methods without names.
    """
    if isinstance(methods, Sequence):
        raise TypeError("expected one method or a mapping of names to methods, got a sequence; name each: {'a': a}")
    if not isinstance(methods, Mapping):
        methods = {type(methods).__name__: methods}
    require(len(methods) > 0, "at least one method", "none", "name what to judge")
    dataset = data.test if isinstance(data, Splits) else data
    tester = build(retrieval)
    table = ResultTable()
    for name, method in methods.items():
        start = time.perf_counter()
        trainings: list[Method] = list(method) if isinstance(method, Sequence) else [method]
        require(len(trainings) > 0, f"at least one training of {name!r}", "none", "leave it out")
        episodic, retrieved = [], []
        for training in trainings:
            labelled, bank = _embedded(training, dataset)
            embeddings = None  # MAML's bank is of images
            if bank.ndim == 2:
                embeddings = EmbeddingBank(bank, labelled.labels.to(bank.device), labelled.fingerprint())
            if isinstance(training, Embedder | EmbeddingBank):
                assert embeddings is not None
                episodic.append(evaluate_grid(embeddings, None, specs, num_episodes, seed, head=head))
            else:
                episodic.append(evaluate_grid(training, labelled, specs, num_episodes, seed, bank, head))
            if tester is not None and embeddings is not None:
                retrieved.append(_ranked_by(tester, training).test(embeddings, reference))
        seconds = (time.perf_counter() - start) / len(trainings)
        judged = Judgement(
            name,
            split,
            len(torch.unique(labelled.labels)),
            "; ".join(text for text in (getattr(labelled, "note", ""), note) if text),
            getattr(trainings[0], "transductive", False),
            seconds if timed else None,
        )
        for results in zip(*episodic, strict=True):
            table.add_episodic(judged, *results)
        if retrieved:
            table.add_retrieval(judged, *retrieved)
    return table


def _embedded(method: Method, dataset: FewShotDataset | None) -> tuple[FewShotDataset | EmbeddingBank, Tensor]:
    """The labelled set and its bank (M, *item)."""
    if isinstance(method, EmbeddingBank):
        return method, method.embeddings
    if dataset is None:
        raise TypeError(f"expected data to judge a {type(method).__name__} on, got none; give splits or a data set")
    return dataset, method.encode(dataset).embeddings if isinstance(method, Embedder) else method.bank(dataset)


def _ranked_by(tester: RetrievalTester, method: Method) -> RetrievalTester:
    """The tester, ranking by a trainer's distance where it has none of its own."""
    if tester.distance is not None:
        return tester
    ranked = copy.copy(tester)  # the caller's own may serve another method
    ranked.distance = getattr(method, "distance", None)
    return ranked
