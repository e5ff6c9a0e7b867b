"""What a pack's records do to the index, and what the index says of a pack: the one place for both.

- :func:`enter` enters a pack that was just written here; :func:`take_out` is what a removal does.
- :class:`Applying` enters packs that lie in their places already, whoever wrote them. What they contradict one another
  in is settled by contests.py.
- :func:`rows_of` and :func:`records_of` give what rows name a pack for, so that another pack can record it.
- :class:`Recorded` compares what packs record with the rows.

A pack may record what the index never had: it came from a copy of the store, or the index is an old one from a backup.
No such pack is ever deleted.
"""

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from pear_store.errors import CheckpointError, DamagedError
from pear_store.format.checkpoint import check_record
from pear_store.format.container import Header
from pear_store.format.digest import Digest, from_digest, is_digest
from pear_store.format.manifest import manifest_digests, manifest_hash
from pear_store.format.pack import NO_COMMIT, Commit, PackedTag, PackedVersion, Records
from pear_store.format.record import tensor_names
from pear_store.local.contests import Contests, Facts, unsettled
from pear_store.local.index import State, View
from pear_store.local.packs import (
    PackReader,
    WrittenPack,
    find_packs,
    open_pack,
    pack_path,
    place_pack,
    read_records,
    read_records_alone,
)
from pear_store.local.rows import NO_PACK, ContentsRow, NameRow, PackRow, RemovedRow, TagRow, TensorRow, VersionRow
from pear_store.local.tables import StoredTensor


@dataclass
class Unlisted:
    """Packs that the index does not list."""

    known: list[bytes] = field(default_factory=list)
    """The index knows all that they record, and misses none of their tensors. A gc that died leaves those"""
    unknown: list[bytes] = field(default_factory=list)
    """They record what the index never had, or hold tensors that it misses"""
    unreadable: list[bytes] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Paths of what is no pack"""


class Recorded:
    """The packs' records, as far as they were looked at, for one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks: dict[bytes, frozenset[tuple[str, int, bytes]]] = {}
        self._as_of: State | None = None
        self._room = 0

    def find_unlisted(self, view: View) -> Unlisted:
        """Looks at each pack that the index does not list. Under the write lock, or what is being added is found."""
        unlisted = Unlisted()
        for pack in find_packs(self._path, unlisted.foreign):
            if pack not in view.packs:
                try:
                    header, records, problems = read_records(pack_path(self._path, pack))
                except DamagedError:
                    unlisted.unreadable.append(pack)
                    continue
                is_known = not problems and self.knows(view, pack, records)
                is_known = is_known and not self._holds_lost(view, header.places)
                (unlisted.known if is_known else unlisted.unknown).append(pack)
        return unlisted

    def knows(self, view: View, pack: bytes, records: Records) -> bool:
        """Whether the index knows all that a pack records, or something later about the same."""
        return self.compare(view, pack, records)[0]

    def compare(self, view: View, pack: bytes, records: Records) -> tuple[bool, int]:
        """Whether the index knows all that a pack records, or something later about the same; and how many rows name
        the pack for what it records."""
        if self._as_of != view.state:  # what could not be read may have been moved
            self._marks, self._as_of, self._room = {}, view.state, _MOST_MARKS
        known, rows = True, 0
        current = set()  # numbers that rows name this pack for: they stay used, wherever those records go
        for version in records.versions:
            mark = (version.task, version.version, version.hash)
            row = view.versions.get(version.task, version.version)
            if row is None:  # removed? of two copies of a store, each may have had its own second version
                removed = view.removed.get(version.task, version.version)
                known = known and removed is not None and self._has(removed.recorded_in, mark, pack)
            elif row.pack != pack:
                known = known and row.manifest == version.hash and self._has(row.pack, mark, pack)
            else:
                known = known and row.manifest == version.hash
                rows += (row.manifest, row.time_ns) == (version.hash, version.time_ns)
                current.add((version.task, version.version))
        for task, number in records.removed:
            known = known and not view.versions.has(task, number)
            removed = view.removed.get(task, number)  # none: no file records that version any more
            if removed is not None and removed.pack == pack:
                rows += 1
                current.add((task, number))
            elif removed is not None:
                known = known and self._has(removed.pack, (task, number, b""), pack)
        for task, number in records.highest_numbers().items():
            name = view.names.get(task)
            known = known and name is not None and name.highest >= number
            if name is not None and name.highest == number:
                rows += (name.name, name.pack) == (task, pack)
                if (task, number) not in current:
                    known = known and self._has(name.pack, (name.name, number, b"highest"), pack)
        for tag in records.tags:
            now = view.tags.get(tag.task, tag.tag) or TagRow(0, 0, NO_PACK)
            rows += now == TagRow(tag.version or 0, tag.time_ns, pack)
            known = known and now.time_ns >= tag.time_ns
            known = known and self._has(now.pack, (f"{tag.task}@{tag.tag}", now.time_ns, b""), pack)
        return known, rows

    def _has(self, pack: bytes, mark: tuple[str, int, bytes], asking: bytes) -> bool:
        """Whether the pack that a row names records what the row says; the one that asks does."""
        if pack == asking:
            return True
        if pack not in self._marks:
            try:
                records = read_records_alone(pack_path(self._path, pack))
            except DamagedError:
                records = Records()
            marks = frozenset(_marks(records))
            if self._room < len(marks):
                self._marks, self._room = {}, _MOST_MARKS
            self._marks[pack] = marks
            self._room -= len(marks)
        return mark in self._marks[pack]

    def _holds_lost(self, view: View, names: Iterable[str]) -> bool:
        """Whether a tensor is among these that the index lists where no file is."""
        there: dict[bytes, bool] = {}
        for name in filter(is_digest, names):
            row = view.tensors.peek(Digest(name))
            if row is not None:
                pack = row.pack
                if pack not in there:
                    there[pack] = pack != NO_PACK and pack_path(self._path, pack).exists()
                if not there[pack]:
                    return True
        return False


_MOST_MARKS = 1 << 20
"""That are kept, of some 200 bytes each"""


def _marks(records: Records) -> Iterator[tuple[str, int, bytes]]:
    """One for each thing that is recorded."""
    for version in records.versions:
        yield version.task, version.version, version.hash
    for task, number in records.removed:
        yield task, number, b""
    for tag in records.tags:
        yield f"{tag.task}@{tag.tag}", tag.time_ns, b""
    for task, number in records.highest_numbers().items():
        yield task, number, b"highest"


def count_rows(view: View) -> Counter[bytes]:
    """How many rows name each pack as the one that records what they say."""
    count: Counter[bytes] = Counter()
    count.update(row.pack for _, _, row in view.versions.rows())
    count.update(row.pack for row in view.names.rows())
    count.update(row.pack for _, _, row in view.tags.rows())
    count.update(row.pack for _, _, row in view.removed.rows())
    return count


def rows_of(view: View, pack: bytes, records: Records) -> Records:
    """Those of a pack's records that a row names this pack for, as another pack would record them."""
    current = Records(removed_manifests=records.removed_manifests)
    for version in records.versions:
        row = view.versions.get(version.task, version.version)
        if row is not None and (row.pack, row.manifest, row.time_ns) == (pack, version.hash, version.time_ns):
            moved_from = records.commit.number if version.moved_from is None else version.moved_from
            current.versions.append(replace(version, moved_from=moved_from))
    for task, number in records.removed:
        removed = view.removed.get(task, number)
        if removed is not None and removed.pack == pack:
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
    """What rows name some packs for, by the index alone: for packs that cannot be read. Adds to `damaged` those that
    record a version whose manifest the index has lost."""
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
            records.tags.append(PackedTag(task, text, tag.version or None, tag.time_ns))
    for task, number, removed in view.removed.rows():
        if removed.pack in packs:
            records.removed.append((task, number))
    return records


def enter(
    path: Path,
    view: View,
    pack: WrittenPack,
    records: Records,
    numbers: Mapping[Digest, int],
    listed: Container[Digest] = frozenset(),
    sizes: Mapping[bytes, int] = MappingProxyType({}),
) -> dict[Digest, StoredTensor]:
    """Places a pack that was just written and enters what it holds and records.

    Args:
        numbers: the tensors' numbers. Those of `listed` may have rows, which are replaced.
        sizes: tensor bytes by manifest, of versions that are new. The other versions that the pack records have rows,
            which from now on name this pack.

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


def take_out(view: View, versions: Iterable[tuple[str, int]]) -> Records:
    """Takes versions out of the index; returns what a pack has to record of that."""
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


# ---- packs that are there already --------------------------------------------------------------------------------


@dataclass
class Settled:
    """What had to be decided because packs contradict one another, or hold what no store accepts."""

    problems: list[str] = field(default_factory=list)
    contradicted: set[bytes] = field(default_factory=set)
    """Packs that record what the index says otherwise: the caller has them written anew (`repair.rewrite_packs`)"""
    refused: dict[bytes, str] = field(default_factory=dict)
    """What is wrong with manifests that no store accepts. Their versions are left out"""


class Applying:
    """Enters packs that lie in their places, in one transaction: :meth:`apply` for each, then :meth:`settle`.

    The same packs give the same rows, in whatever order they come, and in however many transactions. Only this may
    differ, and nobody is handed it: tensors' and manifests' numbers, which of several good copies of a tensor is used,
    what of unneeded manifests is left, and whether the next commit follows more packs than it has to.

    So where a new pack says something of a task that the index knows, all packs are asked again: what rows say of that
    task was settled without the new one. That reads the header of each pack in the index.
    """

    def __init__(self, path: Path, view: View) -> None:
        self._path = path
        self._view = view
        self._facts = Facts()
        self._is_first = not len(view.packs)
        """Whether the index had no packs. Then all tasks are settled, and what packs record is entered as they come."""
        self._touched: set[str] = set()
        """Else: case-folded names of the tasks to settle ..."""
        self._spellings: set[str] = set()
        """... as they are written"""
        self._new: dict[bytes, Commit] = {}
        self._entered: set[bytes] = set()
        """Manifests that have no numbers yet"""
        self._renumbered: set[bytes] = set()
        """Other manifests, of whose tensors more may be known now"""
        self._found_again: set[int] = set()
        """Numbers of tensors that no pack had so far"""
        self._settled = Settled()

    # ---- one pack

    def apply(self, pack: bytes, header: Header, records: Records) -> None:
        """Enters what a pack holds and records. One that the index has already changes nothing."""
        if pack in self._view.packs:
            return
        self._new[pack] = records.commit
        self._enter_tensors(pack, header)
        if self._is_first:
            self._enter_records(pack, records)
        else:
            self._touched |= _tasks_in(records)

    def _enter_tensors(self, pack: bytes, header: Header) -> None:
        view = self._view
        first = view.take_numbers(len(header.places))
        numbers, lengths = [], []
        for number, (name, place) in enumerate(header.places.items(), first):
            if not is_digest(name):
                continue
            before = view.tensors.peek(Digest(name))
            if before is not None:
                if _is_good(self._path, Digest(name), before):
                    continue
                if before.pack == NO_PACK:
                    self._found_again.add(before.number)
                view.contents.unlist(before.pack, {before.number})
                number = before.number  # manifests have it
            row = TensorRow(number, pack, place.offset, place.length, place.dtype, place.shape)
            view.tensors.put(Digest(name), row)
            numbers.append(number)
            lengths.append(place.length)
        view.contents.enter(pack, numbers, lengths)
        tensor_bytes = sum(place.length for place in header.places.values())
        view.packs.put(pack, PackRow(header.file_bytes, tensor_bytes))

    def _enter_records(self, pack: bytes, records: Records) -> None:
        view, facts = self._view, self._facts
        facts.enter_commit(pack, records.commit)
        refused: set[bytes] = set()
        for version in records.versions:
            if version.hash not in refused and version.hash not in view.manifests:
                try:
                    manifest_digests(version.manifest)
                    view.manifests.put(version.hash, 0, (), version.manifest)
                    self._entered.add(version.hash)
                except ValueError as error:
                    refused.add(version.hash)
                    self._settled.refused[version.hash] = str(error)
            if version.hash not in refused:
                row = unsettled(pack, version, records.commit)
                if view.versions.has(version.task, version.version):
                    facts.contested.setdefault((version.task, version.version), []).append(row)
                else:
                    view.versions.put(version.task, version.version, row)
            self._raise_highest(version.task, version.version, pack)
        for task, highest in records.highest.items():
            self._raise_highest(task, highest, pack)
        for task, number in records.removed:
            known = view.removed.get(task, number)
            if known is None or known.pack < pack:
                view.removed.put(task, number, RemovedRow(NO_PACK, pack))
            facts.removed.setdefault((task, number), set()).add(records.removed_manifests.get((task, number)))
            self._raise_highest(task, number, pack)
        for tag in records.tags:
            key = (tag.task, tag.tag)
            rank = (records.commit.number, tag.time_ns, tag.version or 0, pack)
            if rank > facts.tags.get(key, (-1, 0, 0, b"")):
                facts.tags[key] = rank
                view.tags.put(tag.task, tag.tag, TagRow(tag.version or 0, tag.time_ns, pack))

    def _raise_highest(self, task: str, number: int, pack: bytes) -> None:
        known = self._view.names.get(task)
        if known is None or (known.highest, known.pack, known.name) < (number, pack, task):
            self._view.names.put(NameRow(task, 0, number, pack))

    # ---- all together

    def settle(self) -> Settled:
        """Settles what the packs contradict one another in, and completes the rows.

        Raises:
            DamagedError: a pack that the index had before cannot be read, or a row cannot be trusted. The transaction
                must not be committed.
        """
        if not self._is_first:
            self._enter_touched()
        self._enter_commits()
        contests = Contests(self._view, self._facts, None if self._is_first else self._spellings)
        contests.settle()
        self._settled.problems += contests.problems
        self._settled.contradicted |= contests.contradicted
        self._entered |= contests.made
        self._renumbered |= contests.renamed
        self._complete(contests)
        return self._settled

    def _enter_touched(self) -> None:
        """Enters what packs record of the tasks that are touched: of new tasks the new packs, of others all."""
        view = self._view
        for pack in {pack for commit in self._new.values() for pack in commit.after} - self._new.keys():
            if pack in view.packs:
                self._touched |= self._unsettled_by(pack)
        tagged = {task.casefold() for task, _, _ in view.tags.rows()}
        is_known = any(task in tagged or view.names.get(task) is not None for task in self._touched)
        if not is_known:
            self._enter_all_of(self._new)
        names = {task.casefold() for task in self._spellings}
        if is_known or self._facts.contested or len(names) < len(self._spellings):
            self._forget()
            self._facts = Facts()
            self._enter_all_of(list(view.packs.hashes()))
        for task in self._spellings:
            self._renumbered.update(row.manifest for _, row in view.versions.of(task))
        for rows in self._facts.contested.values():
            self._renumbered.update(row.manifest for row in rows)

    def _enter_all_of(self, packs: Iterable[bytes]) -> None:
        for pack in packs:
            _, records, problems = read_records(pack_path(self._path, pack))
            if problems and pack not in self._new:
                raise DamagedError(f"pack {pack.hex()}", f"{problems[0]} does not match its hash")
            records = _only(records, self._touched)
            self._spellings.update(records.highest_numbers())
            self._enter_records(pack, records)

    def _unsettled_by(self, pack: bytes) -> set[str]:
        """Tasks of which a pack may keep more than it did, now that it is known to have been acknowledged."""
        tasks = set()
        for version in read_records_alone(pack_path(self._path, pack)).versions:
            row = self._view.versions.get(version.task, version.version)
            removed = self._view.removed.get(version.task, version.version) if row is None else None
            is_gone = removed is not None and removed.recorded_in == pack
            if not is_gone and (row is None or (row.pack, row.manifest) != (pack, version.hash)):
                tasks.add(version.task.casefold())
        return tasks

    def _forget(self) -> None:
        """Deletes what rows say of the tasks that are touched."""
        view, tasks = self._view, self._touched
        spellings = {name.name for task in tasks if (name := view.names.get(task)) is not None}
        for spelling in spellings | self._spellings:
            for number, _ in list(view.versions.of(spelling)):
                view.versions.delete(spelling, number)
        for task, tag, _ in [row for row in view.tags.rows() if row[0].casefold() in tasks]:
            view.tags.delete(task, tag)
        for task, number, _ in [row for row in view.removed.rows() if row[0].casefold() in tasks]:
            view.removed.delete(task, number)
        for task in tasks:
            view.names.delete(task)

    def _enter_commits(self) -> None:
        """The store's id is that of its latest commit; what follows next follows all that nothing follows yet."""
        now, followed = self._view.next_commit(), self._facts.followed
        last = max(self._new.values(), key=lambda commit: (commit.number, commit.store), default=NO_COMMIT)
        if (last.number, last.store) > (now.number - 1, now.store if now.number > 1 else ""):
            self._view.put_meta(b"id", last.store.encode("ascii"))
        heads = sorted((commit.number, pack) for pack, commit in self._new.items() if commit.number)
        packs = [*(pack for pack in now.after if pack not in self._new), *(pack for _, pack in heads)]
        self._view.put_commit(max(now.number - 1, last.number), [pack for pack in packs if pack not in followed])

    # ---- rows are completed

    def _complete(self, contests: Contests) -> None:
        """Numbers manifests; enters versions' bytes and tasks' newest versions; unsets tags of what is not there."""
        view, refused = self._view, self._settled.refused
        if self._found_again:  # what their manifests' versions take, and whether they are accepted, is known now
            for key, manifest in view.manifests.every():
                if not self._found_again.isdisjoint(manifest.tensors):
                    self._renumbered.add(key)
        sizes = self._number_manifests()
        all_tasks = self._is_first or bool(self._found_again)
        newest: dict[str, tuple[str, int]] = {}
        for task, number, row in list(view.versions.rows() if all_tasks else contests.rows()):
            if row.manifest in refused:
                view.versions.delete(task, number)
                continue
            if row.manifest in sizes:
                view.versions.put(task, number, row._replace(size_bytes=sizes[row.manifest]))
            newest[task.casefold()] = task, number
        touched = (name for task in self._touched if (name := view.names.get(task)) is not None)
        for known in list(view.names.rows() if all_tasks else touched):
            task, number = newest.get(known.name.casefold(), (known.name, 0))
            if task != known.name:
                self._settled.contradicted.add(known.pack)
            view.names.put(known._replace(name=task, newest=number))
        for task, text, tag in list(view.tags.rows()):
            if (task, tag.version) in contests.shared:  # its record has only the number
                self._settled.problems.append(
                    f"tag {task}@{text}: two versions are recorded as {task}@{tag.version}; see which one it should be"
                )
            if tag.version and not view.versions.has(task, tag.version):
                self._settled.problems.append(f"tag {task}@{text}: its version {tag.version} is not there any more")
                view.tags.put(task, text, TagRow(0, tag.time_ns, tag.pack))
                self._settled.contradicted.add(tag.pack)

    def _number_manifests(self) -> dict[bytes, int]:
        """Enters manifests' numbers; returns the bytes of their tensors. Those that no store accepts are refused."""
        view = self._view
        missing: list[int] = []
        sizes: dict[bytes, int] = {}
        fresh = view.take_numbers(len(self._entered))
        for key in sorted(self._entered | self._renumbered):
            number = fresh
            if key in self._entered:
                fresh += 1
            else:
                number = _number_of(view, key)
            try:
                sizes[key] = _number_manifest(view, key, number, missing)
            except CheckpointError as error:
                self._settled.refused[key] = error.problem
        if missing:
            listed = view.contents.get(NO_PACK) if NO_PACK in view.contents else ContentsRow.of((), ())
            view.contents.put(NO_PACK, listed.with_more(missing, [0] * len(missing)))
        return sizes


def _number_of(view: View, key: bytes) -> int:
    """The number of a manifest that was entered earlier.

    Raises:
        DamagedError: it is not as it was then.
    """
    row = view.manifests.get(key)
    if row is None or manifest_hash(view.manifests.text(key)) != key:
        raise DamagedError(f"manifest {key.hex()}", "missing, or its hash differs")
    return row.number


def _number_manifest(view: View, key: bytes, number: int, missing: list[int]) -> int:
    """Enters a manifest's number and those of its tensors; returns the tensors' bytes. Appends the numbers of those
    that no pack has to `missing`.

    Raises:
        CheckpointError: it is not what a store accepts.
    """
    manifest = view.manifests.text(key)
    record = json.loads(manifest)  # it was checked when it was entered
    names = [Digest(name) for name in sorted(tensor_names(record))]
    rows = []
    for name in names:
        found = view.tensors.stored(name)
        if found is None:  # no pack has it: listed as missing, so that its place is known when it comes back
            missing.append(view.take_numbers(1))
            found = view.tensors.put(name, TensorRow(missing[-1], NO_PACK, 0, 0, "U8", ()))
        rows.append(found)
    view.manifests.put(key, number, rows, manifest)
    places = [TensorRow.peek(row) for row in rows]
    if all(place.pack != NO_PACK for place in places):
        tensors = {str(name): (place.dtype, place.shape) for name, place in zip(names, places, strict=True)}
        check_record(record, tensors, "its manifest")
    return sum(place.length for place in places)


def _tasks_in(records: Records) -> set[str]:
    """The case-folded names of the tasks that records say something of."""
    return {task.casefold() for task in (*records.highest_numbers(), *(tag.task for tag in records.tags))}


def _only(records: Records, tasks: Container[str]) -> Records:
    """What records say of some tasks, by their case-folded names."""
    return replace(
        records,
        versions=[version for version in records.versions if version.task.casefold() in tasks],
        removed=[one for one in records.removed if one[0].casefold() in tasks],
        tags=[tag for tag in records.tags if tag.task.casefold() in tasks],
        highest={task: number for task, number in records.highest.items() if task.casefold() in tasks},
    )


def _is_good(path: Path, digest: Digest, row: TensorRow) -> bool:
    """Whether a tensor can be read where its row says, and has that digest."""
    try:
        with open_pack(pack_path(path, row.pack)) as file:
            found = PackReader(file).digest(row.dtype, row.shape, row.offset, row.length)
            return found == from_digest(digest)
    except (OSError, DamagedError):
        return False
