"""Charts of a trained method on a set of classes: what it gets right, what it confuses, and how sure it is.

Whatever the method, they use only what an evaluator uses: `bank`, `classify` and `distance`. The number of episodes
behind a chart depends on how long they take, because a report should take seconds; each chart states its number.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from pml_fewshot.checks import check_finite
from pml_fewshot.data.dataset import FewShotDataset, as_floats
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.modes import evaluating
from pml_fewshot.environment import one_thread_each
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, adaptation_curve, modules_of
from pml_fewshot.evaluation.search import Ranking
from pml_fewshot.evaluation.statistics import average
from pml_fewshot.report.image_plots import (
    embedding_points,
    neighbors_in,
    plot_embedding_map,
    plot_episode,
    plot_neighbours,
    plot_result,
)
from pml_fewshot.report.interactive_map import interactive_map
from pml_fewshot.report.page import Chart, Section, section_of
from pml_fewshot.report.result_plots import (
    calibration_bins,
    calibration_error,
    hardest_classes,
    plot_accuracy_grid,
    plot_adaptation,
    plot_confusion,
    plot_reliability,
)
from pml_fewshot.report.subject import FEWEST, SECONDS, Subject, affordable
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec

WAYS, SHOTS = (2, 5, 10, 20, 50), (1, 2, 5, 10)
ALL_AT_ONCE = 400  # classes at most in an episode that shows which are confused
MAPPED, MAPPED_CLASSES = 800, 40  # items and classes on a map: two seconds of t-SNE
DRAWN_QUERIES = 2  # of each class at a glance
COLUMNS = 12  # queries drawn of an episode
STRIPS = 6
TRIED = 200  # items from which those with strips are chosen


def trainer_sections(subject: Subject) -> list[Section]:
    """All sections on a method; one that cannot be drawn says why in its place."""
    wanted: dict[str, Callable[[Subject], list[Chart]]] = {
        "At a glance": at_a_glance,
        "Example episodes": example_episodes,
        "Accuracy over ways and shots": accuracy_grid,
        "Adaptation": adaptation,
        "What is confused": confusion,
        "Embeddings": embeddings,
        "How sure it is": reliability,
    }
    with evaluating(*modules_of(subject.trainer)):
        if failed := section_of("Pictures", partial(_embed, subject)):  # on all threads
            return failed
        # then on one: small operations on several take up to 20 times as long next to another busy process
        with one_thread_each():
            return [each for title, make in wanted.items() for each in section_of(title, partial(make, subject))]


def _embed(subject: Subject) -> list[Chart]:
    check_finite(subject.bank, "bank")
    return []


def at_a_glance(subject: Subject) -> list[Chart]:
    """An episode with one mistake among the queries that are drawn, and the accuracies of all the table's episodes."""
    episodes, logits = subject.scored.episodes, subject.scored.logits
    accuracies = subject.accuracies.get(subject.spec, subject.scored.right.double().mean(dim=1))
    source = (
        "the table's episodes" if subject.spec in subject.accuracies else "these episodes, which are not the table's"
    )
    queries = min(DRAWN_QUERIES, subject.spec.queries)
    mistakes = (~subject.scored.right).unflatten(1, (subject.spec.ways, -1))[:, :, :queries].sum(dim=(1, 2))
    one = (mistakes == 1).nonzero().flatten()
    number = int(one[0]) if len(one) else int(mistakes.argsort(stable=True)[len(mistakes) // 2])
    index = episodes[number : number + 1]
    episode = Episode(as_floats(subject.images[index.support]), as_floats(subject.images[index.query]))
    mean, half = (100 * value for value in average([accuracies]))
    drawn, shots = subject.spec.ways * queries, subject.spec.shots
    return [
        Chart(
            "result",
            f"{subject.spec}",
            f"One episode: {subject.spec.ways} new classes with {shots} example{'s' * (shots > 1)} of each, and the "
            f"method's probabilities for {drawn} queries, of which {drawn - int(mistakes[number])} are right. Over "
            f"{len(accuracies):,} such episodes the accuracy is {mean:.2f} +- {half:.2f} %.",
            partial(plot_result, accuracies, episode, logits[number : number + 1], 0, queries, (), subject.ink),
            (11.0, 4.8125),
            ("accuracy, %", "episodes"),
            [(100 * value, count) for value, count in sorted(Counter(accuracies.tolist()).items(), reverse=True)],
            f"The episode is the first {'with one mistake' if len(one) else 'of middling accuracy'} among the queries "
            f"that are drawn, of {len(episodes):,} (seed {subject.seed}). The accuracy is that of {source}, "
            f"{'transductive' if subject.trainer.transductive else 'inductive'}.",
        )
    ]


def example_episodes(subject: Subject) -> list[Chart]:
    """An episode of middling accuracy, and the one with the most errors."""
    order = subject.scored.right.sum(dim=1).argsort(stable=True)
    typical = _episode(subject, "typical", int(order[len(order) // 2]), "A typical episode", "one of middling accuracy")
    worst = _episode(subject, "worst", int(order[0]), "The worst episode", "the one with most errors")
    return [typical, worst]


def _episode(subject: Subject, name: str, number: int, title: str, which: str) -> Chart:
    episodes, logits = subject.scored.episodes, subject.scored.logits
    index, own, right = episodes[number : number + 1], logits[number], subject.scored.right[number]
    _, ways, queries = index.query.shape
    labels, images = subject.dataset.labels.cpu(), subject.images
    names = [subject.dataset.class_names[label] for label in labels[index.support[0, :, 0]].tolist()]
    columns = shown_queries(own.softmax(dim=1), right)
    counted = f"{int(right.sum())} of its {len(right)} queries are right"
    episode = Episode(as_floats(images[index.support]), as_floats(images[index.query]))
    rows = [(names[place // queries], *(100 * own[place].double().softmax(dim=0)).tolist()) for place in columns]
    return Chart(
        f"episode-{name}",
        f"{title}: {100 * right.double().mean().item():.0f} % right",
        f"A table of {subject.spec}: a row a class with its support images, a column for each of "
        f"{len(columns)} queries with the probability of each class; {counted}.",
        partial(plot_episode, episode, logits[number : number + 1], 0, None, names, subject.ink, columns),
        (2.4 + 0.66 * (len(columns) + index.support.shape[2]), 0.66 * (ways + 2)),
        ("query of", *names),
        rows,
        f"Of {len(episodes):,} episodes ({subject.spec}, seed {subject.seed}) {which}: {counted}, of which "
        f"{len(columns)} are drawn, right ones first. Probabilities in %: the softmax of {_logits_in_words(subject)}.",
    )


def _logits_in_words(subject: Subject) -> str:
    scale = subject.trainer.logit_scale
    return "the method's logits" if scale == 1 else f"the method's logits times its loss's scale, {scale:.3g}"


def shown_queries(probabilities: Tensor, right: Tensor, most: int = COLUMNS) -> list[int]:
    """Queries of an episode, by (N, W) probabilities: right ones, the surest first, then wrong ones, the surest last.

    At most half are wrong ones if there are enough right ones; of each kind as many as fit, evenly spaced.
    """
    sure = probabilities.amax(dim=1)
    hits, misses = ((mask.nonzero().flatten()) for mask in (right, ~right))
    hits, misses = hits[sure[hits].argsort(descending=True)], misses[sure[misses].argsort()]
    wrong = min(len(misses), max(most // 2, most - len(hits)))
    return [*_spaced(hits, most - wrong), *_spaced(misses, wrong)]


def _spaced(items: Tensor, count: int) -> list[int]:
    places = torch.linspace(0, len(items) - 1, min(count, len(items))).round().long()
    return items[places].tolist()


def accuracy_grid(subject: Subject) -> list[Chart]:
    """The accuracy for every pair of ways and shots that the classes, the method and the time allow."""
    smallest, queries = int(subject.dataset.labels.unique(return_counts=True)[1].min()), subject.spec.queries
    sizes = [EpisodeSpec(ways, shots, queries) for ways in WAYS for shots in SHOTS if shots + queries <= smallest]
    sizes = [spec for spec in sizes if spec.ways <= len(subject.dataset.class_names) and subject.allowed(spec)]
    counts = {spec: subject.episodes_of(spec, 2 * SECONDS / len(sizes)) for spec in sizes}
    results = {spec: subject.evaluate(spec, count) for spec, count in counts.items() if count >= FEWEST}
    if len(results) < 2:
        return []
    counted = sorted(len(each.per_episode) for each in results.values())
    fewest, most = f"{counted[0]:,}", f"{counted[-1]:,}"
    rows = [(s.ways, s.shots, 100 * r.mean, 100 * r.ci95, len(r.per_episode)) for s, r in results.items()]
    height = 1.2 + 0.62 * len({row[0] for row in rows})
    return [
        Chart(
            "accuracy-grid",
            "Accuracy on unseen classes, %",
            f"A heat map of accuracies with 95 % intervals, a row a number of ways, a column of shots: from "
            f"{min(row[2] for row in rows):.1f} to {max(row[2] for row in rows):.1f} %.",
            partial(plot_accuracy_grid, list(results.values())),
            (7.0, height),
            ("ways", "shots", "accuracy, %", "+-", "episodes"),
            rows,
            f"{fewest if fewest == most else f'{fewest} to {most}'} episodes of {queries} queries a class in a cell, "
            f"seed {subject.seed}, with 95 % intervals.",
        )
    ]


def adaptation(subject: Subject) -> list[Chart]:
    """The accuracy after each inner step, for a method that has inner steps."""
    if not subject.trainer.adaptation_steps:
        return []
    curve = partial(adaptation_curve, subject.trainer, subject.dataset, subject.spec, seed=subject.seed)
    results = curve(num_episodes=affordable(lambda few: curve(num_episodes=few)))
    rows = [(step, 100 * r.mean, 100 * r.ci95) for step, r in enumerate(results)]
    return [
        Chart(
            "adaptation",
            "Accuracy by inner steps",
            f"A line: {rows[0][1]:.1f} % before the inner loop, {rows[-1][1]:.1f} % after {len(rows) - 1} steps.",
            partial(plot_adaptation, results),
            head=("inner steps", "accuracy, %", "+-"),
            rows=rows,
            caption=f"{len(results[0].per_episode):,} episodes ({subject.spec}, seed {subject.seed}), 95 % intervals; "
            f"{'transductive' if results[0].transductive else 'inductive'}.",
        )
    ]


def confusion(subject: Subject) -> list[Chart]:
    """Which classes are confused, in episodes of all classes or, if not possible, in the experiment's episodes."""
    spec, dataset = _of_all_classes(subject), subject.dataset
    count = max(2, min(50, subject.episodes_of(spec))) if spec is not None else 0
    if spec is None:
        dataset = _often_confused(subject)
        spec = replace(subject.spec, ways=min(subject.spec.ways, len(dataset.class_names)))
        count = max(FEWEST, subject.episodes_of(spec))
    result = EpisodicEvaluator(spec, count, subject.seed).evaluate(subject.trainer, dataset, confusion=True)
    chosen = hardest_classes(result)
    if not chosen or result.confusion is None:
        return []
    labels, images, all_names = subject.dataset.labels.cpu(), subject.pictures, subject.dataset.class_names
    classes = () if images is None else labels.unique().tolist()
    first = {all_names[label]: images[labels == label][0] for label in classes if images is not None}
    counts = result.confusion[chosen][:, chosen].tolist()
    names = [str(result.classes[place]) for place in chosen]
    totals = result.confusion.sum(dim=1)[chosen].tolist()
    pairs = [
        (c / total, a, b)
        for a, row, total in zip(names, counts, totals, strict=True)
        for b, c in zip(names, row, strict=True)
        if a != b
    ]
    share, own, other = max(pairs)
    with_images = " with an image of each" if first else ""
    return [
        Chart(
            "confusion",
            f"The {len(chosen)} classes that are confused most",
            f"A matrix of {len(chosen)} classes{with_images}: the share of a row's queries that was taken for a "
            f"column's class. The largest, {100 * share:.0f} %: {own} taken for {other}.",
            partial(plot_confusion, result, first or None, ink=subject.ink),
            (2.6 + 0.6 * len(chosen), 2.2 + 0.6 * len(chosen)),
            ("queries of", *names, "all"),
            [(name, *row, total) for name, row, total in zip(names, counts, totals, strict=True)],
            f"% of a row's queries that were taken for a column's class, in {count:,} episodes of {spec}, of "
            f"{'all classes' if dataset is subject.dataset else f'{len(dataset.class_names)} classes alone'}, "
            f"seed {subject.seed}." + (" The rest went to other classes." if len(chosen) < len(result.classes) else ""),
        )
    ]


def _of_all_classes(subject: Subject) -> EpisodeSpec | None:
    """The spec of episodes of all classes, if there are not too many and the method can do them in the time allowed."""
    smallest, classes = (
        int(subject.dataset.labels.unique(return_counts=True)[1].min()),
        len(subject.dataset.class_names),
    )
    shots = min(5, smallest // 2)
    spec = EpisodeSpec(classes, shots, min(10, smallest - shots)) if smallest > 1 else subject.spec
    return spec if classes <= ALL_AT_ONCE and subject.allowed(spec) and subject.episodes_of(spec) >= 2 else None


def _often_confused(subject: Subject, most: int = 8) -> FewShotDataset:
    """The classes that are confused most often in the example episodes, then others."""
    episodes, logits = subject.scored.episodes, subject.scored.logits
    labels = subject.dataset.labels.cpu()
    of_ways = labels[episodes.support[:, :, 0]]  # (E, W)
    own, taken = of_ways.gather(1, episodes.true_ways.expand(len(logits), -1)), of_ways.gather(1, logits.argmax(dim=2))
    pairs = Counter(zip(own[own != taken].tolist(), taken[own != taken].tolist(), strict=True))
    chosen = dict.fromkeys(label for pair, _ in pairs.most_common() for label in pair)
    chosen |= dict.fromkeys(labels.unique().tolist())
    return subject.dataset.select_classes(list(chosen)[: max(most, subject.spec.ways)])


def embeddings(subject: Subject) -> list[Chart]:
    return [*embedding_map(subject), *(() if subject.pictures is None else nearest_neighbors(subject))]


def embedding_map(subject: Subject) -> list[Chart]:
    """A map of some classes' embeddings."""
    bank = subject.embeddings
    distance = subject.trainer.distance
    rows = bank.normalized() if distance is not None and distance.normalize_embeddings else bank
    kept = _some_classes(bank, subject.generator())
    small = EmbeddingBank(rows.embeddings[kept], bank.labels[kept], class_names=bank.class_names)
    method: Literal["tsne", "umap"] = "umap" if find_spec("umap") else "tsne"
    points = embedding_points(small, subject.seed, min(30.0, max(1.0, (len(small) - 1) / 3)), method)
    classes = len(small.labels.unique())
    images = None if subject.pictures is None else subject.pictures[kept]
    live = "" if images is None or find_spec("bokeh") is None else interactive_map(small, images, points, subject.ink)
    title = "UMAP" if method == "umap" else "t-SNE"
    return [
        Chart(
            "embedding-map",
            f"Map of {len(small):,} {'items' if images is None else 'images'} of {classes} classes ({title})",
            f"Points on a plane, in colors of {classes} classes; near points have near embeddings.",
            partial(plot_embedding_map, small, images, classes, subject.ink, points=points),
            (8.5, 6.5),
            caption=f"{title} of the embeddings ({bank.embeddings.shape[1]}-d, seed {subject.seed}). Which points are "
            "neighbors means something; distances between groups and their sizes mean nothing."
            + (" Hover over a point for its image and class." if live else ""),
            live=live,
        )
    ]


def _some_classes(bank: EmbeddingBank, generator: torch.Generator) -> Tensor:
    """Items of random classes, 40 at most; of a large class only its first items."""
    values = bank.labels.unique()
    chosen = values[torch.randperm(len(values), generator=generator)][:MAPPED_CLASSES]
    most = max(MAPPED // len(chosen), 2)
    return torch.cat([(bank.labels == each).nonzero().flatten()[:most] for each in chosen]).sort().values


def nearest_neighbors(subject: Subject) -> list[Chart]:
    """Items whose nearest other item is of their class, and items for which it is not."""
    bank, images, distance = subject.embeddings, subject.images, subject.trainer.distance
    drawn = torch.randperm(len(bank), generator=subject.generator()).tolist()
    count = min(len(bank), TRIED, affordable(lambda few: neighbors_in(bank, drawn[:few], 1, distance)))
    tried = drawn[:count]
    hit = (neighbors_in(bank, tried, 1, distance).labels[:, 0] == bank.labels[tried]).tolist()
    right = [item for item, is_right in zip(tried, hit, strict=True) if is_right]
    wrong = [item for item, is_right in zip(tried, hit, strict=True) if not is_right]
    shown = [*right[: max(STRIPS // 2, STRIPS - len(wrong))], *wrong[: max(STRIPS // 2, STRIPS - len(right))]]
    found = neighbors_in(bank, shown, 10, distance)
    names = [
        [bank.class_names[label] for label in row] for row in [bank.labels[shown].tolist(), *found.labels.tolist()]
    ]
    rows = [
        (own, rank, name, value, "yes" if name == own else "no")
        for own, near, values in zip(names[0], names[1:], found.distances.tolist(), strict=True)
        for rank, (name, value) in enumerate(zip(near, values, strict=True), start=1)
    ]
    return [
        Chart(
            "neighbors",
            f"{len(shown)} images and those nearest to each",
            f"{len(shown)} strips: an image, then its {found.indices.shape[1]} nearest ones, framed and marked by "
            f"whether they are of its class, with the distance.",
            partial(plot_neighbours, bank, images, shown, 10, distance, subject.ink),
            (9.0, 1.15 * len(shown)),
            ("image of", "rank", "neighbor of", "distance", "same class"),
            rows,
            f"Of {count:,} images drawn at random {len(right):,} have a nearest neighbor of their own class. Distances "
            f"are those of {Ranking.of(distance)}"
            f"{', of which larger ones are nearer' if distance is not None and distance.is_inverted else ''}.",
        )
    ]


def reliability(subject: Subject) -> list[Chart]:
    """Whether, for example, a probability of 80 % is right in 80 % of cases."""
    episodes, logits = subject.scored.episodes, subject.scored.logits
    probabilities, labels = (
        logits.double().softmax(dim=2).flatten(0, 1),
        episodes.true_ways.expand(len(logits), -1).flatten(),
    )
    bins = calibration_bins(probabilities, labels)
    error, sure = calibration_error(bins), probabilities.amax(dim=1).mean().item()
    right = (probabilities.argmax(dim=1) == labels).double().mean().item()
    half = average([(probabilities.argmax(dim=1) == labels).double().unflatten(0, (len(logits), -1)).mean(dim=1)])[1]
    certain = abs(sure - right) > half  # of the accuracy's 95 % interval over the episodes
    verdict = "too sure" if sure > right else "not sure enough"
    verdict = f"on the whole {verdict}" if certain else "the difference may be chance"
    return [
        Chart(
            "reliability",
            f"Reliability of the probabilities: expected calibration error {100 * error:.1f} %",
            f"A diagram: the best class has {100 * sure:.1f} % on average, and is right in {100 * right:.1f} %.",
            partial(plot_reliability, probabilities, labels),
            (5.2, 4.6),
            ("from, %", "to, %", "queries", "probability, %", "right, %", "at least", "at most"),
            [tuple(value if name == "queries" else 100 * value for name, value in b._asdict().items()) for b in bins],
            f"{len(labels):,} queries of {len(episodes):,} episodes ({subject.spec}, seed {subject.seed}). The best "
            f"class has {100 * sure:.1f} % on average and is right in {100 * right:.1f} % of cases: "
            f"{verdict}. Below the diagonal probabilities are too high. "
            f"They are the softmax of {_logits_in_words(subject)}.",
        )
    ]
