"""evaluate_fixed: the accuracy on given queries with a given support of the same classes."""

import torch

from pml_fewshot.checks import UsageError, check_at_least_one, check_finite
from pml_fewshot.data.dataset import as_floats
from pml_fewshot.embedders.bank import EmbeddingBank, align
from pml_fewshot.embedders.modes import evaluating
from pml_fewshot.evaluation.episodic import Classifier, Classify, Labeled, Method, embed, modules_of
from pml_fewshot.evaluation.heads import Head
from pml_fewshot.evaluation.retrieval import RetrievalResult

QUERIES = 256  # classified at a time, unless they inform each other


def evaluate_fixed(
    method: Method,
    support: Labeled,
    query: Labeled,
    head: Head | Classify | None = None,
    shots: int | None = None,
) -> RetrievalResult:
    """Classifies every query once, among all classes of the support: no episodes are drawn, and nothing is random.

    Args:
        method: an Embedder or a trainer; or the support bank again, if both sides are banks from any tool.
        support, query: images, or embeddings, with the same classes by name.
        head: classifies instead of the method's own classifier, as in EpisodicEvaluator.
        shots: how many support items of each class to use, the first ones; if None, all, which must be equally many.

    Returns:
        The "accuracy", with ci95 over the queries, per_query and per_class; a table shows it next to retrieval figures.

    Raises:
        UsageError: classes of different sizes without `shots`, too few items, a query's class without support, NaN.
    """
    if shots is not None:
        check_at_least_one("shots", shots)
    if support is query:
        raise UsageError("expected other items as support than the queries, got the same set; split it by items")
    with evaluating(*modules_of(method, head)):
        (named, rows), (asked, queries) = (
            embed(method, each) if not isinstance(method, EmbeddingBank) else embed(each, None)
            for each in (support, query)
        )
        labels, names = align(asked, named)
        classes, counts = torch.unique(named.labels, return_counts=True)
        wanted = int(counts.min()) if shots is None else shots
        if int(counts.min()) < wanted or (shots is None and int(counts.max()) > wanted):
            got = f"got {int(counts.min())} to {int(counts.max())}"
            do = f"give shots={int(counts.min())} to take the first of each"
            raise UsageError(f"expected {shots or 'the same number of'} support items of each class, {got}; {do}")
        position = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
        if len(strange := labels[classes[position] != labels]):
            name = names[int(strange[0])] if names else int(strange[0])
            got = f"none of class {name!r} ({len(strange)} queries have no class there)"
            raise UsageError(f"expected support of each query's class, got {got}; add it, or leave the queries out")
        first = torch.stack([(named.labels == label).nonzero().flatten()[:wanted] for label in classes])  # (W, K)
        classifier = Classifier.of(method, head)
        size = len(queries) if classifier.transductive else QUERIES
        shown = as_floats(rows[first])[None]
        parts = [classifier.classify(shown, as_floats(part)[None])[0] for part in queries.split(size)]
        logits = torch.cat(parts)  # (N, W)
    check_finite(logits, "logits of each query", classifier.divergence_hint)
    correct = (logits.argmax(dim=1) == position).double().cpu()
    described = f"{len(classes)} classes of {wanted} support items, {classifier.name}"
    described += ", transductive" if classifier.transductive else ""
    return RetrievalResult(
        {"accuracy": correct},
        labels.cpu(),
        num_excluded=0,
        k=wanted,
        protocol="fixed support",
        ranking=described,
        class_names=names,
        queries_hash=asked.fingerprint(),
    )
