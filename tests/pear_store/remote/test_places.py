"""One contract, every place."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pear_store.errors import AbsentError, AccessError, DamagedRemoteError, PearStoreError, PlaceError
from pear_store.remote import objects
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.objects import _OF_CLIENT, ObjectPlace
from pear_store.remote.opening import check_options, open_place
from pear_store.remote.place import Place, Range, joined, probe
from pear_store.remote.sftp import SftpPlace
from pear_store.remote.web import WebPlace
from tests.pear_store.remote.servers import EndlessHandler, RangeHandler, RedirectHandler, StaticHandler

pytestmark = pytest.mark.slow


def test_what_was_written_is_read(place: Place) -> None:
    place.put("packs/ab/one", b"abc" * 1000)
    assert place.create("log/1", b"")
    assert place.get("packs/ab/one", 3000) == b"abc" * 1000
    assert place.get("log/1", 10) == b""
    place.put("packs/ab/one", b"new")
    assert place.get("packs/ab/one", 3000) == b"new"


def test_what_is_not_there_is_absent(place: Place) -> None:
    for act in (lambda: place.get("log/1", 10), lambda: place.get_ranges("packs/ab/x", [(0, 1)])):
        with pytest.raises(AbsentError, match="there is no (log/1|packs/ab/x)") as found:
            act()
        assert found.value.exit_code == 3


def test_an_object_larger_than_asked_for_is_refused(place: Place) -> None:
    place.put("log/1", bytes(100))
    assert len(place.get("log/1", 100)) == 100
    with pytest.raises(DamagedRemoteError, match="at most 99"):
        place.get("log/1", 99)


def test_ranges_come_in_the_order_asked_for(place: Place) -> None:
    data = os.urandom(300_000)
    place.put("packs/ab/one", data)
    ranges = [(200_000, 10), (0, 5), (3, 4), (0, 0), (299_999, 1), (100_000, 70_000), (2, 0)]
    assert place.get_ranges("packs/ab/one", ranges) == [data[at : at + length] for at, length in ranges]
    assert place.get_ranges("packs/ab/one", []) == []


@pytest.mark.parametrize("wanted", [(90, 11), (100, 1), (500, 3), (0, 1 << 40)])
def test_a_range_beyond_the_end_is_damage(place: Place, wanted: Range) -> None:
    place.put("packs/ab/one", bytes(100))
    with pytest.raises((DamagedRemoteError, PlaceError)):
        place.get_ranges("packs/ab/one", [(0, 10), wanted])


def test_a_name_is_created_once(place: Place) -> None:
    assert place.create("log/1", b"first")
    assert not place.create("log/1", b"second")
    assert place.get("log/1", 10) == b"first"
    place.delete("log/1")
    place.delete("log/1")
    assert place.create("log/1", b"third")


def test_of_many_that_create_one_name_one_wins(place: Place) -> None:
    def race(round_: int) -> None:
        start = threading.Barrier(6)

        def create(number: int) -> int | None:
            start.wait()
            return number if place.create(f"log/{round_}", str(number).encode() * 1000) else None

        with ThreadPoolExecutor(6) as pool:
            won = [number for number in pool.map(create, range(6)) if number is not None]
        assert len(won) == 1
        assert place.get(f"log/{round_}", 10_000) == str(won[0]).encode() * 1000

    for round_ in range(5):
        race(round_)


def test_lists_what_is_below_a_prefix(place: Place) -> None:
    for name in ("packs/ab/one", "packs/cd/two", "index/one", "log/1"):
        place.put(name, b"x")
    assert sorted(place.list("packs/")) == ["packs/ab/one", "packs/cd/two"]
    place.delete("packs/ab/one")
    assert sorted(place.list("packs/")) == ["packs/cd/two"]
    assert list(place.list("probe/")) == []


def test_every_place_here_passes_the_probe_and_keeps_nothing_of_it(place: Place) -> None:
    probe(place)
    assert list(place.list("probe/")) == []


class Overwriting(MemoryPlace):
    """As some servers do that speak S3: a condition is accepted and not kept."""

    def create(self, name: str, data: bytes) -> bool:
        self.put(name, data)
        return True


class Denying(MemoryPlace):
    def create(self, name: str, data: bytes) -> bool:
        return False


class Silent(Overwriting):
    """Overwrites, and says that it did not."""

    def create(self, name: str, data: bytes) -> bool:
        was_there = name in self.objects
        self.put(name, data)
        return not was_there


@pytest.mark.parametrize("kind", [Overwriting, Denying, Silent])
def test_a_place_that_overwrites_is_refused(kind: type[MemoryPlace]) -> None:
    with pytest.raises(PlaceError, match="it can only be read|cannot be written") as found:
        probe(kind())
    assert found.value.exit_code == 12


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PlaceError, match="no hard links"):
        probe(DirectoryPlace(tmp_path))
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_no_link_leads_out_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    place = DirectoryPlace(tmp_path / "in")
    place.put("index/one", b"x")
    (tmp_path / "in" / "packs").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "index" / "two").symlink_to(tmp_path / "out" / "secret")
    for act in (
        lambda: place.put("packs/one", b"x"),
        lambda: place.create("packs/one", b"x"),
        lambda: place.get("packs/secret", 100),
        lambda: place.get("index/two", 100),
        lambda: place.delete("packs/secret"),
    ):
        with pytest.raises(PearStoreError):
            act()
    place.delete("index/two")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["secret"]


def test_a_directory_that_is_not_there_or_may_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(PlaceError, match="no such directory"):
        DirectoryPlace(tmp_path / "none").get("log/1", 10)
    if os.getuid():
        tmp_path.chmod(0o500)
        with pytest.raises(AccessError):
            DirectoryPlace(tmp_path).create("log/1", b"")


def test_a_full_disk_is_named(small_disk: Path) -> None:
    place = DirectoryPlace(small_disk)
    for act in (place.put, place.create):
        with pytest.raises(PearStoreError, match="no space left") as found:
            act("packs/ab/large", bytes(2 << 20))
        assert found.value.exit_code == 6
    assert place.create("log/1", b"x"), "what was written in vain was removed"


@pytest.mark.parametrize("handler", [RangeHandler, StaticHandler])
def test_a_web_server_is_read_with_and_without_ranges(
    tmp_path: Path, serve: Callable[..., str], handler: type[StaticHandler]
) -> None:
    data = os.urandom(3_000_000)
    DirectoryPlace(tmp_path).put("packs/ab/one", data)
    place = WebPlace(serve(tmp_path, handler) + "/")
    ranges = [(2_900_000, 100), (0, 5), (3, 4), (0, 0), (1_500_000, 10)]
    for _ in range(2):
        assert place.get("packs/ab/one", len(data)) == data
        assert place.get_ranges("packs/ab/one", ranges) == [data[at : at + length] for at, length in ranges]
    with pytest.raises(DamagedRemoteError):
        place.get("packs/ab/one", len(data) - 1)
    for wanted in ((2_999_999, 2), (3_000_000, 1)):
        with pytest.raises(DamagedRemoteError):
            place.get_ranges("packs/ab/one", [wanted])
    with pytest.raises(AbsentError):
        place.get("packs/ab/two", 10)
    assert place.get("packs/ab/one", len(data)) == data, "a refusal spoils no connection"
    with pytest.raises(PlaceError, match="only be read"):
        probe(place)
    place.close()


def test_a_web_server_cannot_lead_elsewhere_or_go_on_for_ever(tmp_path: Path, serve: Callable[..., str]) -> None:
    with pytest.raises(PlaceError, match="redirects, which is not followed"):
        WebPlace(serve(tmp_path, RedirectHandler)).get("log/1", 100)
    place = WebPlace(serve(tmp_path, EndlessHandler))
    with pytest.raises(DamagedRemoteError, match="more than 100 bytes"):
        place.get("log/1", 100)
    assert place.get_ranges("log/1", [(70_000, 4)]) == [bytes(4)]
    place.close()


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path, sshd: dict[str, str]) -> None:
    for make in (
        lambda: WebPlace("http://127.0.0.1:9"),
        lambda: SftpPlace("sftp://127.0.0.1:9/x", {}),
        lambda: SftpPlace(f"{sshd['url']}/x", {"key_file": sshd["key_file"], "known_hosts": os.devnull}),
    ):
        place = make()
        with pytest.raises(PlaceError) as found:
            place.get("log/1", 10)
        assert "\n" not in str(found.value)
        place.close()


def test_a_bucket_that_is_not_there_and_a_denied_one(s3_options: dict[str, str]) -> None:
    place = ObjectPlace("s3://nobody/x", s3_options)
    with pytest.raises(PlaceError, match="no such bucket"):
        place.get("log/1", 10)
    place.close()
    with pytest.raises(PlaceError) as found:
        ObjectPlace("s3://bucket/x", {**s3_options, "no_such_option": "1"})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("url", ["ftp://host/x", "s4://x", "https://user:word@host/x", "http://[bad/", "sftp:///x"])
def test_urls_that_name_no_place_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(PlaceError) as found:
        open_place(url)
    assert "word@" not in str(found.value)


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("remote", "region", r"option 'region': a directory has no options; leave it out"),
        ("file:///remote", "region", r"option 'region': a directory has no options; leave it out"),
        ("https://host/x", "endpoint", r"option 'endpoint': a website has no options; leave it out"),
        ("sftp://host/x", "region", r"option 'region': expected one of key_file, known_hosts"),
        ("s3://b/x", "reggion", r"'reggion' is not valid for store 'S3'"),
        ("gs://b/x", "region", r"'region' is not valid for store 'GCS'"),
        ("az://b/x", "region", r"'region' is not valid for store 'MicrosoftAzure'"),
        *(("s3://b/x", key, f"'{key}' is not valid") for key in ("config", "url", "client_options", "retry_config")),
        *(("s3://b/x", key, f"option '{key.lower()}': Pear itself sets up the HTTP client; leave it out")
          for key in ("Proxy_URL", *sorted(_OF_CLIENT))),
    ],
)  # fmt: skip
def test_an_option_that_a_place_does_not_have_is_refused(url: str, key: str, message: str) -> None:
    with pytest.raises(PlaceError, match=message) as found:
        open_place(url, {"account_name": "a", key: "1"} if url.startswith("az") else {key: "1"})
    assert "\n" not in str(found.value)


def test_secrets_are_not_taken_as_options() -> None:
    for key in ("secret_access_key", "session_token", "password", "account_key", "sas_key"):
        with pytest.raises(PlaceError, match="secrets are not kept"):
            check_options({key: "x"})
    check_options({"endpoint": "http://x", "region": "y", "key_file": "z"})


def test_neighbours_are_read_in_one_request_of_bounded_size() -> None:
    assert joined([(100, 10), (0, 50), (20, 5)]) == [((0, 110), [1, 2, 0])]
    assert len(joined([(0, 10), (1 << 20, 10)])) == 2
    assert len(joined([(at << 20, 1 << 20) for at in range(40)])) == 3


def test_a_folder_that_a_lost_connection_kept_from_being_made_is_made_by_the_next_try(
    sshd: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paramiko

    make = paramiko.SFTPClient.mkdir
    cut: list[str] = []

    def mkdir(sftp: Any, path: str, *mode: int) -> None:
        if path.endswith("packs/ab") and not cut:
            cut.append(path)
            sftp.get_channel().close()
        make(sftp, path, *mode)

    monkeypatch.setattr(paramiko.SFTPClient, "mkdir", mkdir)
    options = {"key_file": sshd["key_file"], "known_hosts": sshd["known_hosts"]}
    place = SftpPlace(f"{sshd['url']}{tmp_path}/remote", options)
    with pytest.raises(PlaceError) as found:
        place.put("packs/ab/one", b"1")
    assert found.value.again and cut
    place.put("packs/ab/one", b"1")
    assert place.get("packs/ab/one", 1) == b"1"
    place.close()


def test_a_large_object_goes_whole_where_the_line_is_fast_and_in_parts_where_it_fails(
    s3_options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request has to end within the time of a stall, so what would take long goes in parts."""
    monkeypatch.setattr(objects, "_WHOLE_S", 600.0)  # also of a busy machine
    place = ObjectPlace(f"s3://bucket/{tmp_path.name}", s3_options)
    real, how = place._obstore, list[bool]()
    failing = False

    at_once, most = threading.Semaphore(0), list[int]()

    class Watched:
        def put(self, *args: Any, **options: Any) -> None:
            how.append(options.get("use_multipart", True))
            if failing:
                raise OSError("the connection was reset")
            at_once.release()
            most.append(at_once._value)
            real.put(*args, **options)
            at_once.acquire()

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    place._obstore = Watched()
    data = os.urandom(6 << 20)
    with closing(place):
        for number in range(2):
            place.put(f"packs/ab/{number}", data)
        assert how == [True, False] and place.get("packs/ab/1", len(data)) == data
        place.put("index/small", b"1" * 1000)
        assert not place._whole_bytes < len(data), "a small object does not show how fast the line is"
        failing = True
        with pytest.raises(PlaceError, match="cut"):
            place.put("packs/ab/2", data)
        failing = False
        with ThreadPoolExecutor(4) as pool:
            most.clear()
            place._whole_bytes = 0
            monkeypatch.setattr(objects, "_WHOLE_BYTES", 0)
            list(pool.map(lambda number: place.put(f"packs/ab/{number}", data), range(4)))
        assert how == [True, False, False, False, *[True] * 4] and most == [1] * 4, "one at a time"
