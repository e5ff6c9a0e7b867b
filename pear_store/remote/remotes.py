"""The remotes that a store knows by name, and what can be done with them.

remotes/NAME.json      what the user said: URL, options (never a secret), which tasks a pull takes
remotes/NAME.mirror    what the remote's log says, see mirror.py
"""

import json
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pear_store.errors import (
    AbsentError,
    FormatError,
    NotFoundError,
    PearStoreError,
    from_os_error,
)
from pear_store.format.container import strict_json
from pear_store.format.digest import fresh_name
from pear_store.local.create import make_store
from pear_store.local.directory import open_folder
from pear_store.local.opened import OpenStore, is_store
from pear_store.local.sync import held
from pear_store.remote import pull as pulling
from pear_store.remote import push as pushing
from pear_store.remote.changes import Changes, compare
from pear_store.remote.log import MAX_ENTRY_BYTES, SETTINGS_NAME, encode_settings, parse_settings
from pear_store.remote.mirror import Mirror, opened_mirror
from pear_store.remote.opening import check_options, checked_url, open_place
from pear_store.remote.place import Place, probe
from pear_store.remote.reading import read_on
from pear_store.remote.retry import Persistent, retried
from pear_store.remote.single import SingleWriter

REMOTE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
FOLDER = "remotes"
_FORMAT = "pear-remotes/1"
_MOST_BYTES = 64 << 10


@dataclass(frozen=True)
class Remote:
    """A remote that a store knows by name.

    Args:
        options: options of the place. Never a secret.
        tasks: patterns such as ``dtd*``. A pull that names no tasks takes those that match.
        single_writer: the user says that only this store writes there. Then it is written even if the probe fails.
    """

    name: str
    url: str
    options: Mapping[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("*",)
    single_writer: bool = False


def opened_place(remote: Remote) -> Place:
    """The place of a remote. Its requests are tried again if that may help."""
    place = Persistent(open_place(remote.url, remote.options))
    return SingleWriter(place) if remote.single_writer else place


def init_remote(url: str, options: Mapping[str, str] | None = None, single_writer: bool = False) -> str:
    """Makes an empty remote, or finds the one that is there. Returns its id.

    Raises:
        PlaceError: the place cannot be reached; or several stores cannot write to it (:func:`probe`), and
            `single_writer` is not set.
        FormatError: another version of Pear wrote the remote that is there.
    """
    check_options(options or {})
    url = checked_url(url)
    with closing(opened_place(Remote("", url, options or {}, single_writer=single_writer))) as place:
        if "://" not in url:
            try:
                os.makedirs(url, exist_ok=True)
            except OSError as error:
                raise from_os_error(error, Path(url)) from None
        retried(lambda: probe(place))
        id = fresh_name()
        if place.create(SETTINGS_NAME, encode_settings(id)):
            return id
        return parse_settings(place.get(SETTINGS_NAME, MAX_ENTRY_BYTES), place.url)


def add_remote(path: Path, remote: Remote) -> None:
    """Adds a remote to those that a store knows.

    Raises:
        NotFoundError: there is no remote at its URL.
        PearStoreError: the name is taken, or no valid name.
    """
    if not REMOTE_NAME.fullmatch(remote.name):
        raise PearStoreError(f"remote {remote.name!r}: expected up to 32 of a-z, 0-9, '_' and '-'")
    check_options(remote.options)
    url = checked_url(remote.url)
    with closing(Persistent(open_place(url, remote.options))) as place:
        try:
            parse_settings(place.get(SETTINGS_NAME, MAX_ENTRY_BYTES), place.url)
        except AbsentError:
            raise NotFoundError(f"{url}: no remote there; 'pear-store remote init NAME {url}' makes one") from None
    value = {**asdict(remote), "format": _FORMAT, "url": url, "tasks": list(remote.tasks)}
    text = json.dumps(value, indent=1).encode()
    try:
        with open_folder(path, FOLDER, create=True) as folder:
            name = f"{remote.name}.json"
            if name in folder.names():
                raise PearStoreError(
                    f"remote {remote.name!r} exists; use another name, or 'pear-store remote rm {remote.name}' first"
                )
            written = f"{fresh_name()}.new"
            handle = folder.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with open(handle, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(handle)
            folder.rename(written, name)
            folder.sync()
    except OSError as error:
        raise from_os_error(error, path) from None


def remove_remote(path: Path, name: str) -> Remote:
    """Removes a remote from those that a store knows. Nothing at its URL is changed.

    Raises:
        NotFoundError: the store knows no remote of that name.
    """
    remote = find_remote(path, name)
    try:
        with open_folder(path, FOLDER) as folder:
            for suffix in ("json", "mirror", "mirror-journal"):
                folder.unlink(f"{remote.name}.{suffix}")
    except OSError as error:
        raise from_os_error(error, path) from None
    return remote


def remotes(path: Path) -> list[Remote]:
    """The remotes that a store knows, by name."""
    found = []
    with suppress(FileNotFoundError), open_folder(path, FOLDER) as folder:
        for file in folder.names():
            name, _, suffix = file.partition(".")
            if suffix == "json" and REMOTE_NAME.fullmatch(name):
                with open(folder.open(file, os.O_RDONLY), "rb") as handle:
                    found.append(_parse(folder.path / file, name, handle.read(_MOST_BYTES + 1)))
    return found


def _parse(path: Path, name: str, data: bytes) -> Remote:
    try:
        value = strict_json(data[:_MOST_BYTES])
        url, options, tasks = value["url"], value["options"], value["tasks"]
        single_writer = value.get("single_writer", False)
        texts = [url, *options, *options.values(), *tasks]
        is_text = all(isinstance(text, str) for text in texts)
        if value["format"] != _FORMAT or not is_text or not isinstance(single_writer, bool):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(
            f"{path}: not what 'pear-store remote add' writes; delete it and add the remote again"
        ) from None
    return Remote(name, url, options, tuple(tasks), single_writer)


def find_remote(path: Path, name: str | None) -> Remote:
    """A remote by its name. None: ``origin``, or the only one.

    Raises:
        NotFoundError: there is no such remote; or no name was given, and there are several.
    """
    known = {remote.name: remote for remote in remotes(path)}
    if name is None:
        name = "origin" if "origin" in known or len(known) != 1 else next(iter(known))
    if name not in known:
        have = ", ".join(known) or "none; 'pear-store remote init NAME URL' makes one, 'remote add' adds one"
        raise NotFoundError(f"no remote {name!r} of {path}; its remotes: {have}")
    return known[name]


@contextmanager
def connected(opened: OpenStore, name: str | None) -> Iterator[tuple[Remote, Place, Mirror]]:
    """Connects to a remote, by its name. Gives the remote, its place, and what is known of it."""
    remote = find_remote(opened.path, name)
    check_options(remote.options)
    with closing(opened_place(remote)) as place:
        file: Path | None = opened.path / FOLDER / f"{remote.name}.mirror"
        if not os.access(opened.path / FOLDER, os.W_OK):
            file = None
        with opened_mirror(file, place.url) as mirror:
            yield remote, place, mirror


def push(
    opened: OpenStore,
    name: str | None = None,
    tasks: Collection[str] = (),
    progress: pushing.Progress = lambda done, all_, moved_bytes: None,
) -> pushing.Pushed:
    """See :meth:`pear_store.Store.push`."""
    here = held(opened, tasks)
    known = {task for task, _ in (*here.versions, *here.removed)}
    if unknown := [task for task in tasks if task not in known]:
        raise NotFoundError(f"no task {unknown[0]!r} in {opened.path}; 'pear-store ls' shows what is there")
    with connected(opened, name) as (remote, place, mirror):
        if remote.single_writer:
            warnings.warn(
                f"{remote.url}: only this store may push there (--single-writer); what others push may be lost",
                stacklevel=2,
            )
        return pushing.push(opened, place, mirror, set(tasks) or None, progress)


def pull(
    opened: OpenStore,
    name: str | None = None,
    references: Collection[str] = (),
    progress: pulling.Progress = lambda done, all_, moved_bytes: None,
) -> pulling.Pulled:
    """See :meth:`pear_store.Store.pull`."""
    with connected(opened, name) as (remote, place, mirror):
        return pulling.pull(opened, place, mirror, references, remote.tasks, progress)


def status(opened: OpenStore, name: str | None = None) -> Changes:
    """What a push and a pull would do."""
    with connected(opened, name) as (remote, place, mirror):
        read_on(mirror, place)
        here = held(opened)
        found = mirror.stable(lambda: compare(here, mirror))
        chosen, _ = pulling.chosen(mirror, (), remote.tasks)
        found.pull = [version for version in found.pull if version.task in chosen]
        return found


def stats(opened: OpenStore, name: str | None = None) -> dict[str, str | int]:
    """What a remote holds: its name and URL, and how many entries, tasks, versions, packs and bytes of packs."""
    with connected(opened, name) as (remote, place, mirror):
        read_on(mirror, place)
        return {"name": remote.name, "url": remote.url, "entries": mirror.head[0], **mirror.counts()}


def clone_store(
    path: Path, remote: Remote, progress: pulling.Progress = lambda done, all_, moved_bytes: None
) -> pulling.Pulled:
    """Makes a store of what a remote holds. Goes on with a clone that was interrupted.

    Raises:
        FormatError: the directory holds something else.
        PearStoreError: it holds a store that is no clone, or a clone of another remote.
    """
    url = checked_url(remote.url)
    if not is_store(path):
        with closing(Persistent(open_place(url, remote.options))) as place:
            try:
                parse_settings(place.get(SETTINGS_NAME, MAX_ENTRY_BYTES), place.url)
            except AbsentError:
                raise NotFoundError(f"{url}: no remote there; check the URL") from None
        make_store(path)
    known = {one.name: one for one in remotes(path)}
    if remote.name not in known:
        with closing(OpenStore(path)) as opened:
            if held(opened).highest:
                raise PearStoreError(
                    f"{path}: found a store that is no clone; choose another directory, or 'remote add' and 'pull'"
                )
        add_remote(path, remote)
    elif known[remote.name].url != url:
        raise PearStoreError(f"{path}: found a clone of {known[remote.name].url}; choose another directory")
    with closing(OpenStore(path)) as opened:
        return pull(opened, remote.name, (), progress)
