"""The notebooks are what their pages make, and such as Jupyter opens; made from a small page they have its cells."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("docs_notebooks", ROOT / "docs" / "notebooks.py")
assert SPEC is not None
assert SPEC.loader is not None
notebooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notebooks)

PAGE = """# Title

See [another](own-loss.md#end), [a guide](../how-to/gpu.md), [the web](https://a.b/c.md), [here](#title).

```python
print("one")

print("two")
```

```text
one
two
```

In between:

```text
not printed by a cell
```

```python
x = 1
```
"""


def test_no_notebook_is_stale() -> None:
    assert not notebooks.stale(), "run python docs/notebooks.py"


@pytest.mark.parametrize("path", notebooks.contents(), ids=lambda path: path.stem)
def test_notebooks_are_valid(path: Path) -> None:
    made = json.loads(path.read_text("utf-8"))
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    assert made["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in made["cells"]]
    assert len(set(ids)) == len(ids)
    assert {cell["cell_type"] for cell in made["cells"]} == {"markdown", "code"}
    for cell in made["cells"]:
        fields = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            fields |= {"execution_count", "outputs"}
            for output in cell["outputs"]:
                assert output.keys() == {"name", "output_type", "text"}
        assert cell.keys() == fields
        for target in notebooks.LINK.findall("".join(cell["source"])) if cell["cell_type"] == "markdown" else ():
            assert (path.parent / target).resolve().is_relative_to(ROOT)


def test_notebooks_need_nothing_but_the_package() -> None:
    for path in notebooks.contents():
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
        imported = {name.split(".")[0] for name in names}
        known = {"pml_fewshot", "pytorch_metric_learning", "torch", "numpy"}
        assert imported - known <= {"concurrent", "dataclasses", "functools", "pathlib"}


def test_a_page_becomes_cells() -> None:
    cells = notebooks.notebook(PAGE, "tutorials")["cells"]
    assert [(cell["id"], cell["cell_type"]) for cell in cells] == [
        ("cell-0", "markdown"),
        ("cell-1", "code"),
        ("cell-2", "markdown"),
        ("cell-3", "code"),
    ]
    first, code, between, last = ("".join(cell["source"]) for cell in cells)
    assert first.startswith("# Title\n\nSee [another](../tutorials/own-loss.md#end), [a guide](../how-to/gpu.md), ")
    assert first.endswith("[the web](https://a.b/c.md), [here](#title).")
    assert code == 'print("one")\n\nprint("two")'
    assert cells[1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["one\n", "two\n"]}]
    assert between == "In between:\n\n```text\nnot printed by a cell\n```"
    assert (last, cells[3]["outputs"]) == ("x = 1", [])
