"""What a store knows of a remote's log."""

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from pear_store.errors import DamagedRemoteError, FormatError, NotFoundError, PlaceError
from pear_store.format.container import Place as TensorPlace
from pear_store.format.digest import Digest
from pear_store.remote.log import (
    SETTINGS_NAME,
    Entry,
    LoggedTag,
    LoggedVersion,
    LogIndex,
    PackListing,
    encode_settings,
    entry_name,
    index_name,
)
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.mirror import Mirror, opened_mirror
from pear_store.remote.reading import read_on

pytestmark = pytest.mark.slow

MANIFEST = b"{}"
KEY = hashlib.sha256(MANIFEST).digest()
PACK = bytes(32)
TENSOR = Digest("sha256:" + "1" * 64)


class Counting(MemoryPlace):
    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def get(self, name: str, at_most: int) -> bytes:
        self.asked[name] += 1
        return super().get(name, at_most)


def remote(*indexes: LogIndex, place: MemoryPlace | None = None) -> MemoryPlace:
    """A place with a log."""
    place = place or MemoryPlace("place")
    place.create(SETTINGS_NAME, encode_settings("0" * 32))
    for index in indexes:
        append(place, index)
    return place


def append(place: MemoryPlace, index: LogIndex) -> None:
    entries = sorted(place.list("log/"))
    previous = hashlib.sha256(place.objects[entries[-1]]).digest() if entries else None
    data = index.encode()
    name = hashlib.sha256(data).digest()
    place.put(index_name(name), data)
    assert place.create(entry_name(len(entries) + 1), Entry("0" * 32, previous, name, 0, "").encode())


def version(task: str, number: int) -> LogIndex:
    return LogIndex(manifests={KEY: MANIFEST}, versions=[LoggedVersion(task, number, 0, KEY)])


def listing(pack: bytes) -> LogIndex:
    return LogIndex(packs={pack: PackListing(1000, {TENSOR: TensorPlace("U8", (4,), 10, 4)})})


def test_reads_on_from_where_it_was(tmp_path: Path) -> None:
    place = Counting()
    remote(*(version("dtd", number) for number in range(1, 31)), place=place)
    with opened_mirror(tmp_path / "m", "place") as mirror:
        read_on(mirror, place)
        assert mirror.head[0] == 30
    assert max(place.asked.values()) == 1
    place.asked.clear()
    append(place, version("dtd", 31))
    with opened_mirror(tmp_path / "m", "place") as mirror:
        read_on(mirror, place)
        assert [one.number for one in mirror.versions("dtd")] == list(range(1, 32))
        assert mirror.manifest(KEY) == MANIFEST
    asked = [name for name in place.asked if name.startswith("log/")]
    assert len(asked) <= 4, "the one that is known, the new one, and the next ones that are not there"


def test_says_what_the_log_says() -> None:
    gone = LogIndex(removed=[("dtd", 1)], drop=[PACK])
    tag = LogIndex(tags=[LoggedTag("dtd", "prod", 2, None)], highest={"dtd": 9, "svhn": 2})
    both = listing(b"b" * 32)
    with opened_mirror(None, "place") as mirror:
        read_on(mirror, remote(listing(PACK), version("dtd", 1), version("dtd", 2), both, tag, gone))
        assert (mirror.tasks(), mirror.highest("DTD"), mirror.spelling("DTD")) == (["dtd", "svhn"], 9, "dtd")
        assert [one.number for one in mirror.versions("dtd")] == [2]
        assert [one.number for one in mirror.removed()] == [1]
        assert mirror.version("dtd", 1) == (LoggedVersion("dtd", 1, 0, KEY), True)
        assert (mirror.tag("dtd", "prod"), mirror.tags(), mirror.tags_of("dtd", 2)) == (
            2,
            {("dtd", "prod"): 2},
            ["prod"],
        )
        assert mirror.is_dropped(PACK)
        assert mirror.places(TENSOR) == [(b"b" * 32, TensorPlace("U8", (4,), 10, 4))]
        assert mirror.has(TENSOR) and not mirror.has(Digest("sha256:" + "2" * 64))


BROKEN = {
    "a version twice": [version("dtd", 1), version("dtd", 1)],
    "a number used again": [version("dtd", 1), LogIndex(removed=[("dtd", 1)]), version("dtd", 1)],
    "another case": [version("dtd", 1), version("DTD", 2)],
    "no manifest": [LogIndex(versions=[LoggedVersion("dtd", 1, 0, KEY)])],
    "a tag of nothing": [LogIndex(tags=[LoggedTag("dtd", "prod", 1, None)])],
    "a tag moved unseen": [version("dtd", 1), LogIndex(tags=[LoggedTag("dtd", "prod", 1, 2)])],
    "a removal of nothing": [LogIndex(removed=[("dtd", 1)])],
    "a removal of what is tagged": [
        version("dtd", 1),
        LogIndex(tags=[LoggedTag("dtd", "prod", 1, None)]),
        LogIndex(removed=[("dtd", 1)]),
    ],
    "a pack twice": [listing(PACK), listing(PACK)],
    "a dropped name used again": [LogIndex(drop=[PACK]), listing(PACK)],
    "an index that is named dropped": [
        LogIndex(highest={"dtd": 2}),
        LogIndex(strays=[index_name(hashlib.sha256(LogIndex(highest={"dtd": 2}).encode()).digest())]),
    ],
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_log_that_contradicts_itself_is_refused(what: str) -> None:
    *before, last = BROKEN[what]
    with opened_mirror(None, "place") as mirror:
        read_on(mirror, place := remote(*before))
        with pytest.raises(DamagedRemoteError):
            mirror.check(mirror.head, last)
        append(place, last)
        with pytest.raises(DamagedRemoteError, match=entry_name(len(before) + 1)):
            read_on(mirror, place)
        assert mirror.head[0] == len(before)


def test_an_entry_is_not_judged_by_a_log_that_moved_on(tmp_path: Path) -> None:
    place = remote(version("dtd", 1))
    with opened_mirror(tmp_path / "m", "place") as mirror, opened_mirror(tmp_path / "m", "place") as other:
        read_on(mirror, place)
        head = mirror.head
        assert mirror.check(head, version("dtd", 2))
        append(place, version("dtd", 2))
        read_on(other, place)
        assert not mirror.check(head, version("dtd", 2))


def test_processes_that_begin_a_mirror_together_all_read_it(tmp_path: Path) -> None:
    """None takes the others' rows for damage, and the file from under them."""
    place = remote(*(version("dtd", number) for number in range(1, 4)))
    count = 6
    begin = Barrier(count)

    def read(path: Path) -> tuple[int, int]:
        begin.wait(60)
        with opened_mirror(path, "place") as mirror:
            begin.wait(60)
            read_on(mirror, place)
            mirror.note_probed()
            return mirror.head[0], path.stat().st_ino

    with ThreadPoolExecutor(count) as pool:
        for n in range(20):
            found = list(pool.map(read, [tmp_path / f"m{n}"] * count))
            assert {head for head, _ in found} == {3} and len({file for _, file in found}) == 1


def test_a_mirror_that_another_command_made_anew_is_named(tmp_path: Path) -> None:
    place = remote(version("dtd", 1))
    with pytest.raises(PlaceError, match="made anew by another command"), opened_mirror(tmp_path / "m", "p") as mirror:
        (tmp_path / "m").unlink()
        read_on(mirror, place)


def put_back(place: MemoryPlace) -> None:
    del place.objects[entry_name(2)]


def made_anew(place: MemoryPlace) -> None:
    place.objects.clear()
    remote(version("svhn", 1), version("svhn", 2), version("svhn", 3), place=place)


def rewritten(place: MemoryPlace) -> None:
    place.objects[entry_name(2)] = place.objects[entry_name(2)].replace(b'"time_ns":0', b'"time_ns":1')


@pytest.mark.parametrize("change", [put_back, made_anew, rewritten])
def test_another_log_in_its_place_is_seen(tmp_path: Path, change: Callable[[MemoryPlace], None]) -> None:
    place = remote(version("dtd", 1), version("dtd", 2))
    with opened_mirror(tmp_path / "m", "place") as mirror:
        read_on(mirror, place)
        change(place)
        with pytest.raises(DamagedRemoteError, match="not the one that this store knows"):
            read_on(mirror, place)


def test_an_entry_whose_predecessor_was_changed_is_refused() -> None:
    place = remote(version("dtd", 1), version("dtd", 2), version("dtd", 3))
    rewritten(place)
    with opened_mirror(None, "place") as mirror, pytest.raises(DamagedRemoteError, match="does not follow"):
        read_on(mirror, place)


def test_no_remote_and_a_newer_one_are_one_line() -> None:
    with opened_mirror(None, "place") as mirror:
        with pytest.raises(NotFoundError, match="no pear-remote.json"):
            read_on(mirror, MemoryPlace())
        place = MemoryPlace()
        place.put(SETTINGS_NAME, encode_settings("0" * 32).replace(b"remote/1", b"remote/2"))
        with pytest.raises(FormatError, match="pear-remote/2"):
            read_on(mirror, place)


def test_a_lost_index_is_named() -> None:
    place = remote(version("dtd", 1))
    place.delete(next(iter(place.list("index/"))))
    with opened_mirror(None, "place") as mirror, pytest.raises(DamagedRemoteError, match="entry 1 names it"):
        read_on(mirror, place)


@pytest.mark.parametrize("data", [b"", b"no database" * 100])
def test_a_mirror_that_cannot_be_read_is_made_anew(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    with opened_mirror(tmp_path / "m", "place") as mirror:
        read_on(mirror, remote(version("dtd", 1)))
        assert mirror.head[0] == 1


def test_a_mirror_damaged_within_is_an_error_of_ours(tmp_path: Path) -> None:
    place = remote(*(version(f"t{number}", 1) for number in range(60)))
    with opened_mirror(tmp_path / "m", "place") as mirror:
        read_on(mirror, place)
    data = bytearray((tmp_path / "m").read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(PlaceError, match="delete it"), opened_mirror(tmp_path / "m", "place") as mirror:
        read_on(mirror, place)


def test_a_link_in_the_place_of_a_mirror_is_not_followed(tmp_path: Path) -> None:
    with opened_mirror(tmp_path / "other", "place") as mirror:
        mirror.note_probed()
    before = (tmp_path / "other").read_bytes()
    (tmp_path / "m").symlink_to(tmp_path / "other")
    with pytest.raises(FormatError, match="a link"):
        Mirror(tmp_path / "m", "place")
    assert (tmp_path / "other").read_bytes() == before


def test_what_both_agreed_on_is_kept(tmp_path: Path) -> None:
    with opened_mirror(tmp_path / "m", "place") as mirror:
        mirror.take([("dtd", 1), ("dtd", 2), ("dtd", 1)])
        mirror.agree([("dtd", "prod", 1), ("dtd", "old", 2), ("dtd", "old", None)])
    with opened_mirror(tmp_path / "m", "place") as mirror:
        assert mirror.taken("dtd", 2) and not mirror.taken("dtd", 3)
        assert mirror.agreed_tags() == {("dtd", "prod"): 1} and mirror.agreed("dtd", "prod") == 1
