"""What the page shows of a store, as JSON. This reads the store, so call it from a thread, not the event loop."""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, TypeVar

from pear_store.errors import PearStoreError
from pear_store.format.summary import Origin, Summary
from pear_store.listing import Listing, Query, Row, listed_json
from pear_store.local.references import Version
from pear_store.readable import ReadableStore
from pear_store.sharing import Group, Numbered, groups, growth, shared_with_others

MOST_MAPPED = 240
"""Most tasks that a map shows. With more, each would be less than two pixels wide."""
_MOST_GROUPS = 400
_MOST_LABELS = 200
Backbone = tuple[str | None, str | None]
"""A backbone's name and digest"""
T = TypeVar("T")


class Overview:
    """A store as it was at one moment. Each part is read when it is first asked for, then kept."""

    def __init__(self, store: ReadableStore) -> None:
        self._store = store
        self._listing = Listing(store)

    @cached_property
    def _tensors(self) -> Mapping[Numbered, Sequence[int]]:
        uses = self._listing.uses
        return {} if uses is None else {(use.version.task, use.version.version): use.tensors for use in uses.versions}

    @cached_property
    def _tasks_of(self) -> Counter[int]:
        """How many tasks name each tensor."""
        by_task: dict[str, set[int]] = {}
        for (task, _), tensors in self._tensors.items():
            by_task.setdefault(task, set()).update(tensors)
        return Counter(number for tensors in by_task.values() for number in tensors)

    @cached_property
    def _by_backbone(self) -> dict[Backbone, list[Version]]:
        """The newest versions by backbone. The backbone of most tasks comes first."""
        found: dict[Backbone, list[Version]] = {}
        newest = self._listing.newest
        for version, summary in zip(newest, self._listing.summaries(newest), strict=True):
            known = (summary.backbone, summary.backbone_digest) if isinstance(summary, Summary) else (None, None)
            found.setdefault(known, []).append(version)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def _size(self, tensors: set[int]) -> int:
        uses = self._listing.uses
        return 0 if uses is None else sum(map(uses.size_bytes.__getitem__, tensors))

    @cached_property
    def totals(self) -> dict[str, Any]:
        """Counts, sizes, backbones, and how the store grew."""
        uses = self._listing.uses
        stages = [] if uses is None else growth(uses)
        backbones = []
        for (model, digest), versions in self._by_backbone.items():
            unique: set[int] = set()
            for version in versions:
                unique.update(self._tensors.get((version.task, version.version), ()))
            logical = sum(version.size_bytes for version in versions)
            row = {"model": model, "digest": digest, "tasks": len(versions), "logical_bytes": logical}
            backbones.append({**row, "unique_bytes": self._size(unique)})
        return {
            "where": self._store.where,
            "tasks": len(self._listing.newest),
            "versions": None if uses is None else len(uses.versions),
            "logical_bytes": stages[-1].logical_bytes if stages else None,
            "unique_bytes": stages[-1].unique_bytes if stages else None,
            "backbones": backbones,
            "growth": [asdict(stage) for stage in stages],
            "problem": None if self._listing.problem is None else str(self._listing.problem),
        }

    def tasks(self, query: Query, digest: str | None, first: int, count: int) -> dict[str, Any]:
        """A part of the list of tasks.

        Args:
            digest: only tasks of this backbone. None: all.
            first: the first row to return, from 0.
            count: how many rows.
        """
        found = list(self._listing.versions(query))
        if digest is not None:
            summaries = self._listing.summaries(found)
            found = [one for one, summary in zip(found, summaries, strict=True) if _digest(summary) == digest]
        rows = [self._row(row) for row in self._listing.rows(found[first : first + count])]
        return {"tasks": rows, "matching": len(found), "total": len(self._listing.newest), "first": first}

    def _row(self, row: Row) -> dict[str, Any]:
        tensors = self._tensors.get((row.version.task, row.version.version))
        shared = None if tensors is None else self._size({one for one in tensors if self._tasks_of[one] > 1})
        return {**listed_json(row), "shared_bytes": shared}

    def task(self, name: str) -> dict[str, Any]:
        """One task: its versions, and what the newest one's record says.

        Raises:
            NotFoundError: no such task.
        """
        versions = self._store.versions(name)
        rows = [self._row(row) for row in self._listing.rows(versions, is_every=True)]
        record = self._store.record(f"{name}@{versions[-1].version}")
        uses = self._listing.uses
        shared = None if uses is None else shared_with_others(uses, versions[-1])
        labels = list(record["labels"])
        return {
            "task": name,
            "versions": rows[::-1],
            "labels": labels[:_MOST_LABELS],
            "classes": len(labels),
            "metrics": dict(record["metrics"]),
            "preprocess": dict(record["preprocess"]),
            "positions": len(record["positions"]),
            "adapters": len(record["adapters"]),
            "origin": asdict(Origin.of(record)),
            "sharing": None
            if shared is None
            else {**asdict(shared), "neighbours": [asdict(one) for one in shared.neighbours[:12]],
                  "count": len(shared.neighbours)},
        }  # fmt: skip

    def map(self, digest: str | None) -> dict[str, Any]:
        """Which tasks of a backbone share how much: tensors grouped by the tasks that name them.

        Args:
            digest: the backbone's. None: the first backbone.
        """
        chosen = next((found for key, found in self._by_backbone.items() if digest in (None, key[1])), [])
        uses = self._listing.uses
        if uses is None or not chosen:
            return {"tasks": [], "groups": [], "left_out": len(chosen)}
        tensors = [self._tensors.get((one.task, one.version), ()) for one in chosen]
        found = groups(tensors, uses.size_bytes)
        order = _alike(len(chosen), found)[:MOST_MAPPED]
        places = {place: number for number, place in enumerate(order)}
        kept = [
            {"tasks": [places[place] for place in group.tasks if place in places], "tensors": group.tensors,
             "size_bytes": group.size_bytes, "of_tasks": len(group.tasks)}
            for group in found if len(group.tasks) > 1
        ]  # fmt: skip
        return {
            "tasks": [{"task": chosen[place].task, "size_bytes": chosen[place].size_bytes} for place in order],
            "groups": kept[:_MOST_GROUPS],
            "left_out": len(chosen) - len(order),
        }


def _digest(summary: Summary | PearStoreError) -> str | None:
    return summary.backbone_digest if isinstance(summary, Summary) else None


def _alike(count: int, found: Sequence[Group]) -> list[int]:
    """An order of tasks in which tasks that share much are adjacent. Those that share most come first."""
    ranks: list[list[int]] = [[] for _ in range(count)]
    for rank, group in enumerate(group for group in found if len(group.tasks) > 1):
        for place in group.tasks:
            ranks[place].append(rank)
    return sorted(range(count), key=lambda place: (not ranks[place], ranks[place], place))


class Watched:
    """The overview of a store as it is now. It is made anew if the store has changed."""

    def __init__(self, store: ReadableStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._state: Hashable = None
        self._overview: Overview | None = None

    def ask(self, question: Callable[[Overview], T]) -> T:
        """Answers one question at a time. Each may read much, and the next one uses what was read."""
        with self._lock:
            state = self._store.state
            if self._overview is None or state != self._state:
                self._overview, self._state = Overview(self._store), state
            return question(self._overview)
