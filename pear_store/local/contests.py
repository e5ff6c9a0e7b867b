"""Decides which of several versions keeps a number, and which numbers the others get.

Packs contradict each other if copies of a store were put together, or if a commit never came. The decision depends on
what the packs record, not on the order in which they are read. If all else is equal, hashes decide.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pear_store.format.manifest import dump_manifest, manifest_hash
from pear_store.format.pack import Commit, PackedVersion
from pear_store.local.index import View
from pear_store.local.rows import NameRow, RemovedRow, VersionRow


@dataclass(frozen=True)
class Candidate:
    """A version that a pack records. Of two with one number, the one of the greater `rank` keeps the number.

    That is a version whose commit is known to have succeeded, else the version of the later commit. Times and hashes
    only make the order the same for everybody.
    """

    acknowledged: bool
    commit: int
    time_ns: int
    manifest: bytes
    pack: bytes

    @property
    def rank(self) -> tuple[bool, int, int, bytes, bytes]:
        return self.acknowledged, self.commit, self.time_ns, self.manifest, self.pack


_Homeless = list[tuple[str, str, int, Candidate]]
"""Versions whose number belongs to another version: the task's name now, the recorded name, the recorded number"""


@dataclass
class Facts:
    """What packs record, beyond the rows made so far."""

    commits: dict[bytes, Commit] = field(default_factory=dict)
    followed: set[bytes] = field(default_factory=set)
    """Packs that a later commit names, so their own commits succeeded"""
    contested: dict[tuple[str, int], list[VersionRow]] = field(default_factory=dict)
    """More versions of numbers that have a row. They may be the same version as the row's."""
    removed: dict[tuple[str, int], set[bytes | None]] = field(default_factory=dict)
    """The manifests of removed versions, by number. None: any version of that number"""
    tags: dict[tuple[str, str], tuple[int, int, int, bytes]] = field(default_factory=dict)
    """The rank of each tag's row"""
    tagged: dict[tuple[str, str], bytes | None] = field(default_factory=dict)
    """The manifest that each tag's record names"""

    def enter_commit(self, pack: bytes, commit: Commit) -> None:
        self.commits[pack] = commit
        self.followed.update(commit.after)

    def candidate(self, row: VersionRow) -> Candidate:
        """The candidate that a row of :func:`unsettled` or :meth:`Contests._put` stands for."""
        was_moved, commit = row.size_bytes & 1, row.size_bytes >> 1
        return Candidate(bool(was_moved) or row.pack in self.followed, commit, row.time_ns, row.manifest, row.pack)


def unsettled(pack: bytes, version: PackedVersion, commit: Commit) -> VersionRow:
    """A version's row until it is settled. Its field for bytes holds the commit's number, and whether it was moved."""
    number = commit.number if version.moved_from is None else version.moved_from
    return VersionRow(version.hash, pack, version.time_ns, number << 1 | (version.moved_from is not None))


class Contests:
    """Settles the unsettled versions of some tasks.

    Args:
        tasks: names as they are written; None: all.
    """

    def __init__(self, view: View, facts: Facts, tasks: set[str] | None) -> None:
        self._view = view
        self._facts = facts
        self._tasks = tasks
        self.problems: list[str] = []
        self.contradicted: set[bytes] = set()
        """Packs whose records differ from the rows"""
        self.shared: set[tuple[str, int]] = set()
        """Numbers under which several versions were recorded"""
        self.moved: dict[tuple[str, int, bytes], int] = {}
        """The new numbers of versions with such a number, by task, old number and manifest"""
        self.renamed: set[bytes] = set()
        """Manifests under a task's new name"""
        self.made: set[bytes] = set()
        """Those of them that were not there before"""

    def settle(self) -> None:
        self._give_numbers(self._settle_removed() + self._settle_contested() + self._settle_names())

    def rows(self) -> Iterator[tuple[str, int, VersionRow]]:
        """The versions of these tasks."""
        if self._tasks is None:
            yield from self._view.versions.rows()
            return
        for task in sorted(self._tasks):
            for number, row in self._view.versions.of(task):
                yield task, number, row

    def _settle_removed(self) -> _Homeless:
        """Takes removed versions out. Another version that a copy of the store has under such a number stays."""
        view = self._view
        homeless: _Homeless = []
        for (task, number), manifests in self._facts.removed.items():
            row = view.versions.get(task, number)
            rows = self._facts.contested.pop((task, number), [])
            if row is not None:
                rows.append(row)
                view.versions.delete(task, number)
            gone = {one.pack for one in rows if None in manifests or one.manifest in manifests}
            stay = [one for one in rows if None not in manifests and one.manifest not in manifests]
            homeless += [(task, task, number, one) for one in self._distinct(stay)]
            if gone:
                removed = view.removed.get(task, number)
                assert removed is not None
                view.removed.put(task, number, RemovedRow(max(gone), removed.pack))
            if len(gone) > 1:  # the row names one pack: after its deletion, another would bring the version back
                self.contradicted |= gone
        return homeless

    def _settle_contested(self) -> _Homeless:
        homeless: _Homeless = []
        for (task, number), rows in self._facts.contested.items():
            row = self._view.versions.get(task, number)
            assert row is not None
            *others, first = self._distinct([*rows, row])
            self._put(task, number, first)
            if others:
                self.shared.add((task, number))
            homeless += [(task, task, number, one) for one in others]
        return homeless

    def _distinct(self, rows: list[VersionRow]) -> list[Candidate]:
        """The versions recorded under one number, the greatest last. Rows with the same manifest are one version."""
        by_rank = sorted(map(self._facts.candidate, rows), key=lambda one: one.rank)
        greatest = {one.manifest: one for one in by_rank}
        return sorted(greatest.values(), key=lambda one: one.rank)

    def _settle_names(self) -> _Homeless:
        """Keeps one of several names that differ in case only. Versions of the others become versions of that task."""
        view = self._view
        spellings: dict[str, list[str]] = {}
        before = ""
        for task, _, _ in self.rows():
            if task != before:
                spellings.setdefault(task.casefold(), []).append(task)
                before = task
        homeless: _Homeless = []
        for tasks in spellings.values():
            if len(tasks) == 1:
                continue
            found = {task: [(n, self._facts.candidate(row)) for n, row in view.versions.of(task)] for task in tasks}
            stays = max(tasks, key=lambda task: (max(one.rank for _, one in found[task]), task))
            for task in tasks:
                for number, one in found[task] if task != stays else ():
                    homeless.append((stays, task, number, one))
                    view.versions.delete(task, number)
        return homeless

    def _put(self, task: str, number: int, one: Candidate) -> None:
        row = VersionRow(one.manifest, one.pack, one.time_ns, one.commit << 1 | one.acknowledged)
        self._view.versions.put(task, number, row)

    def _give_numbers(self, homeless: _Homeless) -> None:
        """Gives the next free number to each version whose number belongs to another, unless it has got one before."""
        there: dict[str, dict[tuple[bytes, int], int]] = {}
        for task, was, number, one in sorted(homeless, key=lambda item: (*item[:3], item[3].rank)):
            self.contradicted.add(one.pack)
            manifest = self._under_name(one.manifest, task, was)
            if task not in there:
                there[task] = {(row.manifest, row.time_ns): here for here, row in self._view.versions.of(task)}
            if (manifest, one.time_ns) in there[task]:
                self._move(task, was, number, one, there[task][manifest, one.time_ns])
                continue
            known = self._view.names.get(task)
            fresh = known.highest + 1 if known else 1
            if fresh >> 32:
                self.problems.append(
                    f"version {was}@{number} of pack {one.pack.hex()}: left out, for the task has no number left"
                )
                continue
            there[task][manifest, one.time_ns] = fresh
            self._move(task, was, number, one, fresh)
            self._view.names.put(NameRow(task, 0, fresh, one.pack))
            self._put(task, fresh, replace(one, manifest=manifest))
            self.problems.append(
                f"version {was}@{number}: two are recorded, as in copies of one store; that of pack {one.pack.hex()} "
                f"is {task}@{fresh} now"
            )

    def _move(self, task: str, was: str, number: int, one: Candidate, fresh: int) -> None:
        if task == was:
            self.moved[task, number, one.manifest] = fresh

    def _under_name(self, manifest: bytes, task: str, was: str) -> bytes:
        """The hash of a manifest after the task was renamed. Enters the new manifest if it is not there."""
        if task == was:
            return manifest
        record = json.loads(self._view.manifests.text(manifest))
        text = dump_manifest({**record, "task": task})
        renamed = manifest_hash(text)
        if renamed not in self._view.manifests:
            self._view.manifests.put(renamed, 0, (), text)
            self.made.add(renamed)
        self.renamed.add(renamed)
        return renamed
