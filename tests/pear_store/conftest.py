"""Fixtures of the store's tests."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pear_store import Store
from tests.helpers.forking import LIMIT_S
from tests.helpers.makers import floats, small_task


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Three tasks: two share three tensors, one has two versions, a tag, and a removed version."""
    with Store.create(tmp_path / "s") as store:
        store.add(small_task("one"))
        store.add(small_task("two", head__bias=floats([5.0, 5.0])))
        for seed in (3, 4, 5):
            store.add(small_task("three", seed=seed))
        store.tag("three@1", "prod")
        store.remove("three@2")
    return tmp_path / "s"


@pytest.fixture
def public() -> Iterator[Path]:
    """A store in a folder that every user may enter; root's."""
    if os.geteuid():
        pytest.skip("needs to be root, to become somebody else")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    with Store.create(folder / "s") as store:
        list(store.add_many([small_task(f"t{i}", seed=i) for i in range(5)]))
        store.tag("t1", "prod")
    yield folder / "s"
    shutil.rmtree(folder)


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Ends a test that waits for ever, such as for a pipe or a lock."""

    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
