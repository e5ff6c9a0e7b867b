"""Tasks of a remote: what a router answers, and what a slow remote holds up."""

import asyncio
import copy
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import router.infer.cli
from pear_store import PearStoreError, Store, Task
from pear_store.errors import PlaceError
from pear_store.local.evict import evict
from pear_store.remote import lazy
from pear_store.remote.cache import CacheSettings
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.lazy import RemoteStore
from pear_store.remote.remotes import Remote, add_remote, init_remote
from router import Backbone, Prediction, Router, UnknownTaskError
from router.serve.batcher import Batcher
from router.serve.catalogue import Catalogue
from tests.pear_store.remote.faults import StalledPlace
from tests.router.serve.conftest import PICTURES, run, until

pytestmark = pytest.mark.slow

NAMES = ("a", "b", "c")


@pytest.fixture
def pushed(tmp_path: Path, task_maker: Callable[..., Task]) -> Iterator[Store]:
    """A store with a, b, c and slow, each pushed by itself."""
    with Store.create(tmp_path / "pushed") as store:
        init_remote(str(tmp_path / "remote"))
        add_remote(store.path, Remote("origin", str(tmp_path / "remote")))
        for seed, name in enumerate((*NAMES, "slow")):
            store.add(task_maker(name, seed=seed, classes=3 + seed % 2))
            store.push()
        yield store


@pytest.fixture
def url(pushed: Store, tmp_path: Path) -> str:
    return f"file://{tmp_path / 'remote'}"


@pytest.fixture
def place(pushed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StalledPlace]:
    """The remote's place: the pack of the task slow does not come until `go` is set."""
    medium = DirectoryPlace(tmp_path / "remote")
    digest = max(pushed.get("slow").tensors).encode()
    slow = {name for name in medium.list("packs/") if digest in medium.get(name, 1 << 30)}
    made = StalledPlace(medium, slow.__contains__)
    monkeypatch.setattr(lazy, "open_place", lambda url, options=None: made)
    yield made
    made.go.set()


@pytest.fixture
def far(url: str, place: StalledPlace, tmp_path: Path) -> Iterator[RemoteStore]:
    with RemoteStore(url, {}, CacheSettings(tmp_path / "cache", timeout_s=50.0)) as store:
        yield store


@pytest.fixture
def hasty(url: str, place: StalledPlace, tmp_path: Path) -> Iterator[RemoteStore]:
    """As `far`, but nobody waits long."""
    with RemoteStore(url, {}, CacheSettings(tmp_path / "cache", timeout_s=2.0)) as store:
        yield store


def assert_same(found: Prediction, expected: Prediction) -> None:
    assert (found.task, found.version, found.classes) == (expected.task, expected.version, expected.classes)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_a_router_by_url_answers_as_one_by_directory(
    backbone: Backbone, pushed: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEAR_CACHE_DIR", str(tmp_path / "cache"))
    images = [PICTURES[0]] * 4
    tasks = ["a", "b@1", "c", "slow"]
    with Router(backbone, url) as router, Router(backbone, pushed) as near:
        for found, expected in zip(router.run(images, tasks), near.run(images, tasks), strict=True):
            assert_same(found, expected)
        with pytest.raises(UnknownTaskError, match="no task 'nobody'"):
            router.run(images, "nobody")
        store = router.store
    assert store is not None
    with pytest.raises(PearStoreError, match="was closed"):  # it was the router's own
        store.tasks()


def test_refresh_takes_up_what_was_pushed(
    backbone: Backbone, pushed: Store, url: str, tmp_path: Path, task_maker: Callable[..., Task]
) -> None:
    with (
        RemoteStore(url, {}, CacheSettings(tmp_path / "cache", ttl_s=1000)) as store,
        Router(backbone, store) as router,
    ):
        router.run(PICTURES[0], "a")
        pushed.add(task_maker("a", seed=50))
        pushed.push()
        assert router.run(PICTURES[0], "a")[0].version == 1
        assert router.refresh() == {"a": 2}
        with Router(backbone, pushed) as near:
            assert_same(router.run(PICTURES[0], "a")[0], near.run(PICTURES[0], "a")[0])


def test_a_router_by_url_goes_to_another_process(url: str, tmp_path: Path) -> None:
    with (
        RemoteStore(url, {}, CacheSettings(tmp_path / "cache")) as store,
        Router("pear_tiny", store) as router,
        copy.deepcopy(router) as again,  # made of what the pickle holds
    ):
        assert_same(again.run(PICTURES[0], "a")[0], router.run(PICTURES[0], "a")[0])
        assert pickle.dumps(router)
        assert again.store is not None and again.store is not router.store
        again.store.close()


def test_lists_of_a_server_fetch_no_task(
    backbone: Backbone, far: RemoteStore, place: StalledPlace, pushed: Store
) -> None:
    with Router(backbone, far) as router:
        catalogue = Catalogue(router)
        assert list(catalogue.tasks()) == ["a", "b", "c", "slow"]
        assert not place.asked["get_ranges packs"]


def test_only_the_rows_of_a_task_that_does_not_come_fail(backbone: Backbone, hasty: RemoteStore) -> None:
    with Router(backbone, hasty) as router:
        found = router.run([PICTURES[0]] * 4, ["a", "slow", "b", "slow"], on_error="return")
        assert sorted(found.failures) == [1, 3]
        assert "slow@1 is not cached, and did not come within 2 s" in str(found.failures[1])
        assert found[0].error is None and found[2].error is None
        with pytest.raises(PlaceError):
            router.run(PICTURES[0], "slow")


def test_calls_of_other_threads_do_not_wait_for_a_cold_task(
    backbone: Backbone, far: RemoteStore, place: StalledPlace
) -> None:
    with Router(backbone, far) as router:
        router.run([PICTURES[0]] * 2, ["a", "b"])
        outcomes: list[str | None] = []

        def ask() -> None:
            outcomes.extend(
                one.error or one.label for one in router.run([PICTURES[0]] * 2, ["slow", "a"], on_error="return")
            )

        thread = threading.Thread(target=ask)
        thread.start()
        while not place.asked_of_stalled:
            time.sleep(0.002)
        for _ in range(3):
            router.run([PICTURES[0]] * 2, ["a", "b"])
        assert router.preload("c").result(20) is None
        assert thread.is_alive() and not outcomes
        place.go.set()
        thread.join()
        assert [str(outcome)[:2] for outcome in outcomes] == ["sl", "a-"]


def test_requests_of_loaded_tasks_do_not_wait_for_a_cold_one(
    backbone: Backbone, far: RemoteStore, place: StalledPlace, pushed: Store
) -> None:
    async def work(router: Router) -> None:
        batcher = Batcher(router, workers=1)
        expected = await batcher.predict(PICTURES[0], "a")
        cold = [asyncio.ensure_future(batcher.predict(PICTURES[i % 6], "slow")) for i in range(40)]
        many = asyncio.ensure_future(batcher.predict_all(PICTURES[0], ["a", "slow", "nobody"]))
        await until(lambda: place.asked_of_stalled)
        for _ in range(3):
            assert_same(await batcher.predict(PICTURES[0], "a"), expected)
        assert not any(one.done() for one in (*cold, many))
        assert await batcher.predict(PICTURES[0], "c")  # another cold one
        place.go.set()
        assert {(await one).task for one in cold} == {"slow"}
        one, two, three = await many
        assert one.error is None and two.error is None and "no task 'nobody'" in str(three.error)
        assert await batcher.close(10)

    with Router(backbone, far) as router:
        run(work(router))
    assert place.asked["get_ranges packs"] == 3


def test_requests_of_a_task_that_does_not_come_fail_in_time(
    backbone: Backbone, hasty: RemoteStore, place: StalledPlace
) -> None:
    async def work(router: Router) -> None:
        batcher = Batcher(router, workers=1)
        cold = [asyncio.ensure_future(batcher.predict(PICTURES[0], "slow")) for _ in range(3)]
        assert await batcher.predict(PICTURES[0], "a")
        for one in cold:
            with pytest.raises(PlaceError, match="did not come within 2 s"):
                await one
        assert await batcher.predict(PICTURES[0], "b")
        assert await batcher.close(10)

    with Router(backbone, hasty) as router:
        run(work(router))


def test_a_loaded_task_that_was_evicted_everywhere_and_is_out_of_reach_fails_alone(
    backbone: Backbone, pushed: Store, url: str, place: StalledPlace, tmp_path: Path
) -> None:
    """Its lookup is known, so its rows get as far as the slots."""
    place.go.set()
    settings = CacheSettings(tmp_path / "cache", timeout_s=1.0)

    async def work(router: Router, store: RemoteStore) -> None:
        batcher = Batcher(router, workers=1)
        for task in ("slow", "a"):
            await batcher.predict(PICTURES[0], task)
        store._flights.finish(10)
        for key in list(router._slots.keys()):
            router._slots.evict(key)
        store._cache.do(partial(evict, chosen=[("slow", 1)], repack_all=True))
        place.go.clear()
        cold = asyncio.ensure_future(batcher.predict(PICTURES[0], "slow"))
        for _ in range(3):
            assert (await batcher.predict(PICTURES[0], "a")).error is None
        with pytest.raises(PlaceError):
            await cold
        assert await batcher.close(10)

    with RemoteStore(url, {}, settings) as store, Router(backbone, store) as router:
        run(work(router, store))


def test_pear_infer_reads_a_remote(pushed: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEAR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "x.png").write_bytes(PICTURES[0])
    (tmp_path / "list.csv").write_text("image,task\nx.png,a\nx.png,b\nx.png,nobody\nx.png,slow\n")
    outputs: list[list[dict[str, object]]] = []
    for where in (url, str(pushed.path)):
        out = tmp_path / f"out{len(outputs)}.jsonl"
        done = CliRunner().invoke(
            router.infer.cli.main, [str(tmp_path / "list.csv"), str(out), "--store", where, "--device", "cpu"]
        )
        assert done.exit_code == 0, done.output
        outputs.append([json.loads(line) for line in out.read_text().splitlines()])
    far, near = outputs
    assert [(row["version"], row["label"]) for row in far] == [(row["version"], row["label"]) for row in near]
    assert "no task 'nobody'" in str(far[2]["error"])
    plan = json.loads((tmp_path / "out0.jsonl.run.json").read_text())
    assert url in json.dumps(plan)
