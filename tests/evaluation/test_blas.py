"""The warning of an OpenBLAS in faiss that takes the processor for an old one."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from pml_fewshot.evaluation import blas


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    blas.warn_of_slow_blas.cache_clear()
    yield
    blas.warn_of_slow_blas.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, core: str | None, capability: str) -> None:
    monkeypatch.setattr(blas, "faiss_blas_core", lambda: core)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("core", ["Prescott", "Sandybridge"])
def test_an_old_core_on_a_newer_processor_is_warned_of_once(
    core: str, capability: str, monkeypatch: pytest.MonkeyPatch
):
    pretend(monkeypatch, core, capability)
    with pytest.warns(UserWarning, match=f"takes this processor for a {core} .* set OPENBLAS_CORETYPE="):
        blas.warn_of_slow_blas()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blas.warn_of_slow_blas()


@pytest.mark.parametrize(
    ("core", "capability"),
    [("Haswell", "AVX2"), ("SkylakeX", "AVX512"), ("Zen", "AVX2"), (None, "AVX512"), ("Prescott", "DEFAULT")],
)
def test_a_core_that_fits_is_not_warned_of(core: str | None, capability: str, monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, core, capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blas.warn_of_slow_blas()


def test_the_core_is_a_name_or_unknown():
    core = blas.faiss_blas_core()
    assert core is None or (isinstance(core, str) and core)
