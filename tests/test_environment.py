"""What `import pml_fewshot` sets up for later imports: faiss gets fast kernels, torchvision loads with any torch."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pml_fewshot import environment
from pml_fewshot.environment import ImportHook, execute_faiss, execute_torchvision, prepare_imports

CORE = environment.OPENBLAS_CORES.get(torch.backends.cpu.get_cpu_capability())
CORES = """
def cores():  # of faiss's OpenBLAS; none where it has another BLAS
    from threadpoolctl import threadpool_info
    return {each.get("architecture", "") for each in threadpool_info() if "faiss" in each["filepath"]} - {""}
"""
FRESH = """
import os, platform, sys
import pml_fewshot
heavy = {"faiss", "torchvision", "sklearn", "scipy", "pytorch_metric_learning", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
from pml_fewshot.environment import keep_freed_memory
assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
import faiss
assert "OPENBLAS_CORETYPE" not in os.environ
import torch, torchvision
assert torchvision.transforms.Resize(8)(torch.rand(3, 16, 16)).shape == (3, 8, 8)
assert type(torchvision.models.resnet18(weights=None)).__name__ == "ResNet"
print(*cores())
"""
SET_BY_USER = """
import os, pml_fewshot, faiss
print(os.environ["OPENBLAS_CORETYPE"], *cores())
"""
FAISS_BEFORE = """
import os, faiss
before = cores()
import pml_fewshot, faiss
assert (cores(), "OPENBLAS_CORETYPE" in os.environ) == (before, False)
"""


def python(code: str, core: str | None = None) -> set[str]:
    """The words that code prints in a fresh interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    variables |= {"OPENBLAS_CORETYPE": core} if core else {}
    command = [sys.executable, "-c", CORES + code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_fresh_interpreter_imports_little_and_then_faiss_with_fast_kernels_and_torchvision():
    found = python(FRESH)
    assert CORE is None or found <= {CORE}


@pytest.mark.slow
def test_the_users_own_choice_and_a_faiss_imported_before_are_left_alone():
    found = python(SET_BY_USER, "Prescott")
    assert CORE is None or found == {"Prescott"}
    python(FAISS_BEFORE)


@pytest.mark.parametrize(("capability", "core"), [("AVX512", "SkylakeX"), ("AVX2", "Haswell"), ("DEFAULT", None)])
@pytest.mark.parametrize("by_user", [None, "Prescott"])
def test_the_core_is_set_while_faiss_loads_even_if_that_fails(
    capability: str, core: str | None, by_user: str | None, monkeypatch: pytest.MonkeyPatch
):
    def load(module: ModuleType) -> None:
        raise ImportError(f"core {os.environ.get('OPENBLAS_CORETYPE')}")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    if by_user:
        monkeypatch.setenv("OPENBLAS_CORETYPE", by_user)
    with pytest.raises(ImportError, match=f"core {by_user or core}"):
        execute_faiss(load, ModuleType("faiss"))
    assert os.environ.get("OPENBLAS_CORETYPE") == by_user


MISSING = "operator torchvision::nms does not exist"
OTHER = RuntimeError("CUDA driver too old")


@pytest.mark.parametrize(
    ("errors", "log", "raised"),
    [
        ([], ["import"], None),
        ([RuntimeError(MISSING)], ["import", "torchvision::nms", "torchvision::qnms", "import"], None),
        ([RuntimeError(MISSING), OTHER], ["import", "torchvision::nms", "torchvision::qnms", "import"], OTHER),
        ([OTHER], ["import"], OTHER),
        ([ImportError("no torchvision")], ["import"], ImportError),
    ],
)
def test_torchvisions_operators_are_declared_only_where_the_import_fails_for_lack_of_them(
    errors: list[Exception], log: list[str], raised: object, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    remaining = list(errors)

    def load(module: ModuleType) -> None:
        calls.append("import")
        assert "torchvision.half" not in sys.modules  # what the failed import left
        if remaining:
            sys.modules["torchvision.half"] = module
            raise remaining.pop(0)

    monkeypatch.setattr(sys, "modules", {n: m for n, m in sys.modules.items() if not n.startswith("torchvision.")})
    monkeypatch.setattr(torch.library, "define", lambda name, schema: calls.append(name))
    if raised is None:
        execute_torchvision(load, ModuleType("torchvision"))
    else:
        with pytest.raises(type(errors[-1]), match=str(errors[-1])):
            execute_torchvision(load, ModuleType("torchvision"))
    assert calls == log


def test_a_hook_runs_when_its_module_is_imported_by_whomever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hooked_module.py").write_text("loaded = True")
    (tmp_path / "its_user.py").write_text("import hooked_module, json")
    calls: list[str] = []

    def execute(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
        calls.append(module.__name__)
        exec_module(module)

    hooks = [ImportHook("hooked_module", execute), ImportHook("module_that_is_not_there", execute)]
    monkeypatch.setattr(sys, "meta_path", [*hooks, *sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("its_user").hooked_module.loaded
    assert calls == ["hooked_module"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("module_that_is_not_there")


def test_the_hooks_are_installed_once():
    prepare_imports()
    assert [each.name for each in sys.meta_path if isinstance(each, ImportHook)] == ["faiss", "torchvision"]
