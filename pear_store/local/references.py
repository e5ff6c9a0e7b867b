"""Resolves references such as ``dtd``, ``dtd@2`` and ``dtd@prod``, and lists versions and tags."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pear_store.errors import DamagedError, NotFoundError
from pear_store.format.checkpoint import TAG_NAME, TASK_NAME
from pear_store.format.manifest import manifest_hash
from pear_store.local.index import View
from pear_store.local.rows import TagRow, TensorRow, VersionRow


@dataclass(frozen=True)
class Version:
    """One version of a task.

    Args:
        task: the task's name.
        version: its number, from 1.
        time_ns: when it was added, in nanoseconds since the epoch.
        size_bytes: the bytes of its distinct tensors.
        tags: the tags that name it.
    """

    task: str
    version: int
    time_ns: int
    size_bytes: int
    tags: tuple[str, ...] = ()


def parse_reference(text: str) -> tuple[str, int | str | None]:
    """Splits a reference into the task's name and a version's number, a tag, or None.

    ``T`` is the newest version of T, ``T@3`` is version 3, and ``T@prod`` is the version with the tag ``prod``.

    Raises:
        NotFoundError: the text is no reference.
    """
    task, at, which = text.partition("@")
    if TASK_NAME.fullmatch(task):
        if not at:
            return task, None
        if which.isascii() and which.isdigit() and len(which) < 10:
            return task, int(which)
        if TAG_NAME.fullmatch(which):
            return task, which
    raise NotFoundError(f"{text!r} is no task or version: expected a task's name such as 'dtd', 'dtd@2' or 'dtd@prod'")


def manifest_of(view: View, row: VersionRow, what: str) -> tuple[bytes, list[TensorRow]]:
    """A version's manifest, and cached places of its tensors, which may be stale. The manifest's hash is checked.

    Raises:
        DamagedError: the manifest is missing, or its hash differs.
    """
    found = view.manifests.unpack(row.manifest)
    if found is None:
        raise DamagedError(f"manifest of {what}", "missing")
    manifest, hints = found
    if manifest_hash(manifest) != row.manifest:
        raise DamagedError(f"manifest of {what}", "its hash differs")
    return manifest, hints


def resolve(view: View, reference: str, path: Path) -> tuple[str, int, VersionRow]:
    """The task, number and row that a reference names. `path` is the store's, for messages.

    Raises:
        NotFoundError: there is no such task, version or tag.
        DamagedError: the index lists it, but its row is missing or damaged.
    """
    name, which = parse_reference(reference)
    known = view.names.get(name)
    if known is None or known.name != name or not known.newest:
        raise NotFoundError(unknown_task(name, path))
    if isinstance(which, str):
        found = view.tags.get(name, which)
        number = found.version if found else 0
        if not number:
            have = ", ".join(tag for tags in tags_of(view, name).values() for tag in tags) or "none"
            raise NotFoundError(f"no tag {which!r} of task {name!r}; its tags: {have}")
    else:
        number = known.newest if which is None else which
    row = view.versions.get(name, number) if 0 < number <= known.highest else None
    if row is None:
        if number == known.newest or isinstance(which, str):
            raise DamagedError(f"version {name}@{number}", "the index does not list it")
        raise NotFoundError(f"no version {number} of task {name!r}; the newest is {known.newest}")
    return name, number, row


def unknown_task(name: str, path: Path) -> str:
    return f"no task {name!r} in {path}; 'pear-store ls' shows what is there"


def all_tags(view: View) -> dict[tuple[str, int], list[str]]:
    """Tags by (task, version). Walks all tags, so that it notices one that a damaged page hides."""
    return _by_version(view.tags.every())


def tags_of(view: View, task: str) -> dict[tuple[str, int], list[str]]:
    """Like :func:`all_tags`, of one task."""
    return _by_version(view.tags.of(task))


def _by_version(rows: Iterable[tuple[str, str, TagRow]]) -> dict[tuple[str, int], list[str]]:
    found: dict[tuple[str, int], list[str]] = {}
    for task, tag, row in rows:
        if row.version:
            found.setdefault((task, row.version), []).append(tag)
    return found


def newest_versions(view: View) -> Iterator[Version]:
    """The newest version of every task, by name."""
    tags = all_tags(view)
    for row in view.names.every():
        if row.newest:
            yield version_of(view, row.name, row.newest, tags)


def versions(view: View, task: str | None) -> list[Version]:
    """Every version, of one task or of all."""
    tags = all_tags(view)
    rows = view.versions.every() if task is None else ((task, *one) for one in view.versions.of(task))
    found = [version_with_tags(name, number, row, tags) for name, number, row in rows]
    known = view.names.get(task) if task is not None and TASK_NAME.fullmatch(task) else None
    if known is not None and known.name == task and known.newest != (found[-1].version if found else 0):
        raise DamagedError(f"version {task}@{known.newest}", "the index does not list it")
    return found


def version_of(view: View, task: str, number: int, tags: dict[tuple[str, int], list[str]]) -> Version:
    row = view.versions.get(task, number)
    if row is None:
        raise DamagedError(f"version {task}@{number}", "the index does not list it")
    return version_with_tags(task, number, row, tags)


def version_with_tags(task: str, number: int, row: VersionRow, tags: dict[tuple[str, int], list[str]]) -> Version:
    return Version(task, number, row.time_ns, row.size_bytes, tuple(tags.get((task, number), ())))


MOST_OFFERED = 300
"""How many names a completion offers. A shell takes milliseconds for each."""


def beginning(view: View, text: str) -> list[str]:
    """References that begin with a text; see :meth:`pear_store.Store.beginning`."""
    task, at, _ = text.partition("@")
    if not TASK_NAME.fullmatch(task or "a"):
        return []
    if at:
        numbers = (str(number) for number, _ in view.versions.of(task))
        tags = (tag for _, tag, row in view.tags.of(task) if row.version)
        return [name for which in (*numbers, *tags) if (name := f"{task}@{which}").startswith(text)]
    rows = list(islice(view.names.beginning(task), MOST_OFFERED + 1))
    names = _branches(view, task) if len(rows) > MOST_OFFERED else [row.name for row in rows if row.newest]
    return [name for name in names if name.startswith(task)]


def _branches(view: View, start: str) -> list[str]:
    """The beginnings of the names that begin with `start`, one letter longer; more letters if they all share these."""
    found: list[str] = []
    while len(found) < 2:
        found = list(view.names.branches(start))
        start = found[0]
    return found
