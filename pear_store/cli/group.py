"""The command itself, and the options that its verbs have in common."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from platformdirs import user_data_path

from pear_store.errors import PearStoreError
from pear_store.local.directory import store_path
from pear_store.readable import ReadableStore
from pear_store.store import Store
from pear_store.terminal import PrintableGroup, echo, version_option

F = TypeVar("F", bound=Callable[..., Any])


class StoreGroup(PrintableGroup):
    """Turns a PearStoreError into one stderr line and that error's exit code."""

    def invoke(self, ctx: click.Context) -> object:
        with warnings.catch_warnings():  # a caller's own way of showing them comes back
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except PearStoreError as error:
                echo(f"Error: {error}", err=True)
                ctx.exit(error.exit_code)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    echo(f"Warning: {message}", err=True)


def _keep_store(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.find_root().meta["pear_store.path"] = value


def store_option(command: F) -> F:
    """--store DIR, before or after the verb."""
    return click.option(
        "--store", type=click.Path(readable=False), callback=_keep_store, expose_value=False, metavar="DIR",
        help="The store's directory. Commands that only read also take a remote's URL "
        "[default: $PEAR_STORE, else the user's data directory].",
    )(command)  # fmt: skip


def yes_option(command: F) -> F:
    return click.option("--yes", is_flag=True, help="Do not ask.")(command)


def dry_run_option(command: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")(command)


def _chosen_store(ctx: click.Context | None) -> str | None:
    root = (ctx or click.get_current_context()).find_root()
    chosen: str | None = root.meta.get("pear_store.path") or root.params.get("store_from_env")
    return chosen


def store_directory(ctx: click.Context | None = None) -> Path:
    chosen = _chosen_store(ctx)
    if chosen and "://" in chosen:
        raise PearStoreError(
            "--store: this command expects a directory, found a URL; clone the remote ('pear-store clone URL DIR')"
        )
    return store_path(chosen) if chosen else user_data_path("pear") / "store"


def open_store() -> ReadableStore:
    """Opens the store for a command that only reads: a directory, or a remote through a cache."""
    chosen = _chosen_store(None)
    return Store.open(chosen if chosen and "://" in chosen else store_directory())


def complete_task(ctx: click.Context, param: click.Parameter, start: str) -> list[str]:
    """Completes names of tasks, and after ``@`` their versions and tags."""
    return _beginning(ctx, start)


def complete_tag(ctx: click.Context, param: click.Parameter, start: str) -> list[str]:
    """Completes tags of the task that the command line names before."""
    task = str(ctx.params.get("reference") or "").partition("@")[0]
    tags = [name.partition("@")[2] for name in _beginning(ctx, f"{task}@{start}")] if task else []
    return [tag for tag in tags if not tag.isdigit()]


def _beginning(ctx: click.Context, start: str) -> list[str]:
    """References that begin with a text. After any error there are none: a shell asks while the user types."""
    try:
        with warnings.catch_warnings(action="ignore"), Store(store_directory(ctx)) as store:
            return store.beginning(start)
    except Exception:
        return []


@click.group(cls=StoreGroup, context_settings={"help_option_names": ["-h", "--help"]})
@store_option
@click.option("store_from_env", "--store-from-env", envvar="PEAR_STORE", hidden=True, type=click.Path(readable=False))
@version_option
def main(store_from_env: str | None) -> None:
    """Keep many tasks in one store. Each distinct tensor is stored once."""
