"""Marks what versions need. This takes one byte for each number of a tensor or manifest, and no list of either."""

from array import array
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from itertools import compress
from operator import gt

from pear_store.errors import DamagedError
from pear_store.local.index import View
from pear_store.local.rows import NO_PACK, ContentsRow, PackRow, RemovedRow, TensorRow


@dataclass
class PackUse:
    """How much of a pack is needed.

    Args:
        row: the pack's row.
        live_bytes: bytes of its tensors that versions need.
        needed: whether versions need a tensor of it, or rows name it for its records.
        contents: its new row of contents, if other tensors count as removed now.
    """

    row: PackRow
    live_bytes: int = 0
    needed: bool = False
    contents: ContentsRow | None = None

    @property
    def dead_bytes(self) -> int:
        return self.row.tensor_bytes - self.live_bytes


@dataclass
class Marked:
    """What versions need and what they do not need. Bytes are tensor bytes."""

    marks: bytearray
    packs: dict[bytes, PackUse] = field(default_factory=dict)
    recorded: Counter[bytes] = field(default_factory=Counter)
    """How many rows name each pack as the one that records them"""
    versions: int = 0
    logical_bytes: int = 0
    kept_tensors: int = 0
    kept_bytes: int = 0
    removed_tensors: int = 0
    removed_bytes: int = 0
    lost: ContentsRow | None = None
    """The new row of NO_PACK, as `PackUse.contents`"""
    is_settled: Callable[[RemovedRow], bool] = lambda row: False
    """Says which removals need no pack. Its answers stay the same, even if packs are deleted later."""


def mark(
    view: View,
    dropped: Set[tuple[str, int]] = frozenset(),
    is_settled: Callable[[RemovedRow], bool] = lambda row: False,
) -> Marked:
    """Marks and counts what versions need.

    Args:
        dropped: versions that are left out.
        is_settled: says of a removal whether it needs no pack.

    Raises:
        DamagedError: an index row cannot be trusted, so nothing may be called dead.
    """
    count = view.next_number()
    if count > max(_MARKS, _NUMBERS_A_ROW * (len(view.tensors) + len(view.manifests))):
        raise DamagedError("the index's count of numbers", f"{count} is far beyond what is stored")
    marked = Marked(bytearray(count), is_settled=is_settled)
    marks, packs = marked.marks, marked.packs
    for pack, pack_row in view.packs.every():
        packs[pack] = PackUse(pack_row)
    expected = len(packs) + (NO_PACK in view.contents)
    if len(view.contents) != expected:
        raise DamagedError("index table contents", f"{len(view.contents)} rows, expected {expected}")

    def need(pack: bytes) -> PackUse:
        if pack not in packs:
            raise DamagedError(f"pack {pack.hex()}", "the index does not list it")
        packs[pack].needed = True
        return packs[pack]

    manifests = array("I")
    seen: set[bytes] = set()
    newest: dict[str, int] = {}
    recorded = marked.recorded
    table = view.manifests
    for task, version, row in view.versions.every():
        newest[task] = version
        if dropped and (task, version) in dropped:
            continue
        marked.versions += 1
        marked.logical_bytes += row.size_bytes
        recorded[row.pack] += 1
        if row.manifest in seen:
            continue
        seen.add(row.manifest)
        manifest = table.get(row.manifest)
        if manifest is None:
            raise DamagedError(f"manifest of version {task}@{version}", "missing")
        manifests.append(manifest.number)
        try:
            for number in manifest.tensors:
                marks[number] = TENSOR
        except IndexError:
            raise DamagedError("the index's count of numbers", "lower than a number in use") from None
    recorded.update(_recording(view, newest, is_settled))
    for pack in recorded:
        need(pack)
    packs[NO_PACK] = PackUse(PackRow(0, 0))
    needed = marks.count(TENSOR)
    try:
        for number in manifests:
            if marks[number] == TENSOR:
                raise DamagedError(f"index number {number}", "both a tensor and a manifest have it")
            marks[number] = MANIFEST
    except IndexError:
        raise DamagedError("the index's count of numbers", "lower than a number in use") from None
    for pack, listed in view.contents.every():
        try:
            live = bytes(map(marks.__getitem__, listed.numbers))
        except IndexError:
            raise DamagedError("the index's count of numbers", "lower than a number in use") from None
        if pack not in packs or MANIFEST in live:
            raise DamagedError(f"contents of pack {pack.hex()}", "it lists a manifest, or the pack has no row")
        if count := live.count(TENSOR):
            use = need(pack)
            use.live_bytes = sum(compress(listed.lengths, live))
            marked.kept_tensors += count
            marked.kept_bytes += use.live_bytes
        dead = live.translate(_OTHER)
        if dead != listed.removed:
            fresh = bytes(map(gt, dead, listed.removed))
            marked.removed_tensors += fresh.count(1)
            marked.removed_bytes += sum(compress(listed.lengths, fresh))
            packs[pack].contents = ContentsRow(listed.numbers, listed.lengths, dead)
    marked.lost = packs.pop(NO_PACK).contents
    if marked.kept_tensors != needed:
        raise DamagedError("index table contents", f"{needed} tensors are needed, {marked.kept_tensors} are listed")
    return marked


_MARKS, _NUMBERS_A_ROW = 1 << 28, 1000
"""The highest count of numbers that is believed: this, or so many for each tensor and manifest. A mark is a byte."""
TENSOR, MANIFEST = 1, 2
"""Marks of numbers that a version needs"""


def is_needed(marks: bytearray, row: TensorRow) -> bool:
    return row.number < len(marks) and marks[row.number] == TENSOR


def _recording(view: View, newest: dict[str, int], is_settled: Callable[[RemovedRow], bool]) -> list[bytes]:
    """The packs that record names, tags and unsettled removals; one item for each of these.

    Args:
        newest: the tasks' newest versions. It is emptied.

    Raises:
        DamagedError: a row is damaged, or contradicts the versions.
    """
    packs = []
    for name in view.names.every():
        packs.append(name.pack)
        if newest.pop(name.name, 0) != name.newest or name.newest > name.highest:
            raise DamagedError(
                f"index row of {name.name!r}", f"it says that version {name.newest} is the newest, which is wrong"
            )
    if newest:
        raise DamagedError(f"index row of {min(newest)!r}", "missing")
    for task, text, tag in view.tags.every():
        packs.append(tag.pack)
        if tag.version and not view.versions.has(task, tag.version):
            raise DamagedError(f"tag {task}@{text}", f"there is no version {tag.version}")
    for task, number, removed in view.removed.every():
        if not is_settled(removed):
            packs.append(removed.pack)
        if view.versions.has(task, number):
            raise DamagedError(f"version {task}@{number}", "both there and removed")
    return packs


_OTHER = bytes([1, 0]) + bytes(254)  # translates marks: 1 for a number that is not needed
