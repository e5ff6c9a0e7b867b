"""The store: many tasks in one directory, each distinct tensor once."""

import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pear_store.errors import NotFoundError, PearStoreError
from pear_store.format.checkpoint import TAG_NAME, Task
from pear_store.format.summary import Summary
from pear_store.local import gc
from pear_store.local.add import Added, FoundGood, add_group
from pear_store.local.create import make_store
from pear_store.local.directory import store_path
from pear_store.local.index import View
from pear_store.local.loading import Refused, load_groups
from pear_store.local.log import Operation, is_on
from pear_store.local.mounts import warn_of_network
from pear_store.local.opened import OpenStore
from pear_store.local.read import read_record, read_summaries, read_version
from pear_store.local.references import (
    Version,
    all_tags,
    beginning,
    newest_versions,
    parse_reference,
    resolve,
    unknown_task,
    version_of,
    versions,
)
from pear_store.local.removal import remove
from pear_store.local.sources import Access, Source
from pear_store.local.stats import Stats, count
from pear_store.local.tags import set_tag
from pear_store.local.uses import Uses, find_uses
from pear_store.readable import ReadableStore

if TYPE_CHECKING:  # a command that needs no remote starts without them
    from pear_store.remote.cache import CacheSettings
    from pear_store.remote.changes import Changes
    from pear_store.remote.gc import RemoteGc
    from pear_store.remote.history import Logged
    from pear_store.remote.pull import Pulled
    from pear_store.remote.push import Pushed
    from pear_store.remote.repair import RemoteRepaired
    from pear_store.remote.verify import RemoteReport


class Store(ReadableStore):
    """A directory of tasks. Any number of threads and processes may read and add at once, also after a fork.

    What `add` has returned is durable. Every tensor handed out has been checked against its digest in this process.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens an existing store.

        Raises:
            NotFoundError: there is no store at `path`.
            FormatError: another Pear wrote it.
            DamagedIndexError: its index cannot be opened.
            PearStoreError: it is a URL.
        """
        if "://" in str(path):
            raise PearStoreError(
                "a URL names a remote, which is only read here (Store.open); to change it, clone it first "
                "('pear-store clone URL DIR'), and push"
            )
        self.path = store_path(path)
        with Operation(__name__, "open", self.path) as operation:
            self._open = OpenStore(self.path)
            if is_on(__name__):
                operation.size_bytes = self._open.index.size_bytes
        warn_of_network(self.path)

    @staticmethod
    def open(
        where: str | Path, *, options: Mapping[str, str] | None = None, cache: "CacheSettings | None" = None
    ) -> ReadableStore:
        """Opens a store's directory, or a remote by its URL, which is then read through a cache on this machine.

        Args:
            options: of the remote's place, such as ``endpoint``; never a secret (docs/remotes.md).
            cache: where the cache is, how large it may grow, and how often the remote is asked.

        Raises:
            NotFoundError: there is no store, or no remote.
            PlaceError: the remote cannot be reached, and nothing is known of it.
        """
        if "://" not in str(where):
            return Store(where)
        from pear_store.remote.lazy import RemoteStore

        return RemoteStore(str(where), options or {}, cache)

    @property
    def where(self) -> str:
        return os.path.realpath(self.path)

    @classmethod
    def create(cls, path: str | Path) -> "Store":
        """Makes an empty store, or opens the one that is there.

        Raises:
            FormatError: the directory holds something else.
        """
        path = store_path(path)
        make_store(path)
        return cls(path)

    def close(self) -> None:
        self._open.close()

    # ---- adding -------------------------------------------------------------------------------

    def add(self, source: Source, name: str | None = None, access: Access | None = None) -> Added:
        """Adds one task, under another name if given; durable when it returns.

        Args:
            source: a task, a path, an fsspec URL, or a binary file object of a task checkpoint.
            access: which URLs may be opened, where the default is not enough.

        Raises:
            PearStoreError: the source is refused, or the disk is full; nothing was changed.
        """
        (result,) = self.add_many([source], name, access)
        if isinstance(result, Refused):
            raise result.error
        return result

    def add_many(
        self, sources: Iterable[Source], name: str | None = None, access: Access | None = None
    ) -> Iterator[Added | Refused]:
        """Adds tasks in groups, one result for each source in order; a bad source costs only its own result.

        A group is added when its results are asked for: nothing is added before the first.

        A list or tuple of many local files is read ahead by forked processes, if this one has no threads, numpy's and
        torch's included; other iterables are read one by one as they give their sources.

        Raises:
            DiskFullError: the group that did not fit is not there, all before it are.
        """
        found_good = FoundGood()
        with Operation(__name__, "add", self.path) as operation:
            for group in load_groups(sources, name, access):
                results = add_group(self._open, group, found_good)
                operation.size_bytes += sum(one.new_bytes for one in results if isinstance(one, Added))
                operation.leave()
                yield from results
                operation.come_back()

    # ---- reading ------------------------------------------------------------------------------

    def get(self, reference: str, copy: bool = True) -> Task:
        return read_version(self._open, reference, copy)

    def record(self, reference: str) -> Mapping[str, Any]:
        return read_record(self._open, reference)

    def iter_tasks(self) -> Iterator[Version]:
        if self._open.index.is_lockless:  # a view does not last
            yield from self._open.look(lambda view: list(newest_versions(view)))
            return
        with self._open.read() as view:
            for version in newest_versions(view):
                yield version
                view.check_own()

    def versions(self, task: str | None = None) -> list[Version]:
        found = self._open.look(lambda view: versions(view, task))
        if task is not None and not found:
            raise NotFoundError(unknown_task(task, self.path))
        return found

    def tags(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        with self._open.read() as view:
            for (task, number), tags in all_tags(view).items():
                found.setdefault(task, {}).update(dict.fromkeys(tags, number))
        return found

    def resolve(self, reference: str) -> Version:
        def look(view: View) -> Version:
            name, number, _ = resolve(view, reference, self.path)
            return version_of(view, name, number, self._open.tags(view))

        return self._open.look(look)

    def stats(self) -> Stats:
        return count(self._open)

    def summaries(self, versions: Iterable[Version]) -> Iterator[Summary | PearStoreError]:
        return read_summaries(self._open, versions)

    def uses(self) -> Uses:
        return self._open.look(find_uses)

    @property
    def state(self) -> Hashable:
        return self._open.look(lambda view: view.state)

    def beginning(self, text: str) -> list[str]:
        """References that begin with a text: tasks, and after ``@`` a task's versions and tags. For completion.

        Where very many tasks do, the next letters of their names stand for them.
        """
        return self._open.look(lambda view: beginning(view, text))

    # ---- tags ---------------------------------------------------------------------------------

    def tag(self, reference: str, tag: str) -> Version:
        """Names a version ``task@tag``; a tag that stood for another version of the task is moved.

        Raises:
            NotFoundError: no such version.
            PearStoreError: the tag is no valid name.
        """
        if not TAG_NAME.fullmatch(tag):
            raise PearStoreError(f"tag {tag!r}: expected a lower-case letter, then up to 31 of a-z, 0-9 and '-'")
        return set_tag(self._open, reference, tag, delete=False)

    def untag(self, reference: str) -> Version:
        """Removes a tag, given as ``task@tag``; the version stays.

        Raises:
            NotFoundError: no such tag.
        """
        _, tag = parse_reference(reference)
        if not isinstance(tag, str):
            raise NotFoundError(f"{reference!r} names no tag: expected 'task@tag'")
        return set_tag(self._open, reference, tag, delete=True)

    # ---- removing -----------------------------------------------------------------------------

    def remove(self, *references: str, dry_run: bool = False) -> list[Version]:
        """Removes versions (``T@n``) or all of a task (``T``); the tensors go with the next gc.

        Raises:
            NotFoundError: no such task or version; nothing was removed.
            TaggedError: a tag holds one of them; nothing was removed.
        """
        return remove(self._open, references, dry_run)

    def gc(
        self,
        dry_run: bool = False,
        repack_all: bool = False,
        keep: int | None = None,
        older_than_s: float | None = None,
    ) -> gc.GcResult:
        """Removes what no version needs: rows at once, then dead packs, then packs that are mostly dead are rewritten.

        Runs while others read and add. `dead_bytes` are what is left in packs that are worth keeping as they are;
        `repack_all` leaves none and merges small packs.

        Args:
            keep: first remove versions beyond the newest `keep` of their task (at least 1) ...
            older_than_s: ... that were added longer ago than this, in seconds. Given one of both, only that counts.
                Neither removes a newest or a tagged version.

        Raises:
            DamagedError: something cannot be trusted, so nothing may be called dead.
        """
        return gc.collect(self._open, dry_run, repack_all, keep, older_than_s)

    # ---- sharing ------------------------------------------------------------------------------

    def push(
        self,
        remote: str | None = None,
        tasks: Collection[str] = (),
        progress: Callable[[int, int, int], None] = lambda done, all_, moved_bytes: None,
    ) -> "Pushed":
        """Sends versions, removals and tags that a remote lacks, of some tasks or of all; what it returned is there.

        None is the remote ``origin``, or the only one. `progress` is told versions done, all of them, and bytes moved.

        Raises:
            ClashError: what another store pushed contradicts what would be sent.
            PlaceError: the remote cannot be reached or written; the same again goes on.
        """
        from pear_store.remote import remotes

        return remotes.push(self._open, remote, tasks, progress)

    def pull(
        self,
        remote: str | None = None,
        references: Collection[str] = (),
        progress: Callable[[int, int, int], None] = lambda done, all_, moved_bytes: None,
    ) -> "Pulled":
        """Takes versions, removals and tags from a remote, of some tasks or versions or of all it was added for.

        Raises:
            NotFoundError: the remote has no such task or version.
            DamagedRemoteError, CheckpointError: what it gave is not what its log says; all before that was taken.
            PlaceError: the remote cannot be reached; the same again goes on.
        """
        from pear_store.remote import remotes

        return remotes.pull(self._open, remote, references, progress)

    def remote_status(self, remote: str | None = None) -> "Changes":
        """What a push and a pull would do."""
        from pear_store.remote import remotes

        return remotes.status(self._open, remote)

    def remote_stats(self, remote: str | None = None) -> dict[str, str | int]:
        """What a remote holds: entries, tasks, versions, packs and their bytes."""
        from pear_store.remote import remotes

        return remotes.stats(self._open, remote)

    def remote_gc(
        self,
        remote: str | None = None,
        keep: int | None = None,
        older_than_s: float | None = None,
        grace_s: float = 7 * 86400.0,
        dry_run: bool = False,
        progress: Callable[[str, int, int], None] = lambda what, done, all_: None,
    ) -> "RemoteGc":
        """Removes from a remote what no version there needs, while others push and pull; safe to cut off and repeat.

        Args:
            keep, older_than_s: which versions are removed there first, as with :meth:`gc`; a pull takes that over.
            grace_s: how long objects stay after the entry that drops them, for readers that know an older log.
            progress: told what is done, how much of it, and all of it.

        Raises:
            PlaceError: the remote cannot be reached, listed or written; the same again goes on.
        """
        from pear_store.remote import upkeep

        return upkeep.gc(self._open, remote, keep, older_than_s, grace_s, dry_run, progress)

    def remote_log(self, remote: str | None = None, most: int | None = None) -> "list[Logged]":
        """What a remote's newest entries did, newest first; `most`: so many of them."""
        from pear_store.remote import upkeep

        return upkeep.history(self._open, remote, most)

    def remote_verify(
        self,
        remote: str | None = None,
        subset: tuple[int, int] = (1, 1),
        progress: Callable[[str, int, int], None] = lambda what, done, all_: None,
    ) -> "RemoteReport":
        """Checks a remote's log, and reads the packs of the n-th of t parts; names each fault with the versions hit.

        Raises:
            DamagedRemoteError: it is not the remote that this store knows.
            PlaceError: the remote cannot be reached.
        """
        from pear_store.remote import upkeep

        return upkeep.verify(self._open, remote, subset, progress)

    def remote_repair(
        self,
        remote: str | None = None,
        copies: Collection[str | Path] = (),
        progress: Callable[[str, int, int], None] = lambda what, done, all_: None,
    ) -> "RemoteRepaired":
        """Mends what :meth:`remote_verify` finds, from good copies in this store and in others.

        Args:
            copies: directories of other stores.

        Raises:
            NotFoundError: one of `copies` is no store; nothing was repaired.
            PlaceError: the remote cannot be reached or written; the same again goes on.
        """
        from pear_store.remote import upkeep

        return upkeep.repair(self._open, remote, copies, progress)
