"""The threads that read a remote for others."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import pytest

from pear_store.cli.remotes import interruptible
from pear_store.errors import PearStoreError, PlaceError
from pear_store.pools import ThreadPool
from pear_store.remote.crew import CrewedPlace
from pear_store.remote.flights import Flights
from pear_store.remote.memory import MemoryPlace
from tests.helpers.makers import sharing_tasks
from tests.pear_store.remote.faults import Team


def test_no_thread_more_is_an_error_and_not_a_hang(few_threads: Callable[[int], None]) -> None:
    medium = MemoryPlace("place")
    medium.put("a", b"a")
    crewed: CrewedPlace = CrewedPlace(medium, 2)
    flights: Flights[int] = Flights(2)
    few_threads(0)
    with pytest.raises(PlaceError, match="can't start new thread"):
        crewed.get("a", 9)
    with pytest.raises(PearStoreError, match="gives no more threads"):
        flights.join("a", lambda future: future.set_result(1))
    few_threads(2)
    assert crewed.get("a", 9) == b"a" and flights.join("a", lambda future: future.set_result(1)).result(60) == 1
    few_threads(0)
    assert [crewed.get("a", 9) for _ in range(3)] == [b"a"] * 3, "the thread that is there does the work"
    crewed.close()


def test_who_asks_after_a_failure_is_not_told_of_it() -> None:
    flights: Flights[int] = Flights(1)

    def fail(future: "Future[int]") -> None:
        raise PlaceError("place", "no connection")

    for n in range(200):
        with pytest.raises(PlaceError):
            flights.join("a", fail).result(60)
        assert flights.join("a", partial(Future[int].set_result, result=n)).result(60) == n
        flights.finish(60)


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_remotes_work_with_the_threads_that_there_are(
    team: Team, few_threads: Callable[[int], None], threads: int
) -> None:
    client = team.client()
    list(client.store.add_many(sharing_tasks(5)))
    few_threads(threads)
    assert len(interruptible("push", client.push).versions) == 5
    client.store.remove(client.store.versions()[0].task)
    client.push()
    client.gc()
    assert client.verify().ok
    assert team.clone().contents() == client.contents()


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_a_pool_does_each_work_once_whatever_threads_there_are(
    few_threads: Callable[[int], None], threads: int
) -> None:
    few_threads(threads)
    done: list[int] = []
    with ThreadPool(4) as pool:
        nested = pool.submit(lambda: [pool.submit(done.append, n) for n in range(3)]).result()
        failing = pool.submit(int, "one")
        few_threads(4)  # whoever comes now finds nothing left of what was done before
        assert list(pool.map(abs, range(-50, 0))) == list(range(50, 0, -1))
    assert sorted(done) == [0, 1, 2] and all(future.done() for future in nested)
    with pytest.raises(ValueError, match="one"):
        failing.result()
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(abs, 1)
