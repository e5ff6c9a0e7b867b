"""Keeps the index and the packs' records in step. Only this module, applying.py and contests.py change rows.

- :func:`enter` enters a pack that was just written here. applying.py enters packs that lie in their places already.
- :func:`leave` takes out packs that nothing needs, and :func:`forget_manifests` takes out manifests.
- :func:`take_out` takes out versions, for a removal.
- :func:`rows_of` and :func:`records_of` return the records for which rows name a pack, so that another pack can record
  them.

A pack may record something that the index never had: the pack came from a copy of the store, or the index from an old
backup. recorded.py finds such packs. They are never deleted.
"""

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from pear_store.errors import DamagedError
from pear_store.format.container import Header
from pear_store.format.digest import Digest, is_digest
from pear_store.format.manifest import manifest_hash
from pear_store.format.pack import PackedTag, PackedVersion, Records
from pear_store.local.index import View
from pear_store.local.mark import MANIFEST, Marked
from pear_store.local.packs import WrittenPack, bare_header, doom_packs, pack_path, place_pack, read_records
from pear_store.local.recorded import Recorded, refuse_unknown
from pear_store.local.rows import NO_PACK, ManifestRow, NameRow, PackRow, RemovedRow, TagRow, TensorRow, VersionRow
from pear_store.local.tables import StoredTensor


def enter(
    path: Path,
    view: View,
    pack: WrittenPack,
    records: Records,
    numbers: Mapping[Digest, int],
    listed: Container[Digest] = frozenset(),
    sizes: Mapping[bytes, int] = MappingProxyType({}),
) -> dict[Digest, StoredTensor]:
    """Places a pack that was just written, and enters what it holds and records.

    Args:
        numbers: the tensors' numbers.
        listed: tensors that may have rows, which are replaced.
        sizes: tensor bytes of new versions, by manifest. The pack's other versions have rows, which now name this pack.

    Returns:
        the tensors' rows, encoded.
    """
    view.packs.put(pack.hash, PackRow(pack.file_bytes, pack.tensor_bytes))
    here = [numbers[digest] for digest in pack.places]
    view.contents.enter(pack.hash, here, (place.length for place in pack.places.values()))
    elsewhere: dict[bytes, set[int]] = {}
    rows: dict[Digest, StoredTensor] = {}
    for number, (digest, place) in zip(here, pack.places.items(), strict=True):
        if digest in listed and (old := view.tensors.peek(digest)) is not None:
            elsewhere.setdefault(old.pack, set()).add(number)
        row = TensorRow(number, pack.hash, place.offset, place.length, place.dtype, place.shape)
        rows[digest] = view.tensors.put(digest, row)
    for other, moved in elsewhere.items():
        view.contents.unlist(other, moved)
    for version in records.versions:
        if version.hash in sizes:
            added = VersionRow(version.hash, pack.hash, version.time_ns, sizes[version.hash])
            view.versions.put(version.task, version.version, added)
            name = view.names.get(version.task)
            if name is None or name.highest <= version.version:
                name = NameRow(version.task, name.newest if name else 0, version.version, pack.hash)
            view.names.put(name._replace(newest=max(name.newest, version.version)))
        else:
            known = view.versions.get(version.task, version.version)
            assert known is not None
            view.versions.put(version.task, version.version, known._replace(pack=pack.hash))
    for task, number in records.highest.items():
        name = view.names.get(task) or NameRow(task, 0, number, pack.hash)
        if name.highest <= number:
            view.names.put(name._replace(highest=number, pack=pack.hash))
    for task, number in records.removed:
        removed = view.removed.get(task, number)
        if removed is not None:
            view.removed.put(task, number, removed._replace(pack=pack.hash))
    for tag in records.tags:
        view.tags.put(tag.task, tag.tag, TagRow(tag.version or 0, tag.time_ns, pack.hash))
    view.enter_commit(pack.hash, pack.commit)
    place_pack(path, pack)
    return rows


def enter_manifest(
    view: View, key: bytes, text: bytes, tensors: Iterable[Digest], rows: Mapping[Digest, StoredTensor]
) -> None:
    """Enters a manifest under its hash, or replaces its row if that is damaged.

    Args:
        rows: the rows of its tensors, and perhaps of others.
    """
    own = None
    with suppress(DamagedError):
        own = view.manifests.get(key)
    number = view.take_numbers(1) if own is None else own.number
    view.manifests.put(key, number, [rows[digest] for digest in sorted(tensors)], text)


# ---- what goes


def take_out(view: View, versions: Iterable[tuple[str, int]]) -> Records:
    """Takes versions out of the index. Returns the records of this for a pack."""
    records = Records(removed=sorted(versions))
    for task, number in records.removed:
        row = view.versions.get(task, number)
        assert row is not None
        records.removed_manifests[task, number] = row.manifest
        view.versions.delete(task, number)
        view.removed.put(task, number, RemovedRow(row.pack, row.pack))
    for task in {task for task, _ in records.removed}:
        known = view.names.get(task)
        assert known is not None
        view.names.put(NameRow(task, view.versions.newest(task), known.highest, known.pack))
    return records


def free(view: View, task: str, number: int) -> RemovedRow | None:
    """Forgets that a version was removed, because another one gets its number. Returns the removal's row, if any."""
    gone = view.removed.get(task, number)
    if gone is not None:
        view.removed.delete(task, number)
    return gone


def leave(
    path: Path,
    view: View,
    packs: Sequence[bytes],
    headers: Mapping[bytes, Header] = MappingProxyType({}),
    recorded: Recorded | None = None,
) -> None:
    """Deletes the rows of packs that nothing needs, and of their tensors. Their files are deleted after the commit.

    Args:
        headers: headers of packs that were read already.
        recorded: if given, checks that the index knows all that the packs record.

    Raises:
        DamagedError: a tensor's row names a pack whose own row does not list the tensor.
        DamagedIndexError: the index does not know all that a pack records.
    """
    unread: dict[bytes, set[int]] = {}
    for pack in packs:
        listed = set(view.contents.get(pack).numbers)
        header = headers.get(pack)
        if header is None:
            header, records = _read(pack_path(path, pack))
            if recorded is not None and not recorded.knows(view, pack, records):
                refuse_unknown(path, [pack])
        for name in filter(is_digest, header.places if header else ()):
            row = view.tensors.peek(Digest(name))
            if row is not None and row.pack == pack:
                _check_listed(view.tensors.get(Digest(name)), listed)
                view.tensors.delete(Digest(name))
        if listed:
            unread[pack] = listed
    if unread:  # missing or damaged

        def dead(row: TensorRow, checked: Callable[[], TensorRow]) -> bool:
            listed = unread.get(row.pack)
            if listed is not None:
                _check_listed(checked(), listed)
            return listed is not None

        view.tensors.delete_where(dead)
    for pack in packs:
        view.packs.drop(pack)
    doom_packs(path, packs)


def _read(file: Path) -> tuple[Header | None, Records]:
    """As much of a pack's header and records as can be read."""
    try:
        header, records, _ = read_records(file)
    except DamagedError:
        return bare_header(file), Records()
    return header, records


def _check_listed(row: TensorRow | None, listed: set[int]) -> None:
    assert row is not None
    if row.number not in listed:
        raise DamagedError(f"contents of pack {row.pack.hex()}", f"its tensor {row.number} is not listed")
    listed.remove(row.number)


def forget_manifests(view: View, marks: bytearray) -> None:
    """Deletes manifests that no version has. The others were found undamaged when they were marked."""

    def dead(number: int, checked: Callable[[], ManifestRow]) -> bool:
        if number < len(marks) and marks[number] == MANIFEST:
            return False
        if checked().number >= len(marks):
            raise DamagedError("the index's count of numbers", "lower than a number in use")
        return True

    view.manifests.delete_where(dead)


def settled_removals(path: Path) -> Callable[[RemovedRow], bool]:
    """Returns a check: whether a removal is settled, because no pack that could bring the version back exists."""
    there: dict[bytes, bool] = {}

    def is_settled(row: RemovedRow) -> bool:
        pack = row.recorded_in
        if pack not in there:
            there[pack] = pack_path(path, pack).exists()
        return not there[pack]

    return is_settled


def forget_removals(view: View, packs: Collection[bytes]) -> None:
    """Forgets the removals that these packs record; the packs have left.

    Settled removals are kept until then. If another version gets the number, all packs that record the removal must be
    known.
    """
    view.removed.delete_where(lambda row: row.pack in packs)


def list_marked(view: View, marked: Marked) -> None:
    """Updates the contents of packs that stay, by the marks. Tensors whose rows were deleted are listed no longer."""
    for pack, use in marked.packs.items():
        if use.contents is not None and use.needed:
            view.contents.put(pack, use.contents)
    if marked.lost is not None:
        view.contents.put(NO_PACK, marked.lost)


# ---- what rows name a pack for


def rows_of(
    view: View, pack: bytes, records: Records, is_settled: Callable[[RemovedRow], bool] = lambda row: False
) -> Records:
    """The records of a pack for which rows name it, without settled removals, as another pack would record them."""
    current = Records(removed_manifests=records.removed_manifests)
    for version in records.versions:
        row = view.versions.get(version.task, version.version)
        if row is not None and (row.pack, row.manifest, row.time_ns) == (pack, version.hash, version.time_ns):
            moved_from = records.commit.number if version.moved_from is None else version.moved_from
            current.versions.append(replace(version, moved_from=moved_from))
    for task, number in records.removed:
        removed = view.removed.get(task, number)
        if removed is not None and removed.pack == pack and not is_settled(removed):
            current.removed.append((task, number))
    for tag in records.tags:
        if view.tags.get(tag.task, tag.tag) == TagRow(tag.version or 0, tag.time_ns, pack):
            current.tags.append(tag)
    for task, number in records.highest_numbers().items():
        name = view.names.get(task)
        if name is not None and (name.name, name.highest, name.pack) == (task, number, pack):
            current.highest[task] = number
    return current


def records_of(view: View, packs: Container[bytes], damaged: set[bytes]) -> Records:
    """The records for which rows name some packs, by the index alone. This is for packs that cannot be read.

    Args:
        damaged: gets the packs that record a version whose manifest the index has lost.
    """
    records = Records()
    for task, number, row in view.versions.rows():
        if row.pack in packs:
            manifest = view.manifests.text(row.manifest)
            if manifest_hash(manifest) == row.manifest:
                records.versions.append(PackedVersion(task, number, row.time_ns, manifest, 0))
            else:
                damaged.add(row.pack)
    for name in view.names.rows():
        if name.pack in packs:
            records.highest[name.name] = name.highest
    for task, text, tag in view.tags.rows():
        if tag.pack in packs:
            version = view.versions.get(task, tag.version)
            records.tags.append(PackedTag(task, text, tag.version or None, tag.time_ns, version and version.manifest))
    for task, number, removed in view.removed.rows():
        if removed.pack in packs:
            records.removed.append((task, number))
    return records
