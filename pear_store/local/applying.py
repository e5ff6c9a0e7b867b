"""Enters packs that lie in their places already in the index. contests.py settles their contradictions."""

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pear_store.errors import CheckpointError, DamagedError
from pear_store.format.checkpoint import check_record
from pear_store.format.container import Header
from pear_store.format.digest import Digest, from_digest, is_digest
from pear_store.format.manifest import manifest_digests, manifest_hash
from pear_store.format.pack import NO_COMMIT, Commit, Records
from pear_store.format.record import tensor_names
from pear_store.local.contests import Contests, Facts, unsettled
from pear_store.local.index import View
from pear_store.local.packs import PackReader, open_pack, pack_path, read_records, read_records_alone
from pear_store.local.rows import NO_PACK, ContentsRow, NameRow, PackRow, RemovedRow, TagRow, TensorRow


@dataclass
class Settled:
    """What had to be decided because packs contradict each other, or hold what no store accepts."""

    problems: list[str] = field(default_factory=list)
    contradicted: set[bytes] = field(default_factory=set)
    """Packs whose records differ from the index now. The caller rewrites them (`repair.rewrite_packs`)."""
    refused: dict[bytes, str] = field(default_factory=dict)
    """Manifests that no store accepts, and what is wrong with each. Their versions are left out."""


class Applying:
    """Enters packs that lie in their places, in one transaction: :meth:`apply` for each, then :meth:`settle`.

    The same packs give the same rows, in any order and in any number of transactions. Only these internals may differ:

    - the numbers of tensors and manifests;
    - which of several good copies of a tensor is used;
    - which unneeded manifests are left;
    - whether the next commit follows more packs than it must.

    So if a new pack says something of a task that the index knows, all packs are read again: that task's rows were
    settled without the new pack. This reads the header of each pack in the index.
    """

    def __init__(self, path: Path, view: View) -> None:
        self._path = path
        self._view = view
        self._facts = Facts()
        self._is_first = not len(view.packs)
        """Whether the index had no packs. Then all tasks are settled, and records are entered as packs come."""
        self._touched: set[str] = set()
        """If it had packs: the tasks to settle, by their case-folded names"""
        self._spellings: set[str] = set()
        """The same tasks, as their names are written"""
        self._new: dict[bytes, Commit] = {}
        self._entered: set[bytes] = set()
        """Manifests that have no numbers yet"""
        self._renumbered: set[bytes] = set()
        """Other manifests, whose tensors may have been found since"""
        self._found_again: set[int] = set()
        """Numbers of tensors that no pack had before"""
        self._settled = Settled()

    # ---- one pack

    def apply(self, pack: bytes, header: Header, records: Records) -> None:
        """Enters what a pack holds and records. A pack that the index has already changes nothing."""
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
                facts.tagged[key] = tag.manifest
                view.tags.put(tag.task, tag.tag, TagRow(tag.version or 0, tag.time_ns, pack))

    def _raise_highest(self, task: str, number: int, pack: bytes) -> None:
        known = self._view.names.get(task)
        if known is None or (known.highest, known.pack, known.name) < (number, pack, task):
            self._view.names.put(NameRow(task, 0, number, pack))

    # ---- all together

    def settle(self) -> Settled:
        """Settles what the packs contradict each other in, and completes the rows.

        Raises:
            DamagedError: a pack that the index had before cannot be read, or a row cannot be trusted. The caller must
                not commit the transaction.
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
        """Enters what packs record of the tasks to settle. New tasks are in new packs only; for others all are read."""
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
        """Tasks of which a pack may now keep more versions, because its commit is known to have succeeded."""
        tasks = set()
        for version in read_records_alone(pack_path(self._path, pack)).versions:
            row = self._view.versions.get(version.task, version.version)
            removed = self._view.removed.get(version.task, version.version) if row is None else None
            is_gone = removed is not None and removed.recorded_in == pack
            if not is_gone and (row is None or (row.pack, row.manifest) != (pack, version.hash)):
                tasks.add(version.task.casefold())
        return tasks

    def _forget(self) -> None:
        """Deletes the rows of the tasks to settle."""
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
        """Notes the store's id, which is that of its latest commit, and the packs that the next commit follows."""
        now, followed = self._view.next_commit(), self._facts.followed
        last = max(self._new.values(), key=lambda commit: (commit.number, commit.store), default=NO_COMMIT)
        if (last.number, last.store) > (now.number - 1, now.store if now.number > 1 else ""):
            self._view.put_meta(b"id", last.store.encode("ascii"))
        heads = sorted((commit.number, pack) for pack, commit in self._new.items() if commit.number)
        packs = [*(pack for pack in now.after if pack not in self._new), *(pack for _, pack in heads)]
        self._view.put_commit(max(now.number - 1, last.number), [pack for pack in packs if pack not in followed])

    # ---- rows are completed

    def _complete(self, contests: Contests) -> None:
        """Numbers manifests. Enters versions' bytes and tasks' newest versions. Unsets tags of missing versions."""
        view, refused = self._view, self._settled.refused
        if self._found_again:  # versions that need these tensors can be checked, and their bytes counted, only now
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
        _settle_tags(view, self._facts, contests, self._settled)

    def _number_manifests(self) -> dict[bytes, int]:
        """Enters manifests' numbers, and refuses manifests that no store accepts. Returns their tensors' bytes."""
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


def _settle_tags(view: View, facts: Facts, contests: Contests, settled: Settled) -> None:
    """Moves tags with versions that got another number, and unsets tags of missing versions."""
    for task, text, tag in list(view.tags.rows()):
        meant = facts.tagged.get((task, text))
        moved = contests.moved.get((task, tag.version, meant or b""))
        if moved is not None:
            view.tags.put(task, text, tag._replace(version=moved))
            settled.contradicted.add(tag.pack)
            continue
        if (task, tag.version) in contests.shared and meant is None:  # an older record names no manifest
            settled.problems.append(
                f"tag {task}@{text}: two versions are recorded as {task}@{tag.version}; check that it is on the right "
                "one"
            )
        if tag.version and not view.versions.has(task, tag.version):
            settled.problems.append(f"tag {task}@{text}: its version {tag.version} is missing; the tag was removed")
            view.tags.put(task, text, TagRow(0, tag.time_ns, tag.pack))
            settled.contradicted.add(tag.pack)


def _number_of(view: View, key: bytes) -> int:
    """The number of a manifest that was entered earlier.

    Raises:
        DamagedError: the manifest is missing, or its hash differs.
    """
    row = view.manifests.get(key)
    if row is None or manifest_hash(view.manifests.text(key)) != key:
        raise DamagedError(f"manifest {key.hex()}", "missing, or its hash differs")
    return row.number


def _number_manifest(view: View, key: bytes, number: int, missing: list[int]) -> int:
    """Enters the numbers of a manifest and its tensors. Returns the tensors' bytes.

    Args:
        missing: gets the numbers of tensors that no pack has.

    Raises:
        CheckpointError: no store accepts the manifest.
    """
    manifest = view.manifests.text(key)
    record = json.loads(manifest)  # it was checked when it was entered
    names = [Digest(name) for name in sorted(tensor_names(record))]
    rows = []
    for name in names:
        found = view.tensors.stored(name)
        if found is None:  # no pack has it: it is listed as missing, and gets its place when a pack brings it
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
    """The case-folded names of all tasks in records."""
    return {task.casefold() for task in (*records.highest_numbers(), *(tag.task for tag in records.tags))}


def _only(records: Records, tasks: Container[str]) -> Records:
    """The records of some tasks, which are given by their case-folded names."""
    return replace(
        records,
        versions=[version for version in records.versions if version.task.casefold() in tasks],
        removed=[one for one in records.removed if one[0].casefold() in tasks],
        tags=[tag for tag in records.tags if tag.task.casefold() in tasks],
        highest={task: number for task, number in records.highest.items() if task.casefold() in tasks},
    )


def _is_good(path: Path, digest: Digest, row: TensorRow) -> bool:
    """Whether the bytes at the place that a tensor's row names have its digest."""
    try:
        with open_pack(pack_path(path, row.pack)) as file:
            found = PackReader(file).digest(row.dtype, row.shape, row.offset, row.length)
            return found == from_digest(digest)
    except (OSError, DamagedError):
        return False
