"""docs/remotes.md says what is so."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pear_store import Store, write_checkpoint
from pear_store.remote.directory import DirectoryPlace
from tests.helpers.makers import floats, small_task
from tests.pear_store.remote.faults import Team
from tests.pear_store.test_cli import run

PAGE = (Path(__file__).parents[3] / "docs" / "remotes.md").read_text()


def test_the_walk_through_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for task in ("dtd", "svhn"):
        write_checkpoint(f"{task}.safetensors", small_task(task, seed=len(task)))
    lines = PAGE.split("```sh\n")[1].split("```")[0].splitlines()
    assert len(lines) > 5
    for line in lines:
        done = run(*shlex.split(line.replace("/shared/pear", str(tmp_path / "remote")))[1:])
        assert done.exit_code == 0, (line, done.output)
    with Store(tmp_path / "alice") as alice, Store(tmp_path / "bob") as bob:
        assert alice.versions() == bob.versions()
        assert len(alice.tasks()) == 2


def test_the_reader_of_the_page_reads_a_remote(tmp_path: Path) -> None:
    blocks = [block.split("```")[0] for block in PAGE.split("```python\n")[1:]]
    (code,) = (block for block in blocks if "def read_remote" in block)
    assert len(code.strip().splitlines()) <= 40
    scope: dict[str, Any] = {}
    exec(code, scope)
    (tmp_path / "remote").mkdir()
    team = Team(tmp_path / "team", DirectoryPlace(tmp_path / "remote"))
    client = team.client()
    client.store.add(small_task("one"))
    client.push()
    client.store.add(small_task("two", head__bias=floats([9.0, 9.0])))
    for seed in range(4):
        client.store.add(small_task("dtd", seed=seed))
    client.push()
    client.store.remove("dtd@4")
    client.push()
    for name, number in (("one", 1), ("two", 1), ("dtd", 3)):
        task = client.store.get(name)
        found = scope["read_remote"](tmp_path / "remote", name)
        assert found == (number, task.record, {digest: bytes(t.data) for digest, t in task.tensors.items()})
    team.close()


def test_every_key_of_the_formats_is_on_the_page() -> None:
    code = "".join((Path(__file__).parents[3] / "pear_store/remote" / name).read_text() for name in ("log.py",))
    for key in set(re.findall(r'value\["(\w+)"\]|listing\["(\w+)"\]', code)):
        assert f'"{"".join(key)}"' in PAGE
