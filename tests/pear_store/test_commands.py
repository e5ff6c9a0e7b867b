"""The commands beyond adding and listing, as a person or a script meets them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pear_store import Store, Task, make_task, write_checkpoint
from pear_store import plot as plotting
from tests.helpers.makers import floats, record, sharing_tasks, small_task, tensors
from tests.pear_store.test_cli import run
from tests.pear_store.test_store import flip, packs


@pytest.fixture
def where(tmp_path: Path) -> Path:
    with Store.create(tmp_path / "s") as store:
        for seed in range(3):
            store.add(small_task(seed=seed))
        store.add(small_task("svhn", head__bias=floats([1.0, 2.0])))
    return tmp_path


def test_sources_directories_urls_and_standard_input(where: Path) -> None:
    (where / "in" / "deep").mkdir(parents=True)
    for i, place in enumerate(("in/b.safetensors", "in/a.safetensors", "in/deep/C.SAFETENSORS")):
        write_checkpoint(where / place, small_task(f"t{i}", seed=20 + i))
    (where / "in" / "note.txt").write_text("no checkpoint")
    added = json.loads(run("--store", where / "s", "add", where / "in", "--json").stdout)
    assert [row["task"] for row in added] == ["t1", "t0", "t2"]
    url = f"file://{where}/in/a.safetensors"
    assert json.loads(run("--store", where / "s", "add", url, "--json").stdout)[0]["changed"] is False
    folder = json.loads(run("--store", where / "s", "add", f"file://{where}/in", "--json").stdout)
    assert [row["changed"] for row in folder] == [False] * 3
    done = subprocess.run(
        [Path(sys.executable).with_name("pear-store"), "--store", where / "s", "add", "-", "--name", "piped"],
        input=(where / "in" / "a.safetensors").read_bytes(), capture_output=True,
    )  # fmt: skip
    assert b"added piped@1" in done.stdout, done.stderr
    for bad, message in (("in/deep/..", "is unchanged"), ("s/packs/..", "pear")):
        assert message in run("--store", where / "s", "add", where / bad).output
    missing = run("--store", where / "s", "add", f"file://{where}/nothing.safetensors")
    assert (missing.exit_code, "no such file" in missing.stderr) == (3, True)
    empty = where / "empty"
    empty.mkdir()
    assert "a directory" in run("--store", where / "s", "add", empty).stderr
    unknown = run("--store", where / "s", "add", "nosuch://x/y.safetensors")
    assert (unknown.exit_code, "protocol 'nosuch' is not opened" in unknown.stderr) == (10, True)


def test_log_tag_diff(where: Path) -> None:
    store = ("--store", where / "s")
    assert "tagged dtd@prod: version 2" in run(*store, "tag", "dtd@2", "prod").stdout
    log = json.loads(run(*store, "log", "dtd", "--json").stdout)
    assert [(row["version"], row["tags"]) for row in log] == [(3, []), (2, ["prod"]), (1, [])]
    assert "prod" in run(*store, "log", "dtd").stdout
    refused = run(*store, "rm", "dtd", "--yes")
    assert (refused.exit_code, "untag it first: 'pear-store tag --delete dtd@prod'" in refused.stderr) == (9, True)
    assert run(*store, "show", "dtd@prod").stdout.startswith("dtd@2")
    assert "removed tag dtd@prod" in run(*store, "tag", "--delete", "dtd@prod").stdout
    assert run(*store, "tag", "dtd@2").exit_code == 2
    assert run(*store, "rm", "dtd@1", "dtd@2", "--yes").exit_code == 0
    found = json.loads(run(*store, "diff", "dtd", "svhn", "--json").stdout)
    assert {row["change"] for row in found["positions"]} == {"changed"}
    assert (found["a"]["version"], found["only_a_bytes"]) == (3, 152)
    assert "head        changed" in run(*store, "diff", "dtd", "svhn").stdout


def test_gc_policies(where: Path) -> None:
    store = ("--store", where / "s")
    plan = json.loads(run(*store, "gc", "--keep", 1, "--dry-run", "--json").stdout)
    assert plan["removed_versions"] == 2
    assert run(*store, "gc", "--keep", 1, input="n\n").exit_code == 1
    assert (
        json.loads(run(*store, "gc", "--keep", 1, "--older-than", "1d", "--yes", "--json").stdout)["removed_versions"]
        == 0
    )
    assert "removed 2 versions, " in run(*store, "gc", "--keep", 1, "--yes").stdout
    for bad in ("90", "d", "xd", "-"):
        refused = run(*store, "gc", "--older-than", bad)
        assert (refused.exit_code, "expected a number and s, m, h, d or w" in refused.stderr) == (2, True)


def pack_of(store: Path, data: bytes) -> Path:
    """The one pack that has these bytes."""
    with Store(store) as opened:
        (pack,) = [pack for pack in packs(opened) if data in pack.read_bytes()]
    return pack


@pytest.mark.slow
def test_verify_repair_and_rebuild(where: Path) -> None:
    store = ("--store", where / "s")
    good = run(*store, "verify")
    assert (good.exit_code, good.stdout.splitlines()[-1]) == (0, "all good")
    write_checkpoint(where / "good.safetensors", small_task(seed=1))
    shared = bytes(small_task(seed=1).tensors["head.weight"].data)
    pack = pack_of(where / "s", shared)
    flip(pack, 8 * pack.read_bytes().index(shared))
    bad = run(*store, "verify", "--json")
    report = json.loads(bad.stdout)
    assert (bad.exit_code, report["damaged"][0]["tasks"], report["damaged"][0]["versions"]) == (5, ["dtd"], ["dtd@2"])
    assert "hits dtd@2" in run(*store, "verify").stdout
    assert run(*store, "verify", where / "good.safetensors").exit_code == 2
    chain = f"simplecache::file://{where / 'good.safetensors'}"
    refused = run(*store, "verify", "--repair", chain)
    assert (refused.exit_code, "not opened unless allowed" in refused.stderr) == (10, True)
    allowed = run(*store, "verify", "--repair", chain, "--allow", "simplecache", "--allow", "file")
    assert (allowed.exit_code, allowed.stdout.splitlines()[-1]) == (0, "all good")
    flip(pack_of(where / "s", shared), 8 * pack_of(where / "s", shared).read_bytes().index(shared))
    healed = run(*store, "verify", "--repair", where / "good.safetensors")
    assert (healed.exit_code, healed.stdout.splitlines()[-1]) == (0, "all good")
    (where / "s" / "index" / "data.mdb").write_bytes(b"\1" * 8192)
    broken = run(*store, "verify")
    assert (broken.exit_code, "run 'pear-store rebuild'" in broken.stdout) == (5, True)
    listed = run(*store, "ls")
    assert (listed.exit_code, "'pear-store rebuild' makes it anew" in listed.stderr) == (5, True)
    assert "2 tasks, 4 versions" in run(*store, "rebuild").stdout
    assert run(*store, "verify", "--subset", "2/2").exit_code == 0
    assert run(*store, "verify", "--subset", "3/2").exit_code == 2


@pytest.mark.slow
def test_plot(where: Path) -> None:
    store = ("--store", where / "s")
    for name in ("map.png", "map.svg", "MAP.PNG"):
        assert run(*store, "plot", where / name).exit_code == 0
        assert (where / name).stat().st_size > 3000
    assert b"saved" in (where / "map.svg").read_bytes() or b"<path" in (where / "map.svg").read_bytes()
    assert "expected a file that ends in .png or .svg" in run(*store, "plot", where / "map.txt").stderr
    assert "no task 'nope'" in run(*store, "plot", where / "map.png", "nope").stderr


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(where: Path, shell: str) -> None:
    assert "pear-store" in run("completion", shell).stdout
    environment = {
        **os.environ, "_PEAR_STORE_COMPLETE": "bash_complete", "COMP_WORDS": "pear-store show d", "COMP_CWORD": "2",
        "PEAR_STORE": str(where / "s"),
    }  # fmt: skip
    command = Path(sys.executable).with_name("pear-store")
    done = subprocess.run([command], env=environment, capture_output=True, text=True)
    assert "dtd" in done.stdout
    assert "svhn" not in done.stdout


def cored(name: str, seed: int = 0) -> Task:
    """As pear-train makes them: positions borrow one adapter, each through a core of its own."""
    stored = {**tensors(seed), **{f"core{i}": floats([[i, 1.0], [seed, 1.0]]) for i in range(3)}}
    adapters = {f"c{i}": {"down": "a0.down", "up": f"core{i}", "basis": "a0.up"} for i in range(3)}
    positions = {f"blocks.{i}.attn": [[f"c{i}", 1.0]] for i in range(3)}
    return make_task(record(name, adapters=adapters, positions=positions), stored)


def colours(picture: Path) -> set[str]:
    """Of the cells: wide areas in a colour of the legend's."""
    image = Image.open(picture).convert("RGB")
    counts = image.getcolors(image.width * image.height) or []
    wide = {"#%02x%02x%02x" % rgb for count, rgb in counts if count > 2000 and isinstance(rgb, tuple)}
    return wide & {*plotting._COLOURS, plotting._BETWEEN, plotting._WITHIN}


@pytest.mark.slow
def test_a_plot_shows_what_cores_share(where: Path) -> None:
    with Store.create(where / "real") as store:
        store.add(cored("one"))
        store.add(cored("two", seed=1))
        made = cored("odd", seed=2)
        evil = {
            "$\\frac{": [["c0", 1.0]],
            "x\x1b[2J" * 300: [["c1", 1.0]],
            "b": [["c0", 1.0], ["c1", 1.0]],
            "c": [["c2", 1.0]],
        }
        store.add(Task({**made.record, "positions": evil}, made.tensors))
    assert run("--store", where / "real", "plot", where / "real.png").exit_code == 0
    assert len(colours(where / "real.png")) == 3  # a colour for each task
    text = svg(where / "real", where / "real.svg")
    assert re.search(r"\b[1-9]\d?% saved by sharing", text) and "e5" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 50])
def test_a_plot_says_by_backbone_what_is_shared_and_what_that_saves(tmp_path: Path, count: int) -> None:
    with Store.create(tmp_path / "s") as store:
        for task in sharing_tasks(count):
            store.add(task)
        stats = store.stats()
    text = svg(tmp_path / "s", tmp_path / "map.svg")
    backbones = {5: 2, 50: 3}[count]
    assert f"{count} tasks on {backbones} backbones: {stats.unique_bytes / 1000:.3g} kB stored in place of" in text
    assert len(re.findall(r"\d+ tasks x \d+ positions", text)) == backbones
    assert re.search(r"24 adapters of \d+ tasks: save", text)
    assert ("task-049" in text) == (count == 50)
    several = re.findall(r"(?:adapters of|times in) \d+ tasks: saves? ", text)
    assert len(several) == {5: 1, 50: 9}[count]  # where colours do not suffice, what tasks have in common has them
    run("--store", tmp_path / "s", "plot", tmp_path / "map.png")
    found = colours(tmp_path / "map.png")
    assert plotting._COLOURS[0] in found  # the common bases
    assert (plotting._WITHIN in found) == (count == 50)  # of 5 tasks, all that is shared has a colour of its own


@pytest.mark.slow
def test_one_task_is_drawn_with_a_colour_for_each_adapter(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        for task in sharing_tasks(8):
            store.add(task)
    text = svg(tmp_path / "s", tmp_path / "map.svg", "task-007")
    assert "blocks.8.mlp, 4 times in task-007: saves" in text
    run("--store", tmp_path / "s", "plot", tmp_path / "map.png", "task-007")
    assert len(colours(tmp_path / "map.png")) == 6


def svg(store: Path, file: Path, *names: str) -> str:
    """A plot's texts, which its .svg keeps as comments."""
    assert run("--store", store, "plot", file, *names).exit_code == 0
    return " ".join(re.findall(r"<!-- (.*?) -->", file.read_text()))


def test_ls_shows_tags_of_older_versions(where: Path) -> None:
    store = ("--store", where / "s")
    for version, tag in ((1, "first"), (2, "prod"), (3, "next")):
        run(*store, "tag", f"dtd@{version}", tag)
    row = next(line for line in run(*store, "ls").stdout.splitlines() if line.startswith("dtd"))
    assert "next first@1 prod@2" in row
    rows = json.loads(run(*store, "ls", "--json").stdout)
    assert rows[0]["tags"] == ["next"] and rows[0]["older_tags"] == {"first": 1, "prod": 2}
    assert "older_tags" not in rows[1]
    every = json.loads(run(*store, "ls", "--all", "--json").stdout)
    assert [tag for row in every for tag in row.get("tags", [])] == ["first", "prod", "next"]


def test_peft_there_and_back(where: Path, task_maker: Callable[..., Task]) -> None:
    store = ("--store", where / "s")
    made = task_maker("lora", positions=("blocks.0.attn.qkv", "blocks.1.mlp.fc1"))
    with Store(where / "s") as opened:
        opened.add(made)  # task_maker shares an adapter with blocks.5.attn, which is no Linear
    refused = run(*store, "export-peft", "lora", where / "peft")
    assert refused.exit_code != 0
    assert "blocks.5.attn" in refused.stderr
    record = {
        **made.record,
        "positions": {"blocks.0.attn.qkv": [["a0", 0.5]]},
        "adapters": {"a0": made.record["adapters"]["a0"]},
    }
    names = {"a0.down", "a0.up", "head.weight", "head.bias"}
    with Store(where / "s") as opened:
        opened.add(make_task(record, {name: t for name, t in made.tensors.items() if name in names}))
    assert run(*store, "export-peft", "lora", where / "peft").stdout == f"wrote lora@2 to {where / 'peft'}\n"
    told = json.loads(run(*store, "export-peft", "lora@2", where / "again", "--json").stdout)
    sizes = {file["file"]: file["bytes"] for file in told.pop("files")}
    assert told == {"task": "lora", "version": 2, "folder": str(where / "again")}
    assert sizes == {path.name: path.stat().st_size for path in (where / "again").iterdir()}
    back = json.loads(run(*store, "import-peft", where / "peft", "--name", "back", "--json").stdout)
    assert (back[0]["task"], back[0]["new_bytes"]) == ("back", 0)
    again = run(*store, "import-peft", where / "peft", "--backbone", "pear_tiny", "--name", "back")
    assert "back@1 is unchanged" in again.stdout, again.output
    missing = run(*store, "import-peft", where / "nothing")
    assert missing.exit_code in (3, 4)
    assert "Traceback" not in missing.output


def test_export_asks_before_it_replaces(where: Path) -> None:
    out = where / "out.safetensors"
    out.write_text("mine")
    refused = run("--store", where / "s", "export", "dtd", out)
    assert (refused.exit_code, "--force replaces it" in refused.stderr, out.read_text()) == (1, True, "mine")
    assert run("--store", where / "s", "export", "dtd", out, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--store", "LONG", "init"), "File name too long"),
        (("--store", "LONG/s", "init"), "File name too long"),
        (("--store", "LONG", "ls"), "no store there"),
        (("--store", "LONG", "verify"), "File name too long"),
        (("--store", "LONG", "rebuild"), "File name too long"),
        (("--store", "s", "add", "LONG"), "File name too long"),
        (("--store", "s", "verify", "--repair", "LONG"), "no such store, file or directory; nothing was repaired"),
        (("--store", "s", "export", "dtd", "LONG"), "File name too long"),
        (("--store", "s", "export-hub", "dtd", "LONG"), "File name too long"),
        (("--store", "s", "import-peft", "LONG"), "File name too long"),
        (("--store", "s", "remote", "init", "r", "{}/LONG"), "File name too long"),
        (("clone", "r", "LONG"), "File name too long"),
    ],
)
def test_a_name_too_long_for_a_file_is_one_line(
    where: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(where)
    assert run("--store", "s", "remote", "init", "origin", where / "r").exit_code == 0
    done = run(*(arg.replace("LONG", "x" * 300).replace("{}", str(where)) for arg in args))
    assert done.exit_code not in (0, 2) and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
