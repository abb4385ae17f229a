"""pml-fewshot classify: teach a folder of photos, and classify others."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.classify.classifier import FewShotClassifier
from pml_fewshot.classify.leave_one_out import leave_one_out
from pml_fewshot.classify.model import UNKNOWN
from pml_fewshot.classify.saved import HEADS
from pml_fewshot.classify.trunks import DEFAULT_TRUNK, trunk_of
from pml_fewshot.data.images import open_images
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.image_embedder import ImageEmbedder
from pml_fewshot.experiment.command_line import one_line_errors
from pml_fewshot.io.atomic import atomic_write

COLUMNS = ("file", "class", "probability", "similarity", "nearest example")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: teaches, evaluates, saves and classifies, whichever of these was asked for, in this order."""
    with one_line_errors():
        _classify(_parser().parse_args(arguments))


def _classify(given: argparse.Namespace) -> None:
    if (given.support is None) == (given.load is None):
        raise UsageError(
            "expected either --support or --load, got both or none; name a folder of photos, or a saved one"
        )
    asked = photos_in([*given.files, *given.query])
    if given.csv is not None and (not asked or given.csv.is_dir() or not given.csv.absolute().parent.is_dir()):
        got = f"{given.csv} with {len(asked)} photos"
        raise UsageError(f"expected photos for --csv, and a file in a folder that is there, got {got}; change it")
    if given.load is None:
        embedder = embedder_of(given)
        classifier = FewShotClassifier(embedder, HEADS[given.head or "nearest_prototype"], given.reject)
        classifier.fit_folder(given.support)
    else:
        fixed = ("head", "reject") if given.trunk else ("head", "reject", "checkpoint", "image_size")
        changed = [name.replace("_", "-") for name in fixed if getattr(given, name) is not None]
        if changed:
            raise UsageError(
                f"expected the saved classifier as it is, got --{changed[0]}; leave it out, or teach again"
            )
        classifier = FewShotClassifier.load(given.load, None if given.trunk is None else embedder_of(given))
    for name, *photos in given.add_class:
        files = photos_in([Path(each) for each in photos])
        if not files:
            raise UsageError(f"expected photos after --add-class {name}, got none; give one at least")
        classifier.partial_fit(files, [name] * len(files))
    print(f"{len(classifier.sources_)} examples of {len(classifier.classes_)} classes")
    if given.evaluate:
        print(leave_one_out(classifier))
    if given.save is not None:
        classifier.save(given.save)
        print(f"saved in {given.save}")
    if asked:
        rows = answers(classifier, asked)
        print(table([COLUMNS, *rows]))
        if given.csv is not None:
            with atomic_write(given.csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, *rows])


def embedder_of(given: argparse.Namespace) -> nn.Module | ImageEmbedder:
    """The trunk, with normalized embeddings: 11 points better with one photo per class (how-to/choose-a-trunk.md)."""
    trunk = trunk_of(given.trunk or DEFAULT_TRUNK, given.checkpoint, given.image_size)
    return trunk if isinstance(trunk, ImageEmbedder) else Embedder(trunk, normalize=True)


def answers(classifier: FewShotClassifier, files: Sequence[Path]) -> list[tuple[str, ...]]:
    """A row of the table for each file."""
    found = classifier.answer(files)
    return [
        (str(file), str(a.label), f"{a.probability:.3f}", f"{a.similarity:.3f}", a.nearest)
        for file, a in zip(files, found, strict=True)
    ]


def photos_in(places: Sequence[Path]) -> list[Path]:
    """The given files, and all images below the given folders."""
    files = []
    for place in places:
        if place.is_dir():
            with open_images(place) as found:
                if not found.names:
                    raise UsageError(
                        f"expected images in {place}, got {len(found.others)} other files; name another folder"
                    )
                files += found.files
        elif place.is_file():
            files.append(place)
        else:
            raise MissingFileError(f"expected a photo or a folder of photos at {place}, got none; check the path")
    return files


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def similarity_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pml-fewshot classify", description="Classifies photos from a few examples of each class."
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="PHOTO", help="photos to classify, or folders of them")
    add("--query", nargs="+", default=[], type=Path, metavar="PHOTO", help="the same, after other options")
    add("--support", type=Path, metavar="DIR", help="folder or zip of examples, one subfolder per class")
    add("--load", type=Path, metavar="DIR", help="a classifier written by --save, instead of --support")
    add("--save", type=Path, metavar="DIR", help="write the classifier, including its embedder, to this folder")
    add(
        "--add-class",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "PHOTO"),
        help="examples to add to a class, or a new class: its name, then photos or folders",
    )
    add(
        "--trunk",
        help=f"embedder: timm/NAME, torchvision/NAME, transformers/NAME or a run folder ({DEFAULT_TRUNK})",
    )
    add("--checkpoint", type=Path, help="file with the trunk's weights, instead of a download")
    add("--image-size", type=int, metavar="N", help="side of a run's images in pixels (84); other trunks set theirs")
    add("--head", choices=HEADS, help="how a photo is compared with the examples (nearest_prototype)")
    add(
        "--reject",
        type=similarity_or_auto,
        metavar="auto|SIMILARITY",
        help=f"similarity below which a photo is {UNKNOWN!r}; auto rejects about 5 %% of known ones",
    )
    add(
        "--evaluate",
        action="store_true",
        help="print leave-one-out accuracy, confusion, the gain of more examples, and rejection",
    )
    add("--csv", type=Path, metavar="FILE", help="also write the table to this file")
    return parser


if __name__ == "__main__":
    main()
