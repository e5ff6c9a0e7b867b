"""What is released: a wheel that works where only it is installed, and files that say the same version."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import pear_store
import pear_train
import router
from pear_store.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module(*command: str | Path) -> Sequence[str | Path]:
    return [sys.executable, "-m", *command]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the source distribution of what git tracks."""
    tree = tmp_path_factory.mktemp("tree")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in files:
        if (ROOT / name).is_file():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    run(*module("build", "--no-isolation", "--outdir", out, tree), cwd=tree)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_what_they_need(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"pear_store", "router", "pear_train"}
    of_git = run("git", "ls-files", "pear_store", "router", "pear_train").splitlines()
    needed = {name for name in of_git if Path(name).name != "README.md"}
    assert needed <= names, needed - names
    (told,) = re.findall(r"The wheel has about ([\d.]+) MB", (ROOT / "docs" / "compatibility.md").read_text())
    assert wheel.stat().st_size == pytest.approx(float(told) * 1e6, rel=0.1)


@pytest.mark.slow
def test_the_source_distribution_can_be_built_and_has_its_licence(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "pear_store/version.py"} <= names


@pytest.mark.slow
def test_what_an_index_shows_of_it_is_sound(dist: Path) -> None:
    assert "PASSED" in run(*module("twine", "check", "--strict", *dist.iterdir()))


@pytest.mark.slow
def test_the_installed_wheel_trains_stores_and_routes(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(*module("pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel))
    env = {"PYTHONPATH": str(site), "PATH": f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    for name in PROJECT["project"]["scripts"]:
        said = run(site / "bin" / name, "--version", cwd=work, env=env)
        assert said.strip() == f"{name}, version {__version__}"
    run(sys.executable, "-c", TRY, cwd=work, env=env)


TRY = """
from pathlib import Path
import numpy as np
import pear_store, pear_train, router
from PIL import Image
for package in (pear_store, pear_train, router):
    assert "site" in Path(package.__file__).parts, package.__file__
from click.testing import CliRunner
from pear_store.cli import main as store
from pear_train.cli import main as train

def call(command, *arguments):
    done = CliRunner().invoke(command, list(map(str, arguments)))
    assert done.exit_code == 0, done.output

random = np.random.default_rng(0)
for split in ("train", "val", "test"):
    for label in ("dark", "light"):
        folder = Path("data", split, label)
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 100, (32, 32, 3), dtype=np.uint8) + (150 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
call(train, "shade", "--data", "data", "--out", "shade.safetensors", "--epochs", 2, "--batch-size", 4)
call(store, "init", "--store", "s")
call(store, "add", "shade.safetensors", "--store", "s")
answers = router.Router("pear_tiny", "s").run([Path("data/test/light/0.png")], task="shade")
assert answers.labels[0] in ("dark", "light")
"""


def test_every_place_names_the_same_version() -> None:
    assert pear_store.__version__ == pear_train.__version__ == router.__version__ == __version__
    assert PROJECT["tool"]["towncrier"]["version"] == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((\S+)\)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest.groups() == (citation["version"], str(citation["date-released"]))
    assert newest[1] == __version__


@pytest.mark.parametrize(
    ("schema", "file"),
    [("vendor.citation-file-format", "CITATION.cff"), ("vendor.github-workflows", ".github/workflows/ci.yml")],
)
def test_files_for_others_keep_to_their_schemas(schema: str, file: str) -> None:
    run(*module("check_jsonschema", "--builtin-schema", schema, file))


def pins(name: str) -> dict[str, SpecifierSet]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one.specifier for one in map(Requirement, lines)}


def bounds() -> dict[str, set[SpecifierSet]]:
    """Of each package that is imported in use, what pyproject.toml says of its version."""
    extras = PROJECT["project"]["optional-dependencies"]
    in_use = [one for extra, listed in extras.items() if extra not in ("tests", "dev") for one in listed]
    found: dict[str, set[SpecifierSet]] = {}
    for one in map(Requirement, [*PROJECT["project"]["dependencies"], *in_use]):
        if one.name != PROJECT["project"]["name"]:
            found.setdefault(canonicalize_name(one.name), set()).add(one.specifier)
    return found


def version_of(specifiers: SpecifierSet, operator: str) -> Version:
    (one,) = specifiers
    assert one.operator == operator, one
    return Version(one.version)


def test_the_lowest_versions_that_are_tested_are_the_lowest_that_are_allowed() -> None:
    lowest = pins("constraints-lowest.txt")
    allowed = bounds()
    for name, specifiers in allowed.items():
        assert {version_of(one, ">=") for one in specifiers} == {version_of(lowest[name], "==")}, name
    assert all(str(specifier).startswith("<") for name, specifier in lowest.items() if name not in allowed)


def test_the_docs_name_the_versions_that_are_tested() -> None:
    lowest, newest = pins("constraints-lowest.txt"), pins("constraints.txt")
    rows = [
        f"| {name} | {version_of(lowest[name], '==')} | {version_of(newest[name], '==')} |" for name in sorted(bounds())
    ]
    text = (ROOT / "docs" / "compatibility.md").read_text()
    assert [line for line in text.splitlines() if re.match(r"\| [a-z0-9-]+ \| \d", line)] == rows, "\n".join(rows)


def test_the_docs_and_the_index_name_the_pythons_that_are_tested() -> None:
    tested = re.findall(r"^\| (3\.\d+)", (ROOT / "docs" / "compatibility.md").read_text(), re.MULTILINE)
    named = [one.rpartition(" ")[2] for one in PROJECT["project"]["classifiers"] if ":: Python :: 3." in one]
    assert list(dict.fromkeys(tested)) == named
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(named) <= set(workflow["jobs"]["versions"]["strategy"]["matrix"]["python"])


def test_the_docs_and_the_index_name_the_systems_that_are_tested() -> None:
    named = [one.rpartition(" :: ")[2] for one in PROJECT["project"]["classifiers"] if "Operating System" in one]
    readme = (ROOT / "README.md").read_text()
    compatibility = (ROOT / "docs" / "compatibility.md").read_text()
    assert named == re.findall(r"You need Python [\d.]+ or newer, on (\w+)\.", readme)
    assert named == re.findall(r"^Pear supports Python .*, on (\w+)\.", compatibility, re.MULTILINE)


def test_news_fragments_can_be_read() -> None:
    run(*module("towncrier", "build", "--draft", "--version", "next"))
    kinds = {kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"]}
    for fragment in (ROOT / "changes").iterdir():
        if fragment.name != "README.md":
            assert re.fullmatch(r"(\d+|\+[\w-]+)\.(\w+)(\.\d+)?\.md", fragment.name), fragment
            assert fragment.name.split(".")[1] in kinds, fragment
