"""Compares a store and a remote, by what both hold now and what they last agreed on."""

from dataclasses import dataclass, field

from pear_store.local.sync import Held, Numbered
from pear_store.remote.log import LoggedTag, LoggedVersion
from pear_store.remote.mirror import Mirror


@dataclass
class Changes:
    """What a push would do, what a pull would do, and what keeps a push from being done."""

    push: list[LoggedVersion] = field(default_factory=list)
    push_removed: list[Numbered] = field(default_factory=list)
    push_tags: list[LoggedTag] = field(default_factory=list)
    push_highest: dict[str, int] = field(default_factory=dict)
    pull: list[LoggedVersion] = field(default_factory=list)
    pull_removed: dict[Numbered, bytes] = field(default_factory=dict)
    pull_tags: dict[tuple[str, str], tuple[int | None, int | None]] = field(default_factory=dict)
    pull_highest: dict[str, int] = field(default_factory=dict)
    clashes: list[str] = field(default_factory=list)
    """What keeps a push from being done, one line each"""
    renumbers: list[Numbered] = field(default_factory=list)
    """Versions with a clash that a pull settles, by giving them another number"""
    same: list[Numbered] = field(default_factory=list)
    same_tags: list[tuple[str, str, int | None]] = field(default_factory=list)

    @property
    def is_pushed(self) -> bool:
        """Whether there is nothing to push."""
        return not (self.push or self.push_removed or self.push_tags or self.push_highest)


def compare(held: Held, mirror: Mirror, tasks: set[str] | None = None) -> Changes:
    """The differences, of some tasks or of all."""
    if tasks is None:
        tasks = {*mirror.tasks(), *held.highest, *(task for task, _ in (*held.versions, *held.removed, *held.tags))}
        tasks |= {task for task, _ in mirror.agreed_tags()}
    else:  # also names here that differ in case only: those clash
        tasks = tasks | {here for task in tasks if (here := held.spellings.get(task.casefold()))}
    found = Changes()
    names, versions = mirror.of_tasks(tasks)
    there = _There(names, versions)
    _compare_held(held, mirror, there, tasks, found)
    _compare_remote(held, mirror, there, tasks, found)
    _compare_tags(held, mirror, tasks, found)
    return found


@dataclass(frozen=True)
class _There:
    """What a remote has of the tasks that are compared."""

    names: dict[str, tuple[str, int]]
    versions: dict[Numbered, tuple[LoggedVersion, bool]]

    def spelling(self, task: str) -> str | None:
        found = self.names.get(task.casefold())
        return None if found is None else found[0]

    def highest(self, task: str) -> int:
        return self.names.get(task.casefold(), ("", 0))[1]


def _compare_held(held: Held, mirror: Mirror, remote: _There, tasks: set[str], found: Changes) -> None:
    """Compares what the store holds with the remote."""
    tops: dict[str, int] = {}
    for (task, number), (manifest, time_ns) in held.versions.items():
        if task not in tasks:
            continue
        spelled = remote.spelling(task)
        if spelled not in (None, task):
            found.clashes.append(
                f"task {task!r} differs only in case from {spelled!r} on the remote; add it under another name"
            )
            continue
        there = remote.versions.get((task, number))
        if there is None:
            found.push.append(LoggedVersion(task, number, time_ns, manifest))
            tops[task] = max(number, tops.get(task, 0))
        elif there[0].manifest != manifest:
            found.clashes.append(f"{task}@{number} is another version on the remote; 'pear-store pull' renumbers yours")
            found.renumbers.append((task, number))
        elif there[1]:
            found.pull_removed[task, number] = manifest
        else:
            found.same.append((task, number))
    for (task, number), removed in held.removed.items():
        if task in tasks and (task, number) not in held.versions:
            there = remote.versions.get((task, number))
            if there is not None and not there[1] and there[0].manifest == removed:
                if tags := mirror.tags_of(task, number):
                    if all(mirror.agreed(task, tag) == number and held.tags.get((task, tag)) != number for tag in tags):
                        found.push_removed.append((task, number))  # the tag was removed here, and that is pushed, too
                    else:
                        found.clashes.append(
                            f"{task}@{number} was removed here and is tagged {tags[0]!r} on the remote; push from a "
                            "store that has untagged it"
                        )
                else:
                    found.push_removed.append((task, number))
    for task, highest in held.highest.items():
        is_there = task in tops or remote.spelling(task) == task
        if is_there and task in tasks and highest > max(tops.get(task, 0), remote.highest(task)):
            found.push_highest[task] = highest


def _compare_remote(held: Held, mirror: Mirror, remote: _There, tasks: set[str], found: Changes) -> None:
    """Compares what the remote holds with the store."""
    for key, (version, is_removed) in sorted(remote.versions.items()):
        task = version.task
        if is_removed or held.spellings.get(task.casefold()) not in (None, task):
            continue  # names that differ in case clash: :func:`_compare_held` says so
        here = held.versions.get(key)
        if here is None:
            if held.removed.get(key, b"") != version.manifest and not mirror.taken(*key):
                found.pull.append(version)
        elif here[0] != version.manifest:
            found.pull.append(version)
    for task in sorted(tasks):
        is_spelled_so = held.spellings.get(task.casefold()) in (None, task)
        if is_spelled_so and (highest := remote.highest(task)) > held.highest.get(task, 0):
            found.pull_highest[task] = highest


def _compare_tags(held: Held, mirror: Mirror, tasks: set[str], found: Changes) -> None:
    there, agreed = mirror.tags(tasks), mirror.agreed_tags()
    for task, tag in sorted({*held.tags, *there, *agreed}):
        if task not in tasks:
            continue
        a, b, base = (side.get((task, tag)) for side in (held.tags, there, agreed))
        if a == b and not (a is not None and (task, a) in found.renumbers):
            if a != base:
                found.same_tags.append((task, tag, a))
        elif b == base:  # moved here
            if a is not None and mirror.version(task, a) is not None and not mirror.has_version(task, a):
                found.clashes.append(
                    f"tag {task}@{tag} is on version {a}, which was removed on the remote; tag another version"
                )
            else:
                found.push_tags.append(LoggedTag(task, tag, a, b))
        elif a == base:  # moved there
            found.pull_tags[task, tag] = (a, b)
        else:
            found.clashes.append(
                f"tag {task}@{tag} is on {_named(a)} here and on {_named(b)} on the remote; "
                "set it here as on the remote, or remove it here and pull"
            )


def _named(version: int | None) -> str:
    return "nothing" if version is None else f"version {version}"
