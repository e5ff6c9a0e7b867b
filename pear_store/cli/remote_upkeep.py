"""Commands for the upkeep of remotes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from pear_store.cli.group import dry_run_option, store_directory, store_option, yes_option
from pear_store.cli.remotes import complete_remote, interruptible, remote
from pear_store.cli.upkeep import Duration, Subset
from pear_store.counted import counted
from pear_store.store import Store
from pear_store.terminal import echo, echo_json, json_option

if TYPE_CHECKING:  # a command that needs no remote starts without them
    from pear_store.remote.gc import RemoteGc
    from pear_store.remote.history import Logged
    from pear_store.remote.verify import Fault

name_argument = click.argument("name", required=False, metavar="[NAME]", shell_complete=complete_remote)


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar for each step, if stderr is a terminal."""
    from tqdm import tqdm

    with tqdm(disable=None, leave=False) as bar:

        def show(what: str, done: int, every: int) -> None:
            bar.set_description(what, refresh=False)
            bar.total = every
            bar.update(done - bar.n)
            if done == every:  # tqdm leaves out updates that come soon after one another
                bar.refresh()

        yield show


@remote.command("gc")
@name_argument
@click.option(
    "--keep", type=click.IntRange(1), help="First remove old versions there: those beyond a task's newest KEEP."
)
@click.option(
    "--older-than",
    type=Duration(),
    help="First remove versions older than AGE, such as 90d or 12h. With --keep, both must hold.",
)
@click.option(
    "--grace", type=Duration(), default="7d", show_default=True,
    help="How long dropped files stay, for readers whose copy of the log is older.",
)  # fmt: skip
@store_option
@json_option
@dry_run_option
@yes_option
def gc_command(
    name: str | None, keep: int | None, older_than: float | None, grace: float, as_json: bool, dry_run: bool, yes: bool
) -> None:
    """Remove from a remote what no version there needs; with --keep or --older-than, old versions first.

    Never removes a task's newest version or a tagged one. Others may push and pull meanwhile. A store takes these
    removals over with its next pull. The command only asks before it removes versions.
    """
    with Store(store_directory()) as store, _steps() as progress:
        if not (dry_run or yes) and (keep is not None or older_than is not None):
            plan = store.remote_gc(name, keep, older_than, grace, True, progress)
            if plan.removed:
                click.confirm(f"Remove {counted(len(plan.removed), 'version')} from the remote?", abort=True, err=True)
        result = interruptible("remote gc", lambda: store.remote_gc(name, keep, older_than, grace, dry_run, progress))
    if as_json:
        echo_json(gc_json(result))
        return
    would = "would " if dry_run else ""
    for task, number in result.removed:
        echo(f"{would}remove {task}@{number}" if dry_run else f"removed {task}@{number}")
    echo(
        f"{would}{'drop' if dry_run else 'dropped'} {counted(result.dropped_packs, 'pack')}, "
        f"{result.dropped_bytes:,} bytes, and {counted(result.orphans, 'upload')} that no entry names; "
        f"{result.moved_bytes:,} bytes moved to new packs"
    )
    echo(
        f"{would}{'delete' if dry_run else 'deleted'} {counted(result.deleted, 'file')}; "
        f"{result.waiting} wait for their grace period; {result.dead_bytes:,} dead bytes in packs that stay"
    )
    for pack in result.damaged:
        echo(f"Warning: pack {pack} is damaged and was left as it is; see 'pear-store remote verify'", err=True)


def gc_json(result: "RemoteGc") -> dict[str, Any]:
    return {**asdict(result), "removed": _numbered(result.removed)}


def _numbered(versions: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"task": task, "version": version} for task, version in versions]


@remote.command("verify")
@name_argument
@click.option("--subset", type=Subset(), default="1/1", show_default=True, help="Only packs of the n-th of t parts.")
@store_option
@json_option
@click.pass_context
def verify_command(ctx: click.Context, name: str | None, subset: tuple[int, int], as_json: bool) -> None:
    """Check a remote: its log, its packs and each tensor. Name each fault with the versions that it hits.

    The log is always checked whole. Nothing is changed.
    """
    with Store(store_directory()) as store, _steps() as progress:
        report = interruptible("remote verify", lambda: store.remote_verify(name, subset, progress))
    if as_json:
        echo_json({**asdict(report), "faults": _faults(report.faults)})
    else:
        echo(
            f"{counted(report.entries, 'entry', 'entries')}, {counted(report.packs, 'pack')}, "
            f"{counted(report.tensors, 'tensor')}, "
            f"{report.bytes:,} bytes hashed"
        )
        _print_faults(report.faults)
        echo("all good" if report.ok else "'pear-store remote repair' mends what a store has good copies of")
    ctx.exit(0 if report.ok else 5)


def _faults(faults: "list[Fault]") -> list[dict[str, Any]]:
    return [
        {"what": one.what, "problem": one.problem, "tasks": one.tasks, "versions": _numbered(one.versions)}
        for one in faults
    ]


def _print_faults(faults: "list[Fault]") -> None:
    for one in faults:
        versions = [f"{task}@{number}" for task, number in one.versions]
        named = ", ".join(versions[:20]) + (f" and {len(versions) - 20} more" if len(versions) > 20 else "")
        echo(f"{one.what}: {one.problem}: hits {named or 'no version'}")


@remote.command("repair")
@name_argument
@click.option(
    "--from", "copies", multiple=True, type=click.Path(), metavar="STORE",
    help="Another store that may have good copies. May be repeated. This store is always searched.",
)  # fmt: skip
@store_option
@json_option
@click.pass_context
def repair_command(ctx: click.Context, name: str | None, copies: tuple[str, ...], as_json: bool) -> None:
    """Mend what 'remote verify' finds, from good copies in this store and in others.

    Tensors that versions need move from damaged packs to new ones, and the damaged packs are dropped. Damaged entries
    and indexes of the log are restored, if a store that read them earlier has a copy.
    """
    with Store(store_directory()) as store, _steps() as progress:
        result = interruptible("remote repair", lambda: store.remote_repair(name, copies, progress))
    if as_json:
        echo_json({**asdict(result), "missing": _faults(result.missing)})
    else:
        for restored in result.restored:
            echo(f"put back {restored}")
        echo(
            f"healed {counted(result.healed, 'tensor')}, dropped {counted(len(result.dropped), 'damaged pack')}, "
            f"{result.sent_bytes:,} bytes sent"
        )
        _print_faults(result.missing)
    ctx.exit(5 if result.missing else 0)


@remote.command("log")
@name_argument
@click.option("-n", "most", type=click.IntRange(1), default=20, show_default=True, help="How many entries to show.")
@store_option
@json_option
def log_command(name: str | None, most: int, as_json: bool) -> None:
    """Show what each entry of a remote's log did, newest first."""
    with Store(store_directory()) as store:
        found = store.remote_log(name, most)
    if as_json:
        echo_json([entry_json(entry) for entry in found])
        return
    for entry in found:
        echo(f"{entry.number:>6}  {_time(entry.time_ns)}  {entry.host}")
        for line in _lines(entry):
            echo(f"        {line}")


def entry_json(entry: "Logged") -> dict[str, Any]:
    return {
        **asdict(entry), "versions": _numbered(entry.versions), "removed": _numbered(entry.removed),
        "tags": [{"task": task, "tag": tag, "version": version} for task, tag, version in entry.tags],
    }  # fmt: skip


def _lines(entry: "Logged") -> Iterator[str]:
    for verb, versions in (("added", entry.versions), ("removed", entry.removed)):
        if versions:
            named = ", ".join(f"{task}@{number}" for task, number in versions[:10])
            yield f"{verb} {named}" + (f" and {len(versions) - 10} more" if len(versions) > 10 else "")
    for task, tag, number in entry.tags:
        yield f"tagged {task}@{tag}: {'nothing' if number is None else f'version {number}'}"
    if entry.packs:
        yield f"{counted(entry.packs, 'new pack')}, {entry.pack_bytes:,} bytes"
    if entry.dropped_packs or entry.strays:
        yield f"dropped {counted(entry.dropped_packs, 'pack')} and {counted(entry.strays, 'other object')}"


def _time(time_ns: int) -> str:
    try:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{time_ns} ns"
