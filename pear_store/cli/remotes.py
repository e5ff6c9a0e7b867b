"""Commands that share a store through remotes."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pear_store.cli.group import complete_task, main, store_directory, store_option
from pear_store.counted import counted
from pear_store.errors import PearStoreError
from pear_store.local.directory import store_path
from pear_store.store import Store
from pear_store.terminal import PrintableGroup, echo, echo_json, echo_table, json_option

if TYPE_CHECKING:  # a command that needs no remote starts without them
    from pear_store.remote.changes import Changes
    from pear_store.remote.pull import Pulled
    from pear_store.remote.push import Pushed

T = TypeVar("T")


def _options(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter("expected KEY=VALUE")  # the value is not shown: it may hold a secret
        found[key] = value
    return found


option_option = click.option(
    "--option", "options", multiple=True, callback=_options, metavar="KEY=VALUE",
    help="An option of the place, such as endpoint=http://host:9000 or region=eu-west-1. Never a secret. May be "
    "repeated.",
)  # fmt: skip
tasks_option = click.option(
    "--tasks", "patterns", multiple=True, metavar="PATTERN", default=("*",),
    help="Which tasks to take if a pull names none, such as 'dtd*'; may be repeated [default: all].",
)  # fmt: skip
single_writer_option = click.option(
    "--single-writer", is_flag=True,
    help="Write there although the place cannot keep several stores apart. No other store may then push to it.",
)  # fmt: skip


def complete_remote(ctx: click.Context, param: click.Parameter, start: str) -> list[str]:
    from pear_store.remote.remotes import remotes

    try:
        return [remote.name for remote in remotes(store_directory(ctx)) if remote.name.startswith(start)]
    except (PearStoreError, OSError):
        return []


@main.group(cls=PrintableGroup)
def remote() -> None:
    """Manage the remotes that this store is shared through."""


@remote.command("init")
@click.argument("name")
@click.argument("url")
@option_option
@tasks_option
@single_writer_option
@store_option
@json_option
def init_command(
    name: str, url: str, options: dict[str, str], patterns: tuple[str, ...], single_writer: bool, as_json: bool
) -> None:
    """Make an empty remote at a directory, s3://, gs://, az:// or sftp:// URL, and add it.

    A place is refused if two stores that write to it at once could lose data. --single-writer takes it all the same.
    """
    from pear_store.remote.remotes import Remote, add_remote, init_remote

    with Store(store_directory()) as store:
        init_remote(url, options, single_writer)
        add_remote(store.path, Remote(name, url, options, patterns, single_writer))
    _report_added(name, url, as_json)


@remote.command("add")
@click.argument("name")
@click.argument("url")
@option_option
@tasks_option
@single_writer_option
@store_option
@json_option
def add_command(
    name: str, url: str, options: dict[str, str], patterns: tuple[str, ...], single_writer: bool, as_json: bool
) -> None:
    """Add an existing remote. One on a web server can only be read."""
    from pear_store.remote.remotes import Remote, add_remote

    with Store(store_directory()) as store:
        add_remote(store.path, Remote(name, url, options, patterns, single_writer))
    _report_added(name, url, as_json)


def _report_added(name: str, url: str, as_json: bool) -> None:
    if as_json:
        echo_json({"name": name, "url": url})
    else:
        echo(f"remote {name} at {url}")


@remote.command("ls")
@store_option
@json_option
def ls_command(as_json: bool) -> None:
    """List the remotes."""
    from pear_store.remote.remotes import remotes

    with Store(store_directory()) as store:
        found = remotes(store.path)
    rows = [{"name": one.name, "url": one.url, "tasks": list(one.tasks), "options": dict(one.options),
             "single_writer": one.single_writer} for one in found]  # fmt: skip
    if as_json:
        echo_json(rows)
    elif rows:
        shown = [{**row, "tasks": " ".join(one.tasks), "options": " ".join(map("=".join, one.options.items())),
                  "single_writer": "yes" if one.single_writer else "no"}
                 for row, one in zip(rows, found, strict=True)]  # fmt: skip
        echo_table(shown, colalign=("left",) * 5)


@remote.command("rm")
@click.argument("name", shell_complete=complete_remote)
@store_option
@json_option
def rm_command(name: str, as_json: bool) -> None:
    """Forget a remote. Nothing at its URL is changed."""
    from pear_store.remote.remotes import remove_remote

    with Store(store_directory()) as store:
        found = remove_remote(store.path, name)
    if as_json:
        echo_json({"name": name, "url": found.url})
    else:
        echo(f"forgot remote {name}; what lies at {found.url} was left as it is")


@remote.command("show")
@click.argument("name", required=False, shell_complete=complete_remote)
@store_option
@json_option
def show_command(name: str | None, as_json: bool) -> None:
    """Show what a remote holds: entries of its log, tasks, versions, packs and their bytes."""
    with Store(store_directory()) as store:
        found = store.remote_stats(name)
    if as_json:
        echo_json(found)
    else:
        for key, value in found.items():
            echo(f"{key:<12}{value:,}" if isinstance(value, int) else f"{key:<12}{value}")


def _split(store: Store, given: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Splits arguments into the remote and the tasks. The first argument is a remote if the store knows that name."""
    from pear_store.remote.remotes import find_remote, remotes

    known = {one.name for one in remotes(store.path)}
    if given and not known:
        find_remote(store.path, given[0])  # raises: the store has no remotes
    return (given[0], given[1:]) if given and given[0] in known else (None, given)


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int, int], None]]:
    """Shows a progress bar in bytes, if stderr is a terminal. The total is estimated from the versions done."""
    from tqdm import tqdm

    with tqdm(desc=verb, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:

        def show(done: int, every: int, moved_bytes: int) -> None:
            bar.total = moved_bytes * every // done if done else None
            bar.set_postfix_str(f"{done} of {every} versions", refresh=False)
            bar.update(moved_bytes - bar.n)
            if done == every:  # tqdm leaves out updates that come soon after one another
                bar.refresh()

        yield show


def interruptible(verb: str, act: Callable[[], T]) -> T:
    """Runs a command so that Ctrl-C ends it at once, even while it waits.


    The process exits without waiting for its threads. That is safe: a command that is killed leaves nothing half done.
    """
    from concurrent.futures import Future  # here: it imports logging, and most commands do without

    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(act())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    try:
        try:
            thread.start()
        except RuntimeError:  # the system gives no more
            work()
        while thread.is_alive():
            thread.join(0.1)  # a signal that another thread received does not wake join: look ten times a second
        return done.result()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            echo(err=True)  # ends the progress bar's line
        echo(f"Error: {verb} interrupted; the same command goes on", err=True)
        sys.stdout.flush()
        os._exit(130)


@main.command()
@click.argument("given", nargs=-1, metavar="[REMOTE] [TASK]...", shell_complete=complete_task)
@store_option
@json_option
def push(given: tuple[str, ...], as_json: bool) -> None:
    """Send versions, removals and tags that a remote lacks: of some tasks, or of all.

    If the first argument is not a remote's name, the remote is 'origin', or the only one. If another store pushed
    another version under the same number, the command names that version and sends nothing. 'pull' then gives yours
    another number.
    """
    with Store(store_directory()) as store, _progress("push") as progress:
        name, tasks = _split(store, given)
        result = interruptible("push", lambda: store.push(name, tasks, progress))
    if as_json:
        echo_json(pushed_json(result))
        return
    for task, version in result.versions:
        echo(f"pushed {task}@{version}")
    for task, version in result.removed:
        echo(f"removed {task}@{version} there")
    for task, tag, standing in result.tags:
        echo(f"tagged {task}@{tag} there: {'nothing' if standing is None else f'version {standing}'}")
    echo(f"{counted(len(result.versions), 'version')}, {result.sent_bytes:,} bytes sent")


def pushed_json(result: "Pushed") -> dict[str, Any]:
    return {
        "versions": _numbered(result.versions), "removed": _numbered(result.removed),
        "tags": [{"task": task, "tag": tag, "version": version} for task, tag, version in result.tags],
        "sent_bytes": result.sent_bytes,
    }  # fmt: skip


def _numbered(versions: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"task": task, "version": version} for task, version in versions]


@main.command()
@click.argument("given", nargs=-1, metavar="[REMOTE] [TASK[@VERSION]]...", shell_complete=complete_task)
@store_option
@json_option
def pull(given: tuple[str, ...], as_json: bool) -> None:
    """Take versions, removals and tags from a remote: of some tasks, or of all.

    If another store pushed another version under the number of one of yours, yours gets the next free number.
    """
    with Store(store_directory()) as store, _progress("pull") as progress:
        name, references = _split(store, given)
        result = interruptible("pull", lambda: store.pull(name, references, progress))
    _report_pulled(result, as_json)


def _report_pulled(result: "Pulled", as_json: bool) -> None:
    for problem in result.problems:
        echo(f"Warning: {problem}", err=True)
    if as_json:
        echo_json(
            {
                "versions": _numbered(result.versions), "removed": _numbered(result.removed),
                "renumbered": [{"task": t, "version": old, "new_version": new} for t, old, new in result.renumbered],
                "tags": [{"task": task, "tag": tag} for task, tag in result.tags],
                "problems": result.problems, "read_bytes": result.read_bytes,
            }
        )  # fmt: skip
        return
    for task, version in result.versions:
        echo(f"took {task}@{version}")
    for task, old, new in result.renumbered:
        echo(f"{task}@{old} of yours is {task}@{new} now: another store has pushed number {old}")
    for task, version in result.removed:
        echo(f"removed {task}@{version}")
    for task, tag in result.tags:
        echo(f"moved tag {task}@{tag}")
    echo(f"{counted(len(result.versions), 'version')}, {result.read_bytes:,} tensor bytes read")


@main.command()
@click.argument("url")
@click.argument("directory", required=False, type=click.Path())
@option_option
@tasks_option
@json_option
def clone(url: str, directory: str | None, options: dict[str, str], patterns: tuple[str, ...], as_json: bool) -> None:
    """Make a store of what a remote holds, in DIRECTORY [default: the last part of the URL].

    The new store knows the remote as 'origin'. After an interruption, run the same command again: it goes on.
    """
    from pear_store.remote.remotes import Remote, clone_store

    path = store_path(directory or Path(url.rstrip("/")).name)
    with _progress("clone") as progress:
        remote = Remote("origin", url, options, patterns)
        result = interruptible("clone", lambda: clone_store(path, remote, progress))
    _report_pulled(result, as_json)


@main.command()
@click.argument("name", required=False, metavar="[REMOTE]", shell_complete=complete_remote)
@store_option
@json_option
def status(name: str | None, as_json: bool) -> None:
    """Show what is only here, and what is only on a remote. Nothing is changed."""
    with Store(store_directory()) as store:
        found = store.remote_status(name)
    if as_json:
        echo_json(status_json(found))
        return
    for version in found.push:
        echo(f"to push    {version.task}@{version.number}")
    for task, number in found.push_removed:
        echo(f"to push    the removal of {task}@{number}")
    for tag in found.push_tags:
        echo(f"to push    tag {tag.task}@{tag.tag}")
    for version in found.pull:
        echo(f"to pull    {version.task}@{version.number}")
    for task, number in found.pull_removed:
        echo(f"to pull    the removal of {task}@{number}")
    for task, tag_name in found.pull_tags:
        echo(f"to pull    tag {task}@{tag_name}")
    for clash in found.clashes:
        echo(f"clash      {clash}")
    if not (found.push or found.push_removed or found.push_tags or found.pull or found.pull_removed
            or found.pull_tags or found.clashes):  # fmt: skip
        echo("both hold the same")


def status_json(found: "Changes") -> dict[str, Any]:
    return {
        "push": {
            "versions": _numbered((v.task, v.number) for v in found.push), "removed": _numbered(found.push_removed),
            "tags": [{"task": tag.task, "tag": tag.tag, "version": tag.version} for tag in found.push_tags],
        },
        "pull": {
            "versions": _numbered((v.task, v.number) for v in found.pull), "removed": _numbered(found.pull_removed),
            "tags": [{"task": t, "tag": tag, "version": now} for (t, tag), (_, now) in found.pull_tags.items()],
        },
        "clashes": found.clashes,
    }  # fmt: skip
