"""Without an extra, whatever needs it says in one line what to install. What modules import is declared."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from PIL import Image

from pear_store import Store
from tests.helpers.makers import small_task
from tests.test_release import PROJECT, ROOT
from tests.test_structure import ALLOWED

BARE = """
import contextlib, importlib, io, json, sys
hidden, scripts, calls = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(hidden))
answers = []
for command, arguments in calls:
    sys.argv, out, err, code = [command, *arguments], io.StringIO(), io.StringIO(), 0
    module, name = scripts[command].split(":")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            getattr(importlib.import_module(module), name)()
        except SystemExit as end:
            code, text = (1, str(end.code)) if isinstance(end.code, str) else (end.code or 0, "")
            err.write(text)
        except BaseException as error:
            code, text = None, repr(error)
            err.write(text)
    answers.append((code, out.getvalue(), err.getvalue()))
json.dump(answers, sys.stdout)
"""
Call = tuple[str, tuple[str, ...]]
HELPS: list[Call] = [("pear-store", ("--help",)), ("pear-train", ("--help",))]
TRAIN = ("t", "--data", "data", "--out", "t.safetensors", "--epochs", "2")
NEEDS: dict[Call, tuple[str, str]] = {
    ("pear-infer", ("--help",)): ("pyarrow", "infer"),
    ("pear-eval", ("--help",)): ("scikit-learn", "eval"),
    ("pear-serve", ("--help",)): ("starlette|uvloop", "serve"),
    ("pear-train", (*TRAIN, "--html", "t.html")): ("jinja2", "eval"),
    ("pear-train", (*TRAIN, "--plot")): ("matplotlib", "demo"),
    ("pear-train", (*TRAIN, "--tensorboard", "tb")): ("tensorboard", "tensorboard"),
    ("pear-train", ("t", "--data", "t.parquet", "--out", "t.safetensors")): ("pyarrow", "infer"),
    ("pear-train", ("--tasks", "t.toml", "--out", "out", "--ray")): ("ray", "ray"),
    ("pear-store", ("plot", "t.png", "--store", "s")): ("matplotlib", "demo"),
    ("pear-store", ("add", "hf://owner/name", "--store", "s")): ("huggingface_hub", "hub"),
    ("pear-store", ("export-hub", "t", "out", "--store", "s")): ("huggingface_hub", "hub"),
    ("pear-store", ("export-onnx", "t", "t.onnx", "--store", "s")): ("onnx", "onnx"),
    **{
        ("pear-store", ("remote", "init", "r", url, "--store", "s")): (package, "remote")
        for url, package in {
            "s3://b/r": "obstore", "gs://b/r": "obstore", "az://b/r": "obstore", "sftp://h/r": "paramiko",
            "https://localhost:1/r": "httpx",
        }.items()
    },
}  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hidden() -> list[str]:
    """The modules of all packages that only an extra brings."""
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [one for extra, listed in extras.items() if extra not in ("dev", "tests") for one in listed]
    names = {normal(re.split(r"[^\w.-]", one)[0]) for one in needed} - {"pear-adapters"}
    return [module for module, of in packages_distributions().items() if names & {normal(one) for one in of}]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What every call said, in one process to which all extras are missing."""
    work = tmp_path_factory.mktemp("bare")
    with Store.create(work / "s") as store:
        store.add(small_task("t"))
    for split in ("train", "val", "test"):
        for label in ("dark", "light"):
            (work / "data" / split / label).mkdir(parents=True)
            Image.new("RGB", (32, 32), label + "gray").save(work / "data" / split / label / "1.png")
    (work / "t.parquet").write_bytes(b"PAR1")
    (work / "t.toml").write_text("[tasks.t]\ndata = 'data'\n")
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        input=json.dumps([hidden(), PROJECT["project"]["scripts"], [*HELPS, *NEEDS]]),
        capture_output=True, text=True, cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in work.iterdir()} == {"s", "data", "t.parquet", "t.toml"}
    return dict(zip([*HELPS, *NEEDS], json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("call", HELPS, ids=lambda call: call[0])
def test_the_base_alone_starts(answers: dict[Any, Any], call: Call) -> None:
    code, out, err = answers[call]
    assert (code, out.splitlines()[0].split()[:2], err) == (0, ["Usage:", call[0]], "")


@pytest.mark.parametrize("call", NEEDS, ids=lambda call: " ".join([call[0], *call[1]]))
def test_one_line_says_what_to_install(answers: dict[Any, Any], call: Call) -> None:
    package, extra = NEEDS[call]
    code, out, err = answers[call]
    assert code and not out, (code, out, err)
    (line,) = [line for line in err.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert re.fullmatch(rf"Error: .*needs.* ({package})\b.*pip install 'pear-adapters\[{extra}\]'", line), line


EXTRA_OF = {
    "router/infer": "infer",
    "router/infer/__main__.py": "",
    "router/serve": "serve",
    "router/serve/__main__.py": "",
    "router/cluster": "ray",
    "pear_store/ui": "serve",
    "pear_train/cluster.py": "ray",
    "pear_train/evaluation": "eval",
    "pear_train/evaluation/__main__.py": "",
}
"""The modules that need an extra when they are imported, and those among them that need none. So do all others."""
DISTRIBUTIONS = packages_distributions()
FILES = [file for package in ALLOWED for file in sorted((ROOT / package).rglob("*.py"))]
GUARDED = {"triton", "pillow-heif", "aiohttp"}
"""Packages that are not declared: torch brings the first, and users add the others for HEIC images and web addresses.
Where one is missing, Pear does without, or says so in a line."""


def extra_of(file: Path) -> str:
    inside = file.relative_to(ROOT)
    return next((EXTRA_OF[str(one)] for one in (inside, *inside.parents) if str(one) in EXTRA_OF), "")


def declared(extra: str) -> set[str]:
    """The packages that `pip install pear-adapters[extra]` names, also by way of other extras."""
    found: set[str] = set()
    listed = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"].get(extra, [])
    for one in map(Requirement, listed):
        if one.name == PROJECT["project"]["name"]:
            found = found.union(*map(declared, one.extras))
        else:
            found.add(normal(one.name))
    return found


def names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module} if isinstance(node, ast.ImportFrom) and node.module and not node.level else set()


def is_guarded(node: ast.AST) -> bool:
    """Whether it is a `try` or a `with` that takes an ImportError."""
    catching = node.handlers if isinstance(node, ast.Try) else node.items if isinstance(node, ast.With) else []
    heads = [ast.unparse(one).splitlines()[0] for one in catching]
    return any(re.search(r"\b(ImportError|ModuleNotFoundError)\b", head) for head in heads)


def imported(node: ast.AST, deep: bool) -> set[str]:
    """The modules that a node imports; not in functions, guards and for type checkers unless `deep`."""
    if not deep and (
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or is_guarded(node)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ):
        return set()
    return names(node).union(*(imported(child, deep) for child in ast.iter_child_nodes(node)))


def packages(modules: set[str]) -> set[str]:
    """The packages of modules that are neither ours nor Python's."""
    tops = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - set(ALLOWED)
    return {normal(one) for top in tops for one in DISTRIBUTIONS.get(top, [top])}


def test_what_a_module_imports_first_is_declared() -> None:
    assert all((ROOT / path).exists() for path in EXTRA_OF)
    undeclared = {
        f"{file.relative_to(ROOT)} [{extra_of(file)}]: {package}"
        for file in FILES
        for package in packages(imported(ast.parse(file.read_text()), deep=False)) - declared(extra_of(file))
    }
    assert not undeclared


def test_what_a_module_imports_first_of_ours_needs_no_other_extra() -> None:
    paths = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    strange = {
        f"{file.relative_to(ROOT)} [{extra_of(file)}]: {module}"
        for file in FILES
        for module in imported(ast.parse(file.read_text()), deep=False) & set(paths)
        if not declared(extra_of(paths[module])) <= declared(extra_of(file))
    }
    assert not strange


def test_what_is_imported_later_is_declared_by_an_extra() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"]) - {"demo", "tests", "dev"}
    known = set().union(*map(declared, extras)) | GUARDED
    undeclared = {
        f"{file.relative_to(ROOT)}: {package}"
        for file in FILES
        for package in packages(imported(ast.parse(file.read_text()), deep=True)) - known
    }
    assert not undeclared
