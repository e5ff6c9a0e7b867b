"""Garbage collection: marks what versions need, sweeps the rest, and rewrites packs that are mostly dead.

A tensor that no version needs counts as removed. It keeps its row as long as its pack stays, because a later add may
need it again.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from pear_store.counted import counted
from pear_store.errors import PearStoreError
from pear_store.local.catalog import forget_manifests, forget_removals, leave, list_marked, settled_removals
from pear_store.local.index import State, View
from pear_store.local.log import Operation, info
from pear_store.local.mark import Marked, mark
from pear_store.local.opened import OpenStore
from pear_store.local.packs import WrittenPack, doom_packs
from pear_store.local.recorded import Recorded, refuse_unknown
from pear_store.local.removal import remove_versions
from pear_store.local.repack import choose_packs, repack, steps
from pear_store.local.sweep import clear_tmp, set_aside, unknown_packs


@dataclass(frozen=True)
class GcResult:
    """What a gc removed and what is left. Bytes are tensor bytes.

    Args:
        removed_versions: old versions that `keep` and `older_than_s` named.
        removed_tensors: tensors that no version needs, and that no earlier gc has counted.
        removed_bytes: their bytes. Packs that stay may still hold some of them.
        kept_tensors: tensors that versions need.
        kept_bytes: their bytes.
        dead_bytes: what is not needed, in packs that stay.
        dry_run: True: nothing was removed; the figures say what would be.
        foreign: paths in the store's folders that are not Pear's, links included. They were not changed.
    """

    removed_versions: int
    removed_tensors: int
    removed_bytes: int
    kept_tensors: int
    kept_bytes: int
    dead_bytes: int
    dry_run: bool
    foreign: tuple[str, ...] = ()


def expired(view: View, keep: int | None, older_than_s: float | None) -> Iterator[tuple[str, int]]:
    """Versions beyond a task's newest `keep` that are older than `older_than_s`. Never a newest or a tagged one."""
    if keep is None and older_than_s is None:
        return
    before = time.time_ns() - int((older_than_s or 0) * 1e9)
    tagged = {(task, tag.version) for task, _, tag in view.tags.every()}
    for task, group in groupby(view.versions.every(), lambda row: row[0]):
        rows = list(group)
        for _, number, row in rows[: -max(1, keep or 1)]:
            if row.time_ns <= before and (task, number) not in tagged:
                yield task, number


def collect(
    opened: OpenStore, dry_run: bool, repack_all: bool, keep: int | None, older_than_s: float | None
) -> GcResult:
    """See :meth:`pear_store.Store.gc`."""
    with Operation(__name__, "gc", opened.path) as operation:
        result = _collect(opened, dry_run, repack_all, keep, older_than_s)
        operation.size_bytes = result.removed_bytes
        return result


def _collect(
    opened: OpenStore, dry_run: bool, repack_all: bool, keep: int | None, older_than_s: float | None
) -> GcResult:
    if keep is not None and keep < 1:
        raise PearStoreError(f"keep {keep}: expected 1 or more, because the newest version of a task always stays")
    packs: list[WrittenPack] = []

    as_of: State | None = None
    foreign: list[str] = []
    gone: list[bytes] = []

    def sweep(view: View) -> tuple[int, Marked]:
        nonlocal as_of
        recorded = Recorded(opened.path)
        unlisted = recorded.find_unlisted(view)
        refuse_unknown(opened.path, unlisted.unknown)
        doomed = list(expired(view, keep, older_than_s))
        packs[:] = remove_versions(opened, view, doomed)
        marked = mark(view, is_settled=settled_removals(opened.path))
        forget_manifests(view, marked.marks)
        list_marked(view, marked)
        swept = [pack for pack, use in marked.packs.items() if not use.needed]
        leave(opened.path, view, swept, recorded=recorded)
        forget_removals(view, set(swept))
        doom_packs(opened.path, unlisted.known)
        gone[:] = [*unlisted.known, *swept]
        foreign[:] = unlisted.foreign
        set_aside(opened.path, unlisted.unreadable)
        as_of = view.state if view.wrote else view.before
        return len(doomed), marked

    if dry_run:
        refuse_unknown(opened.path, unknown_packs(opened))

        def plan(view: View) -> tuple[int, Marked]:
            dropped = set(expired(view, keep, older_than_s))
            return len(dropped), mark(view, dropped, settled_removals(opened.path))

        removed, marked = opened.look(plan)
    else:
        removed, marked = opened.write_packs(sweep, packs)
        opened.unlink_doomed()  # only after the deletion of their rows is durable
        if gone:
            swept = sum(marked.packs[pack].row.file_bytes for pack in gone if pack in marked.packs)
            info(__name__, "gc %s: deleted %s of %d bytes", opened.path, counted(len(gone), "pack"), swept)
        foreign += clear_tmp(opened.path)
    victims = choose_packs(marked.packs, repack_all)
    left = sum(use.dead_bytes for pack, use in marked.packs.items() if use.needed and pack not in victims)
    if not dry_run:
        for step in steps(victims, marked.packs):
            dead_bytes, as_of = repack(opened, step, marked, as_of)
            left += dead_bytes
    return GcResult(
        removed, marked.removed_tensors, marked.removed_bytes, marked.kept_tensors, marked.kept_bytes, left, dry_run,
        tuple(foreign),
    )  # fmt: skip
