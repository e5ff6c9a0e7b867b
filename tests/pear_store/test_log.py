"""What operations log, and what a user's process is spared."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pear_store import NotFoundError, Store, rebuild, repair, verify
from pear_store.local import log, read
from tests.helpers.makers import small_task
from tests.pear_store.test_copies import die_after_placing
from tests.pear_store.test_integrity import ROOT
from tests.pear_store.test_store import packs


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[logging.LogRecord]]:
    caplog.set_level(logging.DEBUG, "pear_store")

    def records_of(operation: str) -> list[logging.LogRecord]:
        return [record for record in caplog.records if vars(record).get("operation") == operation]

    return records_of


def do_open(store: Store) -> int | None:
    Store(store.path).close()
    return None  # what LMDB takes


def do_add(store: Store) -> int:
    return store.add(small_task("new", seed=7)).new_bytes


def do_get(store: Store) -> int:
    return store.get("one").size_bytes


def do_tag(store: Store) -> int:
    return written(store, lambda: store.tag("one", "prod"))


def do_remove(store: Store) -> int:
    return written(store, lambda: store.remove("two"))


def written(store: Store, act: Callable[[], object]) -> int:
    before = sum(file.stat().st_size for file in packs(store))
    act()
    return sum(file.stat().st_size for file in packs(store)) - before


def do_gc(store: Store) -> int:
    store.remove("two")
    return store.gc().removed_bytes


def do_repack(store: Store) -> int:
    store.remove("two")
    store.gc(repack_all=True)
    return sum(file.stat().st_size for file in packs(store))


def do_verify(store: Store) -> int:
    return verify(store.path).bytes


def do_repair(store: Store) -> int:
    file = packs(store)[0]
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    others = set(packs(store)) - {file}
    with Store.create(store.path.parent / "good") as good:
        for name in ("one", "two"):
            good.add(small_task(name, seed=ord(name[0])))
    assert len(repair(store.path, [good.path]).healed) == 1
    return sum(file.stat().st_size for file in set(packs(store)) - others)


def do_rebuild(store: Store) -> int:
    rebuild(store.path)
    return sum(file.stat().st_size for file in packs(store))


@pytest.mark.parametrize(
    "act",
    [do_open, do_add, do_get, do_tag, do_remove, do_gc, do_repack, do_verify, do_repair, do_rebuild],
    ids=lambda act: act.__name__[3:],
)
def test_each_operation_logs_one_line_with_its_seconds_and_bytes(
    store: Store, act: Callable[[Store], int | None], caplog: pytest.LogCaptureFixture,
    logged: Callable[[str], list[logging.LogRecord]],
) -> None:  # fmt: skip
    store.add(small_task("one", seed=ord("o")))
    store.add(small_task("two", seed=ord("t")))
    caplog.clear()
    size = act(store)
    name = act.__name__[3:]
    found = logged(name)
    if name == "open":
        found = [record for record in found if str(store.path) in record.getMessage()]
    (record,) = found
    about = vars(record)
    assert record.levelno == logging.DEBUG
    assert record.name.startswith("pear_store.")
    assert 0 < about["seconds"] < 60
    assert about["size_bytes"] == size or (size is None and about["size_bytes"] > 0)
    assert f"{about['size_bytes']} bytes" in record.getMessage()


def test_a_failed_operation_says_so(store: Store, logged: Callable[[str], list[logging.LogRecord]]) -> None:
    with pytest.raises(NotFoundError):
        store.get("none")
    (record,) = logged("get")
    assert record.getMessage().endswith("failed: NotFoundError")


def test_many_tasks_are_one_line_without_the_time_of_the_caller(
    store: Store, logged: Callable[[str], list[logging.LogRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("pear_store.local.log.time.perf_counter", lambda: now[0])
    for _ in store.add_many([small_task(name, seed=ord(name)) for name in "abc"]):
        now[0] += 100
    unfinished = store.add_many([small_task(name) for name in "de"])
    next(unfinished)
    now[0] += 100
    del unfinished
    for record in logged("add"):
        assert vars(record)["seconds"] == 0
        assert "failed" not in record.getMessage()
    assert len(logged("add")) == 2


def test_a_gc_and_what_a_crash_left_are_said_at_info(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pear_store")
    store.add(small_task("one"))
    assert not caplog.records
    die_after_placing(store.path, "small_task(seed=2)")
    store.add(small_task("two", seed=2))
    assert [record.getMessage() for record in caplog.records] == [f"{store.path}: deleted 1 pack whose writer died"]
    caplog.clear()
    before = {file: file.stat().st_size for file in packs(store)}
    store.gc(repack_all=True)
    (file,) = packs(store)
    assert [record.getMessage() for record in caplog.records] == [
        f"gc {store.path}: wrote 2 packs of {sum(before.values())} bytes anew, as 1 of {file.stat().st_size} bytes"
    ]
    caplog.clear()
    store.gc(repack_all=True)
    assert not caplog.records  # there was nothing to do
    store.tag("one", "prod")
    tag = next(other for other in packs(store) if other != file)
    size = tag.stat().st_size
    store.untag("one@prod")
    store.gc()
    assert [record.getMessage() for record in caplog.records] == [f"gc {store.path}: deleted 1 pack of {size} bytes"]


def test_a_get_that_nobody_logs_is_not_timed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(small_task())
    monkeypatch.setattr(read, "Operation", None)
    assert not log.is_on("pear_store.local.read")
    store.get("dtd")


def test_a_users_process_keeps_its_warnings_and_loggers(tmp_path: Path) -> None:
    code = (
        "import sys, warnings\n"
        "before = list(warnings.filters), warnings.showwarning\n"
        "import pear_store, pear_store.cli\n"
        "pear_store.Store.create(sys.argv[1]).gc()\n"
        "assert (list(warnings.filters), warnings.showwarning) == before\n"
        "import logging\n"
        "store = pear_store.Store(sys.argv[1])\n"
        "store.gc()\n"
        "names = [name for name in logging.root.manager.loggerDict if name.startswith('pear_store')]\n"
        "assert names\n"
        "for name in names:\n"
        "    logger = logging.getLogger(name)\n"
        "    assert (logger.handlers, logger.level, logger.propagate, logger.filters) == ([], 0, True, [])\n"
        "assert (logging.root.handlers, logging.root.level) == ([], logging.WARNING)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_starts_without_logging() -> None:
    code = (
        "import sys; from pear_store.cli import main; main(['--help'], standalone_mode=False); "
        "assert 'logging' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
