"""The store: many tasks in one directory. Each distinct tensor is stored once."""

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

    When `add` returns, the task is safely on disk. This process has checked each tensor that it returns against the
    tensor's digest.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens an existing store.

        Args:
            path: the store's directory. A leading ``~`` is the home directory.

        Raises:
            NotFoundError: there is no store at `path`.
            FormatError: another version of Pear wrote it, in a format that this one does not read.
            DamagedIndexError: its index cannot be opened.
            AccessError: this process may not read it.
            PearStoreError: `path` is a URL.
        """
        if "://" in str(path):
            raise PearStoreError(
                "expected a store's directory, found a URL; Store.open reads a remote by its URL; to change a remote, "
                "clone it ('pear-store clone URL DIR'), change the clone and push"
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
        """Opens a store's directory, or a remote by its URL. A remote is only read, through a cache on this machine.

        Args:
            where: a directory, or a URL (docs/remotes.md lists the kinds).
            options: options of the remote's place, such as ``endpoint``. Never a secret (docs/remotes.md).
            cache: where the cache is, how large it may grow, and how often the remote is asked what is new.

        Returns:
            A `Store` for a directory.

        Raises:
            NotFoundError: there is no store, or no remote.
            PlaceError: the remote cannot be reached, and nothing is known of it from before.
            PearStoreError: as `Store` for a directory.
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
        """Makes an empty store, or opens the store that is there.

        Args:
            path: the directory. It and its parents are made if they are missing.

        Raises:
            FormatError: the directory holds something else.
            DiskFullError, AccessError: it cannot be written.
        """
        path = store_path(path)
        make_store(path)
        return cls(path)

    def close(self) -> None:
        self._open.close()

    # ---- adding -------------------------------------------------------------------------------

    def add(self, source: Source, name: str | None = None, access: Access | None = None) -> Added:
        """Adds one task. When it returns, the task is safely on disk.

        Tensors that are already stored take no extra space. A task whose newest version is the same gets no new
        version: then `changed` is False in the result.

        Args:
            source: a task, or a task checkpoint as a path, an fsspec URL or a binary file object.
            name: the name to store it under. None: its own.
            access: which files and URLs may be opened. None: any file, and URLs of common protocols.

        Raises:
            NotFoundError: there is nothing at the path or URL.
            SourceError: the source is not opened, or cannot be read.
            CheckpointError: it is no valid task checkpoint, or `name` is no valid name.
            NameTakenError: a stored task's name differs in case only.
            DiskFullError: there is no space left. After every error, the store is as it was before.
        """
        (result,) = self.add_many([source], name, access)
        if isinstance(result, Refused):
            raise result.error
        return result

    def add_many(
        self, sources: Iterable[Source], name: str | None = None, access: Access | None = None
    ) -> Iterator[Added | Refused]:
        """Adds tasks in groups, and gives one result for each source, in order. A bad source only fails its own result.

        A group is added when its first result is asked for. So nothing is added if no result is asked for.

        Forked processes read a list or tuple of many local files ahead. They do so only if this process has no other
        threads; those of numpy and torch count. Other iterables are read one by one.

        Args:
            sources: each as :meth:`add` takes it.
            name: the name to store them all under. None: each one's own.
            access: as in :meth:`add`.

        Raises:
            DiskFullError: there is no space left. The group that did not fit is not stored; all groups before it are.
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
        """References that begin with a text, for completion in a shell: tasks, or after ``@`` versions and tags.

        If very many tasks match, the list has the beginnings that their names share, one letter longer.
        """
        return self._open.look(lambda view: beginning(view, text))

    # ---- tags ---------------------------------------------------------------------------------

    def tag(self, reference: str, tag: str) -> Version:
        """Tags a version, so that ``task@tag`` names it. A tag of another version of the same task is moved.

        Args:
            reference: the version, as :meth:`get` takes it.
            tag: a lower-case letter, then up to 31 of a-z, 0-9 and '-'.

        Returns:
            the version, with all its tags.

        Raises:
            NotFoundError: there is no such version.
            PearStoreError: the tag is no valid name.
        """
        if not TAG_NAME.fullmatch(tag):
            raise PearStoreError(f"tag {tag!r}: expected a lower-case letter, then up to 31 of a-z, 0-9 and '-'")
        return set_tag(self._open, reference, tag, delete=False)

    def untag(self, reference: str) -> Version:
        """Removes the tag ``task@tag``. The version stays.

        Returns:
            the version, with the tags that are left.

        Raises:
            NotFoundError: there is no such tag.
        """
        _, tag = parse_reference(reference)
        if not isinstance(tag, str):
            raise NotFoundError(f"{reference!r} names no tag: expected 'task@tag'")
        return set_tag(self._open, reference, tag, delete=True)

    # ---- removing -----------------------------------------------------------------------------

    def remove(self, *references: str, dry_run: bool = False) -> list[Version]:
        """Removes versions (``task@number``) or all versions of a task (``task``). The next gc frees their bytes.

        Args:
            dry_run: return what would be removed, and remove nothing.

        Returns:
            the versions that were removed.

        Raises:
            NotFoundError: there is no such task or version. Nothing was removed.
            TaggedError: one of them has a tag. Nothing was removed.
        """
        return remove(self._open, references, dry_run)

    def gc(
        self,
        dry_run: bool = False,
        repack_all: bool = False,
        keep: int | None = None,
        older_than_s: float | None = None,
    ) -> gc.GcResult:
        """Frees the space of tensors that no version needs. Others may read and add meanwhile.

        Packs that hold nothing needed are deleted. Packs that are mostly dead are rewritten. Other packs keep their
        dead bytes, which the result counts as `dead_bytes`.

        Args:
            dry_run: return what would be removed, and remove nothing.
            repack_all: leave no dead bytes, and merge small packs.
            keep: first remove old versions: all but the newest `keep` of each task. At least 1.
            older_than_s: first remove versions that were added longer ago than this, in seconds. With `keep`, a version
                is removed only if both say so. A task's newest version and tagged versions always stay.

        Raises:
            DamagedError: something in the store cannot be trusted, so nothing may be called dead.
        """
        return gc.collect(self._open, dry_run, repack_all, keep, older_than_s)

    # ---- sharing ------------------------------------------------------------------------------

    def push(
        self,
        remote: str | None = None,
        tasks: Collection[str] = (),
        progress: Callable[[int, int, int], None] = lambda done, all_, moved_bytes: None,
    ) -> "Pushed":
        """Sends versions, removals and tags that a remote lacks. When it returns, they are on the remote.

        Args:
            remote: its name. None: ``origin``, or the only one.
            tasks: names of tasks. Empty: all.
            progress: called with the versions done, all versions to send, and the bytes sent.

        Raises:
            NotFoundError: there is no such task or remote.
            ClashError: another store pushed something that contradicts what would be sent.
            PlaceError: the remote cannot be reached or written. The same call again goes on.
        """
        from pear_store.remote import remotes

        return remotes.push(self._open, remote, tasks, progress)

    def pull(
        self,
        remote: str | None = None,
        references: Collection[str] = (),
        progress: Callable[[int, int, int], None] = lambda done, all_, moved_bytes: None,
    ) -> "Pulled":
        """Takes versions, removals and tags from a remote.

        Args:
            remote: its name. None: ``origin``, or the only one.
            references: tasks or versions, as :meth:`get` takes them. Empty: all tasks that match the remote's patterns.
            progress: called with the versions done, all versions to take, and the bytes read.

        Raises:
            NotFoundError: the remote has no such task or version, or there is no such remote.
            DamagedRemoteError, CheckpointError: what the remote gave differs from what its log says. All versions
                before that were taken.
            PlaceError: the remote cannot be reached. The same call again goes on.
        """
        from pear_store.remote import remotes

        return remotes.pull(self._open, remote, references, progress)

    def remote_status(self, remote: str | None = None) -> "Changes":
        """What a push and a pull would do. Raises as :meth:`pull`."""
        from pear_store.remote import remotes

        return remotes.status(self._open, remote)

    def remote_stats(self, remote: str | None = None) -> dict[str, str | int]:
        """What a remote holds: its name and URL, and how many log entries, tasks, versions, packs and bytes.

        Raises as :meth:`pull`.
        """
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
        """Removes from a remote what no version there needs. Others may push and pull meanwhile.

        It may be interrupted at any time. The same call again goes on.

        Args:
            remote: its name. None: ``origin``, or the only one.
            keep: which versions are removed there first, as with :meth:`gc`. Stores take that over when they pull.
            older_than_s: the same, in seconds.
            grace_s: seconds that an object stays after the log entry that drops it, for readers with an older log.
            dry_run: return what would be removed, and remove nothing.
            progress: called with the name of a step, how much of it is done, and all of it.

        Raises:
            PlaceError: the remote cannot be reached, listed or written.
        """
        from pear_store.remote import upkeep

        return upkeep.gc(self._open, remote, keep, older_than_s, grace_s, dry_run, progress)

    def remote_log(self, remote: str | None = None, most: int | None = None) -> "list[Logged]":
        """What each entry of a remote's log did, newest first.

        Args:
            remote: its name. None: ``origin``, or the only one.
            most: only the newest so many entries. None: all.

        Raises as :meth:`pull`.
        """
        from pear_store.remote import upkeep

        return upkeep.history(self._open, remote, most)

    def remote_verify(
        self,
        remote: str | None = None,
        subset: tuple[int, int] = (1, 1),
        progress: Callable[[str, int, int], None] = lambda what, done, all_: None,
    ) -> "RemoteReport":
        """Checks a remote's log, packs and tensors. Names each fault with the versions that cannot be read.

        Args:
            remote: its name. None: ``origin``, or the only one.
            subset: (n, t): only the packs of the n-th of t parts, n from 1. The log is always checked whole.
            progress: called with the name of a step, how much of it is done, and all of it.

        Raises:
            DamagedRemoteError: it is another remote than the one that this store knows.
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
        """Repairs what :meth:`remote_verify` finds, from good copies in this store and in others.

        Args:
            remote: its name. None: ``origin``, or the only one.
            copies: directories of other stores.
            progress: called with the name of a step, how much of it is done, and all of it.

        Raises:
            NotFoundError: one of `copies` is no store. Nothing was repaired.
            PlaceError: the remote cannot be reached or written. The same call again goes on.
        """

        from pear_store.remote import upkeep

        return upkeep.repair(self._open, remote, copies, progress)
