"""The reading half of a store: a directory (store.py), or a remote read through a cache (remote/lazy.py)."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pear_store.diff import Diff, compare
from pear_store.errors import PearStoreError
from pear_store.format.checkpoint import Task, write_checkpoint
from pear_store.format.manifest import with_plain_names
from pear_store.format.summary import Summary
from pear_store.local.references import Version
from pear_store.local.stats import CacheStats, Stats
from pear_store.local.uses import Uses


class ReadableStore(ABC):
    """Tasks by name. Any number of threads and processes may read at once, also after a fork.

    This process has checked each tensor that it returns against the tensor's digest.

    A *reference* is a task's name (its newest version), ``name@version`` or ``name@tag``.
    """

    is_remote = False
    """Whether reading a task may need a request to another machine"""

    @property
    @abstractmethod
    def where(self) -> str:
        """The store's absolute directory, or the remote's URL. `Store.open` takes either."""

    @abstractmethod
    def close(self) -> None:
        """Releases what is open. Tensors that were returned stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def get(self, reference: str, copy: bool = True) -> Task:
        """Reads a task: its record, and its tensors by digest.

        Args:
            reference: ``name`` (the newest version), ``name@version`` or ``name@tag``.
            copy: True: tensors have their own memory, which may be written to. False: tensors are read-only views of
                the store's files. They stay valid as long as they are held.

        Raises:
            NotFoundError: there is no such task, version or tag.
            DamagedError: stored bytes do not match their digest.
            PlaceError: the task is on a remote that cannot be reached.
        """

    @abstractmethod
    def record(self, reference: str) -> Mapping[str, Any]:
        """A task's record: its JSON, which names tensors by digest (docs/formats.md). No tensor is read.

        Raises:
            NotFoundError: there is no such task, version or tag.
            DamagedError: the record does not match its hash.
            PlaceError: the record is on a remote that cannot be reached.
        """

    @abstractmethod
    def iter_tasks(self) -> Iterator[Version]:
        """The newest version of every task, by name. Reads them one by one."""

    @abstractmethod
    def versions(self, task: str | None = None) -> list[Version]:
        """Every version of one task, or of all tasks, sorted by name and number.

        Raises:
            NotFoundError: there is no such task.
        """

    @abstractmethod
    def tags(self) -> dict[str, dict[str, int]]:
        """The tags of every task that has some: {task: {tag: version}}."""

    @abstractmethod
    def resolve(self, reference: str) -> Version:
        """The version that a reference names now.

        Raises:
            NotFoundError: there is no such task, version or tag.
        """

    @abstractmethod
    def stats(self) -> Stats | CacheStats:
        """Counts and sizes: `Stats` of a directory, `CacheStats` of a remote."""

    @abstractmethod
    def summaries(self, versions: Iterable[Version]) -> Iterator[Summary | PearStoreError]:
        """What lists say of versions, in the same order. A version that cannot be read gives its error instead.

        Each is read when it is asked for. No tensor is read, and only the log of a remote is fetched.
        """

    @abstractmethod
    def uses(self) -> Uses:
        """Which tensors each version names. Sharing is counted by this.

        Raises:
            DamagedError: the index cannot be trusted.
        """

    @property
    @abstractmethod
    def state(self) -> Hashable:
        """A value that stays equal as long as nothing in the store changes."""

    def tasks(self) -> list[Version]:
        """The newest version of every task, by name."""
        return list(self.iter_tasks())

    def export(self, reference: str, path: str | Path) -> int:
        """Writes a version as a task checkpoint. Its tensors are bit-identical. A file that is there is replaced.

        Returns:
            the file's size in bytes.

        Raises:
            NotFoundError, DamagedError, PlaceError: as :meth:`get`.
            PearStoreError: the file cannot be written.
        """
        return write_checkpoint(path, with_plain_names(self.get(reference, copy=False)))

    def diff(self, a: str, b: str) -> Diff:
        """Compares two versions: which positions differ, which share their adapters, and the bytes of each.

        Args:
            a: a reference, as :meth:`get` takes it.
            b: another one. It may be of another task.

        Raises:
            NotFoundError, DamagedError, PlaceError: as :meth:`get`.
        """
        versions = (self.resolve(a), self.resolve(b))
        tasks = [self.get(f"{v.task}@{v.version}", copy=False) for v in versions]
        return compare(*versions, *tasks)

    def refresh(self) -> None:  # noqa: B027 (a directory is always looked at as it is)
        """Asks a remote now what is new. Does nothing for a directory, which is always read as it is.

        Raises:
            PlaceError, DamagedRemoteError: there was no usable answer. What was known before stays known.
        """

    def prefetch(self, references: Collection[str]) -> None:  # noqa: B027 (a directory has all at hand)
        """Begins to fetch tasks that will be read soon, and does not wait. `get` reports what failed."""
