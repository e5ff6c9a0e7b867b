"""Commands on a store as a whole."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import pear_store
from pear_store.cli.group import (
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
from pear_store.local.sources import Access
from pear_store.store import Store
from pear_store.terminal import NamedPath, allow_option, echo, echo_json, json_option


class Duration(click.ParamType[float]):
    """A time such as 90d, 12h, 30m, 45s or 2w. Its value is in seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        unit = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}.get(str(value)[-1:], math.nan)
        try:
            seconds = float(str(value)[:-1]) * unit
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < 1e12:
            self.fail(f"{value!r}: expected a number and s, m, h, d or w, such as 90d")
        return seconds


@main.command()
@click.option("--keep", type=click.IntRange(1), help="First remove old versions: those beyond a task's newest KEEP.")
@click.option(
    "--older-than",
    type=Duration(),
    help="First remove versions older than AGE, such as 90d or 12h. With --keep, both must hold.",
)
@click.option("--repack-all", is_flag=True, help="Leave no dead bytes, and merge small packs.")
@store_option
@json_option
@dry_run_option
@yes_option
def gc(keep: int | None, older_than: float | None, repack_all: bool, as_json: bool, dry_run: bool, yes: bool) -> None:
    """Remove the tensors that no version needs; with --keep or --older-than, old versions first.

    Never removes a task's newest version or a tagged one.
    """
    with Store(store_directory()) as store:
        if not (dry_run or yes):
            plan = store.gc(True, repack_all, keep, older_than)
            if plan.removed_tensors or plan.removed_versions or repack_all:
                click.confirm(
                    f"Remove {counted(plan.removed_versions, 'version')}, {counted(plan.removed_tensors, 'tensor')}, "
                    f"{plan.removed_bytes:,} bytes?", abort=True, err=True,
                )  # fmt: skip
        result = store.gc(dry_run, repack_all, keep, older_than)
    if as_json:
        echo_json(asdict(result))
        return
    versions = f"{counted(result.removed_versions, 'version')}, " if result.removed_versions else ""
    echo(
        f"{'would remove' if dry_run else 'removed'} {versions}{counted(result.removed_tensors, 'tensor')}, "
        f"{result.removed_bytes:,} bytes; kept {counted(result.kept_tensors, 'tensor')}, "
        f"{result.kept_bytes:,} bytes; "
        f"{result.dead_bytes:,} dead bytes in packs"
    )
    for path in result.foreign:
        click.echo(f"not Pear's, left alone: {path}", err=True)
    if result.dead_bytes * 10 > result.kept_bytes and not repack_all:
        echo("the dead bytes lie beside live ones in packs that stay; --repack-all frees them", err=True)


class Subset(click.ParamType[tuple[int, int]]):
    """n/t: the n-th of t parts."""

    name = "n/t"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        part, _, parts = str(value).partition("/")
        digits = part.isdecimal() and parts.isdecimal() and len(part) < 10 and len(parts) < 10
        if not (digits and 1 <= int(part) <= int(parts)):
            self.fail(f"{value!r}: expected n/t with n from 1 to t, such as 1/7")
        return int(part), int(parts)


@main.command()
@click.option("--subset", type=Subset(), default="1/1", show_default=True, help="Only the n-th of t parts.")
@click.option(
    "--repair",
    "mend",
    is_flag=True,
    help="Replace what is damaged by good copies, from the store itself and from COPIES.",
)
@click.argument("copies", nargs=-1, type=click.Path(), metavar="[COPIES]...")
@allow_option
@store_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context, subset: tuple[int, int], mend: bool, copies: tuple[str, ...], allowed: tuple[str, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Hash every tensor and manifest, check the index, and name each damaged tensor with the tasks it hits.

    COPIES, for --repair: other stores, task checkpoints, directories of them, fsspec URLs.
    """
    if copies and not mend:
        raise click.UsageError("COPIES are only used with --repair")
    if mend:
        mended = pear_store.repair(store_directory(), copies, Access(allowed=frozenset(allowed)))
        echo(f"healed {len(mended.healed)}, wrote {mended.packs} damaged packs anew", err=True)
    report = pear_store.verify(store_directory(), subset)
    if as_json:
        echo_json(asdict(report))
    else:
        echo(f"{counted(report.tensors, 'tensor')} in {counted(report.packs, 'pack')}, {report.bytes:,} bytes hashed")
        if report.index:
            echo(f"index: {report.index}")
        for pack in report.damaged_packs:
            echo(f"damaged pack {pack}")
        for pack in report.unknown_packs:
            echo(f"pack {pack} records what the index never had")
        _print_damage("tensor", report.damaged)
        _print_damage("manifest", report.damaged_manifests)
        for line in ["all good"] if report.ok else report.advice:
            echo(line)
    ctx.exit(0 if report.ok else 5)


def _print_damage(kind: str, found: "list[pear_store.Damage]") -> None:
    for damage in found:
        echo(f"damaged or missing {kind} {damage.digest}: hits {', '.join(damage.versions) or 'no version'}")


@main.command()
@store_option
@json_option
def rebuild(as_json: bool) -> None:
    """Make the index anew from the packs alone. The old index is kept beside it."""
    found = pear_store.rebuild(store_directory())
    if as_json:
        echo_json(asdict(found))
        return
    for problem in found.problems:
        echo(f"Warning: {problem}", err=True)
    echo(
        f"{counted(found.tasks, 'task')}, {counted(found.versions, 'version')}, {counted(found.tensors, 'tensor')} "
        f"from {counted(found.packs, 'pack')}"
    )
    if found.old_index:
        echo(f"the old index is in {found.old_index}; remove it when 'pear-store verify' finds all good")


@main.command()
@store_option
@json_option
def stats(as_json: bool) -> None:
    """Count tasks, versions, tensors and bytes. For a remote, also count what is cached here."""
    with open_store() as store:
        result = store.stats()
    if as_json:
        echo_json(asdict(result))
        return
    for key, value in asdict(result).items():
        echo(f"{key.replace('_', ' '):<14} {value:>16,}")


@main.command()
@click.argument("file", type=NamedPath(dir_okay=False, path_type=Path))
@click.argument("references", nargs=-1, metavar="[TASK[@VERSION]]...", shell_complete=complete_task)
@store_option
def plot(file: Path, references: tuple[str, ...]) -> None:
    """Draw what tasks share, and what that saves, to a .png or .svg FILE.

    Each backbone has a map of tasks x positions. Adapters that save most have a colour, which the legend explains.

    Needs matplotlib (pip install 'pear-adapters[demo]').
    """
    from pear_store import plot as plotting

    with open_store() as store:
        try:
            plotting.plot(store, file, references)
        except ImportError as error:
            raise PearStoreError(f"plot needs matplotlib: {error}; pip install 'pear-adapters[demo]'") from None
    echo(f"wrote {file}")


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script: eval "$(pear-store completion bash)".

    For zsh do the same after compinit. For fish: pear-store completion fish >

    ~/.config/fish/completions/pear-store.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "pear-store", "_PEAR_STORE_COMPLETE").source())
