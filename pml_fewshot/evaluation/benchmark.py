"""benchmark: evaluates methods on episodes and by retrieval, and puts the figures in one table."""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from pml_fewshot.checks import UsageError, UsageTypeError, check_choice
from pml_fewshot.data.dataset import FewShotDataset, Splits, joined_notes
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.modes import evaluating
from pml_fewshot.evaluation.episodic import Classify, EpisodicEvaluator, Method, Spec, embed, modules_of
from pml_fewshot.evaluation.fixed_support import evaluate_fixed
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.heads import Head
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable, RowContext
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.sampling.variable_episodes import VariableEpisodeSpec

SPECS = (EpisodeSpec(ways=5, shots=1, queries=15), EpisodeSpec(ways=5, shots=5, queries=15))  # what papers report


def benchmark(
    methods: Method | Mapping[str, Method | Sequence[Method]],
    data: Splits | FewShotDataset | None = None,
    specs: Sequence[Spec] = SPECS,
    retrieval: RetrievalTester | type[RetrievalTester] | None = RetrievalTester,
    num_episodes: int = 10_000,
    seed: int = 0,
    head: Head | Classify | None = None,
    reference: FewShotDataset | EmbeddingBank | Gallery | None = None,
    support: FewShotDataset | EmbeddingBank | None = None,
    timed: bool = True,
    note: str = "",
    split: Literal["train", "val", "test"] | None = None,
) -> ResultTable:
    """Evaluates every method, in eval mode, on the same episodes and by the same retrieval; one table line per method.

    Args:
        methods: an Embedder, a trainer (anything with `bank` and `classify`) or an EmbeddingBank; or a mapping of names
            to these or to sequences of these: one method trained with several seeds, whose figures are averaged.
        data: the classes to evaluate on; not needed for banks, which have their own labels.
        specs: sizes of the episodes.
        retrieval: tester; without a distance of its own it ranks by that of a trainer's loss. None skips retrieval, as
            does a method whose bank does not hold embeddings (MAML's holds images).
        num_episodes: for each spec.
        seed: of the episodes.
        head: classifies episodes instead of each method's own classifier, as in EpisodicEvaluator.
        reference: what retrieval searches: images for each method to embed, a bank or a Gallery; if None, the set
            itself, without the query.
        support: items of the same classes, equally many of each: they classify the set too; see evaluate_fixed.
        timed: record the seconds each method took; turn off where two tables must be identical byte for byte.
        note: what a reader must know in addition to the dataset's own note.
        split: which classes of Splits to use; the test classes if None.

    Raises:
        UsageError: a set that cannot supply the episodes, trainings of one method on different episodes, NaN.
        UsageTypeError: an embedder or a trainer without data, methods without names, a split of data that has none.
    """
    if isinstance(methods, Sequence):
        raise UsageTypeError("expected one method or a mapping of names to methods, got a sequence; name each of them")
    if not isinstance(methods, Mapping):
        methods = {type(methods).__name__: methods}
    if None in methods.values():
        raise UsageTypeError("expected methods to evaluate, got None; give an Embedder, a trainer or a bank")
    if not methods:
        raise UsageError("expected at least one method, got none; name what to evaluate")
    if isinstance(specs, EpisodeSpec | VariableEpisodeSpec):
        specs = (specs,)
    dataset: Any = data
    name_of_split = ""
    if isinstance(data, Splits):
        check_choice("split", split or "test", ("train", "val", "test"))
        name_of_split = "val" if data.test_is_val and split != "train" else split or "test"
        dataset = getattr(data, name_of_split)
        if dataset is None:
            raise UsageError(f"expected {name_of_split} among the splits, got none; choose another")
        if data.seen_in_training(name_of_split):
            note = joined_notes(note, "classes seen in training")
    elif split is not None:
        got = "a bank" if data is None else f"a {type(data).__name__}"
        raise UsageTypeError(f"expected Splits to take {split} from, got {got}; give the Splits, or leave split out")
    if reference is not None and reference is dataset:
        do = "leave reference out: each query then searches the others"
        raise UsageError(f"expected other references than the evaluated set, got the same; {do}")
    tester = retrieval() if callable(retrieval) else retrieval
    table = ResultTable()
    for name, method in methods.items():
        start = time.perf_counter()
        trainings: Sequence[Method] = method if isinstance(method, Sequence) else [method]
        if not trainings:
            raise UsageError(f"expected at least one training of {name!r}, got none; leave it out")
        episodic, retrieved, fixed = [], [], []
        for training in trainings:
            with evaluating(*modules_of(training, head)):
                alone = isinstance(training, EmbeddingBank)
                labeled, bank = embed(training, None if alone else dataset)
                given = () if alone else (labeled, bank)
                evaluators = [EpisodicEvaluator(spec, num_episodes, seed, head=head) for spec in specs]
                episodic.append([evaluator.evaluate(training, *given) for evaluator in evaluators])
                if tester is not None and bank.ndim == 2:
                    labels = labeled.labels.to(bank.device)
                    embeddings = EmbeddingBank(bank, labels, labeled.fingerprint(), labeled.class_names)
                    searched: Any = reference
                    if isinstance(reference, FewShotDataset):
                        rows, names = embed(training, reference)[1], reference.class_names
                        searched = EmbeddingBank(rows, reference.labels.to(rows.device), class_names=names)
                    retrieved.append(_ranked_by(tester, training).test(embeddings, searched))
                if support is not None:
                    fixed.append(evaluate_fixed(training, support, labeled, head))
        notes = joined_notes(labeled.note, note)
        seconds = (time.perf_counter() - start) / len(trainings) if timed else None
        own_split = "" if alone else name_of_split  # (a bank brings its own classes)
        context = RowContext(name, own_split, len(torch.unique(labeled.labels)), notes, seconds)
        for results in zip(*episodic, strict=True):
            table.add_episodic(context, *results)
        for trained in filter(None, (retrieved, fixed)):
            table.add_retrieval(context, *trained)
    return table


def _ranked_by(tester: RetrievalTester, method: Method) -> RetrievalTester:
    """Returns a copy of the tester that ranks by a trainer's distance if it has none of its own."""
    ranked = copy.copy(tester)  # the caller's tester may be used for another method
    if ranked.distance is None:
        ranked.distance = getattr(method, "distance", None)
    return ranked
