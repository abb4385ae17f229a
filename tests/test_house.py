"""The house rules that can be read from the source: imports run one way, names are public where they should be.

What ruff can see (legacy numpy randomness, pickle, bare except) is a rule in pyproject.toml.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pml_fewshot

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pml_fewshot"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in [*FILES, *(ROOT / "experiments").rglob("*.py")]}

# Rooms from the ground up; a room may import from rooms of lower floors and from its own floor.
FLOORS = [
    {"checks", "environment"},
    {"io"},
    {"parts"},
    {"data", "sampling", "embedders", "losses", "distances", "distributed"},
    {"evaluation", "trainers", "training"},
    {"experiment", "report", "classify"},
    {"app"},
    {"reproduce", "compare", "evaluate", "__main__", "__init__"},
]
FORBIDDEN = {"evaluation": {"trainers", "training"}, "training": {"trainers"}, "trainers": {"training"}}

CONTRACT = """
EpisodeSpec Episode EpisodeSampler FewShotDataset Splits Embedder EmbeddingBank Conv4 ResNet12 PrototypicalLoss
MatchingLoss ProtoNetTrainer MatchingTrainer SiameseTrainer MetricTrainer MAMLTrainer EpisodicEvaluator RetrievalTester
Gallery ExperimentConfig run fit swap benchmark compare load_omniglot load_mini_imagenet load_image_folder load_glyphs
load_bank save_bank EpisodeStream BatchSpec Batch BatchStream RandomAffine DenseNTXentLoss DenseTripletMarginLoss
export_embedder load_embedder nearest_prototype nearest_neighbour cosine_classifier ridge_regression logistic_regression
adaptation_curve sweep main
"""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """pml_fewshot.data.cache -> data"""
    return [*module.split("."), "__init__"][1]


MODULES = {module_of(path): path for path in FILES}


def imported(tree: ast.AST) -> set[str]:
    """Every module of the package that is imported, at the top or in a function."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in MODULES}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_imports_run_one_way() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for module, path in MODULES.items():
        room = room_of(module)
        for name in imported(TREES[path]) - {module}:
            other = room_of(name)
            assert floor[other] <= floor[room], f"{module} imports {name}"
            assert other not in FORBIDDEN.get(room, ()), f"{module} imports {name}"
            assert name != "pml_fewshot" or room == "__init__", f"{module} imports {name}"


def test_no_two_modules_import_each_other() -> None:
    graph = {name: imported(TREES[path]) - {name, "pml_fewshot"} for name, path in MODULES.items()}
    graph.pop("pml_fewshot")
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_few_files_stand_at_the_top_and_their_names_say_what_they_hold() -> None:
    assert len(set(PACKAGE.glob("*.py")) - {PACKAGE / "__main__.py"}) <= 7  # (which Python wants there)
    assert {path.stem for path in FILES} & {"utils", "util", "common", "helpers", "misc"} == set()


def test_trainers_are_told_apart_by_nobody() -> None:
    for path in FILES:
        for node in calls(TREES[path]):
            called, place = ast.unparse(node.func), f"{path.name}:{node.lineno}"
            assert called != "isinstance" or "Trainer" not in ast.unparse(node.args[1]), place
            assert called != "getattr" or "trainer" not in ast.unparse(node.args[0]), place


def test_every_name_of_the_contract_is_public_and_every_public_name_is_there() -> None:
    assert set(CONTRACT.split()) - set(pml_fewshot.__all__) == set()
    for name in pml_fewshot.__all__:
        assert getattr(pml_fewshot, name).__module__.startswith("pml_fewshot."), name


DRAWS = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "poisson"}
OTHER_DRAWS = {"random", "uniform", "exponential", "cauchy", "log_normal", "geometric"}  # in place alone
OF_NO_GENERATOR = {"rand_like", "randn_like", "randint_like", "seed"}


def hidden_draws(tree: ast.AST) -> list[int]:
    """Lines with a call of torch that draws from a generator which nobody passed in."""
    lines = []
    for node in calls(tree):
        if isinstance(node.func, ast.Attribute):
            owner, name = ast.unparse(node.func.value), node.func.attr
            passed = any(keyword.arg == "generator" for keyword in node.keywords)
            draws = (owner == "torch" and name in DRAWS) or (
                name.endswith("_") and name[:-1] in DRAWS | OTHER_DRAWS and "init" not in owner
            )
            if (draws and not passed) or (owner == "torch" and name in OF_NO_GENERATOR):
                lines.append(node.lineno)
    return lines


def test_randomness_is_passed_in() -> None:
    for line in ("torch.rand(3)", "x.normal_()", "torch.rand_like(x)"):
        assert hidden_draws(ast.parse(line)) == [1]
    assert hidden_draws(ast.parse("torch.rand(3, generator=g); nn.init.normal_(w)")) == []
    found = {path.name: hidden_draws(tree) for path, tree in TREES.items()}
    # (a loss is built after the experiment's seed is set, and takes the seed of its own draws from torch's generator)
    assert {name: lines for name, lines in found.items() if lines and name != "pair_verification.py"} == {}


def test_no_file_that_is_read_runs_code() -> None:
    for path, tree in TREES.items():
        for node in calls(tree):
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load"}, path
            assert called != "torch.load" or keywords.get("weights_only") == "True", path
            assert keywords.get("allow_pickle", "False") == "False", path
