"""The pear-store command as a person or a script meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pear_store import write_checkpoint
from pear_store.cli import main
from tests.helpers.makers import container, record, small_task, tensors


def run(*args: object, **settings: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False, **settings)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    assert run("--store", tmp_path / "s", "init").exit_code == 0
    for i, name in enumerate(["dtd", "svhn"]):
        write_checkpoint(tmp_path / f"{name}.safetensors", small_task(name, seed=i))
    return tmp_path


def test_the_whole_round(where: Path) -> None:
    store = ("--store", where / "s")
    size = small_task().size_bytes
    added = json.loads(run(*store, "add", where / "dtd.safetensors", where / "svhn.safetensors", "--json").stdout)
    assert added == [
        {"file": str(where / f"{n}.safetensors"), "task": n, "version": 1, "changed": True, "new_bytes": size,
         "shared_bytes": 0} for n in ("dtd", "svhn")
    ]  # fmt: skip
    again = json.loads(run("add", where / "dtd.safetensors", "--json", *store).stdout)
    assert [(row["changed"], row["new_bytes"]) for row in again] == [(False, 0)]
    rows = json.loads(run(*store, "ls", "--json").stdout)
    assert [{key: row[key] for key in ("task", "version", "bytes")} for row in rows] == [
        {"task": "dtd", "version": 1, "bytes": size},
        {"task": "svhn", "version": 1, "bytes": size},
    ]
    shown = json.loads(run(*store, "show", "dtd", "--json").stdout)
    assert shown["manifest"]["labels"] == ["banded", "blotchy"]
    stats = json.loads(run(*store, "stats", "--json").stdout)
    assert {k: stats[k] for k in ("tasks", "versions", "tensors", "logical_bytes", "unique_bytes")} == {
        "tasks": 2, "versions": 2, "tensors": 8, "logical_bytes": 2 * size, "unique_bytes": 2 * size,
    }  # fmt: skip
    assert run(*store, "export", "dtd", where / "out.safetensors").exit_code == 0
    assert json.loads(run(*store, "add", where / "out.safetensors", "--json").stdout)[0]["changed"] is False
    assert json.loads(run(*store, "rm", "svhn", "--yes", "--json").stdout)[0]["task"] == "svhn"
    done = json.loads(run(*store, "gc", "--yes", "--json").stdout)
    assert done == {"removed_versions": 0, "removed_tensors": 4, "removed_bytes": size, "kept_tensors": 4,
                    "kept_bytes": size, "dead_bytes": size, "dry_run": False, "foreign": []}  # fmt: skip
    assert [row["task"] for row in json.loads(run(*store, "ls", "--json", "--all").stdout)] == ["dtd"]


def test_it_reads_well_without_json(where: Path) -> None:
    store = ("--store", where / "s")
    assert "added dtd@1: 152 new bytes, 0 shared" in run(*store, "add", where / "dtd.safetensors").stdout
    assert "dtd@1 is unchanged" in run(*store, "add", where / "dtd.safetensors").stdout
    assert "dtd" in run(*store, "ls").stdout
    shown = run(*store, "show", "dtd").stdout
    assert "banded, blotchy" in shown
    assert "blocks.0.attn" in shown
    assert "logical bytes" in run(*store, "stats").stdout
    assert "would remove dtd@1" in run(*store, "rm", "dtd", "--dry-run").stdout
    assert run(*store, "rm", "dtd", input="n\n").exit_code == 1
    assert "dtd" in run(*store, "ls").stdout
    assert run(*store, "rm", "dtd", input="y\n").exit_code == 0
    assert "would remove 4 tensors, 152 bytes" in run(*store, "gc", "--dry-run").stdout
    assert "removed 4 tensors" in run(*store, "gc", input="y\n").stdout
    assert run(*store, "ls").stdout == ""


def test_store_from_the_environment_and_either_side_of_the_verb(where: Path) -> None:
    run("add", "--store", where / "s", where / "dtd.safetensors")
    for args, env in (
        (("ls", "--json"), {"PEAR_STORE": str(where / "s")}),
        (("--store", where / "s", "ls", "--json"), {"PEAR_STORE": str(where / "other")}),
        (("ls", "--store", where / "s", "--json"), {"PEAR_STORE": str(where / "other")}),
    ):
        assert [row["task"] for row in json.loads(run(*args, env=env).stdout)] == ["dtd"]


def bad_files(folder: Path) -> dict[str, tuple[Path, int]]:
    """Files that add must refuse, with the exit code."""
    good = folder / "dtd.safetensors"
    content = bytearray(good.read_bytes())
    files = {}

    def put(name: str, data: bytes, code: int = 4) -> None:
        (folder / name).write_bytes(data)
        files[name] = (folder / name, code)

    files["missing"] = (folder / "nowhere.safetensors", 3)
    put("pickle.pth", b"PK\x03\x04" + bytes(100))
    put("truncated", bytes(content[:-5]))
    flipped = bytearray(content)
    flipped[-3] ^= 4
    put("flipped", bytes(flipped))
    put("oversized", (2**50).to_bytes(8, "little") + b"{}")
    for name, changed in (
        ("bad-name", record("../evil")),
        ("labels", record(labels=["one"])),
    ):
        from pear_store.format.container import container_chunks

        chunks = container_chunks(tensors(), {"pear": json.dumps(changed)})
        put(name, b"".join(map(bytes, chunks)))
    nan = tensors()
    nan["head.bias"] = type(nan["head.bias"])("F32", (2,), b"\0\0\xc0\x7f" * 2)
    put("nan", b"".join(map(bytes, container_chunks(nan, {"pear": json.dumps(record())}))))
    put("foreign", container("{}"))
    return files


def test_bad_input_is_one_clear_line_and_changes_nothing(where: Path) -> None:
    run("--store", where / "s", "add", where / "svhn.safetensors")
    before = {p: p.read_bytes() for p in (where / "s").rglob("*.safetensors")}
    for name, (path, code) in bad_files(where).items():
        result = run("--store", where / "s", "add", path)
        assert result.exit_code == code, name
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"Error: {path}: "), name
    assert {p: p.read_bytes() for p in (where / "s").rglob("*.safetensors")} == before
    assert [r["task"] for r in json.loads(run("--store", where / "s", "ls", "--json").stdout)] == ["svhn"]


def test_a_bad_file_costs_only_its_own_row(where: Path) -> None:
    result = run(
        "--store", where / "s", "add", where / "dtd.safetensors", where / "no", where / "svhn.safetensors", "--json"
    )
    assert result.exit_code == 3
    rows = json.loads(result.stdout)
    assert [row.get("task") for row in rows] == ["dtd", None, "svhn"]
    assert rows[1] == {"file": str(where / "no"), "error": f"{where / 'no'}: no such file"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("show", "nope"), 3, "no task 'nope' in"),
        (("show", "dtd@9"), 3, "no version 9 of task 'dtd'; the newest is 1"),
        (("rm", "nope", "--yes"), 3, "no task 'nope' in"),
        (("export", "dtd", "/nowhere/x"), 1, "/nowhere/x: cannot be written: No such file or directory"),
        (("export", "dtd", "/etc/passwd/x"), 1, "cannot be written: Not a directory"),
        (("export", "dtd", "/tmp/" + "x" * 300), 1, "cannot be written: File name too long"),
        (("--store", "/tmp/" + "x" * 300, "ls"), 3, "no store there"),
        (("add",), 2, "Missing argument"),
        (("add", "a", "b", "--name", "c"), 2, "--name: expected one task, found 2"),
    ],
)
def test_mistakes(where: Path, args: tuple[str, ...], code: int, message: str) -> None:
    run("--store", where / "s", "add", where / "dtd.safetensors")
    result = run("--store", where / "s", *args)
    assert result.exit_code == code
    assert message in result.stderr


def test_a_full_disk_is_one_line(small_disk: Path, where: Path) -> None:
    run("--store", small_disk / "s", "init")
    run("--store", small_disk / "s", "add", where / "svhn.safetensors")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    result = run("--store", small_disk / "s", "add", where / "dtd.safetensors")
    assert result.exit_code == 6
    assert result.stderr == (
        f"Error: {small_disk / 's'}: no space left on the device; nothing was changed, free some space and run again\n"
    )
    filler.unlink()
    assert [row["task"] for row in json.loads(run("--store", small_disk / "s", "ls", "--json").stdout)] == ["svhn"]
    assert run("--store", small_disk / "s", "add", where / "dtd.safetensors").exit_code == 0


def test_no_store_is_said(tmp_path: Path) -> None:
    result = run("--store", tmp_path / "s", "ls")
    assert result.exit_code == 3
    assert result.stderr == (
        f"Error: {tmp_path / 's'}: no store there; make one with 'pear-store init --store {tmp_path / 's'}'\n"
    )


def test_the_installed_command(where: Path) -> None:
    command = Path(sys.executable).parent / "pear-store"
    if not command.exists():
        pytest.skip("the package is not installed beside this interpreter")
    env = {**os.environ, "PEAR_STORE": str(where / "s")}
    done = subprocess.run([command, "add", where / "dtd.safetensors"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run([command, "--version"], capture_output=True, text=True).stdout.startswith("pear-store")


def test_every_command_has_help() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        assert run(name, "--help").exit_code == 0
