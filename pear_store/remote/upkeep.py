"""Upkeep of the remotes that a store knows by name."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pear_store.errors import NotFoundError, PearStoreError
from pear_store.local.directory import store_path
from pear_store.local.opened import OpenStore, is_store
from pear_store.remote import gc as collecting
from pear_store.remote import history as reading_log
from pear_store.remote import repair as mending
from pear_store.remote import verify as checking
from pear_store.remote.mirror import Mirror, opened_mirror
from pear_store.remote.remotes import FOLDER, connected, remotes


def gc(
    opened: OpenStore,
    name: str | None,
    keep: int | None,
    older_than_s: float | None,
    grace_s: float,
    dry_run: bool,
    progress: collecting.Progress,
) -> collecting.RemoteGc:
    """See :meth:`pear_store.Store.remote_gc`."""
    with connected(opened, name) as (_, place, mirror):
        return collecting.collect(place, mirror, keep, older_than_s, grace_s, dry_run, progress)


def history(opened: OpenStore, name: str | None, most: int | None) -> list[reading_log.Logged]:
    """See :meth:`pear_store.Store.remote_log`."""
    with connected(opened, name) as (_, place, mirror):
        return reading_log.history(place, mirror, most)


def verify(
    opened: OpenStore, name: str | None, subset: tuple[int, int], progress: checking.Progress
) -> checking.RemoteReport:
    """See :meth:`pear_store.Store.remote_verify`."""
    with connected(opened, name) as (_, place, mirror):
        return checking.verify(place, mirror, subset, progress)


def repair(
    opened: OpenStore, name: str | None, copies: Iterable[str | Path], progress: checking.Progress
) -> mending.RemoteRepaired:
    """See :meth:`pear_store.Store.remote_repair`."""
    with connected(opened, name) as (_, place, mirror), ExitStack() as stack:
        stores = [opened]
        mirrors: list[Mirror] = []
        for path in map(store_path, copies):
            if not is_store(path):
                raise NotFoundError(f"{path}: no store there; nothing was repaired")
            stores.append(store := OpenStore(path))
            stack.callback(store.close)
            mirrors += stack.enter_context(_mirrors_of(store, mirror))
        return mending.repair(place, mirror, stores, mirrors, progress)


@contextmanager
def _mirrors_of(store: OpenStore, known: Mirror) -> Iterator[list[Mirror]]:
    """The mirrors in which another store knows the same remote."""

    with ExitStack() as stack:
        found = []
        with suppress(PearStoreError, OSError):
            for remote in remotes(store.path):
                path = store.path / FOLDER / f"{remote.name}.mirror"
                if path.is_file():
                    mirror = stack.enter_context(opened_mirror(path, known.url))
                    if known.id is None or mirror.id == known.id:
                        found.append(mirror)
        yield found
