"""Nothing of a stranger's reaches the terminal as more than text."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pear_store import CheckpointError, Store, Task, make_task
from pear_store.format.checkpoint import natural_key
from pear_store.terminal import echo_json_rows, echo_long_table, printable
from tests.helpers.makers import record, tensors
from tests.pear_store.test_cli import run

EVIL = "x\x1b[2J\x1b]0;title\x07\r\x9b31m\u202eevil\nError: forged"
SHOWN = r"x\x1b[2J\x1b]0;title\x07\r\x9b31m\u202eevil\nError: forged"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")


def evil_task() -> Task:
    """As a store may hold it that was written before names were checked."""
    made = record("evil", backbone={"model": EVIL, "digest": "sha256:" + "0" * 64}, metrics={EVIL: EVIL, "ok": 1})
    made["adapters"] = {EVIL: made["adapters"]["a0"]}
    made["positions"] = {EVIL: [[EVIL, 1.0]], "blocks." + "9" * 5000: [[EVIL, 2.0]], "blocks.3": [[EVIL, 2.0]]}
    return Task(made, tensors())


def command(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [Path(sys.executable).with_name("pear-store"), *map(os.fsencode, map(str, arguments))],
        capture_output=True, env={**os.environ, **(env or {})}, timeout=60,
    )  # fmt: skip


def test_an_old_store_with_escape_sequences_is_shown_as_text(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(evil_task())
        store.add(Task({**evil_task().record, "metrics": {EVIL: 2}}, tensors(seed=1)))
    for arguments in (("show", "evil"), ("ls",), ("log", "evil"), ("diff", "evil@1", "evil@2"), ("stats",),
                      ("show", "evil", "--json"), ("export-peft", "evil", tmp_path / "out")):  # fmt: skip
        done = run("--store", tmp_path / "s", *arguments)
        assert not CONTROL.search(done.output), done.output
        assert not any(line.startswith("Error: forged") for line in done.output.splitlines())
    shown = run("--store", tmp_path / "s", "show", "evil@1").stdout
    assert shown.count(SHOWN) == 7  # the model, a metric's key and value, a position, and an adapter three times
    assert json.loads(run("--store", tmp_path / "s", "show", "evil@1", "--json").stdout)["manifest"]["metrics"]["ok"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"backbone": {"model": "m\x1b[2J", "digest": "sha256:" + "0" * 64}}, "backbone"),
        ({"metrics": {"a\nb": 1}}, "metrics"),
        ({"metrics": {"a" * 1001: 1}}, "metrics"),
        ({"adapters": {"a0\x9b": {"down": "a0.down", "up": "a0.up"}}}, "adapters"),
        ({"positions": {"blocks.0\r": [["a0", 1.0]]}}, "positions"),
    ],
)
def test_new_records_hold_no_control_characters_in_names(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=f"field '{field}': name .*: expected at most 1000 characters"):
        make_task(record(**changes), tensors())


@pytest.mark.slow
def test_file_names_with_escape_sequences_or_bytes_that_are_no_text(tmp_path: Path) -> None:
    store = os.fsdecode(os.fsencode(tmp_path) + b"/s\xff\xe9")
    file = tmp_path / "a\x1b[2J\nError: forged.safetensors"
    file.write_bytes(b"not one")
    for arguments, code in ((("init",), 0), (("add", file), 4), (("ls",), 0), (("stats",), 0), (("verify",), 0),
                            (("rebuild",), 0), (("gc", "--yes"), 0), (("show", "a\x1b[2J"), 3), (("init", "--json"), 0),
                            (("add", "--\x1b[2J"), 2), (("\x1b[2J",), 2), (("export", "a", file), 1)):  # fmt: skip
        done = command("--store", store, *arguments)
        assert done.returncode == code, done
        text = (done.stdout + done.stderr).decode()
        assert not CONTROL.search(text) and "Traceback" not in text and "\nError: forged" not in text, text
    assert rb"/s\xff\xe9" in command("--store", store, "init").stdout
    missing = command("--store", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), "ls")
    assert (missing.returncode, rb"/\xff" in missing.stderr) == (3, True)


def test_a_terminal_that_lacks_a_character_gets_its_number(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(make_task(record(labels=["érable", "樹"]), tensors()))
    done = command("--store", tmp_path / "s", "show", "dtd", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert (done.returncode, rb"\xe9rable, \u6a39" in done.stdout) == (0, True), done


def test_numbers_of_any_length_are_sorted() -> None:
    names = ["b.10.a", "b.2.a", "b.a", "b", "b." + "9" * 5000, "b." + "1" + "0" * 5000, "b.002.b", "c.1"]
    assert sorted(names, key=natural_key) == [
        "b", "b.a", "b.2.a", "b.002.b", "b.10.a", "b." + "9" * 5000, "b." + "1" + "0" * 5000, "c.1",
    ]  # fmt: skip
    for option, value in (("--subset", "1/" + "9" * 5000), ("--subset", "9" * 5000 + "/1")):
        assert run("verify", option, value).exit_code == 2
    for value in ("nand", "infd", "-1d", "9" * 5000 + "d", "1e999s", "d"):
        assert run("gc", "--older-than", value).exit_code == 2


def test_printable_keeps_what_can_be_seen() -> None:
    assert printable("érable 樹 🌳 a b\\c") == "érable 樹 🌳 a b\\c"
    assert printable("a\tb\x00\u2028\udcff\ud800") == r"a\tb\x00\u2028\xff\ud800"


def counted(count: int, capsys: pytest.CaptureFixture[str], printed: list[str]) -> Iterator[dict[str, Any]]:
    """Rows; each time, what was printed before goes to `printed`."""
    for number in range(count):
        printed.append(capsys.readouterr().out)
        yield {"name": f"{'x' * (number // 1500 * 3)}{number}", "bytes": f"{number:,}"}


def test_a_long_table_is_printed_as_its_rows_come(capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []
    echo_long_table(counted(2500, capsys, printed), left=["name"])
    lines = ("".join(printed) + capsys.readouterr().out).splitlines()
    assert len(lines) == 2502 and lines[:3] == ["name  bytes", "----  -----", "0         0"]
    assert lines[1001] == "999     999" and lines[1002] == "1000     1,000"  # one heading; wider only where it must be
    assert lines[-1] == "xxx2499  2,499"
    assert "999     999" in printed[1000]  # the first thousand are there before the next is read


def test_a_long_list_of_json_is_printed_as_its_rows_come(capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []
    echo_json_rows(counted(3, capsys, printed))
    assert printed[1] == '[{"name": "0", "bytes": "0"}'
    assert [row["name"] for row in json.loads("".join(printed) + capsys.readouterr().out)] == ["0", "1", "2"]
    echo_json_rows([])
    assert capsys.readouterr().out == "[]\n"
