"""Speed of FewShotClassifier after embedding: fit, predict, add a class; and a million examples through a Gallery.

    python -m experiments.speed.classifier_speed                     # 1,000 classes of 5, 1,280-d
    python -m experiments.speed.classifier_speed --million           # also 1,000,000 examples of 64-d

Milliseconds are medians of several calls on a quiet machine; embeddings are random, which does not affect the speed.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from pml_fewshot import FewShotClassifier, gallery_votes
from pml_fewshot.embedders.embedder import keep_memory
from pml_fewshot.evaluation.heads import nearest_prototype


def milliseconds(call: Callable[[int], object], times: int) -> float:
    taken = []
    for number in range(times):
        start = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - start)
    return 1000 * median(taken)


def thousand_classes(dims: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5000, dims)).astype(np.float32)
    names, one = np.repeat([f"class {number:04}" for number in range(1000)], 5), rows[:1]
    for reject in (None, "auto"):
        classifier = FewShotClassifier(reject=reject)
        print(f"1,000 classes of 5 examples, {dims}-d, reject={reject!r}:")
        print(f"  fit                    {milliseconds(lambda _: classifier.fit(rows, names), 5):8.1f} ms")  # noqa: B023
        print(f"  first prediction       {milliseconds(lambda _: classifier.predict(one), 1):8.1f} ms")  # noqa: B023
        print(f"  predict one            {milliseconds(lambda _: classifier.predict(one), 200):8.2f} ms")  # noqa: B023
        print(f"  first probability      {milliseconds(lambda _: classifier.predict_proba(one), 1):8.1f} ms")  # noqa: B023
        print(f"  predict_proba of one   {milliseconds(lambda _: classifier.predict_proba(one), 200):8.2f} ms")  # noqa: B023

        def add(number: int) -> None:
            classifier.partial_fit(rows[:5] + number + 1, [f"new {number}"] * 5)  # noqa: B023

        print(f"  add a class of 5       {milliseconds(add, 20):8.1f} ms")


def million() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(10_000, 64)).astype(np.float32)
    labels = rng.integers(0, 10_000, 1_000_000)
    rows = points[labels] + 0.5 * rng.normal(size=(1_000_000, 64)).astype(np.float32)
    truth = rng.integers(0, 10_000, 1000)
    asked = (points[truth] + 0.5 * rng.normal(size=(1000, 64))).astype(np.float32)
    heads: dict[str, Any] = {"prototypes": nearest_prototype, "gallery ivf": partial(gallery_votes, index="ivf")}
    for name, head in heads.items():
        classifier = FewShotClassifier(head=head)
        taken = milliseconds(lambda _: classifier.fit(rows, labels), 1)  # noqa: B023
        one = milliseconds(lambda number: classifier.predict(asked[[number]]), 200)  # noqa: B023
        accuracy = (classifier.predict(asked) == truth).mean()
        print(
            f"1,000,000 examples of 10,000 classes, 64-d, {name}: fit {taken / 1000:.1f} s, one {one:.2f} ms, ", end=""
        )
        print(f"accuracy {100 * accuracy:.1f} % of 1,000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, default=1280, help="of the embeddings (%(default)s, EfficientNet-Lite0's)")
    parser.add_argument("--million", action="store_true", help="also a million examples, which takes minutes")
    given = parser.parse_args()
    keep_memory(torch.device("cpu"))  # as ImageEmbedder does before it embeds
    thousand_classes(given.dims)
    if given.million:
        million()


if __name__ == "__main__":
    main()
