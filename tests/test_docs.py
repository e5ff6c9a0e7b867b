"""What the docs say is what the code does."""

import ast
import dataclasses
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import pear_store.errors
import pear_train.cli
import pear_train.evaluation.cli
import router.infer.cli
import router.serve.cli
from pear_store import Store, write_checkpoint
from pear_store.cli import main
from pear_store.errors import PearStoreError
from router import Predictions, Router
from tests.helpers.makers import floats, small_task

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXIT_CODES = {
    0: "done",
    1: "another error",
    2: "wrong usage",
    3: "a task, version or tag was not found",
    4: "a file is not a valid checkpoint",
    5: "stored bytes are damaged",
    6: "the disk is full",
    7: "the name is taken",
    8: "not a store that this Pear reads",
    9: "the version is tagged",
    10: "a file or URL is not opened, or cannot be read",
    11: "a store may not be read or written",
    12: "a remote cannot be reached or used",
    13: "another store pushed something that contradicts this one",
    130: "Ctrl-C ended a push, pull, clone, pear-train, pear-eval or pear-infer",
}
"""What the errors of pear_store.errors, click and Ctrl-C exit with"""
JSON = {
    "add": '`[{"file", "task", "version", "changed", "new_bytes", "shared_bytes"}]`, and `{"file", "error"}` for a '
    "refused file",
    "ls": '`[{"task", "version", "bytes"}]`; with `--short` only these and tags',
    "gc": '`{"removed_versions", "removed_tensors", "removed_bytes", "kept_tensors", "kept_bytes", "dead_bytes", '
    '"dry_run"}`',
    "verify": '`{"tensors", "damaged": [{"digest", "tasks"}]}`, and exit code 5 if anything is damaged',
    "stats": '`{"tasks", "versions", "tensors", "logical_bytes", "unique_bytes", "stored_bytes"}`',
}
"""What pear-store's commands print with --json, as far as it stays so"""


def store_commands() -> dict[str, click.Command]:
    """Of pear-store, those of its groups included, by name."""
    found: dict[str, click.Command] = {}
    for name, command in sorted(main.commands.items()):
        found[name] = command
        if isinstance(command, click.Group):
            found.update({f"{name} {inner}": command.commands[inner] for inner in sorted(command.commands)})
    return found


def reference() -> str:
    """docs/reference.md, as the commands' own help says it."""
    parts = [
        "# All commands\n\nThis page has what each command says with `--help`. `python -m tests.test_docs` writes it, "
        "and a test compares the two.\nThe [glossary](glossary.md) explains the words.\n\n## Exit codes\n\n"
        "All commands use these. `pear-eval` also has 20: [a gate failed](evaluate.md#a-gate-against-regressions).\n\n"
        "| code | meaning |\n|---|---|\n"
        + "".join(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items()),
        "## JSON\n\nOther programs rely on these keys of `pear-store COMMAND --json` (**fixed**). More may come.\n\n"
        "| command | JSON |\n|---|---|\n" + "".join(f"| `{name}` | {keys} |\n" for name, keys in JSON.items()),
    ]
    commands: list[tuple[str, click.Command]] = [("pear-store", main)]
    commands += [(f"pear-store {name}", command) for name, command in store_commands().items()]
    commands += [("pear-infer", router.infer.cli.main), ("pear-serve", router.serve.cli.main)]
    commands += [("pear-train", pear_train.cli.main), ("pear-eval", pear_train.evaluation.cli.main)]
    for name, command in commands:
        settings: dict[str, Any] = {"max_content_width": 100, "terminal_width": 100, **main.context_settings}
        with click.Context(command, info_name=name, **settings) as context:
            parts.append(f"## {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def test_the_reference_is_what_help_says() -> None:
    assert (DOCS / "reference.md").read_text() == reference(), "run: python -m tests.test_docs"


def test_the_reference_has_every_exit_code_of_an_error() -> None:
    errors = [error for error in vars(pear_store.errors).values() if isinstance(error, type)]
    codes = {error.exit_code for error in errors if issubclass(error, PearStoreError)}
    assert codes == EXIT_CODES.keys() - {0, 2, 130}


@pytest.mark.parametrize("name", store_commands())
def test_every_command_has_help_for_itself_and_its_options(name: str) -> None:
    command = store_commands()[name]
    assert command.help
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


def test_every_command_that_reports_takes_json() -> None:
    """As README says. `completion` prints a script, `plot` draws, and `ui` serves until it is stopped."""
    without = {
        name
        for name, command in store_commands().items()
        if not isinstance(command, click.Group) and not any("--json" in one.opts for one in command.params)
    }
    assert without == {"completion", "plot", "ui"}


def test_the_docs_name_the_commands_that_read_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEAR_CACHE_DIR", str(tmp_path / "cache"))
    reading = set()
    for name, command in store_commands().items():
        needed = [one for one in command.params if isinstance(one, click.Argument) and one.required]
        words = ["x.png" for one in needed for _ in range(max(1, one.nargs))]
        done = CliRunner().invoke(main, ["--store", f"file://{tmp_path}/none", *name.split(), *words])
        if f"{tmp_path}/none: there is no such directory" in done.output:
            reading.add(name)
    (listed,) = re.findall(r"`pear-store ([^.]*?) read a URL", (DOCS / "remotes.md").read_text())
    assert set(re.findall(r"[a-z-]+(?=`)", listed)) == reading


def keys_of(value: object) -> set[str]:
    """The keys of all objects in a JSON value."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_the_json_of_a_command_has_the_keys_that_stay(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "good.safetensors", small_task("dtd"))
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    store = ["--store", str(tmp_path / "store")]

    def printed(name: str, *words: str) -> tuple[Any, int]:
        done = CliRunner().invoke(main, [name, *words, "--json", *store])
        return json.loads(done.stdout), done.exit_code

    Store.create(tmp_path / "store").close()
    answers = {"add": printed("add", str(tmp_path / "good.safetensors"), str(tmp_path / "bad.safetensors"))}
    answers |= {"gc": printed("gc", "--yes"), "stats": printed("stats"), "ls": printed("ls")}
    assert keys_of(printed("ls", "--short")[0]) == {"task", "version", "bytes"}
    (pack,) = (tmp_path / "store/packs").glob("*/*")
    pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    answers["verify"] = printed("verify")
    assert answers["verify"][1] == 5
    assert answers.keys() == JSON.keys()
    for name, (value, _) in answers.items():
        assert set(re.findall(r'"(\w+)"', JSON[name])) <= keys_of(value), name


def test_the_router_page_has_the_routers_interface() -> None:
    page = (DOCS / "router.md").read_text()
    (signature,) = re.findall(r"`Router\((.*?)\)`", page, re.DOTALL)
    positional, _, keywords = " ".join(signature.split()).partition(", *, ")
    parameters = dict(inspect.signature(Router).parameters)
    assert positional == "backbone, store=None"
    assert [word.partition("=")[0] for word in keywords.split(", ")] == [*parameters][2:]
    for word in keywords.split(", "):
        name, default = word.split("=")
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == ast.literal_eval(default), word
    methods = {*re.findall(r"`router\.(\w+)\(", page)}
    assert len(methods) > 10
    assert not [name for name in methods if not callable(getattr(Router, name, None))]
    parts = {*re.findall(r"`\.(\w+)(?:\(k\))?`", page)}
    assert len(parts) > 8
    fields = {field.name for field in dataclasses.fields(Predictions)}
    assert not [name for name in parts if name not in fields and not hasattr(Predictions, name)]


def test_the_reader_of_the_formats_page_reads_a_store(store: Store) -> None:
    code = (DOCS / "formats.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 36
    scope: dict[str, Any] = {}
    exec(code, scope)
    store.add(small_task("one"))
    store.add(small_task("two", head__bias=floats([9.0, 9.0])))
    for seed in range(4):
        store.add(small_task("dtd", seed=seed))
    store.remove("dtd@4")
    store.gc(repack_all=True)
    for name, number in (("one", 1), ("two", 1), ("dtd", 3)):
        task = store.get(name)
        found = scope["read_task"](store.path, name)
        assert found == (number, task.record, {digest: bytes(t.data) for digest, t in task.tensors.items()})


@pytest.mark.parametrize("page", ["promises.md", "threats.md"])
def test_the_promises_name_tests_that_exist(page: str) -> None:
    tests = "".join(file.read_text() for file in Path(__file__).parent.rglob("test_*.py"))
    named = set(re.findall(r"\b(test_[a-z0-9_]+)(?!\.py)\b", (DOCS / page).read_text()))
    assert len(named) > 10
    for name in named:
        assert f"def {name}(" in tests or name in (
            "test_store",
            "test_integrity",
            "test_property",
            "test_checkpoint",
            "test_hostile",
            "test_terminal",
            "test_reading",
            "test_foreign",
        )


def test_each_decision_says_what_else_there_was_and_when_to_think_again() -> None:
    pages = {page.name: page.read_text() for page in (DOCS / "decisions").glob("*.md")}
    index = pages.pop("index.md")
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages.keys()
    for name, text in pages.items():
        parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert {"What was chosen", "Alternatives", "Why", "When to think again"} <= {*parts}, name


def test_the_benchmarks_and_tools_that_docs_name_exist() -> None:
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("benchmarks/*.md"), ROOT / "Makefile"]
    named = set()
    for page in pages:
        text = page.read_text()
        named |= {(page.name, name) for name in re.findall(r"\b(?:benchmarks|tools)/[a-z0-9_/]+\.py\b", text)}
        modules = re.findall(r"-m ((?:benchmarks|tools)\.[a-z0-9_.]+)\b", text)
        named |= {(page.name, name.replace(".", "/") + ".py") for name in modules}
    assert len(named) > 15
    assert not [(page, name) for page, name in named if not (ROOT / name).is_file()]


def test_the_table_of_benchmarks_has_every_script_and_result() -> None:
    folder = ROOT / "benchmarks"
    programs = {str(file.relative_to(folder)) for file in folder.rglob("*.py") if "__main__" in file.read_text()}
    scripts = {name for name in programs if not name.startswith("serve/peers/")}  # servers that serve/speed.py starts
    table = re.findall(r"^\| `.*", (folder / "README.md").read_text().split("\n## ")[0], re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`([a-z0-9_/]+\.py)`", row.split("|")[1])}
    assert named == scripts
    results = {name for row in table for name in re.findall(r"`(results/[a-z0-9_.]+)`", row)}
    assert not {name for name in results if not (folder / name).is_file()}


def test_the_make_targets_that_docs_name_exist_and_check_leaves_slow_tests_out() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("benchmarks/*.md")]
    named = {
        name for page in pages for name in re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"check", "demo", "faults", "test"} <= named <= targets
    assert "'not slow'" in makefile
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert any(marker.startswith("slow:") for marker in settings["markers"])


def test_figures_of_the_study_are_those_of_its_table() -> None:
    """Bytes and test top-1 side by side in README and method.md, as docs/results/study.md has them."""
    study = (DOCS / "results/study.md").read_text().split("## Final table")[1].split("\n![")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in study.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 8
    for page, heading in ((ROOT / "README.md", "What a task's bytes buy"), (DOCS / "method.md", "## What it gives")):
        table = re.findall(r"(?:^\|.*\n)+", page.read_text().split(heading)[1], re.MULTILINE)[0]
        shown = re.findall(r"^\|.*\| ([\d,]+) \| \**([\d.]+)\** \|$", table, re.MULTILINE)
        assert len(shown) >= 6, page
        for size, top1 in shown:
            assert any(row[7] == size and abs(float(row[6]) - float(top1)) < 0.056 for row in rows), (page, size, top1)


if __name__ == "__main__":
    (DOCS / "reference.md").write_text(reference())
