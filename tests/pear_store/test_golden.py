"""What earlier code wrote is read, whatever is changed: files that `tests/golden/make.py` made once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pear_store import Store, Task, read_checkpoint, rebuild, verify, write_checkpoint
from pear_store.exchange.peft import import_peft

GOLDEN = Path(__file__).parents[1] / "golden"
STORES = ["1", "2", "3", "4", "index3"]
CHECKPOINTS = sorted(path.relative_to(GOLDEN) for path in GOLDEN.glob("*/checkpoints/*"))


def digests(task: Task) -> dict[str, str]:
    return {name: tensor.digest for name, tensor in sorted(task.tensors.items())}


def expected(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / folder / "expected.json").read_text())
    return found


def stored(store: Store) -> dict[str, Any]:
    """All that a store hands out; its tensors are hashed as they are read."""
    found = {}
    for version in store.versions():
        task = store.get(f"{version.task}@{version.version}")
        found[f"{version.task}@{version.version}"] = {
            "time_ns": version.time_ns, "bytes": version.size_bytes, "tags": list(version.tags),
            "record": dict(task.record), "tensors": sorted(task.tensors),
        }  # fmt: skip
    return found


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a store: to open one makes its lock file."""
    return Path(shutil.copytree(GOLDEN / request.param / "store", tmp_path / request.param))


@pytest.mark.parametrize("path", CHECKPOINTS, ids=str)
def test_checkpoints(path: Path) -> None:
    task = read_checkpoint(GOLDEN / path)
    assert digests(task) == expected(path.parts[0])["checkpoints"][path.stem]
    assert task.record["kept"] == {"unknown": ["keys", 1, None]}


@pytest.mark.parametrize("path", [path for path in CHECKPOINTS if path.parts[0] == "4"], ids=str)
def test_checkpoints_are_written_as_they_were(path: Path, tmp_path: Path) -> None:
    """To the byte. So a task has one manifest, and a store finds that it has the task."""
    write_checkpoint(tmp_path / "again", read_checkpoint(GOLDEN / path))
    assert (tmp_path / "again").read_bytes() == (GOLDEN / path).read_bytes()
    with Store(shutil.copytree(GOLDEN / "4" / "store", tmp_path / "4")) as store:
        if not (added := store.add(GOLDEN / path)).changed:
            assert added.new_bytes == 0
        else:
            assert path.stem in {"core", "q8", "half", "brain"}, "whose newest version is another task, or removed"


@pytest.mark.parametrize("folder", STORES, indirect=True)
def test_stores(folder: Path) -> None:
    with Store(folder) as store:
        assert stored(store) == expected(folder.name)["store"]
        assert verify(folder).ok


@pytest.mark.parametrize("folder", STORES, indirect=True)
def test_stores_that_are_changed(folder: Path) -> None:
    with Store(folder) as store:
        before = expected(folder.name)["store"]
        unchanged = store.add(GOLDEN / "1" / "checkpoints" / "plain.safetensors")
        assert (unchanged.version, unchanged.changed, unchanged.new_bytes) == (1, False, 0)
        added = store.add(GOLDEN / "1" / "checkpoints" / "brain.safetensors")  # its first version was removed
        assert (added.version, added.changed) == (2, True)
        store.gc(repack_all=True)
        now = stored(store)
        assert {name: now[name] for name in before} == before
        assert verify(folder).ok


@pytest.mark.parametrize("folder", ["1", "2"], indirect=True)
def test_an_index_of_format_4_is_read_and_brought_up_to_date_by_the_first_write(folder: Path) -> None:
    def index_format(store: Store) -> bytes | None:
        with store._open.read() as view:
            return view.get("meta", b"format")

    with Store(folder) as store:
        assert stored(store) == expected(folder.name)["store"]
        assert index_format(store) == b"4"
        store.tag("plain@1", "prod")
        assert index_format(store) == b"5"
        again = stored(store)
        assert again.pop("plain@1")["tags"] == ["prod"]
        assert again == {key: value for key, value in expected(folder.name)["store"].items() if key != "plain@1"}


@pytest.mark.parametrize("folder", STORES, indirect=True)
def test_rebuilt_from_its_packs(folder: Path) -> None:
    rebuild(folder)
    with Store(folder) as store:
        assert stored(store) == expected(folder.name)["store"]
    assert verify(folder).ok


def test_peft_folder() -> None:
    assert digests(import_peft(GOLDEN / "1" / "peft")) == expected("1")["peft"]
