"""The threads that read a remote for others."""

import threading
from concurrent.futures import Future

import pytest

from pear_store.errors import PearStoreError, PlaceError
from pear_store.remote.crew import CrewedPlace
from pear_store.remote.flights import Flights
from pear_store.remote.memory import MemoryPlace


def no_more_threads(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_no_thread_more_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    medium = MemoryPlace("place")
    medium.put("a", b"a")
    crewed: CrewedPlace = CrewedPlace(medium, 2)
    flights: Flights[int] = Flights(2)
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", no_more_threads)
    with pytest.raises(PlaceError, match="can't start new thread"):
        crewed.get("a", 9)
    with pytest.raises(PearStoreError, match="gives no more threads"):
        flights.join("a", lambda future: future.set_result(1))
    monkeypatch.setattr(threading.Thread, "start", start)
    assert crewed.get("a", 9) == b"a" and flights.join("a", lambda future: future.set_result(1)).result(60) == 1
    monkeypatch.setattr(threading.Thread, "start", no_more_threads)
    assert [crewed.get("a", 9) for _ in range(3)] == [b"a"] * 3, "the thread that is there does the work"
    crewed.close()


def test_who_asks_after_a_failure_is_not_told_of_it() -> None:
    flights: Flights[int] = Flights(1)

    def fail(future: "Future[int]") -> None:
        raise PlaceError("place", "no connection")

    for n in range(200):
        with pytest.raises(PlaceError):
            flights.join("a", fail).result(60)
        assert flights.join("a", lambda future, n=n: future.set_result(n)).result(60) == n  # type: ignore[misc]
        flights.finish(60)
