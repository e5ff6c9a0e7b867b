"""The pear-store command: a thin twin of :class:`pear_store.Store`."""

import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from platformdirs import user_data_path

from pear_store import sources
from pear_store.checkpoint import PARTS, natural_key
from pear_store.container import read_json
from pear_store.digest import ITEM_BYTES
from pear_store.directory import store_path
from pear_store.errors import PearStoreError
from pear_store.integrity import Damage, repair
from pear_store.integrity import verify as verify_store
from pear_store.loading import Refused
from pear_store.reading import Access
from pear_store.recovery import rebuild as rebuild_store
from pear_store.sources import Source
from pear_store.store import Added, Store, Version
from pear_store.terminal import PrintableGroup, echo, echo_json, echo_table

F = TypeVar("F", bound=Callable[..., Any])


class StoreGroup(PrintableGroup):
    """Turns a PearStoreError into one stderr line and that error's exit code."""

    def invoke(self, ctx: click.Context) -> object:
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
        help="The store's directory [default: $PEAR_STORE, else the user's data directory].",
    )(command)  # fmt: skip


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")(command)


def allow_option(command: F) -> F:
    return click.option(
        "--allow", "allowed", multiple=True, metavar="PROTOCOL", envvar="PEAR_ALLOW",
        help="Also open URLs of this protocol, and chains of allowed ones; may be repeated [default: $PEAR_ALLOW].",
    )(command)  # fmt: skip


def yes_option(command: F) -> F:
    return click.option("--yes", is_flag=True, help="Do not ask.")(command)


def dry_run_option(command: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")(command)


def _path(ctx: click.Context | None = None) -> Path:
    ctx = ctx or click.get_current_context()
    chosen = ctx.find_root().meta.get("pear_store.path") or ctx.find_root().params.get("store_from_env")
    return store_path(chosen) if chosen else user_data_path("pear") / "store"


def complete_task(ctx: click.Context, param: click.Parameter, start: str) -> list[str]:
    """Names of tasks, and after ``@`` their versions and tags."""
    try:
        with Store(_path(ctx)) as store:
            task, at, _ = start.partition("@")
            if not at:
                return [version.task for version in store.iter_tasks() if version.task.startswith(start)]
            versions = store.versions(task)
            names = [*(str(v.version) for v in versions), *(tag for v in versions for tag in v.tags)]
            return [f"{task}@{name}" for name in names if f"{task}@{name}".startswith(start)]
    except PearStoreError:
        return []


@click.group(cls=StoreGroup, context_settings={"help_option_names": ["-h", "--help"]})
@store_option
@click.option("store_from_env", "--store-from-env", envvar="PEAR_STORE", hidden=True, type=click.Path(readable=False))
@click.version_option(package_name="pear-adapters")
def main(store_from_env: str | None) -> None:
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
        echo_json({"store": str(path)})
    else:
        echo(f"store at {path}")


@main.command()
@click.argument("given", nargs=-1, required=True, type=click.Path(allow_dash=True), metavar="SOURCE...")
@click.option("--name", help="Store the one task under this name.")
@allow_option
@store_option
@json_option
@click.pass_context
def add(ctx: click.Context, given: tuple[str, ...], name: str | None, allowed: tuple[str, ...], as_json: bool) -> None:
    """Add task checkpoints: files, directories of them, fsspec URLs, or - for standard input.

    A refused file costs only itself, and the exit code says so.
    """
    access = Access(allowed=frozenset(allowed))
    files = list(sources.expand(given, access))
    if name is not None and len(files) > 1:
        raise click.UsageError(f"--name goes with one task, there are {len(files)}")
    rows: list[dict[str, Any]] = []
    exit_code = 0
    stop: PearStoreError | None = None
    with Store(_path()) as store:
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
                    echo(_added_line(result))
    if as_json:
        echo_json(rows)
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
    """List the tasks: newest version and tensor bytes of each, and its tags; TAG@2 is one of an older version."""
    with Store(_path()) as store:
        versions = store.versions() if every else store.tasks()
        tags = {} if every else store.tags()
    others = [{tag: number for tag, number in tags.get(v.task, {}).items() if number != v.version} for v in versions]
    if as_json:
        rows = zip(versions, others, strict=True)
        echo_json([{**_version_json(v), **({"older_tags": older} if older else {})} for v, older in rows])
    elif versions:
        table = [_version_row(version) for version in versions]
        for row, older in zip(table, others, strict=True):
            row["tags"] = " ".join([row["tags"], *(f"{tag}@{number}" for tag, number in older.items())]).strip()
        echo_table(table)


def _version_json(version: Version) -> dict[str, Any]:
    row = {"task": version.task, "version": version.version, "bytes": version.size_bytes}
    return {**row, "tags": list(version.tags)} if version.tags else row


def _version_row(version: Version) -> dict[str, Any]:
    return {
        **_version_json(version),
        "bytes": f"{version.size_bytes:,}",
        "added": _time(version.time_ns),
        "tags": " ".join(version.tags),
    }


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


@main.command()
@click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task)
@store_option
@json_option
def show(reference: str, as_json: bool) -> None:
    """Show one task: backbone, labels, metrics, and which position uses which adapter."""
    with Store(_path()) as store:
        version = store.resolve(reference)
        task = store.get(f"{version.task}@{version.version}", copy=False)
    if as_json:
        echo_json({**_version_json(version), "time_ns": version.time_ns, "manifest": dict(task.record)})
        return
    echo(f"{version.task}@{version.version}, added {_time(version.time_ns)}, {version.size_bytes:,} tensor bytes")
    echo(f"backbone    {task.backbone_model} {task.backbone_digest}")
    echo(f"activation  {task.activation}")
    echo(f"labels      {len(task.labels)}: {', '.join(task.labels[:8])}{', …' if len(task.labels) > 8 else ''}")
    for key, value in task.record["metrics"].items():
        echo(f"{key:<11} {value}")
    rows = []
    for position, branches in sorted(task.positions.items(), key=lambda item: natural_key(item[0])):
        for branch in branches:
            entry = task.record["adapters"][branch.adapter]
            size = sum(task.tensors[entry[part]].size_bytes for part in PARTS if part in entry)
            bits = entry["quant"]["bits"] if "quant" in entry else 8 * ITEM_BYTES[task.tensors[entry["down"]].dtype]
            rows.append({"position": position, "adapter": branch.adapter, "scale": round(branch.scale, 4),
                         "bits": bits, "bytes": f"{size:,}"})  # fmt: skip
    if rows:
        echo_table(rows)


@main.command()
@click.argument("reference", metavar="TASK", shell_complete=complete_task)
@store_option
@json_option
def log(reference: str, as_json: bool) -> None:
    """List a task's versions, the newest first."""
    with Store(_path()) as store:
        versions = store.versions(store.resolve(reference).task)[::-1]
    if as_json:
        echo_json([{**_version_json(v), "tags": list(v.tags), "time_ns": v.time_ns} for v in versions])
    else:
        echo_table([_version_row(version) for version in versions])


@main.command()
@click.argument("a", metavar="TASK[@VERSION]", shell_complete=complete_task)
@click.argument("b", metavar="TASK[@VERSION]", shell_complete=complete_task)
@store_option
@json_option
def diff(a: str, b: str, as_json: bool) -> None:
    """Compare two versions: which adapters differ, which are shared, and the bytes of each."""
    with Store(_path()) as store:
        found = store.diff(a, b)
    if as_json:
        value = asdict(found)
        echo_json({**value, "a": _version_json(found.a), "b": _version_json(found.b)})
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
@click.argument("tag", required=False)
@click.option("--delete", is_flag=True, help="Remove the tag that TASK@TAG names.")
@store_option
@json_option
def tag(reference: str, tag: str | None, delete: bool, as_json: bool) -> None:
    """Name a version TASK@TAG; gc and rm keep a tagged version. A tag that is there is moved."""
    if delete == (tag is not None):
        raise click.UsageError("expected 'tag TASK[@VERSION] TAG' or 'tag --delete TASK@TAG'")
    with Store(_path()) as store:
        version = store.untag(reference) if tag is None else store.tag(reference, tag)
    if as_json:
        echo_json({**_version_json(version), "tags": list(version.tags)})
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
    """Remove versions, or all versions of tasks; 'gc' then frees what nothing else needs."""
    with Store(_path()) as store:
        found = store.remove(*references, dry_run=True)
        names = ", ".join(f"{version.task}@{version.version}" for version in found)
        if not dry_run:
            if not yes:
                click.confirm(f"Remove {names}?", abort=True, err=True)
            found = store.remove(*references)
    if as_json:
        echo_json([_version_json(version) for version in found])
    else:
        echo(f"{'would remove' if dry_run else 'removed'} {names}")


class Duration(click.ParamType[float]):
    """A time as 90d, 12h, 30m, 45s or 2w, in seconds."""

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
@click.option("--keep", type=click.IntRange(1), help="First remove versions beyond a task's newest KEEP ...")
@click.option("--older-than", type=Duration(), help="... that are older than this, such as 90d or 12h.")
@click.option("--repack-all", is_flag=True, help="Leave no dead bytes, and merge small packs.")
@store_option
@json_option
@dry_run_option
@yes_option
def gc(keep: int | None, older_than: float | None, repack_all: bool, as_json: bool, dry_run: bool, yes: bool) -> None:
    """Remove the tensors that no version needs; with --keep or --older-than, old versions first.

    Never removes a task's newest version or a tagged one.
    """
    with Store(_path()) as store:
        if not (dry_run or yes):
            plan = store.gc(True, repack_all, keep, older_than)
            if plan.removed_tensors or plan.removed_versions or repack_all:
                click.confirm(
                    f"Remove {plan.removed_versions} versions, {plan.removed_tensors} tensors, "
                    f"{plan.removed_bytes:,} bytes?", abort=True, err=True,
                )  # fmt: skip
        result = store.gc(dry_run, repack_all, keep, older_than)
    if as_json:
        echo_json(asdict(result))
        return
    versions = f"{result.removed_versions} versions, " if result.removed_versions else ""
    echo(
        f"{'would remove' if dry_run else 'removed'} {versions}{result.removed_tensors} tensors, "
        f"{result.removed_bytes:,} bytes; kept {result.kept_tensors} tensors, {result.kept_bytes:,} bytes; "
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
@click.option("--repair", "mend", is_flag=True, help="Write what is damaged anew, from what is good and from COPIES.")
@click.argument("copies", nargs=-1, type=click.Path(), metavar="[COPIES]...")
@allow_option
@store_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context, subset: tuple[int, int], mend: bool, copies: tuple[str, ...], allowed: tuple[str, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Hash every tensor and manifest, check the index, and name each damaged tensor with the tasks hit.

    COPIES, for --repair: other stores, task checkpoints, directories of them, fsspec URLs.
    """
    if copies and not mend:
        raise click.UsageError("COPIES go with --repair")
    if mend:
        mended = repair(_path(), copies, Access(allowed=frozenset(allowed)))
        echo(f"healed {len(mended.healed)}, wrote {mended.packs} damaged packs anew", err=True)
    report = verify_store(_path(), subset)
    if as_json:
        echo_json(asdict(report))
    else:
        echo(f"{report.tensors:,} tensors in {report.packs:,} packs, {report.bytes:,} bytes hashed")
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


def _print_damage(kind: str, found: list[Damage]) -> None:
    for damage in found:
        echo(f"damaged or missing {kind} {damage.digest}: hits {', '.join(damage.versions) or 'no version'}")


@main.command()
@store_option
@json_option
def rebuild(as_json: bool) -> None:
    """Make the index anew from the packs alone; the old one is kept beside it."""
    found = rebuild_store(_path())
    if as_json:
        echo_json(asdict(found))
        return
    for problem in found.problems:
        echo(f"Warning: {problem}", err=True)
    echo(f"{found.tasks} tasks, {found.versions} versions, {found.tensors} tensors from {found.packs} packs")
    if found.old_index:
        echo(f"the old index is in {found.old_index}; remove it when 'pear-store verify' finds all good")


@main.command()
@click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@store_option
@json_option
def export(reference: str, file: Path, force: bool, as_json: bool) -> None:
    """Write a stored task as a task checkpoint, its tensors bit-identical."""
    if os.path.exists(file) and not force:
        raise PearStoreError(f"{file} exists; --force replaces it")
    with Store(_path()) as store:
        version = store.resolve(reference)
        size = store.export(f"{version.task}@{version.version}", file)
    if as_json:
        echo_json({"task": version.task, "version": version.version, "file": str(file), "file_bytes": size})
    else:
        echo(f"wrote {version.task}@{version.version} to {file}, {size:,} bytes")


@main.command()
@store_option
@json_option
def stats(as_json: bool) -> None:
    """Count tasks, versions, tensors and bytes."""
    with Store(_path()) as store:
        result = store.stats()
    if as_json:
        echo_json(asdict(result))
        return
    for key, value in asdict(result).items():
        echo(f"{key.replace('_', ' '):<14} {value:>16,}")


@main.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("references", nargs=-1, metavar="[TASK[@VERSION]]...", shell_complete=complete_task)
@store_option
def plot(file: Path, references: tuple[str, ...]) -> None:
    """Draw tasks x positions, coloured by adapter, and the bytes saved, to a .png or .svg FILE.

    Needs matplotlib (pip install 'pear-adapters[demo]').
    """
    from pear_store import plot as plotting

    with Store(_path()) as store:
        try:
            plotting.plot(store, file, references)
        except ImportError as error:
            raise PearStoreError(f"plot needs matplotlib: {error}; pip install 'pear-adapters[demo]'") from None
    echo(f"wrote {file}")


@main.command("import-peft")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", help="The task's name [default: pear.json's].")
@click.option("--backbone", help="timm name of the backbone [default: pear.json's].")
@click.option("--digest", help="The backbone's digest, where timm or its weights are not at hand.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--labels", type=click.Path(path_type=Path), help="UTF-8 file of class names, one a line.")
@click.option("--preprocess", metavar="timm|FILE", help="The model's own preprocessing (timm), or a JSON file of it.")
@click.option("--features-only", is_flag=True, help="Take a LoRA without a classifier: its task gives features.")
@store_option
@json_option
def import_peft(
    folder: Path, name: str | None, backbone: str | None, digest: str | None, weights: str | None,
    labels: Path | None, preprocess: str | None, features_only: bool, as_json: bool,
) -> None:  # fmt: skip
    """Add a LoRA that Hugging Face PEFT saved for a timm model.

    Reads FOLDER's adapter_config.json and adapter_model.safetensors. Name, backbone, labels and preprocessing come from
    the options, else from a pear.json beside them, as export-peft writes. What neither says is asked for: with another
    preprocessing than in training, a task can lose most of its accuracy.

    The JSON of --preprocess, here for a LoRA that was trained on whole pictures at 96 pixels:

    \b
    {"input_size": [3, 96, 96],            3, height, width in pixels
     "mean": [0.5, 0.5, 0.5],              subtracted from red, green, blue in 0 to 1
     "std": [0.5, 0.5, 0.5],               then divided by
     "interpolation": "bicubic",           nearest, bilinear, bicubic, box, hamming or lanczos
     "crop_pct": 1.0,                      how much of the resized picture is kept
     "crop_mode": "squash"}                center, squash or border, as in timm
    """
    from pear_store import peft

    described: dict[str, Any] | None = None
    if backbone is not None:
        described = {"model": backbone, "digest": digest} if digest else peft.describe_backbone(backbone, weights)
        if described is None:
            raise PearStoreError(f"backbone {backbone!r}: nothing installed here can hash it; give --digest")
    if preprocess == "timm" and not (described and "preprocess" in described):
        raise click.UsageError("--preprocess timm asks timm for the model: give --backbone MODEL, without --digest")
    task = peft.import_peft(
        folder, name=name, backbone=described, labels=peft.read_labels(labels) if labels else None,
        preprocess=_preprocess(preprocess, described), features_only=features_only,
    )  # fmt: skip
    with Store(_path()) as store:
        result = store.add(task)
    if as_json:
        echo_json([{"file": str(folder), **asdict(result)}])
    else:
        echo(_added_line(result))


def _preprocess(choice: str | None, described: dict[str, Any] | None) -> Any:
    if choice == "timm" and described:
        return described["preprocess"]
    return None if choice is None else read_json(choice)


@main.command("export-peft")
@click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@store_option
def export_peft(reference: str, folder: Path, weights: str | None) -> None:
    """Write a task as a folder that PeftModel.from_pretrained loads onto the timm model.

    PEFT's LoRA lies at Linear modules and has no activation. So tasks that import-peft added can go, and tasks that
    were trained with 'pear-train --positions qkv' or '--positions linear' and the activation identity (the default).
    The default positions of pear-train include whole mlp blocks, which are no Linears: such a task cannot go.
    """
    from pear_store import peft

    with Store(_path()) as store:
        task = store.get(reference, copy=False)
        described = peft.describe_backbone(task.backbone_model, weights)
        if described is None:
            echo(f"Warning: {task.backbone_model} is not known here: positions were not checked", err=True)
        head = described["head"] if described else "head"
        if head is None:
            raise PearStoreError(f"{task.backbone_model} has several classifiers: PEFT cannot hold the task's one head")
        peft.export_peft(task, folder, linears=described["linears"] if described else None, head=head)
    echo(f"wrote {folder}")


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script: eval "$(pear-store completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "pear-store", "_PEAR_STORE_COMPLETE").source())
