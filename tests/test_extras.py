"""Without an extra, whatever needs it says in one line what to install."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from typing import Any

import pytest
from PIL import Image

from pear_store import Store
from tests.helpers.makers import small_task
from tests.test_release import PROJECT, ROOT

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
