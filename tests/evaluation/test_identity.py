"""Classes are known by their names: banks, galleries and figures that meet are aligned, or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank, load_bank, save_bank
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.sampling.episodes import EpisodeSpec

NAMES = ["ant", "bee", "cat", "dog"]
ROWS = torch.eye(4)
TESTER = RetrievalTester("precision_at_1")


def bank(names: list[str], noise: float = 0.0, each: int = 1) -> EmbeddingBank:
    """Every class's own direction, whatever it is numbered."""
    rows = torch.stack([ROWS[NAMES.index(name)] for name in names]).repeat_interleave(each, dim=0)
    rows = rows + noise * torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(0))
    return EmbeddingBank(rows, torch.arange(len(names)).repeat_interleave(each), class_names=tuple(names))


def of_file(folder: Path, names: list[str], kind: str) -> EmbeddingBank:
    given = bank(names)
    path = folder / f"{'-'.join(names)}{kind}"
    if kind == ".safetensors":
        save_bank(path, given)
    elif kind == ".npz":
        np.savez(path, embeddings=given.embeddings.numpy(), labels=names)
    else:
        torch.save({"embeddings": given.embeddings, "labels": tuple(names)}, path)
    return load_bank(path)


@pytest.mark.parametrize("kind", [".npz", ".pt", ".safetensors"])
def test_sets_numbered_apart_are_aligned_by_name(kind: str, tmp_path: Path) -> None:
    query, reference = (of_file(tmp_path, names, kind) for names in (NAMES[1:], NAMES))
    assert query.labels.tolist() == [0, 1, 2]
    for gallery in (reference, Gallery(reference, "flat")):
        result = TESTER.test(query, gallery)
        assert result["precision_at_1"] == 1
        assert result.per_class("precision_at_1") == {"bee": 1, "cat": 1, "dog": 1}


def test_labels_in_bytes_are_the_same_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "bytes.npz", embeddings=ROWS.numpy(), labels=np.array([name.encode() for name in NAMES]))
    assert load_bank(tmp_path / "bytes.npz").class_names == tuple(NAMES)


def test_names_of_either_side_alone_are_no_match() -> None:
    result = TESTER.test(bank(["cat", "ant"]), bank(["bee", "dog", "cat"]))
    assert (result["precision_at_1"], result.num_queries, result.num_excluded) == (1, 1, 1)  # nothing matches ant
    with pytest.raises(UsageError, match="a query whose class is among the references, got none"):
        TESTER.test(bank(["cat"]), bank(["ant", "bee"]))


@pytest.mark.parametrize("query_named", [True, False])
def test_names_on_one_side_and_numbers_on_the_other_are_refused(query_named: bool) -> None:
    named, numbered = bank(NAMES), replace(bank(NAMES), class_names=())
    pair = (named, numbered) if query_named else (numbered, named)
    says = "expected class names on both sides or on none, got 'ant', 'bee', 'cat', .. on one"
    for meet in (TESTER.test, lambda a, b: Gallery(a, "flat").add(b), lambda a, b: TESTER.test(a, Gallery(b, "flat"))):
        with pytest.raises(UsageError, match=says):
            meet(*pair)
    assert TESTER.test(numbered, numbered)["precision_at_1"] == 1


def test_an_image_set_and_a_gallery_of_another_order_are_aligned() -> None:
    images = (255 * ROWS).byte().view(4, 1, 2, 2)
    dataset = FewShotDataset(images[1:], torch.arange(3), NAMES[1:])
    backwards = FewShotDataset(images.flip(0), torch.arange(4), NAMES[::-1])
    embedder = Embedder(nn.Flatten())
    assert TESTER.test(embedder, dataset, backwards)["precision_at_1"] == 1
    rows = benchmark(embedder, dataset, [EpisodeSpec(2, 1, 1)][:0], TESTER, reference=embedder.encode(backwards)).rows
    assert [row.value for row in rows] == [1.0]


def test_search_gives_names_and_a_gallery_learns_new_ones(tmp_path: Path) -> None:
    gallery = Gallery(bank(["cat", "ant"]), "flat")
    gallery.add(bank(["dog", "cat"]))
    gallery.save(tmp_path / "gallery")
    for each in (gallery, Gallery.load(tmp_path / "gallery")):
        assert each.class_names == ("cat", "ant", "dog")
        assert each.labels.tolist() == [0, 1, 2, 0]
        found = each.search(ROWS[[0, 3]], 1)
        assert (found.indices.tolist(), found.labels.tolist(), found.names) == (
            [[1], [2]],
            [[1], [2]],
            [["ant"], ["dog"]],
        )
    numbered = Gallery(EmbeddingBank(ROWS, torch.tensor([7, 7, 2**60, -3])), "flat").search(ROWS[2:], 1)
    assert numbered.names == [[2**60], [-3]]


def test_where_fewer_are_found_than_asked_for_there_is_no_name() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 4, generator=generator)
    many = EmbeddingBank(rows, torch.arange(400) % 4, class_names=tuple(NAMES))
    found = Gallery(many, "ivf", "nprobe=1").search(rows[:3], 300)
    assert (found.indices == -1).any()
    for indices, labels, names in zip(found.indices.tolist(), found.labels.tolist(), found.names, strict=True):
        for index, label, name in zip(indices, labels, names, strict=True):
            assert (label, name) == ((0, None) if index == -1 else (index % 4, NAMES[index % 4]))


def test_accuracy_and_confusion_are_by_name() -> None:
    noisy, spec = bank(NAMES, 0.4, each=8), EpisodeSpec(3, 2, 4)
    named = EpisodicEvaluator(spec, 60).evaluate(noisy, confusion=True)
    numbered = EpisodicEvaluator(spec, 60).evaluate(replace(noisy, class_names=()), confusion=True)
    assert named.classes == tuple(NAMES)
    assert numbered.classes == (0, 1, 2, 3)
    assert list(named.per_class()) == NAMES
    assert list(named.per_class().values()) == list(numbered.per_class().values())
    assert named.episodes_hash != numbered.episodes_hash
    with pytest.raises(UsageError, match=r"at least 9 items .* got 8 in class 'ant'"):
        EpisodicEvaluator(EpisodeSpec(3, 4, 5), 60).evaluate(noisy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: EmbeddingBank(ROWS, torch.arange(4), class_names=("a", "b", "a", "c")),
            r"different class names, got \['a'\]",
        ),
        (
            lambda: EmbeddingBank(ROWS, torch.arange(4), class_names=("a", "b")),
            "indices into the 2 class names, got labels from 0 to 3",
        ),
        (lambda: EmbeddingBank(ROWS, torch.arange(4) - 1, class_names=tuple(NAMES)), "got labels from -1 to 2"),
    ],
)
def test_names_that_do_not_fit_the_labels_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_derived_banks_and_embedded_sets_keep_names() -> None:
    named = bank(NAMES)
    derived: list[EmbeddingBank] = [named.normalized(), named.centered(named.mean()), named.to("cpu")]
    assert {each.class_names for each in derived} == {tuple(NAMES)}
    images: Tensor = (255 * ROWS).byte().view(4, 1, 2, 2)
    assert Embedder(nn.Flatten()).encode(FewShotDataset(images, torch.arange(4), NAMES)).class_names == tuple(NAMES)
