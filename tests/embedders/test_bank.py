"""EmbeddingBank against numpy, and features in all their forms against the same bank built by hand."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.decomposition import PCA, FastICA
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, QuantileTransformer, StandardScaler
from torch import Tensor

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.embedders import bank as bank_module
from pml_fewshot.embedders.bank import EmbeddingBank, load_bank
from tests.embedders.made_banks import EMBEDDINGS, LABELS, NAMES, NUMBERED, NUMBERS, ROWS, SOURCE, TEXTS, bank, check


@pytest.mark.parametrize(
    ("embeddings", "labels", "error", "message"),
    [
        (
            ROWS[0],
            NUMBERS,
            UsageError,
            r"embeddings of shape \(M, D\), got shape \(4,\); flatten each item to one row$",
        ),
        (ROWS[..., None], NUMBERS, UsageError, r"got shape \(6, 4, 1\); .* use EmbeddingBank.from_features"),
        (ROWS.long(), NUMBERS, UsageTypeError, r"float embeddings, got torch.int64; convert them with .float\(\)"),
        ([[1, 2], [3, 4]], [0, 1], UsageTypeError, r"float embeddings, got torch.int64; .* or write 1.0 for 1"),
        (EMBEDDINGS > 0, NUMBERS, UsageTypeError, "float embeddings, got torch.bool"),
        ("rows", NUMBERS, UsageTypeError, "embeddings as a tensor, numpy array, DataFrame or list of rows.*, got str;"),
        (None, NUMBERS, UsageTypeError, "got NoneType"),
        ([[1.0, 2.0], [3.0]], NUMBERS, UsageTypeError, "all numbers and of one length, got list of 2"),
        ([ROWS[0], ROWS[0, :2]], NUMBERS, UsageTypeError, "all numbers and of one length, got list of 2"),
        (EMBEDDINGS.astype(object), NUMBERS, UsageTypeError, r"got object \(6, 4\)"),
        (ROWS, NUMBERS.float(), UsageTypeError, "the bank's labels as integers or texts"),
        (ROWS, LABELS.astype(bool), UsageTypeError, "the bank's labels as integers or texts, got ndarray of bool"),
        (ROWS, NUMBERS[:, None], UsageError, r"the bank's labels of shape \(6,\)"),
        (ROWS, TEXTS[:5], UsageError, r"the bank's labels of shape \(6,\)"),
        (ROWS, np.full(6, 2**63, dtype=np.uint64), UsageError, r"labels below 2\*\*63, got 9223372036854775808"),
        (ROWS, torch.full((6,), 2**63, dtype=torch.uint64), UsageError, r"labels below 2\*\*63"),
        (ROWS / 0, NUMBERS, UsageError, "finite embeddings, got NaN or infinity in 6 of 6 rows"),
    ],
)
def test_what_is_no_bank_is_refused(embeddings: Any, labels: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^expected .*{message}"):
        EmbeddingBank(embeddings, labels)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (
            NUMBERED,
            ("ant", "bee"),
            "labels that are indices into the 2 class names, got labels from 0 to 3; number the classes from 0",
        ),
        (TEXTS, ("ant", "bee"), r"labels among the class names, got 'cat'; add it to class_names"),
        (NUMBERED, ("ant", "bee", "ant", "dog"), r"different class names, got \['ant'\] more than once"),
    ],
)
def test_names_that_do_not_fit_the_labels_are_refused(labels: Any, names: tuple[str, ...], message: str):
    with pytest.raises(UsageError, match=f"^expected {message}"):
        EmbeddingBank(ROWS, labels, class_names=names)


@pytest.mark.parametrize(
    ("embeddings", "dtype"),
    [
        (EMBEDDINGS, torch.float32),
        (EMBEDDINGS.astype(np.float16), torch.float16),
        (EMBEDDINGS.astype(">f8"), torch.float64),
        (np.asfortranarray(EMBEDDINGS), torch.float32),
        (EMBEDDINGS[::-1].copy()[::-1], torch.float32),
        (EMBEDDINGS.astype(np.float64).tolist(), torch.float32),
        (list(EMBEDDINGS), torch.float32),
        (list(EMBEDDINGS.astype(np.float64)), torch.float64),
        (tuple(ROWS.bfloat16()), torch.bfloat16),
        ([list(row) for row in EMBEDDINGS], torch.float32),
    ],
    ids=["float32", "float16", "swapped", "fortran", "reversed", "lists", "arrays", "float64s", "tensors", "scalars"],
)
def test_embeddings_as_arrays_and_lists_keep_their_type_and_pythons_become_float32(embeddings: Any, dtype: torch.dtype):
    check(EmbeddingBank(embeddings, LABELS), ROWS.to(dtype))


def test_tensors_and_arrays_are_not_copied():
    for given in (ROWS, EMBEDDINGS, ROWS.requires_grad_(False)):
        assert EmbeddingBank(given, NUMBERS).embeddings.data_ptr() == ROWS.data_ptr()
    assert EmbeddingBank(ROWS, NUMBERS).labels is NUMBERS


@pytest.mark.parametrize(
    "change", [list, tuple, np.array, lambda given: np.array(given, "S"), lambda given: np.array(given, object)]
)
def test_labels_as_texts_are_numbered_in_alphabetical_order_or_as_the_class_names_are(change: Any):
    check(EmbeddingBank(ROWS, change(TEXTS)), labels=NUMBERED, names=NAMES)
    check(
        EmbeddingBank(ROWS, change(TEXTS), class_names=NAMES[::-1]), labels=[3 - n for n in NUMBERED], names=NAMES[::-1]
    )


@pytest.mark.parametrize("change", [list, np.int32, np.uint8, np.uint64, lambda given: torch.tensor(given).short()])
def test_labels_as_integers_of_any_kind(change: Any):
    check(EmbeddingBank(ROWS, change(NUMBERED)), labels=NUMBERED)


BY_CLASS = {"cat": ROWS[[0, 2]], "ant": ROWS[[1, 5]], "dog": ROWS[[3]], "bee": ROWS[[4]]}  # of other sizes
ORDER = [0, 2, 1, 5, 3, 4]


@pytest.mark.parametrize(
    "change", [Tensor.clone, Tensor.numpy, Tensor.tolist, list], ids=["tensors", "numpy", "lists", "rows"]
)
def test_rows_by_class_are_named_by_their_keys(change: Any):
    made = EmbeddingBank.from_features({name: change(rows) for name, rows in BY_CLASS.items()})
    check(made, ROWS[ORDER], [2, 2, 0, 0, 3, 1], NAMES)
    numbered = EmbeddingBank.from_features({7: change(ROWS[:2]), np.int64(-3): change(ROWS[2:])}, note="n")
    check(numbered, labels=[7, 7, -3, -3, -3, -3])
    assert numbered.note == "n"


def test_a_tensor_of_three_axes_is_of_classes_in_order():
    for given in (
        ROWS.view(2, 3, 4),
        EMBEDDINGS.reshape(2, 3, 4),
        ROWS.view(2, 3, 4).tolist(),
        list(ROWS.view(2, 3, 4)),
    ):
        check(EmbeddingBank.from_features(given), labels=[0, 0, 0, 1, 1, 1])
    check(EmbeddingBank.from_features(ROWS.view(2, 3, 4), class_names=["a", "b"]), labels=[0] * 3 + [1] * 3, names="ab")


def test_pairs_and_labels_beside_the_rows():
    check(EmbeddingBank.from_features(EMBEDDINGS, TEXTS), labels=NUMBERED, names=NAMES)
    check(EmbeddingBank.from_features((EMBEDDINGS, LABELS)))
    check(EmbeddingBank.from_features(list(zip(ROWS, TEXTS, strict=True))), labels=NUMBERED, names=NAMES)
    check(EmbeddingBank.from_features(tuple(zip(EMBEDDINGS, NUMBERS, strict=True))))
    check(EmbeddingBank.from_features([(row, int(n)) for row, n in zip(EMBEDDINGS.tolist(), LABELS, strict=True)]))
    two = EmbeddingBank.from_features([(ROWS[0], 5), (ROWS[1], 4)])  # no pair of embeddings and labels
    check(two, ROWS[:2], [5, 4])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (EMBEDDINGS, r"labels beside the features, got float32 \(6, 4\) alone; give labels, a dict of rows by class"),
        (EMBEDDINGS.tolist(), "labels beside the features, got list of 6 alone"),
        ([], "labels beside the features, got list of 0 alone"),
        ({}, "rows by class, all named by texts or all by integers, got none"),
        ({"cat": ROWS, 3: ROWS}, "all named by texts or all by integers, got 'cat', 3; rename them"),
        ({(0, 1): ROWS}, r"all named by texts or all by integers, got \(0, 1\)"),
        ({"cat": ROWS, "dog": ROWS[:, :2]}, r"shape \(n, 4\), n > 0, .*, got torch.float32 \(6, 2\) for class 'dog'"),
        ({"cat": ROWS, "dog": ROWS[:0]}, r"got torch.float32 \(0, 4\) for class 'dog'; convert or leave it out"),
        ({"cat": ROWS, "dog": ROWS[0]}, r"got torch.float32 \(4,\) for class 'dog'"),
        (
            {"embeddings": ROWS, "labels": NUMBERS},
            "got torch.int64 .* 'labels'; .* give embeddings and labels as a pair",
        ),
        ({"cat": "rows"}, "embeddings as a tensor, .* got str"),
        ("features.pt", "embeddings as a tensor, .* got str"),
    ],
)
def test_other_features_are_refused_with_what_was_given(features: Any, message: str):
    with pytest.raises(UsageError, match=f"^expected .*{message}"):
        EmbeddingBank.from_features(features)


def table(**more: Any) -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({**dict(zip("abcd", EMBEDDINGS.T, strict=True)), **more})


@pytest.mark.parametrize("name", ["label", "class", "class_name", "Target", "species"])
def test_a_table_of_floats_and_a_column_of_labels(name: str):
    check(EmbeddingBank.from_features(table(**{name: TEXTS})), labels=NUMBERED, names=NAMES)
    as_category = table(**{name: TEXTS}).astype({name: "category", "a": "Float64"})
    check(EmbeddingBank.from_features(as_category), ROWS.double(), labels=NUMBERED, names=NAMES)
    numbers = table(**{name: LABELS, "path": TEXTS, "unused": TEXTS})
    if name != "species":  # an integer of another name may be a feature
        check(EmbeddingBank.from_features(numbers))


@pytest.mark.parametrize("name", ["embedding", "embeddings", "features", "clip"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_table_with_a_column_of_lists(name: str, dtype: Any):
    rows = EMBEDDINGS.astype(dtype)
    made = EmbeddingBank.from_features(table(**{name: list(rows)}, label=LABELS, id=range(6), path=TEXTS))
    check(made, torch.from_numpy(rows))
    check(
        EmbeddingBank.from_features(table(**{name: EMBEDDINGS.tolist(), "class": TEXTS})), labels=NUMBERED, names=NAMES
    )


def test_row_names_are_no_features_and_no_labels():
    pandas = pytest.importorskip("pandas")
    for names in (range(6), TEXTS):
        given = pandas.concat([pandas.DataFrame({"Unnamed: 0": names}), table(species=TEXTS)], axis=1)
        check(EmbeddingBank.from_features(given), labels=NUMBERED, names=NAMES)
    floats = pandas.concat([pandas.DataFrame({"Unnamed: 0": EMBEDDINGS[:, 0]}), table(species=TEXTS)], axis=1)
    assert EmbeddingBank.from_features(floats).embeddings.shape == (6, 5)


def test_columns_of_a_table_as_embeddings_and_as_labels():
    whole = table(e=list(EMBEDDINGS), label=TEXTS)
    check(EmbeddingBank(whole[list("abcd")], whole.label), labels=NUMBERED, names=NAMES)
    check(EmbeddingBank(whole.e, whole.label), labels=NUMBERED, names=NAMES)
    check(EmbeddingBank.from_features((whole[list("abcd")], LABELS)))
    pandas = pytest.importorskip("pandas")
    twice = pandas.concat([whole[list("abcd")], whole], axis=1).drop(columns="e")  # the same names twice
    check(EmbeddingBank.from_features(twice), ROWS.repeat(1, 2), NUMBERED, NAMES)
    with pytest.raises(UsageTypeError, match=r"got DataFrame"):
        EmbeddingBank(whole[[]], whole.label)
    mixed = whole[list("abcd")].astype({"b": "float64"})
    check(EmbeddingBank(mixed, LABELS), ROWS.double())
    with pytest.raises(
        UsageTypeError, match=r"expected columns of floats, got object in 'e', .* in 'label'; leave them"
    ):
        EmbeddingBank(whole, whole.label)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"label": TEXTS, "count": range(6)},
            "floats in the columns of the table .*, got int64 in 'count'; name that of",
        ),
        ({"label": TEXTS, "ok": [True] * 6}, "got bool in 'ok'"),
        (
            {},
            r"a column of labels \(.* or the only one of texts\) in the table, got columns a .*; name it 'label'",
        ),
        ({"one": TEXTS, "other": TEXTS}, "a column of labels .*, got columns .*, one .*, other "),
        ({"label": [*TEXTS[:5], None]}, r"a label in every row of the table, got none in 1 of 6 rows, first in row 5"),
        ({"clip": list(EMBEDDINGS), "dino": list(EMBEDDINGS), "label": TEXTS}, "one column of lists in the table, got"),
        ({"label": EMBEDDINGS[:, 0]}, "the bank's labels as integers or texts"),
    ],
)
def test_tables_in_which_it_is_not_clear_what_is_meant_are_refused(more: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=f"^expected .*{message}"):
        EmbeddingBank.from_features(table(**more))
    with pytest.raises(
        UsageError, match=r"columns of floats, or one of lists, in the table, got columns label .*; add"
    ):
        EmbeddingBank.from_features(table(label=TEXTS)[["label"]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mean_centering_and_normalization_are_numpys_in_float32_at_least(dtype: torch.dtype):
    original, mean = bank(dtype, SOURCE), torch.linspace(-1, 5, 4, dtype=torch.float64)
    rows, tolerance = original.embeddings.double().numpy(), 1e-6
    np.testing.assert_allclose(original.mean().double().numpy(), rows.mean(axis=0), rtol=1e-6)
    moved = rows - mean.numpy()[None]
    lengths = np.sqrt((moved**2).sum(axis=1, keepdims=True))
    centered = original.centered(mean)
    for result, expected in ((centered, moved), (centered.normalized(), moved / lengths)):
        assert result.embeddings.dtype == torch.promote_types(dtype, torch.float32)
        assert result.labels is original.labels
        np.testing.assert_allclose(result.embeddings.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    check(original, ROWS.to(dtype))


def test_lengths_beyond_float32_are_refused():
    long = EmbeddingBank(torch.tensor([[3.0, 4.0], [1e20, 1e20]]), [0, 1])
    with pytest.raises(UsageError, match="lengths of embeddings, got NaN or infinity in 1 of 2 rows, first in row 1"):
        long.normalized()


@pytest.mark.parametrize("shape", [(3,), (1,), (1, 4), ()])  # the last three would broadcast
def test_a_mean_of_another_width_is_refused(shape: tuple[int, ...]):
    with pytest.raises(UsageError, match=r"expected a mean of shape \(4,\), got \(.*\); use bank.mean\(\)"):
        bank().centered(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0.5, 2])
def test_the_power_transform_is_numpys_in_float32_at_least(power: float, dtype: torch.dtype):
    rows = ROWS.abs().to(dtype)
    rows[0, 1] = 0
    original = EmbeddingBank(rows, NUMBERS, SOURCE, note="of a test")
    result = original.power_transformed() if power == 0.5 else original.power_transformed(power)
    assert result.embeddings.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(result.embeddings.double(), (rows.double().numpy() + 1e-6) ** power, rtol=1e-5)
    assert (result.labels is original.labels, result.source, result.note) == (True, SOURCE, "of a test")
    check(original, rows)


def test_no_power_is_taken_of_negative_features_and_none_of_no_use():
    with pytest.raises(UsageError, match=r"at least 0 to raise to a power, got -0.5; take a trunk that ends in a ReLU"):
        EmbeddingBank(ROWS.abs() - torch.eye(6)[:, :4] * (ROWS.abs() + 0.5), NUMBERS).power_transformed()
    for power in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"expected a power above 0, got {power}; 0.5 is the paper's"):
            bank().power_transformed(power)
    assert len(EmbeddingBank(ROWS[:0], NUMBERS[:0]).power_transformed()) == 0


TRAIN = np.random.default_rng(1).normal(2, size=(40, 4)).astype(np.float32)
TRANSFORMERS: dict[str, Any] = {
    "PCA": PCA(2),
    "whitening": PCA(3, whiten=True),
    "ICA": FastICA(2, random_state=0, whiten="unit-variance"),
    "quantiles": QuantileTransformer(n_quantiles=40, output_distribution="normal"),
    "in place": StandardScaler(copy=False),
    "pipeline": make_pipeline(StandardScaler(), PCA(2)),
    "no fit needed": FunctionTransformer(np.abs),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_fitted_transformers_are_scikit_learns_block_by_block(
    name: str, mapped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(bank_module, "BLOCK_ROWS", 4)
    fitted, rows = clone(TRANSFORMERS[name]).fit(TRAIN.copy()), EMBEDDINGS
    expected, seen = fitted.transform(EMBEDDINGS.copy()), []
    if mapped:  # read-only: a write would end the process
        np.save(tmp_path / "rows.npy", EMBEDDINGS)
        np.save(tmp_path / "rows_labels.npy", LABELS)
        original = load_bank(tmp_path / "rows.npy")
    else:
        original = EmbeddingBank(rows, LABELS, SOURCE, note="of a test")
    own = fitted.transform
    monkeypatch.setattr(fitted, "transform", lambda block: seen.append(len(block)) or own(block), raising=False)
    result = original.transformed(fitted)
    assert seen == [4, 2]
    assert result.embeddings.dtype == torch.float32
    np.testing.assert_allclose(result.embeddings, expected, rtol=1e-4, atol=1e-5)
    assert (result.labels is original.labels, result.source, result.note) == (True, original.source, original.note)
    check(original)
    assert EmbeddingBank(ROWS.half(), NUMBERS).transformed(fitted).embeddings.dtype == torch.float32


class Odd(TransformerMixin, BaseEstimator):
    """Fitted to nothing, it gives what `function` makes of embeddings."""

    def __init__(self, function: Any = None):
        self.function = function

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, rows: Any) -> "Odd":
        return self

    def transform(self, rows: Any) -> Any:
        return self.function(rows)


@pytest.mark.parametrize(
    ("fitted", "error", "message"),
    [
        (
            PCA(2),
            UsageError,
            "got PCA that is not fitted; fit it on the training bank's embeddings: PCA(...).fit(train",
        ),
        (make_pipeline(PCA(2)), UsageError, "got Pipeline that is not fitted"),
        (PCA(2).fit(TRAIN[:, :3]), UsageError, "embeddings of 3 dimensions, as PCA was fitted on, got 4; fit it on"),
        (PCA, UsageTypeError, "a fitted scikit-learn transformer, got <class 'sklearn"),
        (np.abs, UsageTypeError, "a fitted scikit-learn transformer, got <ufunc 'absolute'>; give one such as PCA"),
        (LinearRegression().fit(TRAIN, TRAIN), UsageTypeError, "got LinearRegression()"),
        (Odd(lambda rows: rows[1:]), UsageError, "for each embedding from Odd, got shape (5, 4) for 6 embeddings; tak"),
        (Odd(lambda rows: rows[:, 0]), UsageError, "got shape (6,) for 6 embeddings"),
        (Odd(csr_array), UsageError, "got shape () for 6 embeddings"),
        (
            Odd(lambda rows: np.where(rows > 3, np.nan, rows)),
            UsageError,
            "expected finite embeddings from Odd, got NaN",
        ),
        (
            Odd(lambda rows: rows.astype(float) * 1e300),
            UsageError,
            "expected finite embeddings from Odd, got NaN or inf",
        ),
    ],
)
def test_what_cannot_transform_embeddings_is_refused(fitted: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        bank().transformed(fitted)


def test_the_fingerprint_is_of_the_labels_in_their_order_or_of_the_source_where_it_is_known():
    digest = hashlib.blake2b(digest_size=8)
    for label in LABELS.tolist():
        digest.update(label.to_bytes(8, "little", signed=True))
    for labels in (NUMBERS, NUMBERS.repeat_interleave(2)[::2]):  # strided
        assert EmbeddingBank(ROWS[:, :2], labels).fingerprint() == digest.hexdigest()
    known = bank(source=SOURCE)
    for derived in (known, known.normalized(), known.centered(torch.zeros(4)), known.to("cpu")):
        assert derived.fingerprint() == derived.source == SOURCE
        assert derived.note == "of a test"


@pytest.mark.parametrize("names", [(), tuple(f"c{number}" for number in range(9))])
def test_small_classes_are_left_out_and_the_note_says_so(names: tuple[str, ...]):
    labels = [5, 0, 5, 3, 0, 5, 8, 3]  # three of 5, two of 0 and 3, one of 8
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    whole = EmbeddingBank(rows, labels, SOURCE, names, "of a test")
    assert whole.without_small_classes(1) is whole  # (classes without items are none)
    for least in (2, 3):
        kept = [i for i, label in enumerate(labels) if labels.count(label) >= least]
        left = whole.without_small_classes(least)
        values = sorted({labels[i] for i in kept})
        expected = [values.index(labels[i]) if names else labels[i] for i in kept]
        check(left, rows[kept], expected, [names[v] for v in values] if names else ())
        out = f"{4 - len(values)} of 4 classes with fewer than {least} items left out ({8 - len(kept)} items)"
        assert left.note == f"of a test; {out}"
    with pytest.raises(UsageError, match="expected a class of at least 4 items, got at most 3; lower it"):
        whole.without_small_classes(4)


def test_a_bank_without_small_classes_is_another_set_and_the_same_one_however_it_was_asked_for():
    labels, rows = [0] * 6 + [1] * 4 + [2] * 2, torch.zeros(12, 3)
    for source in ("", SOURCE):
        banks = [EmbeddingBank(rows, labels, source, names) for names in ("abc", "abd", "xyc")]
        prints = [each.fingerprint() for each in banks[:1]] + [
            each.without_small_classes(3).fingerprint() for each in banks
        ]
        assert len(set(prints)) == 3
        assert prints[1] == prints[2]  # "abc" and "abd" without their last class
        assert banks[0].without_small_classes(4).fingerprint() == prints[1]
    known, other = (EmbeddingBank(rows, labels, source).without_small_classes(3) for source in (SOURCE, "another"))
    assert len({known.fingerprint(), other.fingerprint(), SOURCE}) == 3


def test_as_a_data_set_it_has_the_embeddings_as_items_and_the_classes_that_have_some():
    dataset = EmbeddingBank(ROWS, NUMBERS, note="of a test").as_dataset()
    assert torch.equal(dataset.floats(torch.arange(6)), ROWS)
    assert [dataset.class_names[label] for label in dataset.labels.tolist()] == list(map(str, LABELS))
    assert dataset.class_names == tuple(map(str, sorted(set(LABELS.tolist()))))
    assert dataset.note == "of a test"
    named = EmbeddingBank(ROWS, [2, 0, 2, 4, 0, 4], class_names="abcde").as_dataset()
    assert named.class_names == ("a", "c", "e")
    assert named.labels.tolist() == [1, 0, 1, 2, 0, 2]
