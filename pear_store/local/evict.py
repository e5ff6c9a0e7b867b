"""Evicts versions from a store that is a cache: first the versions, then the bytes that only they needed."""

from collections.abc import Collection

from pear_store.local.gc import GcResult, collect
from pear_store.local.index import View
from pear_store.local.opened import OpenStore
from pear_store.local.packs import WrittenPack
from pear_store.local.references import Version, versions
from pear_store.local.removal import remove_versions
from pear_store.local.sync import Numbered


def pack_bytes(opened: OpenStore) -> int:
    """The bytes of all packs, by the index."""
    return opened.look(lambda view: sum(row.file_bytes for _, row in view.packs.every()))


def versions_in(opened: OpenStore) -> list[Version]:
    """Every version, by name and number."""
    return opened.look(lambda view: versions(view, None))


def evict(opened: OpenStore, chosen: Collection[Numbered], repack_all: bool) -> GcResult:
    """Removes those of the chosen versions that are there, and what nothing else needs. Open maps stay readable.

    Raises:
        DamagedError: something cannot be trusted, so nothing may be called dead.
    """
    packs: list[WrittenPack] = []

    def change(view: View) -> None:
        packs[:] = remove_versions(opened, view, [numbered for numbered in chosen if view.versions.has(*numbered)])

    opened.write_packs(change, packs)
    return collect(opened, dry_run=False, repack_all=repack_all, keep=None, older_than_s=None)
