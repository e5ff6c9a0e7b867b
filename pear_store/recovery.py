"""Makes a store's index anew from the packs."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pear_store.checkpoint import tensor_names
from pear_store.digest import Digest, from_digest, is_digest
from pear_store.directory import open_folder, require_packs, store_path
from pear_store.errors import DamagedError, from_os_error
from pear_store.index import (
    NO_PACK,
    ManifestRow,
    NameRow,
    PackRow,
    RemovedRow,
    TagRow,
    TensorRow,
    VersionRow,
    View,
    name_key,
    open_index,
    parse_tag_key,
    parse_version_key,
    release_index,
    tag_key,
    version_key,
    write_lock,
)
from pear_store.manifest import manifest_hash
from pear_store.opened import name_row
from pear_store.pack import PackReader, Records, bare_header, open_pack, pack_path, read_records


@dataclass
class Rebuilt:
    """What a rebuild found; problems name what the packs no longer tell."""

    packs: int = 0
    tensors: int = 0
    tasks: int = 0
    versions: int = 0
    problems: list[str] = field(default_factory=list)
    old_index: str | None = None


def rebuild(path: str | Path, progress: Callable[[int, int], None] = lambda done, all_: None) -> Rebuilt:
    """Makes the index anew from the packs alone; the old one is kept beside it as ``index.old-…``.

    Reads the packs' headers, not their tensors (a tensor that two packs hold is hashed). Writers wait; processes that
    have the old index open change over by themselves. A kill leaves the old index in its place.

    Raises:
        NotFoundError: there are no packs.
        DiskFullError: no space for a second index; nothing was changed.
    """
    path = store_path(path)
    require_packs(path)
    result = Rebuilt()
    try:
        with write_lock(path), open_folder(path) as store:
            store.remove_index("index.new")
            store.remove_index("index.build")
            with store.folder("index.build", create=True), store.folder("tmp", create=True):
                index = open_index(path / "index.build", create=True)
            try:
                index.fill(lambda view: _fill(view, path, result, progress))
            finally:
                release_index(index)
            with store.folder("index.build") as built:
                built.sync()
            store.rename("index.build", "index.new")
            with suppress(FileNotFoundError):
                old = f"index.old-{time.time_ns()}"
                store.rename("index", old)  # a link, too: what it leads to is not touched
                result.old_index = str(path / old)
            store.rename("index.new", "index")
            store.sync()
    except OSError as error:
        raise from_os_error(error, path) from None
    return result


def _fill(view: View, path: Path, result: Rebuilt, progress: Callable[[int, int], None]) -> None:
    files = sorted((path / "packs").glob("*/*.safetensors"))
    for done, file in enumerate(files):
        progress(done, len(files))
        _fill_pack(view, path, file, result)
    progress(len(files), len(files))
    for key, value in list(view.rows("removed")):
        found = view.get("versions", key)
        row = RemovedRow.decode(key, value)
        recorded_in = VersionRow.decode(key, found).pack if found is not None else NO_PACK
        view.put("removed", key, RemovedRow(recorded_in, row.pack).encode(key))
        if found is not None:
            view.delete("versions", key)
    _drop_conflicts(view, result)
    missing: list[int] = []
    for key in [key for key, _ in view.rows("manifests")]:
        _number_manifest(view, key, missing)
    if missing:
        view.list_tensors(NO_PACK, missing, [0] * len(missing))
    for key, value in list(view.rows("versions")):
        row_ = VersionRow.decode(key, value)
        size = _size_of(view, row_.manifest)
        view.put("versions", key, VersionRow(row_.manifest, row_.pack, row_.time_ns, size).encode(key))
        task, number = parse_version_key(key)
        known = name_row(view, task)
        assert known is not None
        newest = NameRow(task, max(number, known.newest if known.name == task else 0), known.highest, known.pack)
        view.put("names", name_key(task), newest.encode(name_key(task)))
    for key, value in list(view.rows("tags")):
        tag = TagRow.decode(key, value)
        task, text = parse_tag_key(key)
        if tag.version and view.get("versions", version_key(task, tag.version)) is None:
            result.problems.append(f"tag {task}@{text}: its version {tag.version} is not there any more")
            view.put("tags", key, TagRow(0, tag.time_ns, tag.pack).encode(key))
    result.versions = view.count("versions")
    result.tensors = view.count("tensors")
    result.tasks = sum(1 for key, value in view.rows("names") if NameRow.decode(key, value).newest)


def _fill_pack(view: View, path: Path, file: Path, result: Rebuilt) -> None:
    try:
        pack = bytes.fromhex(file.stem)
    except ValueError:
        return
    if file != pack_path(path, pack):  # a copy that somebody made
        return
    records = Records()
    try:
        header, records, problems = read_records(file)
        result.problems += [f"pack {file.stem}: {problem} is damaged" for problem in problems]
    except DamagedError as error:
        bare = bare_header(file)
        if bare is None:
            with (
                open_folder(path) as store, store.folder("damaged", create=True) as damaged,
                open_folder(path, "packs", file.parent.name) as folder,
            ):  # fmt: skip
                folder.rename(file.name, file.name, damaged)  # gc would take it for an orphan
            result.problems.append(f"{error.what}: {error.found}; moved to {path / 'damaged'}")
            return
        result.problems.append(f"{error.what}: {error.found}; its tensors are kept, the versions it recorded are not")
        header = bare
    result.packs += 1
    first = view.take_numbers(len(header.places))
    numbers, lengths = [], []
    for number, (name, place) in enumerate(header.places.items(), first):
        if not is_digest(name):
            continue
        key = from_digest(Digest(name))
        old = view.get("tensors", key)
        if old is not None:
            before = TensorRow.peek(old)
            if _is_good(path, Digest(name), before):
                continue
            view.unlist_tensors(before.pack, {before.number})
        row = TensorRow(number, pack, place.offset, place.length, place.dtype, place.shape)
        view.put("tensors", key, row.encode(key))
        numbers.append(number)
        lengths.append(place.length)
    view.list_tensors(pack, numbers, lengths)
    tensor_bytes = sum(place.length for place in header.places.values())
    view.put("packs", pack, PackRow(header.file_bytes, tensor_bytes).encode(pack))
    for version in records.versions:
        key = version_key(version.task, version.version)
        found = view.get("versions", key)
        if found is None or VersionRow.decode(key, found).time_ns < version.time_ns:
            manifest = manifest_hash(version.manifest)
            view.put("manifests", manifest, ManifestRow.encode(manifest, 0, (), version.manifest))
            view.put("versions", key, VersionRow(manifest, pack, version.time_ns, 0).encode(key))
        _raise_highest(view, version.task, version.version, pack)
    for task, highest in records.highest.items():
        _raise_highest(view, task, highest, pack)
    for task, removed in records.removed:
        key = version_key(task, removed)
        view.put("removed", key, RemovedRow(NO_PACK, pack).encode(key))
        _raise_highest(view, task, removed, pack)
    for tag in records.tags:
        key = tag_key(tag.task, tag.tag)
        found = view.get("tags", key)
        if found is None or TagRow.decode(key, found).time_ns < tag.time_ns:
            view.put("tags", key, TagRow(tag.version or 0, tag.time_ns, pack).encode(key))


def _is_good(path: Path, digest: Digest, row: TensorRow) -> bool:
    try:
        with open_pack(pack_path(path, row.pack)) as file:
            found = PackReader(file).digest(row.dtype, row.shape, row.offset, row.length)
            return found == from_digest(digest)
    except (OSError, DamagedError):
        return False


def _raise_highest(view: View, task: str, number: int, pack: bytes) -> None:
    known = name_row(view, task)
    if known is None or known.highest < number:
        view.put("names", name_key(task), NameRow(task, 0, number, pack).encode(name_key(task)))


def _drop_conflicts(view: View, result: Rebuilt) -> None:
    """Of names that differ in case only, the one added last stays: no two are ever committed."""
    spelt: dict[bytes, dict[str, int]] = {}
    for key, value in view.rows("versions"):
        task, _ = parse_version_key(key)
        times = spelt.setdefault(name_key(task), {})
        times[task] = max(times.get(task, 0), VersionRow.decode(key, value).time_ns)
    for times in spelt.values():
        stays = max(times, key=lambda task: times[task])
        for task in times.keys() - {stays}:
            result.problems.append(
                f"task {task!r}: differs in case only from {stays!r}, which was added later; dropped"
            )
            for key in [key for key, _ in view.rows("versions", task.encode("ascii") + b"\0")]:
                view.delete("versions", key)


def _number_manifest(view: View, key: bytes, missing: list[int]) -> None:
    row = view.get("manifests", key)
    assert row is not None
    manifest = ManifestRow.manifest_of(row)
    rows = []
    for name in sorted(tensor_names(json.loads(manifest))):
        digest = from_digest(Digest(name))
        found = view.get("tensors", digest)
        if found is None:  # no pack has it: listed as missing, so that its place is known when it comes back
            missing.append(view.take_numbers(1))
            found = TensorRow(missing[-1], NO_PACK, 0, 0, "U8", ()).encode(digest)
            view.put("tensors", digest, found)
        rows.append(found)
    view.put("manifests", key, ManifestRow.encode(key, view.take_numbers(1), rows, manifest))


def _size_of(view: View, manifest: bytes) -> int:
    row = view.get("manifests", manifest)
    assert row is not None
    size = 0
    for name in tensor_names(json.loads(ManifestRow.manifest_of(row))):
        found = view.get("tensors", from_digest(Digest(name)))
        size += TensorRow.peek(found).length if found is not None else 0
    return size
