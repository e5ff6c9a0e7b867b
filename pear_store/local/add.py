"""Adds tasks in groups. The new tensors of a group become one pack, and one commit to the index enters them."""

import time
from contextlib import suppress
from dataclasses import dataclass, field

from pear_store.errors import DamagedError, DamagedIndexError, NameTakenError, OutOfNumbersError, from_os_error
from pear_store.format.digest import Digest, RawTensor
from pear_store.format.pack import NO_COMMIT, Commit, PackedVersion, Records
from pear_store.local.catalog import enter, enter_manifest
from pear_store.local.index import State, View
from pear_store.local.loading import Group, Loaded, Refused
from pear_store.local.opened import OpenStore
from pear_store.local.packs import WrittenPack, write_pack
from pear_store.local.rows import NO_PACK, NameRow
from pear_store.local.tables import StoredTensor

_KEPT_ROWS = 50_000


@dataclass(frozen=True)
class Added:
    """What `add` did with one task.

    Args:
        task: the name that it has in the store.
        version: the new version, or the newest one if nothing changed.
        changed: whether there is a new version.
        new_bytes: tensor bytes that were not stored before.
        shared_bytes: tensor bytes that were stored before.
    """

    task: str
    version: int
    changed: bool
    new_bytes: int
    shared_bytes: int


@dataclass
class _Plan:
    """What one commit would write.

    Args:
        tensors: those that have no good stored copy.
        damaged: those among them that have a damaged copy, and their numbers.
        stored: the rows of good copies that the group needs.
        versions: new versions.
        healed: tasks that are unchanged, but whose stored manifest is damaged.
    """

    tensors: dict[Digest, RawTensor] = field(default_factory=dict)
    damaged: dict[Digest, int] = field(default_factory=dict)
    stored: dict[Digest, StoredTensor] = field(default_factory=dict)
    versions: list[tuple[PackedVersion, Loaded]] = field(default_factory=list)
    healed: list[Loaded] = field(default_factory=list)
    results: list[Added | Refused] = field(default_factory=list)
    commit: Commit = NO_COMMIT

    @property
    def records(self) -> Records:
        return Records(versions=[version for version, _ in self.versions])

    @property
    def sizes(self) -> dict[bytes, int]:
        """Tensor bytes of the versions, by their manifests' hashes"""
        return {loaded.hash: loaded.size_bytes for _, loaded in self.versions}

    def same_pack(self, other: "_Plan") -> bool:
        return list(self.tensors) == list(other.tensors) and self.records == other.records


@dataclass
class FoundGood:
    """Encoded rows of tensors that one `add` wrote, or compared with its own. They hold until somebody else commits."""

    rows: dict[Digest, StoredTensor] = field(default_factory=dict)
    as_of: State | None = None


def add_group(opened: OpenStore, group: Group, found_good: FoundGood) -> list[Added | Refused]:
    """Adds what can be added of a group, in one commit. Returns one result for each of its tasks, in order.

    Raises:
        DiskFullError, AccessError: nothing of the group was added.
        DamagedIndexError: a row cannot be trusted; nothing was added.
    """
    now = time.time_ns()
    with opened.read() as view:
        plan = _make_plan(opened, view, group, found_good, now, planned_in := view.state)
    if not (plan.tensors or plan.versions or plan.healed):
        return plan.results
    packs: list[WrittenPack] = []
    try:
        if plan.tensors or plan.versions:
            packs.append(write_pack(opened.path, plan.tensors, plan.records, plan.commit))
    except OSError as error:
        raise from_os_error(error, opened.path) from None

    def change(view: View) -> dict[Digest, StoredTensor]:
        nonlocal plan
        written_in.clear()
        if view.before != planned_in:  # another process added, removed or rebuilt meanwhile
            current = _make_plan(opened, view, group, found_good, now, view.before)
            if not current.same_pack(plan):
                for pack in packs:
                    pack.path.unlink(missing_ok=True)
                packs.clear()
                if current.tensors or current.versions:
                    packs.append(write_pack(opened.path, current.tensors, current.records, current.commit))
            plan = current
        numbers = dict(plan.damaged)
        fresh = [digest for digest in plan.tensors if digest not in numbers]
        numbers.update(zip(fresh, range(first := view.take_numbers(len(fresh)), first + len(fresh)), strict=True))
        rows: dict[Digest, StoredTensor] = {}
        for pack in packs:
            rows = enter(opened.path, view, pack, plan.records, numbers, plan.damaged, plan.sizes)
        places = {**plan.stored, **rows}
        for loaded in (*plan.healed, *(loaded for _, loaded in plan.versions)):
            enter_manifest(view, loaded.hash, loaded.manifest, loaded.tensors, places)
        if view.wrote:
            written_in.append(view.state)
        return rows

    written_in: list[State] = []
    rows = opened.write_packs(change, packs)
    if written_in:
        found_good.rows.update(rows)
        found_good.as_of = written_in[-1]
    return plan.results


def _make_plan(opened: OpenStore, view: View, group: Group, found_good: FoundGood, now: int, state: State) -> _Plan:
    """What this group would add to the store in this state."""
    plan = _Plan(commit=view.next_commit())
    names: dict[str, NameRow] = {}
    newest: dict[str, tuple[int, bytes]] = {}
    seen: set[bytes] = set()
    if found_good.as_of != state or len(found_good.rows) > _KEPT_ROWS:
        found_good.rows.clear()
        found_good.as_of = state
    good = found_good.rows
    for loaded in group:
        if isinstance(loaded, Refused):
            plan.results.append(loaded)
            continue
        key = loaded.name.casefold()
        known = names.get(key) or view.names.get(loaded.name)
        if known and known.newest and known.name != loaded.name:
            plan.results.append(Refused(NameTakenError(loaded.name, known.name)))
            continue
        new_bytes = 0
        for digest in loaded.tensors:
            if digest in plan.tensors:
                continue
            row = good.get(digest)
            if row is None:
                tensor = loaded.tensors[digest]
                row = good_row(opened, view, digest, tensor, seen, plan.damaged)
                if row is None:
                    plan.tensors[digest] = tensor
                    new_bytes += tensor.size_bytes
                    continue
                good[digest] = row
            plan.stored[digest] = row
        before = newest.get(loaded.name)
        if before is None and known and known.newest:
            version = view.versions.get(loaded.name, known.newest)
            before = (known.newest, version.manifest if version else b"")
        changed = before is None or before[1] != loaded.hash
        number = (known.highest if known else 0) + 1 if before is None or changed else before[0]
        if number >> 32:
            plan.results.append(Refused(OutOfNumbersError(loaded.name)))
            continue
        if changed:
            plan.versions.append((PackedVersion(loaded.name, number, now, loaded.manifest), loaded))
            names[key] = NameRow(loaded.name, number, number, NO_PACK)
            newest[loaded.name] = (number, loaded.hash)
        elif loaded.name not in newest and not is_intact(view, loaded):
            plan.healed.append(loaded)
        plan.results.append(Added(loaded.name, number, changed, new_bytes, loaded.size_bytes - new_bytes))
    return plan


def good_row(
    opened: OpenStore, view: View, digest: Digest, tensor: RawTensor, seen: set[bytes], damaged: dict[Digest, int]
) -> StoredTensor | None:
    """The encoded row of a stored copy that equals the tensor byte for byte. None if there is no good copy.

    Args:
        seen: packs whose files were looked at. More are added.
        damaged: gets the tensor's number, if there is a damaged copy.

    Raises:
        DamagedIndexError: the row is damaged.
    """
    found = view.tensors.stored(digest)
    if found is None:
        return None
    try:
        row = view.tensors.decode(digest, found)
    except DamagedError as error:  # without the row's number, gc could not tell who needs the tensor
        raise DamagedIndexError(opened.path / "index", f"{error.what}: {error.found}") from None
    with suppress(DamagedError):
        if (row.dtype, row.shape, row.length) == (tensor.dtype, tensor.shape, tensor.size_bytes):
            if row.pack not in seen:
                opened.forget_replaced(row.pack)
            mapped = opened.map_of(view, row.pack)
            seen.add(row.pack)
            # bytes objects are compared by memcmp, memory views item by item
            if bytes(mapped.view[row.offset : row.offset + row.length]) == bytes(tensor.data):
                return found
    damaged[digest] = row.number
    return None


def is_intact(view: View, loaded: Loaded) -> bool:
    """Whether the stored manifest, and its row in the index, are undamaged."""
    try:
        row = view.manifests.get(loaded.hash)
        return row is not None and view.manifests.text(loaded.hash) == loaded.manifest
    except DamagedError:
        return False
