"""The cache through which a remote is read: a store on this machine that may be lost at any time.

CACHE/<id>/store/             a normal store (docs/formats.md) of the versions that were read
CACHE/<id>/uses/T@N           its time says when version N of task T was last used; its lock, who fetches that version
CACHE/<id>/log-<URL>.mirror   what the log says, as it was read at one URL (<URL> is a hash)

Tensors are checked by their digests, so all URLs of a remote share them. Names cannot be checked so: a stranger's
remote may claim the id of another one. So each URL has its own mirror, and a version is found by its manifest's hash.
"""

import hashlib
import os
import shutil
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from platformdirs import user_cache_path

from pear_store.counted import counted
from pear_store.errors import (
    AbsentError,
    AccessError,
    DamagedError,
    DamagedRemoteError,
    DiskFullError,
    FormatError,
    NotFoundError,
    PearStoreError,
)
from pear_store.format.checkpoint import Task
from pear_store.format.digest import Digest, RawTensor, fresh_name
from pear_store.local.create import make_store
from pear_store.local.directory import store_path
from pear_store.local.evict import evict, pack_bytes, versions_in
from pear_store.local.locks import locked, write_lock
from pear_store.local.log import info
from pear_store.local.opened import OpenStore, is_store
from pear_store.local.sync import Incoming, Numbered, good_tensors_in, receive, version_in
from pear_store.remote.log import LoggedVersion

T = TypeVar("T")
LIMIT_BYTES = 10 << 30
_AT_HAND_BYTES = 64 << 20
"""The most bytes of tasks that are kept in memory, if the disk takes none"""
_LOOK_EVERY = 16
"""The cache's size is checked each time that a 16th of the limit was written. Other processes write, too."""


@dataclass(frozen=True)
class CacheSettings:
    """How a remote is read through a cache."""

    folder: Path | None = None
    """The folder of all remotes' caches. None: $PEAR_CACHE_DIR, else the user's cache folder"""
    limit_bytes: int | None = None
    """The most bytes of one remote's packs. None: $PEAR_CACHE_BYTES, else 10 GiB. The index takes some more."""
    ttl_s: float = 5.0
    """Seconds for which answers that may change are used: newest versions, tags, and that a task is missing"""
    timeout_s: float = 30.0
    """Seconds that a caller waits for a task"""

    def resolved_folder(self) -> Path:
        chosen = self.folder or os.environ.get("PEAR_CACHE_DIR")
        return store_path(chosen).absolute() if chosen else user_cache_path("pear") / "remotes"

    def resolved_limit(self) -> int:
        """The limit in bytes. Raises a PearStoreError if it is no number of bytes."""
        text = str(
            self.limit_bytes if self.limit_bytes is not None else os.environ.get("PEAR_CACHE_BYTES", LIMIT_BYTES)
        )
        if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text)):
            raise PearStoreError(
                f"size of the cache {text[:40]!r}: expected a number of bytes, at least 1; see $PEAR_CACHE_BYTES"
            )
        return int(text)


def mirror_name(url: str, options: Mapping[str, str]) -> str:
    """The name of the mirror's file for a remote at this URL."""
    text = "\n".join([url, *(f"{key}={options[key]}" for key in sorted(options))])
    return f"log-{hashlib.sha256(text.encode()).hexdigest()[:32]}.mirror"


def last_id(folder: Path, name: str) -> str | None:
    """The remote's id when a mirror of that name was last written. None: there is no such mirror."""
    try:
        found = [(file.stat().st_mtime, file.parent.name) for file in folder.glob(f"*/{name}")]
    except OSError:  # no folder can be there, or none that can be read
        return None
    return max(found)[1] if found else None


class Cache:
    """The versions of one remote that are on this machine. Threads and processes may share its folder.

    If the folder cannot be written, a temporary one is used instead, with a warning.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._temporary: Path | None = None
        try:
            self.folder = folder
            self._opened = self._open()
        except (OSError, AccessError, DiskFullError) as error:
            try:
                self.folder = self._temporary = Path(tempfile.mkdtemp(prefix="pear-cache-"))
            except OSError:
                raise AccessError(folder, f"the cache cannot be written ({error}), nor can a temporary one") from None
            self._warn(f"the cache cannot be written ({error}); a temporary one is used until this program ends")
            self._opened = self._open()
        self._generation = self._look_at_folder()
        self._unlooked = self._limit_bytes  # so the size is checked when the first version is kept
        self._at_hand: OrderedDict[tuple[Numbered, bytes], Task] = OrderedDict()
        self._warned_of_disk = False
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        return self.folder / "store"

    def _look_at_folder(self) -> int | None:
        """The inode of the store's folder, which changes if the store is begun anew. None: there is no store."""
        try:
            return self.path.stat().st_ino if is_store(self.path) else None
        except OSError:
            return None

    def _open(self) -> OpenStore:
        for folder in (self.folder, self.folder / "uses"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise AccessError(folder, "permission denied")
        for _ in range(2):
            try:
                make_store(self.path)
                if not os.access(self.path / "index", os.W_OK):
                    with write_lock(self.path):  # a rebuild renames the index, and another process may begin anew
                        if not os.access(self.path / "index", os.W_OK):
                            raise AccessError(self.path, "permission denied")
                return OpenStore(self.path)
            except (DamagedError, FormatError, NotFoundError) as error:
                self._begin_anew(error, self._look_at_folder())
        make_store(self.path)
        return OpenStore(self.path)

    def do(self, act: Callable[[OpenStore], T]) -> T:
        """Does something with the store. If the store is damaged, it is begun anew, and `act` runs again."""
        seen = self._generation
        try:
            return act(self._opened)
        except (DamagedRemoteError, AbsentError):  # the remote's damage, not the cache's
            raise
        except (DamagedError, NotFoundError, FormatError) as error:
            self._begin_anew(error, seen)
            return act(self._opened)

    def close(self) -> None:
        self._opened.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    # ---- reading

    def get(self, version: LoggedVersion) -> Task | None:
        """A version, if it is here and undamaged. None: it must be fetched."""
        numbered = version.task, version.number
        if (task := self._at_hand.get((numbered, version.manifest))) is not None:
            return task
        try:
            task = version_in(self._opened, numbered, version.manifest, copy=False)
        except NotFoundError:
            return None
        except PearStoreError as error:
            info(__name__, "cache %s: %s@%d is fetched again: %s", self.path, *numbered, error)
            return None
        self._touch(numbered)
        return task

    def _use_of(self, numbered: Numbered) -> Path:
        return self.folder / "uses" / f"{numbered[0]}@{numbered[1]}"

    def _touch(self, numbered: Numbered) -> None:
        with suppress(OSError):
            os.utime(self._use_of(numbered))

    @contextmanager
    def fetching(self, version: LoggedVersion, wait_s: float) -> Iterator[None]:
        """Lets one process at a time fetch a version. A process that has waited for `wait_s` goes on all the same."""
        with ExitStack() as held:
            with suppress(OSError):  # such as a full disk, or a folder that was deleted
                file = self._use_of((version.task, version.number))
                held.enter_context(locked(partial(_lock_file, file), wait_s))
            yield

    # ---- writing

    def keep(self, incoming: Incoming, task: Task) -> None:
        """Keeps a version that was fetched: in the store; or in memory, if the disk takes nothing."""
        loaded = incoming.loaded
        numbered = loaded.name, incoming.number
        try:
            self.do(lambda opened: receive(opened, [incoming], {}))
            self._use_of(numbered).touch(0o600)
            self._unlooked += loaded.size_bytes + len(loaded.manifest)
            if self._unlooked * _LOOK_EVERY >= self._limit_bytes:
                self._unlooked = 0
                self._make_room(numbered)
        except (PearStoreError, OSError) as error:
            self._keep_at_hand(numbered, loaded.hash, task)
            if not self._warned_of_disk:
                self._warned_of_disk = True
                self._warn(f"{self.path}: cannot be written, so tasks are read from the remote each time: {error}")

    def tensors(self, digests: Iterable[Digest]) -> dict[Digest, RawTensor]:
        """Those of the tensors that are here and undamaged."""
        wanted = list(digests)
        return self.do(lambda opened: good_tensors_in(opened, wanted))

    def _keep_at_hand(self, numbered: Numbered, manifest: bytes, task: Task) -> None:
        with self._lock:
            self._at_hand[numbered, manifest] = task
            while len(self._at_hand) > 1 and sum(map(_size, self._at_hand.values())) > _AT_HAND_BYTES:
                self._at_hand.popitem(last=False)

    def size_bytes(self) -> int:
        """The bytes of its packs."""
        return pack_bytes(self._opened)

    def count(self) -> int:
        """How many versions are here."""
        return len(versions_in(self._opened))

    def _make_room(self, newest: Numbered) -> None:
        """Evicts the least recently used versions until a tenth of the limit is free. `newest` always stays."""
        with locked(partial(_lock_file, self.folder / "evicting"), wait_s=0) as is_mine:
            if not is_mine:
                return
            for last_resort in (False, True):
                used_bytes, uses = self.size_bytes(), sorted(self._uses())
                excess: float = used_bytes - self._limit_bytes
                if excess <= 0:
                    return
                chosen: list[Numbered] = []
                excess += self._limit_bytes // 10
                # records take bytes that tensors do not have, and tensors that versions share are there once
                a_byte = used_bytes / max(1, sum(size for *_, size in uses))
                for _, numbered, size in uses:
                    if excess <= 0:
                        break
                    if numbered != newest:
                        chosen.append(numbered)
                        excess -= size * a_byte
                self._evict(chosen, repack_all=last_resort)

    def _uses(self) -> Iterator[tuple[int, Numbered, int]]:
        """For each version: when it was last used (nanoseconds), its name and number, its bytes."""
        for version in versions_in(self._opened):
            numbered = version.task, version.version
            try:
                used = self._use_of(numbered).stat().st_mtime_ns
            except OSError:
                used = 0
            yield used, numbered, version.size_bytes

    def _evict(self, chosen: list[Numbered], repack_all: bool) -> None:
        self.do(lambda opened: evict(opened, chosen, repack_all))
        info(__name__, "cache %s: evicted %s", self.path, counted(len(chosen), "version"))
        for numbered in chosen:
            self._use_of(numbered).unlink(missing_ok=True)

    def _begin_anew(self, error: PearStoreError, seen: int | None) -> None:
        """Replaces the damaged store by an empty one, unless another process has done so since `seen`."""
        (self.folder / "uses").mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(partial(_lock_file, self.folder / "anew")), ExitStack() as held:
            now = self._look_at_folder()
            if now is None or now == seen:
                info(__name__, "cache %s: begun anew: %s", self.path, error)
                with suppress(OSError, PearStoreError):  # the folder may be missing
                    held.enter_context(write_lock(self.path))  # else a writer could put packs into the new store
                aside = self.folder / f"damaged-{fresh_name()}"
                with suppress(FileNotFoundError):
                    self.path.rename(aside)
                make_store(self.path)
                if aside.is_symlink() or not aside.is_dir():
                    aside.unlink(missing_ok=True)
                else:
                    shutil.rmtree(aside, ignore_errors=True)
            self._generation = self._look_at_folder()

    def _warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)


def _size(task: Task) -> int:
    return sum(tensor.size_bytes for tensor in task.tensors.values())


def _lock_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
