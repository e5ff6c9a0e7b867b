"""Rewrites packs that are mostly dead: what versions need of them moves into one new pack."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pear_store.counted import counted
from pear_store.errors import DamagedError, from_os_error
from pear_store.format.container import Header
from pear_store.format.digest import Digest, RawTensor, is_digest
from pear_store.format.pack import Records
from pear_store.local.catalog import enter, forget_manifests, forget_removals, leave, rows_of, settled_removals
from pear_store.local.index import State, View
from pear_store.local.log import Operation, info
from pear_store.local.mark import TENSOR, Marked, PackUse, is_needed, mark
from pear_store.local.opened import OpenStore
from pear_store.local.packs import WrittenPack, pack_path, read_records, write_pack
from pear_store.local.recorded import Recorded

REPACK_BYTES = 256 * 1024 * 1024
"""The most live bytes that one step of a repack moves"""
REPACK_HEADER_BYTES = 4 * 1024 * 1024
REPACK_MANIFEST_BYTES = 16 * 1024 * 1024
"""The most inflated manifests that one pack of a repack has, if it was made of several"""


def choose_packs(packs: dict[bytes, PackUse], repack_all: bool) -> list[bytes]:
    """Chooses packs that are worth rewriting.

    With `repack_all`: packs with dead bytes, and small packs. Otherwise: packs that are more than two thirds dead, if
    rewriting them frees a tenth of the store. Each byte that is written then frees two or more. In both cases: packs
    whose tensors are all dead; and packs without tensors, if there are many.
    """
    needed = {pack: use for pack, use in packs.items() if use.needed}
    if repack_all:
        small = [pack for pack, use in needed.items() if use.row.tensor_bytes * 4 < REPACK_BYTES]
        dead = [pack for pack, use in needed.items() if use.dead_bytes]
        many = 2
    else:
        small = [pack for pack, use in needed.items() if not use.row.tensor_bytes]
        dead = [pack for pack, use in needed.items() if use.dead_bytes * 3 > use.row.tensor_bytes * 2]
        many = _RECORD_PACKS
        if sum(needed[pack].dead_bytes for pack in dead) * 10 < sum(use.row.tensor_bytes for use in needed.values()):
            dead = []
    emptied = [pack for pack, use in needed.items() if use.dead_bytes and not use.live_bytes]  # only records are left
    chosen = {*dead, *emptied, *(small if len(small) >= many else ())}
    return [pack for pack in needed if pack in chosen]


_RECORD_PACKS = 8


def steps(victims: list[bytes], packs: dict[bytes, PackUse]) -> Iterator[list[bytes]]:
    """Groups packs into steps of at most REPACK_BYTES live bytes and REPACK_HEADER_BYTES of headers.

    A pack that has more is a step of its own.
    """
    step: list[bytes] = []
    size = headers = 0
    for pack in victims:
        row = packs[pack].row
        header = row.file_bytes - row.tensor_bytes
        if step and (size + packs[pack].live_bytes > REPACK_BYTES or headers + header > REPACK_HEADER_BYTES):
            yield step
            step, size, headers = [], 0, 0
        step.append(pack)
        size += packs[pack].live_bytes
        headers += header
    if step:
        yield step


@dataclass
class Needed:
    """What is needed of some packs: tensors with their numbers, and records. Also has the packs' headers."""

    headers: dict[bytes, Header] = field(default_factory=dict)
    tensors: dict[Digest, RawTensor] = field(default_factory=dict)
    numbers: dict[Digest, int] = field(default_factory=dict)
    records: Records = field(default_factory=Records)

    @property
    def manifest_bytes(self) -> int:
        """Of each manifest once, inflated."""
        return sum({version.hash: len(version.manifest) for version in self.records.versions}.values())

    def merge(self, other: "Needed") -> None:
        self.headers.update(other.headers)
        self.tensors.update(other.tensors)
        self.numbers.update(other.numbers)
        self.records.versions += other.records.versions
        self.records.removed += other.records.removed
        self.records.tags += other.records.tags
        self.records.highest.update(other.records.highest)
        self.records.removed_manifests.update(other.records.removed_manifests)


def _needed_of(opened: OpenStore, view: View, pack: bytes, marked: Marked, recorded: Recorded) -> Needed:
    """What is still needed of a pack, by the pack's own header.

    Raises:
        DamagedError: something in it is damaged.
    """
    header, records, problems = read_records(pack_path(opened.path, pack))
    if problems:
        raise DamagedError(f"pack {pack.hex()}", f"{problems[0]} does not match its hash")
    found = Needed({pack: header})
    for name in header.places:
        if not is_digest(name):
            continue
        row = view.tensors.get(Digest(name))
        if row is not None and row.pack == pack and is_needed(marked.marks, row):
            digest = Digest(name)
            found.tensors[digest] = opened.tensor(view, digest, row)
            found.numbers[digest] = row.number
    live = bytes(map(marked.marks.__getitem__, view.contents.get(pack).numbers)).count(TENSOR)
    if live != len(found.tensors):
        raise DamagedError(
            f"pack {pack.hex()}", f"{live} of its tensors are needed, rows of {len(found.tensors)} are there"
        )
    found.records = rows_of(view, pack, records, marked.is_settled)
    if len(found.records) != marked.recorded[pack] or not recorded.knows(view, pack, records):
        raise DamagedError(f"pack {pack.hex()}", "its records are not what the index says")
    return found


def move(opened: OpenStore, view: View, contents: Needed) -> WrittenPack:
    """Writes contents into a new pack and points the index there."""
    written = write_pack(opened.path, contents.tensors, contents.records, view.next_commit())
    enter(opened.path, view, written, contents.records, contents.numbers, contents.tensors)
    return written


def repack(opened: OpenStore, victims: list[bytes], marked: Marked, as_of: State | None) -> tuple[int, State]:
    """Moves what is needed of some packs into one new pack, or into a few if their manifests are long.

    Args:
        victims: the packs.
        marked: what was needed in the state `as_of`. If there was a commit since, it is marked anew, because an add may
            need what was dead.

    Returns:
        the dead bytes that had to stay, and the state after the move.
    """
    packs: list[WrittenPack] = []
    moved: list[bytes] = []

    def change(view: View) -> tuple[int, State]:
        packs.clear()
        moved.clear()
        left = 0
        contents: list[Needed] = []
        recorded = Recorded(opened.path)
        now = marked if view.before == as_of else mark(view, is_settled=settled_removals(opened.path))
        for pack in victims:
            if pack not in view.packs:
                continue
            try:
                found = _needed_of(opened, view, pack, now, recorded)
            except DamagedError:  # a damaged pack stays where it is, so that a repair finds it
                left += marked.packs[pack].dead_bytes
                continue
            moved.append(pack)
            if contents and contents[-1].manifest_bytes + found.manifest_bytes <= REPACK_MANIFEST_BYTES:
                contents[-1].merge(found)
            else:
                contents.append(found)
        forget_manifests(view, now.marks)  # of versions that were removed meanwhile, with their tensors' rows
        leave(opened.path, view, moved, {pack: header for one in contents for pack, header in one.headers.items()})
        packs.extend(move(opened, view, one) for one in contents if one.tensors or one.records)
        forget_removals(view, set(moved))
        return left, view.state if view.wrote else view.before

    with Operation(__name__, "repack", opened.path) as operation:
        try:
            result = opened.write_packs(change, packs)
        except OSError as error:
            raise from_os_error(error, opened.path) from None
        opened.unlink_doomed()
        operation.size_bytes = sum(pack.file_bytes for pack in packs)
    if moved:
        before = sum(marked.packs[pack].row.file_bytes for pack in moved)
        info(
            __name__, "gc %s: wrote %s of %d bytes anew, as %d of %d bytes",
            opened.path, counted(len(moved), "pack"), before, len(packs), operation.size_bytes,
        )  # fmt: skip
    return result
