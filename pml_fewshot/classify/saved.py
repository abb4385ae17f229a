"""Saves and loads classifiers: classifier.json, and the safetensors files it names, of examples and embedder."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.classify.taught import Taught
from pml_fewshot.classify.trunks import made_from, name_of, rebuilt
from pml_fewshot.evaluation.gallery_votes import gallery_votes
from pml_fewshot.evaluation.heads import (
    k_nearest_neighbours,
    mean_similarity,
    name_of_head,
    nearest_neighbour,
    nearest_prototype,
    soft_nearest_neighbour,
    unwrapped,
)
from pml_fewshot.evaluation.linear_heads import cosine_classifier, logistic_regression, ridge_regression
from pml_fewshot.evaluation.reconstruction import feature_map_reconstruction
from pml_fewshot.evaluation.transductive_heads import alpha_tim, bd_cspn, laplacian_shot, pt_map
from pml_fewshot.evaluation.tuned_heads import fine_tuning, transductive_fine_tuning
from pml_fewshot.io.atomic import translate_write_errors, write_text
from pml_fewshot.io.checkpoint import check_exportable, load_embedder, plain_names
from pml_fewshot.io.tensors import CHECKSUM, checksum_of, json_checksum, read_tensors, write_tensors

ABOUT = "classifier.json"
HEADS = {
    head.__name__: head
    for head in (
        *(nearest_prototype, nearest_neighbour, mean_similarity, soft_nearest_neighbour, k_nearest_neighbours),
        *(cosine_classifier, ridge_regression, logistic_regression, fine_tuning, gallery_votes),
        *(bd_cspn, laplacian_shot, alpha_tim, pt_map, transductive_fine_tuning),
        feature_map_reconstruction,
    )
}


def save_classifier(folder: str | Path, options: dict[str, Any], taught: Taught) -> None:
    """Writes the constructor's options and the examples. The files that classifier.json names come first, named by
    their content, so that it names complete files at any moment; those of an earlier save are removed last."""
    folder, reject = Path(folder), options["reject"]
    about = {
        "version": 1,
        "classes": taught.classes.tolist(),
        "dtype": taught.classes.dtype.str,
        "sizes": taught.sizes,
        "sources": taught.sources,
        "reject": reject if reject in (None, "auto") else float(reject),
        "false_rejections": float(options["false_rejections"]),
        "head": _head_as_data(options["head"]),
        "embedder": None,
    }
    files = {"examples": {"items": taught.items}}
    if options["embedder"] is not None:
        about["embedder"] = {"name": name_of(options["embedder"]), "made_from": made_from(options["embedder"])}
        if weights := _weights(options["embedder"]):
            files["embedder"] = weights
    names = {kind: f"{kind}-{checksum_of(tensors).split(':')[1]}.safetensors" for kind, tensors in files.items()}
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _files_named_in(folder)
        for kind, tensors in files.items():
            write_tensors(folder / names[kind], tensors)
        about["files"] = names
        write_text(folder / ABOUT, json.dumps({**about, CHECKSUM: json_checksum(about)}, indent=1, ensure_ascii=False))
        for name in earlier - set(names.values()):
            (folder / name).unlink(missing_ok=True)


def load_classifier(folder: str | Path, embedder: Any, head: Any) -> tuple[dict[str, Any], Taught]:
    """The options and examples that `save_classifier` wrote; see FewShotClassifier.load."""
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise MissingFileError(f"expected {ABOUT} in {folder}, got none; make it by FewShotClassifier.save")
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        if about.pop(CHECKSUM) != json_checksum(about):
            raise ValueError("other content than its checksum says")
        names, sizes = about["files"], tuple(about["sizes"])
        classes = np.array(about["classes"], dtype=np.dtype(about["dtype"]))
        sources, reject, rate = about["sources"], about["reject"], about["false_rejections"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        got = f"one that is damaged or of another version ({error or type(error).__name__})"
        raise UsageError(f"expected a classifier in {folder}, got {got}; save it again") from error
    tensors, _ = read_tensors(folder / names["examples"])
    items = tensors["items"]
    if len(items) != sum(sizes) or len(items) != len(sources) or len(classes) != len(sizes):
        got = f"{len(items)} for {sum(sizes)} labels and {len(sources)} sources"
        raise UsageError(f"expected as many examples as {ABOUT} says in {folder}, got {got}; save it again")
    options = {
        "embedder": _embedder(folder, about["embedder"], names.get("embedder"), embedder),
        "head": _head_of(about["head"], head, folder),
        "reject": reject,
        "false_rejections": rate,
    }
    return options, Taught.of(items, np.repeat(classes, sizes), sources)


def _embedder(folder: Path, about: dict[str, Any] | None, weights: str | None, given: Any) -> Any:
    """The given embedder, if it is the one that was saved; when None, the saved one, rebuilt."""
    if about is None:
        if given is not None:
            got = f"{name_of(given)}; leave it out"
            raise UsageError(f"expected no embedder for the classifier in {folder}, which has none, got {got}")
        return None
    if given is not None:
        own = _weights(given)
        if weights is not None and weights != f"embedder-{checksum_of(own).split(':')[1]}.safetensors":
            got = f"{name_of(given)} with other weights" if name_of(given) == about["name"] else name_of(given)
            do = "give the one it was taught with, or teach a new classifier"
            raise UsageError(f"expected {about['name']}, the embedder of the classifier in {folder}, got {got}; {do}")
        own_form = made_from(given)
        if own_form and about["made_from"] and json.loads(json.dumps(own_form)) != about["made_from"]:
            got = "another preprocessing, mean, deviation or normalization"
            raise UsageError(f"expected {about['name']} as the classifier in {folder} had it, got {got}; give the same")
        return given
    if about["made_from"] is None or weights is None:
        do = f"give it: load({str(folder)!r}, embedder=...)"
        raise UsageError(f"expected an embedder for the classifier in {folder}, {about['name']}, got none; {do}")
    with torch.random.fork_rng(devices=[]):  # weights about to be replaced must not move the caller's generator
        embedder, module = rebuilt(about["made_from"])
    load_embedder(folder / weights, module)
    return embedder


def _files_named_in(folder: Path) -> set[str]:
    """The files of an earlier save, from its classifier.json; none if that is missing or damaged."""
    try:
        names = json.loads((folder / ABOUT).read_text("utf-8"))["files"].values()
        return {name for name in names if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _weights(embedder: Any) -> dict[str, Any]:
    module = getattr(embedder, "embedder", embedder)  # of an ImageEmbedder
    if not isinstance(module, nn.Module):
        return {}
    check_exportable(module)
    own = module.state_dict()
    return {plain: own[name].detach().cpu().clone() for plain, name in plain_names(module).items()}


def _head_as_data(head: Any) -> dict[str, Any]:
    """Name and options of a head of this library; for another, or one with a distance, its name for the message."""
    function, options = unwrapped(head)
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    plain = all(isinstance(value, bool | int | float | str | None) for value in options.values())
    known = plain and function in HEADS.values()
    return {"name": function.__name__, "options": options} if known else {"other": name_of_head(head)}


def _head_of(about: dict[str, Any], given: Any, folder: Path) -> Any:
    if given is not None:
        return given
    if about.get("name") not in HEADS:
        do = f"give it: load({str(folder)!r}, head=...)"
        got = about.get("other") or about.get("name")
        raise UsageError(f"expected a head of this library in {folder}, got {got}; {do}")
    head = HEADS[about["name"]]
    return partial(head, **about["options"]) if about["options"] else head
