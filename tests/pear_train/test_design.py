"""pear_train's listing explains its design: one idea a module, imports one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pear_train"
LAYERS = (
    {"errors", "choices"},
    {"dtypes", "memory", "options"},
    {"config", "data"},
    {"adapters", "importance", "prune", "tasks", "machine", "recall", "feed"},
    {"knowledge", "bank", "identity", "evaluate", "report", "targets"},
    {"base", "bases", "optimiser", "pruning", "output", "plot", "curves"},
    {"start", "head", "html", "preview", "fitting"},
    {"run"},
    {"group", "state", "to_task"},
    {"job", "make_base", "changed"},
    {"loop", "rebase", "rounding"},
    {"source_tasks"},
    {"cluster", "make_bases"},
    {"cli"},
    {"evaluation"},
)
"""What each module may import: of those above it"""
PURE = {"adapters", "importance", "prune", "knowledge"}


def ours(file: Path) -> set[str]:
    """The modules, and folders, of pear_train that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pear_train"):
            found.add(node.module.split(".")[1] if "." in node.module else node.names[0].name)
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pear_train.")}
    return found


def files(module: str) -> list[Path]:
    folder = PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_module_has_its_place() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set().union(*LAYERS) == there - {"__init__"}
    assert sum(map(len, LAYERS)) == len(there) - 1


@pytest.mark.parametrize("level", range(len(LAYERS)))
def test_modules_import_those_above(level: int) -> None:
    above = set().union(*LAYERS[:level])
    for module in LAYERS[level]:
        for file in files(module):
            assert ours(file) <= above | {module}, f"{file}: {ours(file) - above - {module}}"


def test_only_the_evaluation_needs_what_its_extra_installs() -> None:
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        if not {"evaluation", "html"} & {*file.parts}:
            assert not re.search(r"^\s*(?:from|import) (?:sklearn|scipy|jinja2)\b", text, re.MULTILINE), file


def test_the_maths_knows_no_run_and_no_options() -> None:
    for module in PURE:
        for file in files(module):
            assert ours(file) <= {"choices", "adapters"}, file


def test_no_class_holds_two_ideas() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            length = (getattr(node, "end_lineno", None) or 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, ast.ClassDef):
                assert length <= 250, f"{file}: {node.name} has {length} lines"
            if isinstance(node, ast.FunctionDef) and file.name == "run.py" and node.name != "__init__":
                assert length <= 25, f"{file}: {node.name} has {length} lines: TaskRun is a face of short methods"


def test_modules_import_those_of_their_row_of_the_page_or_above() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    above: set[str] = set()
    for row in re.findall(r"^\| (`.+?) \|", page.split("\n## pear_train\n")[1], re.MULTILINE):
        modules = re.findall(r"`([a-z_]+)/?`", row)
        above |= {*modules}
        for module in modules:
            for file in files(module):
                assert ours(file) <= above, f"{file}: {ours(file) - above}"
    assert above == set().union(*LAYERS)


def test_the_guide_says_what_only_set_reaches() -> None:
    from pear_train.cli import main
    from pear_train.cli.options import KNOWN

    guide = (ROOT / "docs" / "training.md").read_text()
    table = guide.split("## Every other option")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == KNOWN.keys() - {parameter.name for parameter in main.params}
