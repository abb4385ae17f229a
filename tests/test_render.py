"""docs/render.py fills the tables of README and pages from docs/results, and says what a marker asks for in vain."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
CSV = """method,source,"5-way, 1-shot",command,commit
ProtoNet,this library,**98.95 +- 0.05**,python -m one | tee log,abc1234
ProtoNet,Snell et al. 2017,98.8,,
Matching,this library,98.79 +- 0.05,python -m two,abc1234
"""
PAGE = """# Results

<!-- table: few.csv -->
stale
<!-- end of table -->
between
<!-- table: few.csv | where: method=ProtoNet;Matching, source=this library | columns: "5-way, 1-shot", command -->
<!-- end of table -->
<!-- table: few.csv | where: source=this library | columns: commit -->
<!-- end of table -->

```
<!-- table: missing.csv -->
```
"""
EXPECTED = r"""# Results

<!-- table: few.csv -->

| method | source | 5-way, 1-shot |
| --- | --- | --- |
| ProtoNet | this library | **98.95 +- 0.05** |
| ProtoNet | Snell et al. 2017 | 98.8 |
| Matching | this library | 98.79 +- 0.05 |

<!-- end of table -->
between
<!-- table: few.csv | where: method=ProtoNet;Matching, source=this library | columns: "5-way, 1-shot", command -->

| 5-way, 1-shot | command |
| --- | --- |
| **98.95 +- 0.05** | `python -m one \| tee log` |
| 98.79 +- 0.05 | `python -m two` |

<!-- end of table -->
<!-- table: few.csv | where: source=this library | columns: commit -->

| commit |
| --- |
| `abc1234` |

<!-- end of table -->

```
<!-- table: missing.csv -->
```
"""


@pytest.fixture(scope="module")
def rendering() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_docs", ROOT / "docs" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a README, one page and its figures."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "few.csv").write_text(CSV)
    (tmp_path / "docs" / "results" / "index.md").write_text(PAGE)
    (tmp_path / "README.md").write_text("no table\n")
    return tmp_path


def test_tables_are_filled_once_and_stay(rendering: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = root / "docs" / "results" / "index.md"
    assert rendering.main(["--check"], root) == 1
    assert capsys.readouterr().out == "docs/results/index.md: stale; run `python docs/render.py`\n"
    assert page.read_text() == PAGE
    assert rendering.main([], root) == 0
    assert page.read_text() == EXPECTED
    assert capsys.readouterr().out == "docs/results/index.md: written\n"
    assert rendering.main(["--check"], root) == rendering.main([], root) == 0
    assert page.read_text() == EXPECTED


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("<!-- table: many.csv -->", r"expected a file of docs/results, got \['many.csv'\]; use some of \['few.csv'\]"),
        ("<!-- table: few.csv | rows: 3 -->", r"expected options, got \['rows'\]; use some of \['columns', 'where'\]"),
        ("<!-- table: few.csv | columns: methods -->", r"expected columns of few.csv, got \['methods'\]; use some of"),
        ("<!-- table: few.csv | where: name=MAML -->", r"expected a column of few.csv, got \['name'\]; use some of"),
        ("<!-- table: few.csv | where: method=MAML -->", r"got \['MAML'\]; use some of \['Matching', 'ProtoNet'\]"),
        ("<!-- table: few.csv | where: method=Matching, source=Snell et al. 2017 -->", r"got \['Snell et al. 2017'\]"),
    ],
)
def test_what_is_not_there_is_named(rendering: ModuleType, root: Path, marker: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        rendering.render(f"{marker}\n<!-- end of table -->", root / "docs" / "results", "page.md")
    assert str(error.value).startswith(f"page.md: {marker}: expected")


@pytest.mark.parametrize("after", ["", "\n<!-- table: few.csv -->\n<!-- end of table -->"])
def test_a_marker_without_an_end_is_an_error(rendering: ModuleType, root: Path, after: str) -> None:
    with pytest.raises(ValueError, match=r"expected '<!-- end of table -->' below it, got .*; add it"):
        rendering.render(f"<!-- table: few.csv -->{after}", root / "docs" / "results", "page.md")
    with pytest.raises(ValueError, match=r"got \['--chekc'\]"):
        rendering.main(["--chekc"], root)


def test_readme_and_pages_are_not_stale(rendering: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert rendering.main(["--check"]) == 0, capsys.readouterr().out


def test_every_figure_says_how_it_came_about() -> None:
    for path in (ROOT / "docs" / "results").glob("*.csv"):
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            assert None not in (*row, *row.values()), f"{path.name}: {row}"
            if row.get("source", "this library") == "this library":
                assert all((row["commit"], row["machine"])), f"{path.name}: {row}"
            else:
                assert not any((row["command"], row["commit"])), f"{path.name}: {row}"
