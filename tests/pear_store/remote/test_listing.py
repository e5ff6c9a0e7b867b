"""Lists of a remote's tasks are those of the store that was pushed, and fetch no task."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pear_store import PearStoreError, Store
from pear_store.listing import Listing, Query, listed_json
from pear_store.remote.cache import CacheSettings
from pear_store.sharing import groups, new_bytes
from pear_store.ui.overview import Overview
from tests.helpers.makers import sharing_tasks
from tests.pear_store.test_cli import run


@pytest.fixture
def pushed(tmp_path: Path) -> Iterator[tuple[Store, str]]:
    (tmp_path / "remote").mkdir()
    url = f"file://{tmp_path / 'remote'}"
    with Store.create(tmp_path / "s") as store:
        for task in sharing_tasks(6):
            store.add(task)
        store.tag("task-002", "prod")
        assert run("--store", store.path, "remote", "init", "origin", url).exit_code == 0
        store.push()
        yield store, url


def test_a_remotes_list_is_the_stores(pushed: tuple[Store, str], tmp_path: Path) -> None:
    store, url = pushed
    with Store.open(url, cache=CacheSettings(folder=tmp_path / "cache")) as remote:
        listings = [Listing(store), Listing(remote)]
        for query in (Query(), Query(every=True, sort="new", reverse=True), Query(backbone="vit*", sort="accuracy")):
            here, there = (
                [listed_json(row) for row in listing.rows(listing.versions(query), query.every)] for listing in listings
            )
            assert here == there and len(here) >= 4
        assert new_bytes(store.uses()) == new_bytes(remote.uses())
        shared = [
            [group.size_bytes for group in groups([use.tensors for use in uses.versions], uses.size_bytes)]
            for uses in (store.uses(), remote.uses())
        ]
        assert shared[0] == shared[1]
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        before = remote.state
        assert remote.state == before
        store.remove("task-000")
        (gone,) = remote.summaries([version for version in remote.tasks() if version.task == "task-000"])
        assert not isinstance(gone, PearStoreError)  # until that is pushed
        store.push()
        remote.refresh()
        assert remote.state != before
        (gone,) = remote.summaries([listings[1].newest[0]])
        assert isinstance(gone, PearStoreError) and "was removed meanwhile" in str(gone)


def test_the_page_of_a_remote_is_the_stores(pushed: tuple[Store, str], tmp_path: Path) -> None:
    store, url = pushed
    with Store.open(url, cache=CacheSettings(folder=tmp_path / "cache")) as remote:
        here, there = Overview(store), Overview(remote)
        assert {**there.totals, "where": ""} == {**here.totals, "where": ""} and there.totals["where"] == url
        assert there.tasks(Query(sort="new"), None, 1, 3) == here.tasks(Query(sort="new"), None, 1, 3)
        assert there.map(None) == here.map(None) != {}
        assert there.task("task-002") == here.task("task-002")
        assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_command_lists_a_remote(pushed: tuple[Store, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEAR_CACHE_DIR", str(tmp_path / "cache"))
    rows = json.loads(run("--store", pushed[1], "ls", "task-00[12]", "--json").stdout)
    assert [(row["task"], row["new_bytes"]) for row in rows] == [("task-001", 1692), ("task-002", 1692)]
    shown = run("--store", pushed[1], "show", "task-001")
    assert shown.exit_code == 0 and "\nshared " not in shown.stdout  # that would take the whole log
