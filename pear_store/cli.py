"""The pear-store command: a thin twin of :class:`pear_store.Store`."""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from platformdirs import user_data_path

from pear_store.digest import ITEM_BYTES
from pear_store.errors import PearStoreError
from pear_store.store import Added, Refused, Store, Version

F = TypeVar("F", bound=Callable[..., Any])


class StoreGroup(click.Group):
    """Turns a PearStoreError into one stderr line and that error's exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PearStoreError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


def _keep_store(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.find_root().meta["pear_store.path"] = value


def store_option(command: F) -> F:
    """--store DIR, before or after the verb."""
    return click.option(
        "--store", type=click.Path(path_type=Path), callback=_keep_store, expose_value=False, metavar="DIR",
        help="The store's directory [default: $PEAR_STORE, else the user's data directory].",
    )(command)  # fmt: skip


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")(command)


def yes_option(command: F) -> F:
    return click.option("--yes", is_flag=True, help="Do not ask.")(command)


def dry_run_option(command: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")(command)


def _path() -> Path:
    ctx = click.get_current_context()
    chosen = ctx.find_root().meta.get("pear_store.path") or ctx.find_root().params.get("store_from_env")
    return chosen or user_data_path("pear") / "store"


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _print_table(rows: list[dict[str, Any]]) -> None:
    from tabulate import tabulate

    click.echo(
        tabulate(rows, headers="keys", disable_numparse=True, colalign=["left"] + ["right"] * (len(rows[0]) - 1))
    )


@click.group(cls=StoreGroup, context_settings={"help_option_names": ["-h", "--help"]})
@store_option
@click.option("store_from_env", "--store-from-env", envvar="PEAR_STORE", hidden=True, type=click.Path(path_type=Path))
@click.version_option(package_name="pear-adapters")
def main(store_from_env: Path | None) -> None:
    """Keep many tasks of one backbone in one store, each distinct tensor once."""


@main.command()
@store_option
@json_option
def init(as_json: bool) -> None:
    """Make an empty store; an existing one is left as it is."""
    path = _path()
    with Store.create(path):
        pass
    if as_json:
        _print_json({"store": str(path)})
    else:
        click.echo(f"store at {path}")


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option("--name", help="Store the one task under this name.")
@store_option
@json_option
@click.pass_context
def add(ctx: click.Context, files: tuple[str, ...], name: str | None, as_json: bool) -> None:
    """Add task checkpoints; a refused file costs only itself, and the exit code says so."""
    if name is not None and len(files) > 1:
        raise click.UsageError("--name goes with one FILE")
    rows: list[dict[str, Any]] = []
    exit_code = 0
    stop: PearStoreError | None = None
    with Store(_path()) as store:
        results = store.add_many(files, name)
        for file in files:
            try:
                result: Added | Refused = next(results)
            except PearStoreError as error:
                stop = error
                break
            if isinstance(result, Refused):
                exit_code = exit_code or result.error.exit_code
                rows.append({"file": file, "error": str(result.error)})
                click.echo(f"Error: {result.error}", err=True)
            else:
                rows.append({"file": file, **asdict(result)})
                if not as_json:
                    click.echo(_added_line(result))
    if as_json:
        _print_json(rows)
    if stop is not None:
        raise stop
    ctx.exit(exit_code)


def _added_line(result: Added) -> str:
    sizes = f"{result.new_bytes:,} new bytes, {result.shared_bytes:,} shared"
    if not result.changed:
        return f"{result.task}@{result.version} is unchanged" + (f" ({sizes})" if result.new_bytes else "")
    return f"added {result.task}@{result.version}: {sizes}"


@main.command()
@click.option("--all", "every", is_flag=True, help="Every version, not only the newest.")
@store_option
@json_option
def ls(every: bool, as_json: bool) -> None:
    """List the tasks: newest version and tensor bytes of each."""
    with Store(_path()) as store:
        versions = store.versions() if every else store.tasks()
    if as_json:
        _print_json([_version_json(version) for version in versions])
    elif versions:
        _print_table([{**_version_json(v), "bytes": f"{v.size_bytes:,}", "added": _time(v.time_ns)} for v in versions])


def _version_json(version: Version) -> dict[str, Any]:
    return {"task": version.task, "version": version.version, "bytes": version.size_bytes}


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


@main.command()
@click.argument("reference", metavar="TASK[@VERSION]")
@store_option
@json_option
def show(reference: str, as_json: bool) -> None:
    """Show one task: backbone, labels, metrics, and which position uses which adapter."""
    with Store(_path()) as store:
        version = store.resolve(reference)
        task = store.get(f"{version.task}@{version.version}", copy=False)
    if as_json:
        _print_json({**_version_json(version), "time_ns": version.time_ns, "manifest": dict(task.record)})
        return
    click.echo(f"{version.task}@{version.version}, added {_time(version.time_ns)}, {version.size_bytes:,} tensor bytes")
    click.echo(f"backbone    {task.backbone_model} {task.backbone_digest}")
    click.echo(f"activation  {task.activation}")
    click.echo(f"labels      {len(task.labels)}: {', '.join(task.labels[:8])}{', …' if len(task.labels) > 8 else ''}")
    for key, value in task.record["metrics"].items():
        click.echo(f"{key:<11} {value}")
    rows = []
    for position, branches in sorted(task.positions.items(), key=lambda item: _natural(item[0])):
        for branch in branches:
            entry = task.record["adapters"][branch.adapter]
            size = sum(task.tensors[entry[side]].size_bytes for side in ("down", "up"))
            bits = entry["quant"]["bits"] if "quant" in entry else 8 * ITEM_BYTES[task.tensors[entry["down"]].dtype]
            rows.append({"position": position, "adapter": branch.adapter, "scale": round(branch.scale, 4),
                         "bits": bits, "bytes": f"{size:,}"})  # fmt: skip
    if rows:
        _print_table(rows)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key that puts blocks.2 before blocks.10."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (0, part) for part in text.split(".")]


@main.command()
@click.argument("reference", metavar="TASK[@VERSION]")
@store_option
@json_option
@dry_run_option
@yes_option
def rm(reference: str, as_json: bool, dry_run: bool, yes: bool) -> None:
    """Remove one version, or all versions of a task; 'gc' then frees what nothing else needs."""
    with Store(_path()) as store:
        found = store.remove(reference, dry_run=True)
        names = ", ".join(f"{version.task}@{version.version}" for version in found)
        if not dry_run:
            if not yes:
                click.confirm(f"Remove {names}?", abort=True, err=True)
            found = store.remove(reference)
    if as_json:
        _print_json([_version_json(version) for version in found])
    else:
        click.echo(f"{'would remove' if dry_run else 'removed'} {names}")


@main.command()
@click.option("--repack-all", is_flag=True, help="Leave no dead bytes, and merge small packs.")
@store_option
@json_option
@dry_run_option
@yes_option
def gc(repack_all: bool, as_json: bool, dry_run: bool, yes: bool) -> None:
    """Remove the tensors that no version needs."""
    with Store(_path()) as store:
        if not (dry_run or yes):
            plan = store.gc(dry_run=True, repack_all=repack_all)
            if plan.removed_tensors or repack_all:
                click.confirm(
                    f"Remove {plan.removed_tensors} tensors, {plan.removed_bytes:,} bytes?", abort=True, err=True
                )
        result = store.gc(dry_run, repack_all)
    if as_json:
        _print_json(asdict(result))
        return
    click.echo(
        f"{'would remove' if dry_run else 'removed'} {result.removed_tensors} tensors, {result.removed_bytes:,} bytes; "
        f"kept {result.kept_tensors} tensors, {result.kept_bytes:,} bytes; {result.dead_bytes:,} dead bytes in packs"
    )


@main.command()
@click.argument("reference", metavar="TASK[@VERSION]")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@store_option
@json_option
def export(reference: str, file: Path, as_json: bool) -> None:
    """Write a stored task as a task checkpoint, its tensors bit-identical."""
    with Store(_path()) as store:
        version = store.resolve(reference)
        size = store.export(f"{version.task}@{version.version}", file)
    if as_json:
        _print_json({"task": version.task, "version": version.version, "file": str(file), "file_bytes": size})
    else:
        click.echo(f"wrote {version.task}@{version.version} to {file}, {size:,} bytes")


@main.command()
@store_option
@json_option
def stats(as_json: bool) -> None:
    """Count tasks, versions, tensors and bytes."""
    with Store(_path()) as store:
        result = store.stats()
    if as_json:
        _print_json(asdict(result))
        return
    for key, value in asdict(result).items():
        click.echo(f"{key.replace('_', ' '):<14} {value:>16,}")
