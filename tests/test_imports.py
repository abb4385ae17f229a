"""The house rules that can be read from the source: imports run one way, randomness is passed in, files stay small."""

import ast
from pathlib import Path

import pytest

import pml_fewshot

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pml_fewshot"
FILES = sorted(PACKAGE.rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))

# What each part of the package may import of the others. experiment -> {trainers, evaluation, recording, checkpoint}
# -> {embedders, losses, distances, data} -> episodes -> checks; within a folder files may import each other.
FILE_FORMATS = {"zip_archive", "npy_file", "tensor_file", "pytorch_file"}
TOOLS = {"atomic", "checks", "parts", "modes", "sizes"} | FILE_FORMATS
PARTS = {"embedders", "losses", "distances", "data", "episodes", "batches", "drawing"} | TOOLS
MAY_IMPORT: dict[str, set[str]] = {
    "atomic": set(),
    "checks": set(),
    "parts": set(),
    "modes": set(),
    "sizes": {"checks"},
    "zip_archive": set(),
    "npy_file": {"checks"},
    "tensor_file": {"atomic", "checks", "sizes"},
    "pytorch_file": {"sizes", "zip_archive"},
    "allocator": set(),
    "torchvision_import": set(),
    "drawing": {"checks"},
    "episodes": {"checks", "drawing"},
    "batches": {"checks"},
    "data": {"episodes", "batches", "drawing"} | TOOLS,
    "embedders": {"data", "episodes"} | TOOLS,
    "losses": {"distances"} | TOOLS,
    "distances": TOOLS,
    "checkpoint": TOOLS,
    "recording": TOOLS,
    "exit_codes": {"trainers"},
    "stored_config": TOOLS,
    "provenance": {"data", "stored_config"} | TOOLS,
    "run_folder": {"provenance"} | TOOLS,
    "evaluation": PARTS,
    "adaptation": TOOLS,
    "trainers": PARTS | {"adaptation", "evaluation", "recording", "checkpoint"},
    "experiment_config": PARTS | {"evaluation"},
}
MAY_IMPORT["experiment"] = MAY_IMPORT.keys() - {"experiment"}
MAY_IMPORT["command_line"] = set(MAY_IMPORT)
MAY_IMPORT["reproduce"] = set(MAY_IMPORT) - {"command_line"}
MAY_IMPORT["sweeps"] = set(MAY_IMPORT) - {"command_line"}
MAY_IMPORT["__init__"] = set(MAY_IMPORT)

# The names that programs outside of the repository use (those of parts to come are not demanded)
CONTRACT = """
EpisodeSpec Episode EpisodeSampler FewShotDataset Splits Embedder EmbeddingBank Conv4 ResNet12 PrototypicalLoss
MatchingLoss ProtoNetTrainer MatchingTrainer SiameseTrainer MetricTrainer MAMLTrainer EpisodicEvaluator RetrievalTester
ExperimentConfig run main fit load_omniglot load_mini_imagenet load_image_folder load_glyphs
"""


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def path_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    """pml_fewshot.data.cache; for an __init__.py its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module) -> set[str]:
    """Every module that a file imports, at its top or in a function, as a dotted name."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import, which these tests do not follow"
            names.add(node.module or "")
            # `from pml_fewshot.data import cache` names a module too
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {module_name(path) for path in FILES}
    return {name for name in names if name.split(".")[0] != "pml_fewshot" or name in modules}


def part_of(module: str) -> str:
    """pml_fewshot.data.cache -> data"""
    return [*module.split("."), "__init__"][1]


# --- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(module_name(path))
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {part} may import"
    own = {name for name in imported(parse(path)) if name.split(".")[0] == "pml_fewshot"}
    if part != "__init__":
        assert "pml_fewshot" not in own, "import from the module that defines a name, not from the public __init__"
    for module in own:
        assert part_of(module) in MAY_IMPORT[part] | {part}, f"{path_id(path)} imports {module}"


def test_no_two_modules_import_each_other() -> None:
    arrows = {
        module_name(path): {name for name in imported(parse(path)) if name.count(".")} & {module_name(p) for p in FILES}
        for path in FILES
        if path.name != "__init__.py"
    }

    def reachable(start: str, seen: tuple[str, ...] = ()) -> None:
        assert start not in seen, " -> ".join([*seen, start])
        for name in arrows.get(start, ()):
            reachable(name, (*seen, start))

    for name in arrows:
        reachable(name)


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_package_imports_neither_experiments_nor_tests(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(parse(path))} & {"experiments", "tests", "conftest", "pytest"}


# --- names and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_files_have_one_subject(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}
    assert len(path.read_text().splitlines()) < 260


def test_public_names_are_sorted_and_there() -> None:
    names = pml_fewshot.__all__
    assert names == sorted(set(names))
    assert [name for name in names if not hasattr(pml_fewshot, name)] == []


def test_every_name_of_the_contract_that_exists_is_public() -> None:
    defined = {
        node.name for path in FILES for node in parse(path).body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    assert set(CONTRACT.split()) & defined - set(pml_fewshot.__all__) == set()


def test_what_init_imports_is_what_it_exports() -> None:
    tree = parse(PACKAGE / "__init__.py")
    names = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert names - {"ensure_torchvision"} == set(pml_fewshot.__all__)


def test_package_says_that_it_is_typed_and_which_version_it_is() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert pml_fewshot.__version__.count(".") == 2


# --- randomness and safety --------------------------------------------------------------------------------------------

DRAWS = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "poisson"}
DRAWS_IN_PLACE = {
    "random_",
    "uniform_",
    "normal_",
    "bernoulli_",
    "exponential_",
    "cauchy_",
    "log_normal_",
    "geometric_",
}


def hidden_state(tree: ast.Module) -> list[str]:
    """Calls that draw from a generator which nobody passed in, and imports of modules that have nothing else."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(a.name in {"random", "numpy.random"} for a in node.names):
            found.append(f"line {node.lineno}: import random")
        if isinstance(node, ast.ImportFrom) and node.module in {"random", "numpy.random"}:
            found.append(f"line {node.lineno}: from {node.module}")
        of_numpy = isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"np.random", "numpy.random"}
        if of_numpy and node.attr != "RandomState":
            found.append(f"line {node.lineno}: np.random.{node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("RandomState") and not node.args:
            found.append(f"line {node.lineno}: RandomState without a seed")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = ast.unparse(node.func.value), node.func.attr
            with_generator = any(keyword.arg == "generator" for keyword in node.keywords)
            draws = (owner == "torch" and name in DRAWS) or (name in DRAWS_IN_PLACE and "init" not in owner)
            if draws and not with_generator:
                found.append(f"line {node.lineno}: {ast.unparse(node.func)} without generator")
            if owner == "torch" and name in {"rand_like", "randn_like", "randint_like", "seed"}:
                found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import random",
        "from random import shuffle",
        "x = np.random.rand(3)",
        "g = np.random.default_rng()",
        "g = np.random.RandomState()",
        "torch.rand(\n    3,\n    device=d,\n)",
        "torch.randn(2)",
        "torch.randperm(5)",
        "torch.randint(5, (2,))",
        "torch.rand_like(x)",
        "x.normal_()",
        "torch.empty(3).uniform_(0, 1)",
    ],
)
def test_hidden_state_would_be_found(line: str) -> None:
    assert hidden_state(ast.parse(line))


@pytest.mark.parametrize(
    "line", ["torch.rand(3, generator=g)", "x.normal_(generator=g)", "nn.init.normal_(w)", "np.random.RandomState(3)"]
)
def test_what_is_no_hidden_state_passes(line: str) -> None:
    assert hidden_state(ast.parse(line)) == []


@pytest.mark.parametrize("path", FILES + EXPERIMENTS, ids=path_id)
def test_randomness_is_passed_in(path: Path) -> None:
    assert hidden_state(parse(path)) == []


def test_the_global_generator_is_seeded_in_one_place() -> None:
    """Initial weights, dropout and the miners of PML draw from it, so an experiment must seed it, once.

    PML's samplers draw from it too; the stream seeds a fork of it for them and gives it back as it was.
    """
    seeding = [
        path_id(path)
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.manual_seed"
    ]
    assert seeding == ["pml_fewshot/data/batch_stream.py", "pml_fewshot/experiment.py"]


@pytest.mark.parametrize("path", FILES + EXPERIMENTS, ids=path_id)
def test_no_file_runs_code_that_it_reads(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load"}, called
        if called == "torch.load":
            assert keywords.get("weights_only") == "True"
        assert keywords.get("allow_pickle", "False") == "False"


@pytest.mark.parametrize("path", FILES + EXPERIMENTS, ids=path_id)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            caught = ast.unparse(node.type)
            empty = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (empty and caught in {"Exception", "BaseException"}), f"line {node.lineno}: {caught} swallowed"


@pytest.mark.parametrize("path", FILES + EXPERIMENTS, ids=path_id)
def test_no_statement_is_left_empty_by_a_linter(path: Path) -> None:
    """`try: pass` is what remains of `try: import torchvision` when a linter removes an "unused" import."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Try):
            assert not all(isinstance(statement, ast.Pass) for statement in node.body), f"line {node.lineno}: try: pass"
