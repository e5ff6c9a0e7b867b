"""Commands on tasks and their versions."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import click

from pear_store.cli.group import (
    complete_tag,
    complete_task,
    dry_run_option,
    main,
    open_store,
    store_directory,
    store_option,
    yes_option,
)
from pear_store.counted import counted
from pear_store.errors import PearStoreError
from pear_store.format.checkpoint import Task, natural_key, shown_label
from pear_store.format.digest import ITEM_BYTES
from pear_store.format.record import Adapter
from pear_store.format.summary import NO_SUMMARY, Origin, Summary
from pear_store.listing import Listing, Query, Row, SortKey, listed_json, version_json
from pear_store.local import sources
from pear_store.local.add import Added
from pear_store.local.loading import Refused
from pear_store.local.references import Version
from pear_store.local.sources import Access, Source
from pear_store.readable import ReadableStore
from pear_store.sharing import Shared, shared_with_others
from pear_store.store import Store
from pear_store.terminal import (
    NamedPath,
    allow_option,
    echo,
    echo_json,
    echo_json_rows,
    echo_long_table,
    echo_table,
    json_option,
    printable,
)


@main.command()
@store_option
@json_option
def init(as_json: bool) -> None:
    """Make an empty store. An existing store is not changed."""
    path = store_directory()
    with Store.create(path):
        pass
    if as_json:
        echo_json({"store": str(path)})
    else:
        echo(f"store at {path}")


@main.command()
@click.argument("given", nargs=-1, required=True, type=click.Path(allow_dash=True), metavar="SOURCE...")
@click.option("--name", help="Store the task under this name; only for one task.")
@allow_option
@store_option
@json_option
@click.pass_context
def add(ctx: click.Context, given: tuple[str, ...], name: str | None, allowed: tuple[str, ...], as_json: bool) -> None:
    """Add task checkpoints: files, directories of them, fsspec URLs, or - for standard input.

    hf://OWNER/NAME[@REVISION] is a task on the Hugging Face Hub, as 'export-hub' writes it.

    If a file is refused, the others are still added, and the exit code is not 0.
    """
    access = Access(allowed=frozenset(allowed))
    files = list(sources.expand(given, access))
    if name is not None and len(files) > 1:
        raise click.UsageError(f"--name: expected one task, found {len(files)}")
    rows: list[dict[str, Any]] = []
    exit_code = 0
    stop: PearStoreError | None = None
    with Store(store_directory()) as store:
        given_files: list[Source] = [sys.stdin.buffer if file == "-" else file for file in files]
        results = store.add_many(given_files, name, access)
        for file in files:
            try:
                result: Added | Refused = next(results)
            except PearStoreError as error:
                stop = error
                break
            if isinstance(result, Refused):
                exit_code = exit_code or result.error.exit_code
                rows.append({"file": file, "error": str(result.error)})
                echo(f"Error: {result.error}", err=True)
            else:
                rows.append({"file": file, **asdict(result)})
                if not as_json:
                    echo(added_line(result))
    if as_json:
        echo_json(rows)
    if stop is not None:
        raise stop
    ctx.exit(exit_code)


def added_line(result: Added) -> str:
    sizes = f"{result.new_bytes:,} new bytes, {result.shared_bytes:,} shared"
    if not result.changed:
        return f"{result.task}@{result.version} is unchanged" + (f" ({sizes})" if result.new_bytes else "")
    return f"added {result.task}@{result.version}: {sizes}"


@main.command()
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...", shell_complete=complete_task)
@click.option("--all", "every", is_flag=True, help="Every version, not only the newest.")
@click.option("--backbone", metavar="PATTERN", help="Only tasks whose backbone matches, such as 'vit_*'.")
@click.option("--tag", metavar="TAG", help="Only tasks with this tag; with --all, only the versions that have it.")
@click.option("--sort", type=click.Choice(get_args(SortKey)), default="name", show_default=True, help="Sort by this.")
@click.option("--reverse", is_flag=True, help="Sort the other way round.")
@click.option("--limit", type=click.IntRange(1), help="List at most so many.")
@click.option("--short", is_flag=True, help="Leave out what records say. Much faster with very many tasks.")
@store_option
@json_option
def ls(
    patterns: tuple[str, ...], every: bool, backbone: str | None, tag: str | None, sort: SortKey, reverse: bool,
    limit: int | None, short: bool, as_json: bool,
) -> None:  # fmt: skip
    """List the tasks, or those whose names match a PATTERN such as 'flowers-*'.

    NEW are the bytes that no older version has. Their sum is what the store's tensors take. BYTES are the bytes of all
    tensors of the version. VAL % is the METRIC that chose the weights in training, on the validation images. Tags of
    older versions are shown as TAG@2.
    """
    query = Query(patterns, tag, backbone, every, sort, reverse)
    with open_store() as store:
        listing = Listing(store)
        versions = islice(listing.versions(query), limit)
        if short:
            pairs = ((version, {} if every else listing.older_tags(version)) for version in versions)
            if as_json:
                echo_json_rows(version_json(*pair) for pair in pairs)
            else:
                echo_long_table((version_row(*pair) for pair in pairs), _LEFT)
            return
        rows = (_warned(row) for row in listing.rows(versions, every))
        if as_json:
            echo_json_rows(listed_json(row) for row in rows)
        else:
            echo_long_table((_listed_row(row) for row in rows), _LEFT)
        if listing.problem is not None:
            echo(f"Warning: new bytes are not known: {listing.problem}", err=True)


_LEFT = ("task", "backbone", "metric", "tags")


def _warned(row: Row) -> Row:
    if isinstance(row.summary, PearStoreError):
        echo(f"Warning: {row.version.task}@{row.version.version}: {row.summary}", err=True)
    return row


def _listed_row(row: Row) -> dict[str, Any]:
    short = version_row(row.version, row.older_tags)
    summary = row.summary if isinstance(row.summary, Summary) else NO_SUMMARY
    backbone = summary.backbone or "?"
    return {
        "task": short["task"],
        "version": short["version"],
        "backbone": backbone if len(backbone) <= _BACKBONE_WIDTH else f"{backbone[: _BACKBONE_WIDTH - 1]}…",
        "classes": "?" if summary.classes is None else summary.classes or "-",
        "val %": "-" if summary.val is None else f"{100 * summary.val:.1f}",
        "metric": "-" if summary.val is None else _METRICS[summary.selected_by],
        "new": "?" if row.new_bytes is None else f"{row.new_bytes:,}",
        **{key: value for key, value in short.items() if key not in ("task", "version")},
    }


_BACKBONE_WIDTH = 44
_METRICS = {"val_top1": "top-1", "val_macro_f1": "macro F1"}


def version_row(version: Version, older_tags: Mapping[str, int] | None = None) -> dict[str, Any]:
    return {
        "task": version.task,
        "version": version.version,
        "bytes": f"{version.size_bytes:,}",
        "added": _time(version.time_ns),
        "tags": " ".join([*version.tags, *(f"{tag}@{number}" for tag, number in (older_tags or {}).items())]),
    }


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


@main.command()
@click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task)
@store_option
@json_option
def show(reference: str, as_json: bool) -> None:
    """Show one task: backbone, labels, metrics, how it was trained and on what, what it shares, and its positions.

    A position may use an adapter of its own or one of another position, several, or none.
    """
    with open_store() as store:
        version = store.resolve(reference)
        task = store.get(f"{version.task}@{version.version}", copy=False)
        manifest = dict(store.record(f"{version.task}@{version.version}"))
        shared = None if store.is_remote else _shared(store, version)  # a remote's whole log would be read for it
    origin = Origin.of(task.record)
    if as_json:
        row = {**version_json(version), "time_ns": version.time_ns, "manifest": manifest}
        echo_json({**row, "origin": asdict(origin), "sharing": shared and asdict(shared)})
        return
    echo(f"{version.task}@{version.version}, added {_time(version.time_ns)}, {version.size_bytes:,} tensor bytes")
    if version.tags:
        echo(f"tags        {' '.join(version.tags)}")
    echo(f"backbone    {task.backbone_model} {task.backbone_digest}")
    echo(f"activation  {task.activation}")
    labels = ", ".join(map(shown_label, task.labels[:8]))
    echo(f"labels      {len(task.labels)}: {labels}{', …' if len(task.labels) > 8 else ''}")
    for key, value in task.record["metrics"].items():
        echo(f"{key:<11} {value}")
    for heading, values in (("data", origin.data), ("given", origin.given), ("training", origin.options)):
        _echo_values(heading, values)
    if shared is not None:
        echo(f"shared      {_shared_line(shared)}")
    rows = []
    for position, branches in sorted(task.positions.items(), key=lambda item: natural_key(item[0])):
        for branch in branches:
            adapter = task.adapters[branch.adapter]
            rows.append({"position": position, "adapter": branch.adapter, "scale": round(branch.scale, 4),
                         "bits": _bits(adapter, task), "bytes": f"{_size_bytes(adapter, task):,}"})  # fmt: skip
    if rows:
        echo_table(rows)


def _bits(adapter: Adapter, task: Task) -> str:
    """The bits of a number, of each matrix that has others than those before it: "16, 4" of a coded core in bases."""
    every = (matrix.bits or 8 * ITEM_BYTES[task.tensors[matrix.name].dtype] for matrix in adapter.matrices)
    return ", ".join(map(str, dict.fromkeys(every)))


def _size_bytes(adapter: Adapter, task: Task) -> int:
    """The bytes of its matrices, with their scales."""
    parts = [part(task.tensors) for matrix in adapter.matrices for part in (matrix.tensor, matrix.scales)]
    return sum(part.size_bytes for part in parts if part is not None)


def _shared(store: ReadableStore, version: Version) -> Shared | None:
    """What the version shares. None, with a warning, if another task is damaged: this one is shown all the same."""
    try:
        return shared_with_others(store.uses(), version)
    except PearStoreError as error:
        echo(f"Warning: what it shares is not known: {error}", err=True)
        return None


def _echo_values(heading: str, values: Mapping[str, Any]) -> None:
    """Prints values under one heading, in lines of about 100 characters."""
    line = f"{heading:<11}"
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        text = printable(f"{key}={text if len(text) <= 200 else text[:199] + '…'}")
        if len(line) > 12 and len(line) + len(text) > 100:
            echo(line)
            line = " " * 11
        line += f" {text}"
    if values:
        echo(line)


def _shared_line(shared: Shared) -> str:
    if not shared.neighbours:
        return "nothing with other tasks"
    share = shared.shared_bytes / max(1, shared.size_bytes)
    count = len(shared.neighbours)
    named = ", ".join(f"{one.task} {one.shared_bytes:,}" for one in shared.neighbours[:5]) + (
        ", …" if count > 5 else ""
    )
    return f"{shared.shared_bytes:,} bytes ({share:.0%}) with {counted(count, 'other task')}: {named}"


@main.command()
@click.argument("reference", metavar="TASK", shell_complete=complete_task)
@store_option
@json_option
def log(reference: str, as_json: bool) -> None:
    """List a task's versions, the newest first."""
    with open_store() as store:
        versions = store.versions(store.resolve(reference).task)[::-1]
    if as_json:
        echo_json([{**version_json(v), "tags": list(v.tags), "time_ns": v.time_ns} for v in versions])
    else:
        echo_table([version_row(version) for version in versions])


@main.command()
@click.argument("a", metavar="TASK[@VERSION]", shell_complete=complete_task)
@click.argument("b", metavar="TASK[@VERSION]", shell_complete=complete_task)
@store_option
@json_option
def diff(a: str, b: str, as_json: bool) -> None:
    """Compare two versions: which adapters differ, which are shared, and the bytes of each."""
    with open_store() as store:
        found = store.diff(a, b)
    if as_json:
        value = asdict(found)
        echo_json({**value, "a": version_json(found.a), "b": version_json(found.b)})
        return
    rows = [
        {"position": p.position, "change": p.change, "shared": f"{p.shared_bytes:,}", "only first":
         f"{p.a_bytes - p.shared_bytes:,}", "only second": f"{p.b_bytes - p.shared_bytes:,}"}
        for p in sorted(found.positions, key=lambda p: natural_key(p.position))
    ]  # fmt: skip
    if rows:
        echo_table(rows)
    echo(f"head        {found.head}")
    echo(f"record      {'differs in ' + ', '.join(found.fields) if found.fields else 'equal'}")
    echo(
        f"bytes       {found.shared_bytes:,} shared, {found.only_a_bytes:,} only in {found.a.task}@{found.a.version}, "
        f"{found.only_b_bytes:,} only in {found.b.task}@{found.b.version}"
    )


@main.command()
@click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task)
@click.argument("tag", required=False, shell_complete=complete_tag)
@click.option("--delete", is_flag=True, help="Remove the tag that TASK@TAG names.")
@store_option
@json_option
def tag(reference: str, tag: str | None, delete: bool, as_json: bool) -> None:
    """Tag a version, so that TASK@TAG names it. gc and rm keep tagged versions. An existing tag is moved."""
    if delete == (tag is not None):
        raise click.UsageError("expected 'tag TASK[@VERSION] TAG' or 'tag --delete TASK@TAG'")
    with Store(store_directory()) as store:
        version = store.untag(reference) if tag is None else store.tag(reference, tag)
    if as_json:
        echo_json({**version_json(version), "tags": list(version.tags)})
    else:
        name = reference if tag is None else f"{version.task}@{tag}"
        echo(f"{'removed tag' if delete else 'tagged'} {name}: version {version.version}")


@main.command()
@click.argument("references", nargs=-1, required=True, metavar="TASK[@VERSION]...", shell_complete=complete_task)
@store_option
@json_option
@dry_run_option
@yes_option
def rm(references: tuple[str, ...], as_json: bool, dry_run: bool, yes: bool) -> None:
    """Remove versions, or all versions of tasks. 'gc' then frees the space that nothing else needs."""
    with Store(store_directory()) as store:
        found = store.remove(*references, dry_run=True)
        names = ", ".join(f"{version.task}@{version.version}" for version in found)
        if not dry_run:
            if not yes:
                click.confirm(f"Remove {names}?", abort=True, err=True)
            found = store.remove(*references)
    if as_json:
        echo_json([version_json(version) for version in found])
    else:
        echo(f"{'would remove' if dry_run else 'removed'} {names}")


@main.command()
@click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task)
@click.argument("file", type=NamedPath(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@store_option
@json_option
def export(reference: str, file: Path, force: bool, as_json: bool) -> None:
    """Write a stored task as a task checkpoint, its tensors bit-identical."""
    if os.path.exists(file) and not force:
        raise PearStoreError(f"{file} exists; --force replaces it")
    with open_store() as store:
        version = store.resolve(reference)
        size = store.export(f"{version.task}@{version.version}", file)
    if as_json:
        echo_json({"task": version.task, "version": version.version, "file": str(file), "file_bytes": size})
    else:
        echo(f"wrote {version.task}@{version.version} to {file}, {size:,} bytes")
