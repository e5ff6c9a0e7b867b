"""Lists tasks: filters them, sorts them, and adds what their records say. Reads no more than a query needs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from pear_store.errors import NotFoundError, PearStoreError
from pear_store.format.summary import NO_SUMMARY, Summary
from pear_store.local.references import Version
from pear_store.local.uses import Uses
from pear_store.readable import ReadableStore
from pear_store.sharing import Numbered, new_bytes

SortKey = Literal["name", "backbone", "classes", "accuracy", "val", "new", "bytes", "added"]
_BY_INDEX: Mapping[SortKey, Callable[[Version], Any]] = {
    "bytes": lambda version: version.size_bytes,
    "added": lambda version: version.time_ns,
}
_BY_RECORD: Mapping[SortKey, Callable[[Summary], Any]] = {
    "backbone": lambda summary: summary.backbone,
    "classes": lambda summary: summary.classes,
    "accuracy": lambda summary: summary.val_top1,
    "val": lambda summary: summary.val,
}
_AT_ONCE = 1000


@dataclass(frozen=True)
class Query:
    """Which versions to list, and in what order.

    Args:
        patterns: patterns of task names, such as ``dtd*``. Empty: all tasks. A name without ``*``, ``?`` or ``[`` must
            exist.
        tag: only tasks that have this tag. With `every`: only versions that have it.
        backbone: only tasks whose backbone's name matches this pattern.
        every: list every version, not only the newest.
        sort: what to sort by. Versions whose value is not known come last, in either order.
        reverse: from the last to the first.
    """

    patterns: tuple[str, ...] = ()
    tag: str | None = None
    backbone: str | None = None
    every: bool = False
    sort: SortKey = "name"
    reverse: bool = False


@dataclass(frozen=True)
class Row:
    """A version in a list.

    Args:
        older_tags: tags of the task's other versions, if only the newest version is listed.
        summary: what its record says, or why the record cannot be read.
        new_bytes: tensor bytes that no older version has. None: not known.
    """

    version: Version
    older_tags: Mapping[str, int]
    summary: Summary | PearStoreError
    new_bytes: int | None


class Listing:
    """The versions of a store. Each part is read when it is first asked for, then kept."""

    def __init__(self, store: ReadableStore) -> None:
        self._store = store
        self._summaries: dict[Numbered, Summary | PearStoreError] = {}
        self.problem: PearStoreError | None = None
        """Why new bytes are not known"""

    @cached_property
    def uses(self) -> Uses | None:
        """Which tensors each version names. None if that is not known: then `problem` says why."""
        try:
            return self._store.uses()
        except PearStoreError as error:
            self.problem = error
            return None

    @cached_property
    def new_bytes(self) -> Mapping[Numbered, int]:
        return {} if self.uses is None else new_bytes(self.uses)

    @cached_property
    def tags(self) -> Mapping[str, Mapping[str, int]]:
        return self._store.tags()

    @cached_property
    def newest(self) -> list[Version]:
        return self._store.tasks()

    def older_tags(self, version: Version) -> dict[str, int]:
        return {tag: number for tag, number in self.tags.get(version.task, {}).items() if number != version.version}

    def versions(self, query: Query) -> Iterator[Version]:
        """The versions that a query asks for, in its order. Records are read only if it filters or sorts by them.

        Raises:
            NotFoundError: there is no task of a name that is no pattern.
        """
        found = self._store.versions() if query.every else self.newest
        if query.patterns:
            found = [one for one in found if any(fnmatchcase(one.task, pattern) for pattern in query.patterns)]
            for name in query.patterns:
                if not any(sign in name for sign in "*?[") and not any(one.task == name for one in found):
                    raise NotFoundError(f"no task {name!r} in {self._store.where}; 'pear-store ls' shows what is there")
        if query.tag is not None:
            found = [one for one in found if query.tag in (one.tags if query.every else self.tags.get(one.task, {}))]
        if query.sort in _BY_INDEX:
            found = _sorted(found, _BY_INDEX[query.sort], query.reverse)
        elif query.sort == "new":
            found = _sorted(found, lambda one: self.new_bytes.get((one.task, one.version)), query.reverse)
        elif query.sort == "name":
            found = found[::-1] if query.reverse else found
        else:
            known = dict(zip(map(_numbered, found), self.summaries(found), strict=True))
            key = _BY_RECORD[query.sort]

            def of_record(version: Version) -> Any:
                summary = known[_numbered(version)]
                return key(summary) if isinstance(summary, Summary) else None

            found = _sorted(found, of_record, query.reverse)
        if query.backbone is None:
            return iter(found)
        pattern = query.backbone
        return (one for one, summary in self._with_summaries(found) if _is_of(summary, pattern))

    def rows(self, versions: Iterable[Version], is_every: bool = False) -> Iterator[Row]:
        """The rows of a list. Each is read when it is asked for."""
        for version, summary in self._with_summaries(versions):
            older = {} if is_every else self.older_tags(version)
            yield Row(version, older, summary, self.new_bytes.get(_numbered(version)))

    def summaries(self, versions: Iterable[Version]) -> Iterator[Summary | PearStoreError]:
        return (summary for _, summary in self._with_summaries(versions))

    def _with_summaries(self, versions: Iterable[Version]) -> Iterator[tuple[Version, Summary | PearStoreError]]:
        waiting = iter(versions)
        while part := list(islice(waiting, _AT_ONCE)):
            unread = [version for version in part if _numbered(version) not in self._summaries]
            self._summaries.update(zip(map(_numbered, unread), self._store.summaries(unread), strict=True))
            yield from ((version, self._summaries[_numbered(version)]) for version in part)


def _numbered(version: Version) -> Numbered:
    return version.task, version.version


def _is_of(summary: Summary | PearStoreError, pattern: str) -> bool:
    return isinstance(summary, Summary) and summary.backbone is not None and fnmatchcase(summary.backbone, pattern)


def _sorted(versions: list[Version], key: Callable[[Version], Any], reverse: bool) -> list[Version]:
    """Sorts by `key`. Versions whose key is None come last."""
    keys = [(key(version), version) for version in versions]
    known = [pair for pair in keys if pair[0] is not None]
    known.sort(key=lambda pair: pair[0], reverse=reverse)
    return [version for _, version in known] + [version for value, version in keys if value is None]


def version_json(version: Version, older_tags: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A version as JSON. Other programs rely on it: keys may be added, but not changed."""
    row: dict[str, Any] = {"task": version.task, "version": version.version, "bytes": version.size_bytes}
    if version.tags:
        row["tags"] = list(version.tags)
    return {**row, "older_tags": dict(older_tags)} if older_tags else row


def listed_json(row: Row) -> dict[str, Any]:
    summary = row.summary if isinstance(row.summary, Summary) else NO_SUMMARY
    return {
        **version_json(row.version, row.older_tags),
        "new_bytes": row.new_bytes,
        "time_ns": row.version.time_ns,
        "backbone": summary.backbone,
        "backbone_digest": summary.backbone_digest,
        "classes": summary.classes,
        "val_top1": summary.val_top1,
        "selected_by": summary.selected_by,
        "metrics": dict(summary.metrics),
        **({"error": str(row.summary)} if isinstance(row.summary, PearStoreError) else {}),
    }
