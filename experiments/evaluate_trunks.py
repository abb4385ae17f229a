"""Which pretrained trunk suits your own photos? Frozen features ranked in one table, with speed, size and differences.

    python -m experiments.evaluate_trunks --photos DIR --trunk timm/resnet18 torchvision/resnet50 runs/mine
    python -m experiments.evaluate_trunks --photos DIR --trunk timm/tf_efficientnet_lite0=FILE --transform unit centered

DIR has one subfolder of photos per class. A trunk is LIBRARY/NAME, whose weights are downloaded unless =FILE gives
them, or the folder of a run. Each photo is embedded once per trunk, and nothing is trained. The best trunk comes first.
"""

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from sklearn.decomposition import PCA
from torch import nn

from pml_fewshot import EmbeddingBank, EpisodeSpec, ImageEmbedder, ResultTable, RetrievalTester, UsageError, benchmark
from pml_fewshot.checks import MissingFileError, check_at_least_one
from pml_fewshot.classify.photos import PhotoFile, labeled_photos
from pml_fewshot.classify.trunks import trunk_of
from pml_fewshot.data.images import BrokenImageError
from pml_fewshot.evaluation.statistics import average
from pml_fewshot.evaluation.table_formats import arrange, layout
from pml_fewshot.experiment.command_line import one_line_errors, program
from pml_fewshot.experiment.config import Device
from pml_fewshot.experiment.prepare import resolve_device
from pml_fewshot.io.atomic import write_text

Transform = Literal["unit", "centered", "pca", "whitened", "power"]
FITTED = ("centered", "pca", "whitened")  # fitted to all photos, so that the queries of an episode inform each other
RETRIEVAL = RetrievalTester(("precision_at_1", "mean_average_precision_at_r"))


def transformed(bank: EmbeddingBank, kind: Transform, dims: int = 64) -> EmbeddingBank:
    """Returns the bank with transformed, then L2-normalized rows; its note says how, and what was fitted to what.

    Args:
        bank: the photos' embeddings.
        kind: "unit": nothing else. "centered": minus the mean (CL2N of Wang et al. 2019, SimpleShot). "pca",
            "whitened": the first principal components, with variance 1 for the latter. "power": square roots (Hu et al.
            2021, "Leveraging the feature distribution in transfer-based few-shot learning"), which keep the sign for
            trunks that do not end in a ReLU.
        dims: number of principal components; fewer if the bank has too few photos or dimensions. With one whitened
            component fewer than photos, all photos are equally far from each other, whatever they show.
    """
    rows, photos = bank.embeddings, f"all {len(bank):,} photos without their labels, length 1"
    notes = {"unit": "length 1", "power": "signed roots, length 1", "centered": f"minus the mean of {photos}"}
    if kind == "centered":
        rows = bank.centered(bank.mean()).embeddings
    elif kind == "power":
        rows = rows.sign() * rows.abs().sqrt()
    elif kind in ("pca", "whitened"):
        dims = min(dims, len(bank) - 1, rows.shape[1])
        pca = PCA(dims, whiten=kind == "whitened", svd_solver="full")
        rows = torch.from_numpy(pca.fit_transform(rows.double().numpy())).float()
        notes[kind] = f"{dims} {'whitened ' * pca.whiten}principal components of {photos}"
    return replace(bank, embeddings=rows, note=notes[kind]).normalized()


def sizes(labels: np.ndarray, least: int, spec: EpisodeSpec, shots: Sequence[int]) -> tuple[np.ndarray, Any, str]:
    """Returns the photos of classes with enough of them, the episodes they allow, and a note of the classes left out.

    Args:
        labels: (n,) class names.
        least: fewest photos per class, at least 2: one for the support and one query.
        spec: desired ways and queries.
        shots: desired shots, one for each episode size.
    """
    names, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    least = max(least, 2)
    large = counts >= least
    if large.sum() < 2:
        wanted = f"two classes or more with at least {least} photos each"
        raise UsageError(f"expected {wanted}, got {large.sum()} of {len(names)} classes with so many; add photos")
    smallest = counts[large].min().item()
    shots = list(dict.fromkeys(min(k, smallest - 1) for k in shots))
    ways, queries = min(spec.ways, large.sum().item()), min(spec.queries, smallest - max(shots))
    note = f"{(~large).sum()} of {len(names)} classes with fewer than {least} photos left out"
    return np.flatnonzero(large[index]), [EpisodeSpec(ways, k, queries) for k in shots], "" if large.all() else note


def embedded(trunk: str, photos: Sequence[PhotoFile], device: torch.device) -> tuple[np.ndarray, dict[str, float]]:
    """Returns a trunk's embeddings (n, D) of the photos; its speed with reading and decoding; its weights and D."""
    name, _, checkpoint = trunk.partition("=")
    made = trunk_of(name, Path(checkpoint) if checkpoint else None)
    embedder = made if isinstance(made, ImageEmbedder) else ImageEmbedder(made)
    embedder.device = device
    start = time.perf_counter()
    rows = embedder.transform(photos)
    speed = len(photos) / (time.perf_counter() - start)
    module: Any = embedder.embedder
    weights = sum(weight.numel() for weight in module.parameters()) if isinstance(module, nn.Module) else 0
    return rows, {"images_per_second": speed, "weights": weights, "dims": rows.shape[1]}


def shown(table: ResultTable, facts: dict[str, dict[str, float]], path: Path | None) -> str:
    """Returns the table as Markdown, with lines' facts and paired differences from the first; writes it as CSV too."""
    columns, lines = arrange(table.rows)
    first = next(iter(lines.values()))
    (head, *cells), conditions = layout(table.rows, table.failures)
    exact: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(table.csv())))
    episodic = [column for column, row in first.items() if row.ways]
    head += [*(f"{columns[column]} minus first" for column in episodic), "images/s", "M weights", "D"]
    for figures, cell, line in zip(lines.values(), cells, exact, strict=False):  # trunks that failed are below these
        for column in episodic:
            values: Any = (figures[column].values, first[column].values)
            difference, ci95 = average([values[0] - values[1]])
            cell.append("" if figures is first else f"{100 * difference:+.2f} +- {100 * ci95:.2f}")
            line |= {f"{column}_minus_first": difference, f"{column}_minus_first_ci95": ci95}
        about = facts[figures[episodic[0]].method]
        cell += [f"{about['images_per_second']:.1f}", f"{about['weights'] / 1e6:.1f}", str(about["dims"])]
        line |= about
    if path is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, exact[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(exact)
        write_text(path, text.getvalue())
    cells = [head, ["---"] * len(head), *([*cell, *[""] * (len(head) - len(cell))] for cell in cells)]
    rows = ("| " + " | ".join(text.replace("|", r"\|") for text in cell) + " |" for cell in cells)
    return "\n".join(rows) + "".join(f"\n\n{text}" for text in conditions)


def main(
    photos: Path,
    trunk: tuple[str, ...],
    transform: tuple[Transform, ...] = (),
    dims: int = 64,
    ways: int = 5,
    shots: tuple[int, ...] = (5, 1),
    queries: int = 15,
    least: int = 2,
    num_episodes: int = 10_000,
    seed: int = 0,
    device: Device = "cpu",
    write: Annotated[Path | None, tyro.conf.arg(name="csv")] = None,
) -> ResultTable:
    """Prints the table.

    Args:
        photos: folder or zip with one subfolder of photos per class.
        trunk: timm/NAME or torchvision/NAME (with =FILE, weights from a file), transformers/NAME, or a run folder.
        transform: also evaluate transformed embeddings, in lines of their own.
        dims: principal components of pca and whitened; whitening needs several photos per component.
        ways: classes per episode; fewer if there are fewer.
        shots: support photos per class, the first ranks the trunks; fewer if the smallest class has too few.
        queries: query photos per class; fewer if the smallest class has too few.
        least: leave out classes with fewer photos, so that no small class makes all episodes small.
        num_episodes: episodes of each size.
        seed: seed of the episodes.
        device: device for embedding.
        write: file for the table at full precision.
    """
    if write is not None and not write.parent.is_dir():
        raise MissingFileError(f"expected an existing folder for {write}, got none; make it first")
    check_at_least_one("dims", dims)
    check_at_least_one("the number of shots", len(shots))
    where = resolve_device(device)
    banks: dict[str, EmbeddingBank] = {}
    facts: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    fitted: set[str] = set()
    with labeled_photos(photos) as (found, labels):
        items, specs, left_out = sizes(labels, least, EpisodeSpec(ways, 1, queries), shots)
        for text in dict.fromkeys(trunk):
            try:
                rows, about = embedded(text, [found[item] for item in items], where)
            except BrokenImageError:  # a broken photo, which no trunk could read
                raise
            except UsageError as error:
                failures[text] = str(error)
                continue
            plain = EmbeddingBank(rows, labels[items])
            own = {text: plain} | {f"{text}, {kind}": transformed(plain, kind, dims) for kind in transform}
            banks |= own
            fitted |= {f"{text}, {kind}" for kind in FITTED}
            facts |= dict.fromkeys(own, about)
    if not banks:
        raise UsageError("expected a trunk that can be used, got none; " + "; ".join(map(": ".join, failures.items())))
    measured = benchmark(banks, None, specs, RETRIEVAL, num_episodes, seed, timed=False, note=left_out).rows
    figures = [replace(row, protocol="transductive") if row.ways and row.method in fitted else row for row in measured]
    table = ResultTable(figures, failures).best_first()
    print(shown(table, facts, write))
    print(f"\nimages/s: reading, decoding, scaling and embedding {len(items):,} photos ({where.type})")
    return table


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog=program())
