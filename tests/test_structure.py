"""The packages' imports run one way, and the store's commands start light."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pear_store.local.index import TABLES

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "pear_store": {"pear_store"},
    "router": {"pear_store", "router"},
    "pear_train": {"pear_store", "router", "pear_train"},
}
OURS = {*ALLOWED, "tests", "tools", "benchmarks"}
HEAVY = {"torch", "timm", "torchvision"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "multiprocessing"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert imports(file) & OURS <= ALLOWED[package], file
        assert not imports(file) & PICKLES, f"{file}: pickles run code; none is read, not even our own"
        if package == "pear_store":
            assert not imports(file) & HEAVY, file
        if "cli" not in file.relative_to(ROOT).with_suffix("").parts and file.name != "terminal.py":
            assert "click" not in imports(file), f"{file}: only a cli imports click, and what it prints through"


@pytest.mark.parametrize("package", ALLOWED)
def test_no_pickle_is_read(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        found = {ast.unparse(call.func) for call in calls} & {"torch.load", "cloudpickle.load", "cloudpickle.loads"}
        if file == ROOT / "router/cluster/deployment.py":
            found.remove("cloudpickle.loads")  # of what Ray Serve's proxy, in the same process, has pickled
        assert not found, f"{file}: pickles run code"
        for word in (word for call in calls for word in call.keywords if word.arg == "allow_pickle"):
            assert ast.unparse(word.value) == "False", f"{file}: pickles run code"


def test_only_one_module_has_pools_that_fail_where_threads_are_few() -> None:
    for file in [file for package in ALLOWED for file in (ROOT / package).rglob("*.py")]:
        if file.name != "pools.py":
            assert "concurrent.futures.ThreadPoolExecutor" not in modules(file), f"{file}: expected pools.ThreadPool"


LEAVES = {"counted", "errors", "files", "pools"}
WINGS = {
    "format": LEAVES | {"format"},
    "local": LEAVES | {"format", "local"},
    "exchange": LEAVES | {"format", "exchange"},
    "readable": LEAVES | {"format", "local", "diff"},
    "remote": LEAVES | {"format", "local", "readable", "remote"},
    "store": LEAVES | {"format", "local", "readable", "remote"},
    "sharing": {"local"},
    "listing": LEAVES | {"format", "local", "readable", "sharing"},
    "webpage": set(),
    "ui": LEAVES | {"format", "local", "readable", "sharing", "listing", "webpage", "ui"},
    "cli": LEAVES
    | {"format", "local", "exchange", "remote", "readable", "store", "diff", "plot", "terminal", "cli"}
    | {"sharing", "listing", "ui"},
}
"""Of pear_store, each wing and what it may import of the others"""


def modules(file: Path) -> set[str]:
    """The full names of the modules that a file imports, at any depth of its code."""
    return modules_of(ast.parse(file.read_text()))


def modules_of(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("wing", WINGS)
def test_the_stores_wings_import_one_way(wing: str) -> None:
    folder = ROOT / "pear_store" / wing
    for file in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        ours = {name.split(".")[1] for name in modules(file) if name.startswith("pear_store.")}
        assert ours <= WINGS[wing], f"{file} imports {ours - WINGS[wing]}"


def test_remotes_know_no_index() -> None:
    """What they need of a store, catalog.py and what is built on it say; and no start of a command pays for them."""
    for file in (ROOT / "pear_store" / "remote").rglob("*.py"):
        inner = {name for name in modules(file) if name.startswith("pear_store.local.")}
        hidden = {f"pear_store.local.{name}" for name in ("index", "tables", "rows", "contests")}
        assert not inner & hidden, f"{file} imports {inner & hidden}"
        body = ast.parse(file.read_text()).body
        tops = {name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for name in modules_of(node)}
        assert not tops & {"httpx", "obstore", "paramiko"}, (
            f"{file}: an optional package is imported where it is needed"
        )


def test_only_the_index_itself_knows_keys_and_bytes_of_its_rows() -> None:
    """Others name a table by an attribute of a view, and a row by what it is called."""
    ours = {"index.py", "rows.py", "tables.py"}
    for file in (ROOT / "pear_store").rglob("*.py"):
        if file.name in ours and file.parent.name == "local":
            continue
        assert not [name for name in modules(file) if name.startswith("pear_store.local.rows.") and "key" in name], file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0]
                named = isinstance(first, ast.Constant) and first.value in TABLES
                of_view = isinstance(node.func.value, ast.Name) and "view" in node.func.value.id
                assert not (named and of_view), f"{file}:{node.lineno}: a table by its name"
                codes = node.func.attr == "encode" and isinstance(first, ast.Name) and "key" in first.id
                assert not codes, f"{file}:{node.lineno}: a row as bytes"


def test_only_the_catalog_changes_rows() -> None:
    """Of packs and what they record; applying.py and contests.py are its ways to take in packs that others wrote."""
    changing = {"put", "delete", "delete_where", "drop", "enter", "unlist"}
    found = set()
    for file in (ROOT / "pear_store").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing:
                table = node.func.value
                if isinstance(table, ast.Attribute) and table.attr in TABLES and "view" in ast.unparse(table.value):
                    found.add(file.relative_to(ROOT / "pear_store" / "local").stem)
    assert found == {"catalog", "applying", "contests"}


def test_one_module_reads_what_a_record_says_of_its_matrices() -> None:
    """`Task.adapters` and `Task.head` offer it; pear_train/to_task.py writes it."""
    for file in [file for package in ALLOWED for file in (ROOT / package).rglob("*.py")]:
        if file.relative_to(ROOT) not in (Path("pear_store/format/record.py"), Path("pear_train/to_task.py")):
            constants = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
            assert not {"quant", "basis"} & {value for value in constants if isinstance(value, str)}, file


@pytest.mark.parametrize("package", ALLOWED)
def test_nobody_imports_a_cli(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        if "cli" not in file.relative_to(ROOT).with_suffix("").parts and file.name != "__main__.py":
            assert not [name for name in modules(file) if "cli" in name.split(".")], file


OUTER = {
    "infer": {"pyarrow", "tqdm"},
    "cluster": {"ray"},
    "exports": {"onnx", "onnxruntime", "onnxscript"},
    "serve": {
        *("starlette", "uvicorn", "uvloop", "httptools", "multipart", "python_multipart", "prometheus_client", "httpx"),
    },
}
"""Wings of router that nothing else of it imports, and the packages that only they import"""
USERS = {
    "infer": {Path("cluster")},
    "cluster": {Path("infer/cli.py")},
    "serve": {Path("cluster/deployment.py")},
}
"""But for a wing that is built on another, and the command that starts it"""
USES = {Path("cluster/deployment.py"): {"starlette"}}
"""And packages of another wing, for the type of what it is given"""


@pytest.mark.parametrize("wing", OUTER)
def test_nothing_of_router_imports_its_outer_wings(wing: str) -> None:
    for file in (ROOT / "router").rglob("*.py"):
        inside = file.relative_to(ROOT / "router")
        if wing in inside.parts:
            continue
        if not USERS.get(wing, set()) & {inside, *inside.parents}:
            assert not [name for name in modules(file) if name.startswith(f"router.{wing}")], file
        if not (wing == "infer" and "cluster" in inside.parts):
            assert imports(file) & OUTER[wing] <= USES.get(inside, set()), file


def test_ray_is_imported_where_clusters_are() -> None:
    """It is an extra, takes seconds to import, and one machine needs none of it."""
    using = {file.relative_to(ROOT) for p in ALLOWED for file in (ROOT / p).rglob("*.py") if "ray" in imports(file)}
    assert {path for path in using if path.parent != Path("router/cluster")} == {Path("pear_train/cluster.py")}
    for file in (ROOT / "pear_train").rglob("*.py"):
        if any(name.startswith("pear_train.cluster") for name in modules(file)):
            assert file.relative_to(ROOT) == Path("pear_train/cli/cluster.py")
            body = ast.parse(file.read_text()).body
            tops = {name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for name in modules_of(node)}
            assert "pear_train.cluster" not in tops


def test_the_page_of_a_store_is_imported_where_it_is_asked_for() -> None:
    """It needs an extra, and no other command waits for that."""
    for file in (ROOT / "pear_store").rglob("*.py"):
        inside = file.relative_to(ROOT / "pear_store")
        if inside.parts[0] != "ui":
            assert not imports(file) & OUTER["serve"] - {"httpx"}, file
            body = ast.parse(file.read_text()).body
            tops = {name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for name in modules_of(node)}
            assert not [name for name in tops if name.startswith("pear_store.ui")], file


def test_the_batcher_knows_no_http() -> None:
    for name in ("batcher", "flow", "parts", "turns", "errors"):
        file = ROOT / "router" / "serve" / f"{name}.py"
        ours = {name for name in modules(file) if name.startswith("router.serve.")}
        assert not imports(file) & OUTER["serve"], file
        assert {name.split(".")[2] for name in ours} <= {"flow", "parts", "turns", "errors"}, file


FACES = {"router", "call", "engine"}
"""Of router, those that bring ideas together; nothing else of it imports them"""


def test_ideas_of_router_do_not_import_its_faces() -> None:
    for file in (ROOT / "router").glob("*.py"):
        ours = {name.split(".")[1] for name in modules(file) if name.startswith("router.")}
        if file.stem not in (*FACES, "__init__"):
            assert not ours & FACES, f"{file} imports {ours & FACES}"
        if file.stem in ("pictures", "preprocess", "batches"):
            assert not ours & {"slots", "matrices", "adapted", "registry"}, f"{file}: images know nothing of tasks"
        if file.stem in ("slots", "matrices", "layout"):
            assert not ours & {"adapted", "registry", "batches"}, f"{file}: slots know nothing of forwards and names"


@pytest.mark.parametrize("package", ALLOWED)
def test_no_class_is_long(package: str) -> None:
    """docs/architecture.md says why those are that are."""
    long = {
        f"{file.relative_to(ROOT)} {node.name}"
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= 250
    }
    assert long <= LONG


LONG = {"router/router.py Router", "pear_store/store.py Store"}


@pytest.mark.parametrize("package", ALLOWED)
def test_the_architecture_page_names_every_module(package: str) -> None:
    """A row that begins with a folder names modules of that folder. The first cell of any row names others."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split(f"\n## {package}\n")[1].split("\n## ")[0]
    named: set[tuple[str, str]] = set()
    for first, second in re.findall(r"^\| (`.+?) \| (.*)", section, re.MULTILINE):
        folder = "."
        for words in re.findall(r"`([^`]+)`", first):
            if "/" in words:
                folder, _, words = words.rpartition("/")
            named |= {(folder, name) for name in re.findall(r"\w+", words)}
        if folder != ".":
            named |= {
                (folder, name) for words in re.findall(r"`([^`]+)`", second) for name in re.findall(r"\w+", words)
            }
    for file in (ROOT / package).rglob("*.py"):
        if file.stem not in ("__init__", "__main__"):
            place = str(file.parent.relative_to(ROOT / package)), file.stem
            assert place in named, f"{file}: docs/architecture.md has no row that names it"


@pytest.mark.parametrize("package", ["router", "pear_train"])
def test_what_holds_arrays_is_equal_only_to_itself(package: str) -> None:
    """Arrays have no truth value, so a dataclass that compares them field by field raises."""
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            fields = [ast.unparse(line.annotation) for line in node.body if isinstance(line, ast.AnnAssign)]
            if not any(re.search(r"\b(Tensor|NDArray|Floats|Ints)\b", field) for field in fields):
                continue
            made = [ast.unparse(mark) for mark in node.decorator_list if ast.unparse(mark).startswith("dataclass")]
            assert all("eq=False" in mark for mark in made), f"{file}: {node.name} holds arrays: say eq=False"


@pytest.mark.slow
@pytest.mark.parametrize("package", ALLOWED)
def test_importing_changes_neither_warnings_nor_logging(package: str) -> None:
    code = (
        "import logging, warnings, torch, timm, numpy, PIL.Image\n"  # which have filters of their own
        "before = list(warnings.filters), warnings.showwarning, list(logging.root.handlers), logging.root.level\n"
        f"import {package}\n"
        "assert before == (list(warnings.filters), warnings.showwarning, logging.root.handlers, logging.root.level)\n"
        f"assert not logging.getLogger({package!r}).handlers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_one_module_opens_urls() -> None:
    using = {file.relative_to(ROOT) for p in ALLOWED for file in (ROOT / p).rglob("*.py") if "fsspec" in imports(file)}
    assert using == {Path("pear_store/local/sources.py")}


def test_the_hubs_package_is_imported_where_it_is_needed() -> None:
    """It is optional, and takes longer to import than most commands."""
    for package in ALLOWED:
        for file in (ROOT / package).rglob("*.py"):
            body = ast.parse(file.read_text()).body
            tops = {name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for name in modules_of(node)}
            assert not {name for name in tops if name.split(".")[0] in ("huggingface_hub", "matplotlib")}, file
            if "huggingface_hub" in imports(file):
                assert file.relative_to(ROOT / "pear_store") in (Path("local/hub.py"), Path("exchange/card.py"))


def test_store_commands_import_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; from pear_store.cli import main\n"
        f"store = ['--store', {str(tmp_path / 's')!r}]\n"
        "for args in (['--help'], [*store, 'init'], [*store, 'ls']):\n"
        "    main(args, standalone_mode=False)\n"
        "print(sorted({'torch', 'timm', 'numpy', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", ALLOWED)
def test_all_is_sorted_and_whole(package: str) -> None:
    module = importlib.import_module(package)
    names = module.__all__
    assert names == sorted(names)
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and str(n.module).split(".")[0] == package]
    assert set(names) == {a.asname or a.name for n in ours for a in n.names} - {"__version__"}
    for name in names:
        assert getattr(module, name).__name__ == name
