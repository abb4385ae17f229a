"""import torchvision works with or without its compiled operators once pml_fewshot is imported."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from pml_fewshot.torchvision_import import ensure_torchvision


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchvision_works_in_a_fresh_interpreter() -> None:
    code = (
        "import pml_fewshot, sys\n"
        "assert 'torchvision' in sys.modules\n"
        "import torch, torchvision\n"
        "from torchvision import transforms, datasets, models\n"
        "model = models.resnet18(weights=None)\n"
        "print(tuple(transforms.Resize(8)(torch.rand(3, 16, 16)).shape), type(model).__name__)\n"
    )
    assert python(code).strip() == "(3, 8, 8) ResNet"


def test_it_is_used_only_when_the_plain_import_fails() -> None:
    """And a second call does nothing."""
    code = (
        "import torch\n"
        "defined = []\n"
        "real = torch.library.define\n"
        "torch.library.define = lambda name, *a, **k: (defined.append(name), real(name, *a, **k))\n"
        "try:\n"
        "    import torchvision\n"
        "    plain = True\n"
        "except RuntimeError:\n"
        "    plain = False\n"
        "defined.clear()\n"
        "from pml_fewshot.torchvision_import import ensure_torchvision\n"
        "first = [name for name in defined if name in ('torchvision::nms', 'torchvision::qnms')]\n"
        "defined.clear()\n"
        "ensure_torchvision()\n"
        "print(plain, sorted(first), defined)\n"
    )
    assert python(code).strip() in ("True [] []", "False ['torchvision::nms', 'torchvision::qnms'] []")


class FakeTorchvision(Loader, MetaPathFinder):
    """In place of torchvision: an import fails with each of the errors in turn, and then works."""

    def __init__(self, errors: list[Exception], log: list[str]) -> None:
        self.errors, self.log = errors, log

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "torchvision" else None

    def exec_module(self, module: ModuleType) -> None:
        self.log.append("import")
        assert "torchvision.half" not in sys.modules, "half-imported modules were kept"
        if self.errors:
            sys.modules["torchvision.half"] = module  # what a failed import leaves behind
            raise self.errors.pop(0)


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[Exception]], list[str]]]:
    """Lets the imports of torchvision fail with the errors given; returns a log of imports and definitions."""
    real = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == "torchvision"}
    for name in real:
        del sys.modules[name]
    log: list[str] = []

    def install(errors: list[Exception]) -> list[str]:
        monkeypatch.setattr(sys, "meta_path", [FakeTorchvision(errors, log), *sys.meta_path])
        monkeypatch.setattr(torch.library, "define", lambda name, schema: log.append(f"define {name}"))
        return log

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules.update(real)


FailWith = Callable[[list[Exception]], list[str]]
MISSING = "operator torchvision::nms does not exist"


def test_missing_operator_is_declared_and_the_import_tried_again(fail_with: FailWith) -> None:
    log = fail_with([RuntimeError(MISSING)])
    ensure_torchvision()
    assert log == ["import", "define torchvision::nms", "define torchvision::qnms", "import"]


def test_nothing_is_declared_where_the_plain_import_works(fail_with: FailWith) -> None:
    log = fail_with([])
    ensure_torchvision()
    ensure_torchvision()
    assert log == ["import"]


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA driver too old"), ImportError("No module named 'torchvision'")], ids=["other", "none"]
)
def test_other_errors_are_raised(error: Exception, fail_with: FailWith) -> None:
    log = fail_with([error])
    with pytest.raises(type(error), match=str(error)):
        ensure_torchvision()
    assert log == ["import"]


def test_error_of_the_second_try_is_raised(fail_with: FailWith) -> None:
    fail_with([RuntimeError(MISSING), RuntimeError("still broken")])
    with pytest.raises(RuntimeError, match="still broken"):
        ensure_torchvision()
