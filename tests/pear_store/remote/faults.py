"""A place that fails as networks and servers do, and stores that share a remote."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from pear_store import Store
from pear_store.errors import PlaceError
from pear_store.format.manifest import to_manifest
from pear_store.remote import gc, pull, push, repair, verify
from pear_store.remote.log import SETTINGS_NAME, encode_settings
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.mirror import opened_mirror
from pear_store.remote.place import Place, Range
from pear_store.remote.retry import Persistent


class FaultyPlace(Place):
    """Another place, with faults. It forgets nothing that it acknowledged.

    Args:
        rate: of all requests, how many fail before or after they have done their work.
    """

    def __init__(self, place: Place, seed: int = 0, rate: float = 0.0) -> None:
        self.place, self.url, self.rate = place, place.url, rate
        self._random = random.Random(seed)
        self.asked: Counter[str] = Counter()
        self.read_bytes = 0
        self.before: dict[str, list[Callable[[], None]]] = {}
        """What happens just before the next requests of a kind, such as "create log": once each"""
        self.after: dict[str, list[Callable[[], None]]] = {}

    def _note(self, verb: str, name: str) -> None:
        kind = f"{verb} {name.split('/')[0]}"
        self.asked[kind] += 1
        if waiting := self.before.get(kind):
            waiting.pop(0)()
        self._maybe_fail("before")

    def _done(self, verb: str, name: str) -> None:
        if waiting := self.after.get(f"{verb} {name.split('/')[0]}"):
            waiting.pop(0)()
        self._maybe_fail("after")

    def _maybe_fail(self, when: str) -> None:
        if self._random.random() < self.rate / 2:
            raise PlaceError(self.url, f"a fault {when} it was done", again=True)

    def get(self, name: str, at_most: int) -> bytes:
        self._note("get", name)
        data = self.place.get(name, at_most)
        self._done("get", name)
        return data

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        self._note("get_ranges", name)
        self.read_bytes += sum(length for _, length in ranges)
        data = self.place.get_ranges(name, ranges)
        self._done("get_ranges", name)
        return data

    def put(self, name: str, data: bytes) -> None:
        self._note("put", name)
        self.place.put(name, data)
        self._done("put", name)

    def create(self, name: str, data: bytes) -> bool:
        self._note("create", name)
        done = self.place.create(name, data)
        self._done("create", name)
        return done

    def list(self, prefix: str) -> Iterator[str]:
        self._note("list", prefix)
        found = [name for name in self.place.list(prefix) if self._random.random() > self.rate]
        self._done("list", prefix)
        return iter(found)

    def delete(self, name: str) -> None:
        self._note("delete", name)
        self.place.delete(name)
        self._done("delete", name)


class StalledPlace(FaultyPlace):
    """Packs do not come until `go` is set."""

    def __init__(self, place: Place, stalled: Callable[[str], bool]) -> None:
        super().__init__(place)
        self.go, self.stalled = threading.Event(), stalled
        self.asked_of_stalled = 0

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        if self.stalled(name):
            self.asked_of_stalled += 1
            self.go.wait(60)
        return super().get_ranges(name, ranges)


def lost_answer() -> None:
    raise PlaceError("place", "the answer was lost", again=True)


def no_connection() -> None:
    raise PlaceError("place", "no connection")


class Client:
    """A store, and what it knows of the one remote."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self.place = folder, place
        self.store = Store.create(folder / "store")

    def push(self, *tasks: str) -> push.Pushed:
        with opened_mirror(self.folder / "mirror", self.place.url) as mirror:
            return push.push(self.store._open, Persistent(self.place), mirror, set(tasks) or None)

    def pull(self, *references: str, patterns: Sequence[str] = ("*",)) -> pull.Pulled:
        with opened_mirror(self.folder / "mirror", self.place.url) as mirror:
            return pull.pull(self.store._open, Persistent(self.place), mirror, references, patterns)

    def gc(self, keep: int | None = None, grace_s: float = 0.0, dry_run: bool = False) -> gc.RemoteGc:
        """A gc of the remote; unlike a user's, it deletes at once what it drops."""
        with opened_mirror(self.folder / "mirror", self.place.url) as mirror:
            return gc.collect(Persistent(self.place), mirror, keep, None, grace_s, dry_run)

    def verify(self, subset: tuple[int, int] = (1, 1)) -> verify.RemoteReport:
        with opened_mirror(self.folder / "mirror", self.place.url) as mirror:
            return verify.verify(Persistent(self.place), mirror, subset)

    def repair(self, *others: "Client") -> repair.RemoteRepaired:
        """By what this store has, and others; and by what they know of the log."""
        with ExitStack() as stack:
            clients = (self, *others)
            mirrors = [stack.enter_context(opened_mirror(c.folder / "mirror", c.place.url)) for c in clients]
            stores = [client.store._open for client in clients]
            return repair.repair(Persistent(self.place), mirrors[0], stores, mirrors[1:])

    def contents(self) -> dict[str, bytes]:
        """Versions by reference, as their manifests; every tensor is read and checked."""
        references = [f"{version.task}@{version.version}" for version in self.store.versions()]
        return {reference: to_manifest(self.store.get(reference)) for reference in references}


class Team:
    """Stores that share a place."""

    def __init__(self, folder: Path, place: Place | None = None) -> None:
        self.folder = folder
        self.medium = place or MemoryPlace()
        self.place = FaultyPlace(self.medium)
        self.medium.create(SETTINGS_NAME, encode_settings("0" * 32))
        self.clients: list[Client] = []

    def client(self, name: str = "") -> Client:
        folder = self.folder / (name or f"client{len(self.clients)}")
        folder.mkdir(parents=True)
        made = Client(folder, self.place)
        self.clients.append(made)
        return made

    def close(self) -> None:
        for client in self.clients:
            client.store.close()

    def clone(self) -> Client:
        """A new store with all that the remote has."""
        made = self.client()
        made.pull()
        return made

    def log(self) -> list[str]:
        return sorted(self.medium.list("log/"))
