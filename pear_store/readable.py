"""What a store offers to readers, be it a directory (store.py) or a remote read through a cache (remote/lazy.py)."""

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

    Every tensor handed out has been checked against its digest in this process.
    """

    is_remote = False
    """Whether to read a task may take a request to another machine"""

    @property
    @abstractmethod
    def where(self) -> str:
        """Its directory from the root on, or its URL: what `Store.open` takes."""

    @abstractmethod
    def close(self) -> None:
        """Releases what is open; buffers handed out stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def get(self, reference: str, copy: bool = True) -> Task:
        """A task by ``name`` (its newest version), ``name@version`` or ``name@tag``.

        Args:
            copy: give tensors their own memory; else they are read-only views, valid as long as they are held.

        Raises:
            NotFoundError: no such task, version or tag.
            DamagedError: stored bytes do not match their digest.
            PlaceError: they are elsewhere, and that cannot be reached.
        """

    @abstractmethod
    def record(self, reference: str) -> Mapping[str, Any]:
        """A task's record without its tensors, which are named by digest. Raises as :meth:`get`."""

    @abstractmethod
    def iter_tasks(self) -> Iterator[Version]:
        """Like :meth:`tasks`, one by one."""

    @abstractmethod
    def versions(self, task: str | None = None) -> list[Version]:
        """Every version, of one task or of all, by name and number.

        Raises:
            NotFoundError: the named task has no version.
        """

    @abstractmethod
    def tags(self) -> dict[str, dict[str, int]]:
        """Every task's tags: {task: {tag: version}}."""

    @abstractmethod
    def resolve(self, reference: str) -> Version:
        """The version that a reference stands for now.

        Raises:
            NotFoundError: none.
        """

    @abstractmethod
    def stats(self) -> Stats | CacheStats:
        """Counts and sizes of what is stored."""

    @abstractmethod
    def summaries(self, versions: Iterable[Version]) -> Iterator[Summary | PearStoreError]:
        """What lists say of each of some versions, in their order, read as it is asked for; or why it cannot be read.

        No tensor is read, and nothing of a remote's is fetched but its log.
        """

    @abstractmethod
    def uses(self) -> Uses:
        """Which tensors each version names: what sharing is counted by.

        Raises:
            DamagedError: the index cannot be trusted.
        """

    @property
    @abstractmethod
    def state(self) -> Hashable:
        """Equal as long as nothing changed."""

    def tasks(self) -> list[Version]:
        """The newest version of every task, by name."""
        return list(self.iter_tasks())

    def export(self, reference: str, path: str | Path) -> int:
        """Writes a stored version as a task checkpoint, its tensors bit-identical; returns the file's bytes."""
        return write_checkpoint(path, with_plain_names(self.get(reference, copy=False)))

    def diff(self, a: str, b: str) -> Diff:
        """Which positions use other adapters in two versions, which share theirs, and the bytes of each.

        Raises:
            NotFoundError: one of them is not there.
        """
        versions = (self.resolve(a), self.resolve(b))
        tasks = [self.get(f"{v.task}@{v.version}", copy=False) for v in versions]
        return compare(*versions, *tasks)

    def refresh(self) -> None:  # noqa: B027 (a directory is always looked at as it is)
        """Asks now what is new, where that is not asked each time.

        Raises:
            PlaceError, DamagedRemoteError: there was no answer that can be used; what was known stays known.
        """

    def prefetch(self, references: Collection[str]) -> None:  # noqa: B027 (a directory has all at hand)
        """Begins to bring tasks here that will be asked for soon, and does not wait. What fails is said by `get`."""
