"""Makes a store's index anew from the packs."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pear_store.errors import CheckpointError, DamagedError, from_os_error
from pear_store.format.checkpoint import check_record
from pear_store.format.digest import Digest, from_digest, is_digest
from pear_store.format.manifest import dump_manifest, manifest_digests, manifest_hash
from pear_store.format.pack import NO_COMMIT, Commit, PackedVersion, Records
from pear_store.local.directory import open_folder, require_packs, store_path
from pear_store.local.index import View, open_index, release_index, write_lock
from pear_store.local.packs import (
    PackReader,
    bare_header,
    find_unfinished,
    open_pack,
    pack_path,
    read_records,
    unlink_written,
)
from pear_store.local.repair import rewrite_packs
from pear_store.local.rows import NO_PACK, NameRow, PackRow, RemovedRow, TagRow, TensorRow, VersionRow
from pear_store.local.sweep import keep_copy, set_aside


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
    found = _Found()
    try:
        with write_lock(path), open_folder(path) as store:
            _set_aside_unfinished(path, result, found)
            store.remove_index("index.new")
            store.remove_index("index.build")
            with store.folder("index.build", create=True), store.folder("tmp", create=True):
                index = open_index(path / "index.build", create=True)
            try:
                index.fill(lambda view: _fill(view, path, result, found, progress))
            finally:
                release_index(index)
            with store.folder("index.build") as built:
                built.sync()
            store.rename("index.build", "index.new")
            store.sync()  # after each: a disk may else keep the second renaming and lose the first
            with suppress(FileNotFoundError):
                old = f"index.old-{time.time_ns()}"
                store.rename("index", old)  # a link, too: what it leads to is not touched
                store.sync()
                result.old_index = str(path / old)
            store.rename("index.new", "index")
            store.sync()
        if found.contradicted:
            rewrite_packs(path, found.contradicted)
    except OSError as error:
        raise from_os_error(error, path) from None
    return result


@dataclass(frozen=True)
class _Candidate:
    """A version that a pack records. Of two of one number, the greater one keeps it: the one that is known to have been
    acknowledged, else the one of the later commit. Time and hash only make the order one and the same for all."""

    acknowledged: bool
    commit: int
    time_ns: int
    manifest: bytes
    pack: bytes

    @property
    def rank(self) -> tuple[bool, int, int, bytes, bytes]:
        return self.acknowledged, self.commit, self.time_ns, self.manifest, self.pack


@dataclass
class _Found:
    """What the packs record beside the rows made so far. `contested` are versions whose number another one has."""

    followed: set[bytes] = field(default_factory=set)
    """Packs that a later commit names: theirs were acknowledged"""
    commits: dict[bytes, Commit] = field(default_factory=dict)
    contested: dict[tuple[str, int], list[VersionRow]] = field(default_factory=dict)
    removed: dict[tuple[str, int], set[bytes | None]] = field(default_factory=dict)
    """The manifests of removed versions; None: whatever had the number"""
    tags: dict[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)
    contradicted: set[bytes] = field(default_factory=set)
    """Packs that record a version under a number that another one keeps: they are written anew"""
    refused: dict[bytes, str] = field(default_factory=dict)
    """What is wrong with manifests that no store accepts"""
    unsure: set[bytes] = field(default_factory=set)
    """Packs whose commit may never have come"""

    def clear(self) -> None:
        """Forgets all but `unsure`: the index is filled again, with more space."""
        for kept in (
            self.followed,
            self.commits,
            self.contested,
            self.removed,
            self.tags,
            self.contradicted,
            self.refused,
        ):
            kept.clear()

    def candidate(self, row: VersionRow) -> _Candidate:
        """A row whose place for the bytes holds the commit and whether it was moved, until the bytes are known."""
        moved, commit = row.size_bytes & 1, row.size_bytes >> 1
        return _Candidate(bool(moved) or row.pack in self.followed, commit, row.time_ns, row.manifest, row.pack)


def _set_aside_unfinished(path: Path, result: Rebuilt, found: _Found) -> None:
    """Moves packs whose commit never came into damaged/: nobody was promised them. The old index tells, if it can be
    read."""
    unfinished = find_unfinished(path)
    if not unfinished:
        return
    import subprocess  # here, as in pear_store.local.verify; a damaged index can kill its reader
    import sys

    run = (
        "import sys; from pathlib import Path; from pear_store.local.opened import OpenStore\n"
        "path, *packs = sys.argv[1:]\n"
        "with OpenStore(Path(path)).read() as view:\n"
        "    print(*[pack for pack in packs if bytes.fromhex(pack) not in view.packs])"
    )
    names = [pack.hex() for pack in unfinished]
    done = subprocess.run([sys.executable, "-c", run, str(path.resolve()), *names], capture_output=True, text=True)
    if done.returncode:
        found.unsure = set(unfinished)
        return
    never = [bytes.fromhex(name) for name in done.stdout.split()]
    set_aside(path, never)
    unlink_written(path, unfinished)
    result.problems += [f"pack {pack.hex()}: its commit never came; moved to {path / 'damaged'}" for pack in never]


def _fill(view: View, path: Path, result: Rebuilt, found: _Found, progress: Callable[[int, int], None]) -> None:
    found.clear()
    files = _pack_files(path)
    for done, file in enumerate(files):
        progress(done, len(files))
        _fill_pack(view, path, file, result, found)
    progress(len(files), len(files))
    _enter_commits(view, found, result)
    homeless = _settle_removed(view, found) + _settle_contested(view, found) + _settle_names(view, found)
    _give_numbers(view, homeless, found, result)
    missing: list[int] = []
    sizes: dict[bytes, int] = {}
    for key in list(view.manifests.hashes()):
        try:
            sizes[key] = _number_manifest(view, key, missing)
        except CheckpointError as error:
            found.refused[key] = error.problem
    if missing:
        view.contents.enter(NO_PACK, missing, [0] * len(missing))
    for task, number, row in list(view.versions.rows()):
        if row.manifest in found.refused:
            view.versions.delete(task, number)
            continue
        entered = VersionRow(row.manifest, row.pack, row.time_ns, sizes[row.manifest])
        view.versions.put(task, number, entered)
        known = view.names.get(task)
        assert known is not None
        newest = NameRow(task, max(number, known.newest if known.name == task else 0), known.highest, known.pack)
        view.names.put(newest)
    for task, text, tag in list(view.tags.rows()):
        if tag.version and not view.versions.has(task, tag.version):
            result.problems.append(f"tag {task}@{text}: its version {tag.version} is not there any more")
            view.tags.put(task, text, TagRow(0, tag.time_ns, tag.pack))
            found.contradicted.add(tag.pack)
    if found.refused:
        _name_refused(path, files, found, result)
    result.versions = len(view.versions)
    result.tensors = len(view.tensors)
    result.tasks = sum(1 for name in view.names.rows() if name.newest)


def _name_refused(path: Path, files: list[Path], found: _Found, result: Rebuilt) -> None:
    """Names the versions whose manifest was refused. Their packs are written anew without, and kept in damaged/."""
    for file in files:
        with suppress(DamagedError):
            _, records, _ = read_records(file)
            refused = [version for version in records.versions if version.hash in found.refused]
            for version in refused[:_NAMED]:
                result.problems.append(
                    f"pack {file.stem}: version {version.task}@{version.version} was left out: "
                    f"{found.refused[version.hash]}; the pack is kept in {path / 'damaged'}"
                )
            if len(refused) > _NAMED:
                result.problems.append(f"pack {file.stem}: {len(refused) - _NAMED} more versions were left out")
            if refused:
                found.contradicted.add(bytes.fromhex(file.stem))
                keep_copy(path, bytes.fromhex(file.stem))


_NAMED = 20


def _pack_files(path: Path) -> list[Path]:
    return sorted((path / "packs").glob("*/*.safetensors"))


def _fill_pack(view: View, path: Path, file: Path, result: Rebuilt, found: _Found) -> None:
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
            set_aside(path, [pack])  # gc would not know what it records
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
        before = view.tensors.peek(Digest(name))
        if before is not None:
            if _is_good(path, Digest(name), before):
                continue
            view.contents.unlist(before.pack, {before.number})
        row = TensorRow(number, pack, place.offset, place.length, place.dtype, place.shape)
        view.tensors.put(Digest(name), row)
        numbers.append(number)
        lengths.append(place.length)
    view.contents.enter(pack, numbers, lengths)
    tensor_bytes = sum(place.length for place in header.places.values())
    view.packs.put(pack, PackRow(header.file_bytes, tensor_bytes))
    found.commits[pack] = records.commit
    found.followed.update(records.commit.after)
    refused: set[bytes] = set()
    for version in records.versions:
        if version.hash not in refused and version.hash not in view.manifests:
            try:
                manifest_digests(version.manifest)
                view.manifests.put(version.hash, 0, (), version.manifest)
            except ValueError as error:
                refused.add(version.hash)
                found.refused[version.hash] = str(error)
        if version.hash not in refused:
            _enter_version(view, pack, version, records.commit, found)
        _raise_highest(view, version.task, version.version, pack)
    for task, highest in records.highest.items():
        _raise_highest(view, task, highest, pack)
    for task, removed in records.removed:
        view.removed.put(task, removed, RemovedRow(NO_PACK, pack))
        found.removed.setdefault((task, removed), set()).add(records.removed_manifests.get((task, removed)))
        _raise_highest(view, task, removed, pack)
    for tag in records.tags:
        key = (tag.task, tag.tag)
        rank = (records.commit.number, tag.time_ns, tag.version or 0)
        if rank > found.tags.get(key, (-1, 0, 0)):
            found.tags[key] = rank
            view.tags.put(tag.task, tag.tag, TagRow(tag.version or 0, tag.time_ns, pack))


def _enter_version(view: View, pack: bytes, version: PackedVersion, commit: Commit, found: _Found) -> None:
    number = commit.number if version.moved_from is None else version.moved_from
    row = VersionRow(version.hash, pack, version.time_ns, number << 1 | (version.moved_from is not None))
    old = view.versions.get(version.task, version.version)
    if old is None or (old.manifest == row.manifest and _order(old) < _order(row)):
        view.versions.put(version.task, version.version, row)
    elif old.manifest != row.manifest:
        found.contested.setdefault((version.task, version.version), []).append(row)


def _order(row: VersionRow) -> tuple[int, int, int, bytes]:
    return row.size_bytes & 1, row.size_bytes, row.time_ns, row.pack


def _enter_commits(view: View, found: _Found, result: Rebuilt) -> None:
    """The store's id is that of its latest commit; what follows next follows all that nothing follows yet."""
    last = max(found.commits.values(), key=lambda commit: (commit.number, commit.store), default=NO_COMMIT)
    if last.store:
        view.put_meta(b"id", last.store.encode("ascii"))
    heads = [(c.number, pack) for pack, c in found.commits.items() if c.number and pack not in found.followed]
    view.put_commit(last.number, [pack for _, pack in sorted(heads)])
    for pack in sorted(found.unsure & found.commits.keys() - found.followed):
        result.problems.append(f"pack {pack.hex()}: its commit may never have come; what it records was kept")


_Homeless = list[tuple[str, str, int, _Candidate]]
"""Versions whose number is another's: the task's name as it is now, the name and number recorded"""


def _settle_removed(view: View, found: _Found) -> _Homeless:
    """Takes removed versions out. What another copy of the store has under a removed number is not what was removed."""
    homeless: _Homeless = []
    for (task, number), manifests in found.removed.items():
        row = view.versions.get(task, number)
        rows = found.contested.pop((task, number), [])
        if row is not None:
            rows.append(row)
            view.versions.delete(task, number)
        candidates = [found.candidate(one) for one in rows]
        gone = [one for one in candidates if None in manifests or one.manifest in manifests]
        homeless += [(task, task, number, one) for one in candidates if one not in gone]
        if gone:
            removed = view.removed.get(task, number)
            assert removed is not None
            view.removed.put(task, number, RemovedRow(max(one.pack for one in gone), removed.pack))
    return homeless


def _settle_contested(view: View, found: _Found) -> _Homeless:
    homeless: _Homeless = []
    for (task, number), rows in found.contested.items():
        row = view.versions.get(task, number)
        assert row is not None
        *others, first = sorted(map(found.candidate, [*rows, row]), key=lambda one: one.rank)
        _put_version(view, task, number, first)
        homeless += [(task, task, number, one) for one in others]
    return homeless


def _settle_names(view: View, found: _Found) -> _Homeless:
    """Of names that differ in case only, one stays; versions of the others become versions of that."""
    spelt: dict[str, dict[str, tuple[object, ...]]] = {}
    for task, _, row in view.versions.rows():
        ranks = spelt.setdefault(task.casefold(), {})
        ranks[task] = max(ranks.get(task, (False, 0)), found.candidate(row).rank)
    homeless: _Homeless = []
    for ranks in spelt.values():
        stays = max(ranks, key=lambda task: (ranks[task], task))
        for task in ranks.keys() - {stays}:
            for number, row in list(view.versions.of(task)):
                homeless.append((stays, task, number, found.candidate(row)))
                view.versions.delete(task, number)
    return homeless


def _put_version(view: View, task: str, number: int, one: _Candidate) -> None:
    row = VersionRow(one.manifest, one.pack, one.time_ns, one.commit << 1 | one.acknowledged)
    view.versions.put(task, number, row)


def _give_numbers(view: View, homeless: _Homeless, found: _Found, result: Rebuilt) -> None:
    """Gives each version whose number is another's the next free one, in an order that is the same for any order of
    the packs. One that has been given its own before is passed over."""
    there: dict[str, set[tuple[bytes, int]]] = {}
    for task, was, number, one in sorted(homeless, key=lambda item: (*item[:3], item[3].rank)):
        found.contradicted.add(one.pack)
        manifest = _renamed(view, one.manifest, task, was)
        if task not in there:
            there[task] = {(row.manifest, row.time_ns) for _, row in view.versions.of(task)}
        if (manifest, one.time_ns) in there[task]:
            continue
        there[task].add((manifest, one.time_ns))
        known = view.names.get(task)
        fresh = known.highest + 1 if known else 1
        if fresh >> 32:
            result.problems.append(f"version {was}@{number} of pack {one.pack.hex()}: no number is left for it")
            continue
        _raise_highest(view, task, fresh, one.pack)
        _put_version(view, task, fresh, replace(one, manifest=manifest))
        result.problems.append(
            f"version {was}@{number}: two are recorded, as in copies of one store; that of pack {one.pack.hex()} is "
            f"{task}@{fresh} now"
        )


def _renamed(view: View, manifest: bytes, task: str, was: str) -> bytes:
    """The hash of a manifest under the task's name as it is now."""
    if task == was:
        return manifest
    record = json.loads(view.manifests.text(manifest))
    text = dump_manifest({**record, "task": task})
    digest = manifest_hash(text)
    view.manifests.put(digest, 0, (), text)
    return digest


def _is_good(path: Path, digest: Digest, row: TensorRow) -> bool:
    try:
        with open_pack(pack_path(path, row.pack)) as file:
            found = PackReader(file).digest(row.dtype, row.shape, row.offset, row.length)
            return found == from_digest(digest)
    except (OSError, DamagedError):
        return False


def _raise_highest(view: View, task: str, number: int, pack: bytes) -> None:
    known = view.names.get(task)
    if known is None or known.highest < number:
        view.names.put(NameRow(task, 0, number, pack))


def _number_manifest(view: View, key: bytes, missing: list[int]) -> int:
    """Enters a manifest's numbers; returns the bytes of its tensors.

    Raises:
        CheckpointError: it is not what a store accepts.
    """
    manifest = view.manifests.text(key)
    rows = []
    names = manifest_digests(manifest)
    for name in names:
        found = view.tensors.stored(name)
        if found is None:  # no pack has it: listed as missing, so that its place is known when it comes back
            missing.append(view.take_numbers(1))
            found = view.tensors.put(name, TensorRow(missing[-1], NO_PACK, 0, 0, "U8", ()))
        rows.append(found)
    view.manifests.put(key, view.take_numbers(1), rows, manifest)
    places = [TensorRow.peek(row) for row in rows]
    if all(place.pack != NO_PACK for place in places):
        tensors = {str(name): (place.dtype, place.shape) for name, place in zip(names, places, strict=True)}
        check_record(json.loads(manifest), tensors, "its manifest")
    return sum(place.length for place in places)
