"""Fixtures of the store's tests."""

from pathlib import Path

import pytest

from pear_store import Store
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
