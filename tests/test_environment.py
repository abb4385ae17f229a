"""What `import pml_fewshot` sets up for later imports: faiss gets fast kernels, torchvision loads with any torch."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from pml_fewshot import (
    Embedder,
    EmbeddingBank,
    EpisodeSpec,
    EpisodeStream,
    EpisodicEvaluator,
    FewShotDataset,
    ProtoNetTrainer,
    RetrievalTester,
    environment,
    fit,
)
from pml_fewshot.embedders.embedder import encode, encode_to_file
from pml_fewshot.environment import (
    ImportHook,
    cpu_quota,
    execute_faiss,
    execute_torchvision,
    keep_memory,
    limit_threads,
    prepare_imports,
)

CORE = environment.OPENBLAS_CORES.get(torch.backends.cpu.get_cpu_capability())
FRESH = """
import os, platform, sys
import pml_fewshot, pml_fewshot.data.glyphs, pml_fewshot.data.omniglot
heavy = "faiss torchvision sklearn scipy pytorch_metric_learning matplotlib tensorboard tyro".split()
assert not sys.modules.keys() & heavy, sys.modules.keys() & heavy
from pml_fewshot.environment import keep_freed_memory
assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
if platform.libc_ver()[0] == "glibc":  # in threads too, of blocks larger than a heap of a thread's own
    import concurrent.futures, resource, torch
    pages = 80 * 2**20 // resource.getpagesize()
    def faults(pool):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        list(pool.map(lambda _: torch.ones(80, 2**18).sum(), range(10)))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert any(faults(pool) < pages for _ in range(10))  # the first are new blocks: glibc cannot reuse all at once
import faiss
assert "OPENBLAS_CORETYPE" not in os.environ
import torch, torchvision
assert torchvision.transforms.Resize(8)(torch.rand(3, 16, 16)).shape == (3, 8, 8)
assert type(torchvision.models.resnet18(weights=None)).__name__ == "ResNet"
# PML comes without scipy.stats, which its only function that needs it finds, as does another thread meanwhile
from pytorch_metric_learning.utils import common_functions
assert "scipy.stats" not in sys.modules
asked = []
def of_pml(module):
    from scipy.stats import rankdata
    asked.append(rankdata)
pml_fewshot.environment.execute_pml(of_pml, None)
assert len(asked) == 1
assert common_functions.make_label_to_rank_dict([30, 10, 20]) == {30: 2, 10: 0, 20: 1}
from threadpoolctl import threadpool_info
print(*(each.get("architecture", "") for each in threadpool_info() if "faiss" in each["filepath"]))
"""


def test_whatever_trains_embeds_or_evaluates_on_a_cpu_keeps_freed_memory_once_unless_switched_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    trainer = ProtoNetTrainer(Embedder(nn.Sequential(nn.Flatten(), nn.Linear(9, 2))))
    noise = torch.randint(256, (12, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = FewShotDataset(noise, torch.arange(12) % 3, ["a", "b", "c"])
    bank, spec = EmbeddingBank(noise.flatten(1).float(), dataset.labels), EpisodeSpec(2, 1, 1)
    optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
    ways: list[Callable[[], object]] = [
        lambda: fit(trainer, EpisodeStream(dataset, spec, 0), optimizer, 1, progress=False),
        lambda: encode(trainer.embedder, dataset),
        lambda: encode_to_file(trainer.embedder, dataset, tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"),
        lambda: EpisodicEvaluator(spec, 2).evaluate(bank),
        lambda: RetrievalTester().test(bank),
        lambda: keep_memory(torch.device("cpu")),
    ]
    calls: list[bool] = []
    monkeypatch.setattr(environment, "keep_freed_memory", lambda: calls.append(True) or True)
    for way in ways:
        environment._keep_memory.cache_clear()
        calls.clear()
        caplog.clear()
        with caplog.at_level("INFO", logger="pml_fewshot"):
            keep_memory(torch.device("cuda"))
            monkeypatch.setenv("PML_FEWSHOT_KEEP_MEMORY", "0")
            way()
            assert calls == []
            monkeypatch.delenv("PML_FEWSHOT_KEEP_MEMORY")
            for _ in range(2):
                way()
        assert calls == [True]
        assert caplog.text.count("PML_FEWSHOT_KEEP_MEMORY=0") == 1


@pytest.mark.parametrize(
    ("libc", "by_user", "told"),
    [
        ("glibc", {}, {-1, -2, -4, -8}),
        ("glibc", {"MALLOC_TOP_PAD_": "1000", "MALLOC_ARENA_MAX": "4"}, {-1, -4}),
        ("glibc", {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9:glibc.malloc.trim_threshold=5"}, {-2, -8}),
        ("", {}, set()),  # musl, macOS, Windows
    ],
)
def test_glibc_is_told_what_the_user_has_not(
    libc: str, by_user: dict[str, str], told: set[int], monkeypatch: pytest.MonkeyPatch
):
    calls: dict[int, int] = {}
    known = SimpleNamespace(mallopt=lambda name, value: calls.update({name: value}) or 1)
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: known)
    monkeypatch.setattr(environment.platform, "libc_ver", lambda: (libc, ""))
    for name in [*filter(re.compile("MALLOC_|GLIBC_").match, os.environ)]:
        monkeypatch.delenv(name)
    for name, value in by_user.items():
        monkeypatch.setenv(name, value)
    assert environment.keep_freed_memory() == bool(told)
    assert calls.keys() == told
    assert calls.get(-8, 1) == 1


V1 = "4:memory:/a\n3:cpu,cpuacct:/docker/abc\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),  # of the group around
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "400000 100000"}, 1),
        ("0::/system/docker-abc\n", {"cpu.max": "20000 100000"}, 1),  # the container's own is the root
        ("0::/../other\n", {"cpu.max": "800000 100000", "../other/cpu.max": "1 100000"}, 8),
        ("1:name=systemd:/\n0::/\n", {}, None),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {f"cpu,cpuacct/docker/abc/cpu.cfs_{n}_us": v for n, v in (("quota", "-1\n"), ("period", "9"))}, None),
        (V1, {"memory/cpu.max": "1 100000"}, None),
        ("4:cpuacct,cpu:/\n", {f"cpu/cpu.cfs_{n}_us": v for n, v in (("quota", "200000"), ("period", "100000"))}, 2),
        ("0::/\n", {"cpu.max": "a few"}, None),
        ("0::/\n", {"cpu.max/is": "a folder"}, None),
        ("nothing known", {"cpu.max": "100000 100000"}, None),
        (None, {"cpu.max": "100000 100000"}, None),
    ],
)
def test_a_containers_share_of_the_cores(own: str | None, files: dict[str, str], expected: int | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert cpu_quota(tmp_path / "own", tmp_path / "mounted") == expected


@pytest.mark.parametrize(
    ("quota", "threads", "variable", "expected"),
    [(4, 64, "", 4), (4, 32, "", 4), (None, 64, "", None), (4, 4, "", None), (4, 8, "", None), (4, 64, "OMP", None)],
)
@pytest.mark.parametrize("imported", [False, True])
def test_threads_are_limited_to_the_share_unless_the_user_chose(
    quota: int | None,
    threads: int,
    variable: str,
    expected: int | None,
    imported: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[tuple[str, int]] = []
    faiss = SimpleNamespace(omp_set_num_threads=lambda count: calls.append(("faiss", count)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(f"{variable}_NUM_THREADS", "64")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: calls.append(("torch", count)))
    monkeypatch.setattr(sys, "modules", {name: each for name, each in sys.modules.items() if name != "faiss"})
    monkeypatch.setattr(environment, "_faiss_threads", None)
    if imported:
        sys.modules["faiss"] = faiss
    assert limit_threads(quota) == (expected is not None)
    if not imported:
        execute_faiss(lambda module: None, faiss)
    assert calls == ([] if expected is None else [("torch", expected), ("faiss", expected)])


@pytest.mark.long
def test_a_fresh_interpreter_imports_little_and_then_fast_kernels_torchvision_and_a_lighter_pml():
    by_user = re.compile("OPENBLAS_CORETYPE|MALLOC_|GLIBC_")
    variables = {name: value for name, value in os.environ.items() if not by_user.match(name)}
    done = subprocess.run([sys.executable, "-c", FRESH], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert CORE is None or set(done.stdout.split()) <= {CORE}  # none where faiss has another BLAS


BEFORE = """
import contextlib, os, faiss
with contextlib.suppress(RuntimeError):  # beside another build of torch
    import torchvision
import pml_fewshot, faiss, torchvision
from torchvision.models import resnet18
assert 'OPENBLAS_CORETYPE' not in os.environ
"""


@pytest.mark.long
def test_a_faiss_imported_before_is_left_alone_and_a_torchvision_whose_import_failed_is_repaired():
    variables = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    assert subprocess.run([sys.executable, "-c", BEFORE], env=variables, check=False).returncode == 0


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


MISSING, OTHER = RuntimeError("operator torchvision::nms does not exist"), RuntimeError("CUDA driver too old")
LOG = ["import", "torchvision::nms", "torchvision::qnms", "import"]


@pytest.mark.parametrize(
    ("errors", "log"),
    [([], LOG[:1]), ([MISSING], LOG), ([MISSING, OTHER], LOG), ([OTHER], LOG[:1]), ([ImportError("none")], LOG[:1])],
)
def test_torchvisions_operators_are_declared_only_where_the_import_fails_for_lack_of_them(
    errors: list[Exception], log: list[str], monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    remaining, last = list(errors), errors[-1] if errors else MISSING

    def load(module: ModuleType) -> None:
        calls.append("import")
        assert "torchvision.half" not in sys.modules  # what the failed import left
        if remaining:
            sys.modules["torchvision.half"] = module
            raise remaining.pop(0)

    monkeypatch.setattr(sys, "modules", {n: m for n, m in sys.modules.items() if not n.startswith("torchvision.")})
    monkeypatch.setattr(torch.library, "define", lambda name, schema: calls.append(name))
    with nullcontext() if last is MISSING else pytest.raises(type(last), match=str(last)):
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
    assert [each.name for each in sys.meta_path if isinstance(each, ImportHook)] == list(environment.HOOKS)
