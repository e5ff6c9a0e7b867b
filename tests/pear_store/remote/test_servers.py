"""Real servers, and servers that fail, refuse, lie and lead away."""

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pear_store import Store
from pear_store.errors import DamagedRemoteError, DiskFullError, PearStoreError, PlaceError
from pear_store.remote import objects, place, retry, sftp, web
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.objects import ObjectPlace
from pear_store.remote.place import Place, own_names, probe
from pear_store.remote.remotes import Remote, add_remote, clone_store, init_remote
from pear_store.remote.retry import Persistent
from pear_store.remote.sftp import SftpPlace
from pear_store.remote.web import WebPlace
from tests.helpers.log import keep_log
from tests.helpers.makers import small_task
from tests.pear_store.remote.proxy import Faults, Proxy
from tests.pear_store.remote.real_servers import Server, free_port, wait_for
from tests.pear_store.remote.servers import answering
from tests.pear_store.test_cli import run

pytestmark = pytest.mark.slow

CANARY = "canary7f3a"
RESTARTS = int(os.environ.get("PEAR_REMOTE_RESTARTS", "1"))
"""Of a server, while a store pushes and others are cloned"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as made:
        for number in range(12):
            made.add(small_task(f"t{number}", seed=number))
        yield made


def clone_of(remote: Remote, folder: Path) -> set[str]:
    """The versions in a new clone; each tensor was read and checked."""
    clone_store(folder, remote)
    with Store(folder) as store:
        names = {f"{version.task}@{version.version}" for version in store.versions()}
        for name in names:
            store.get(name)
        return names


# ---- who may write ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("default:.*only this store may push")
@pytest.mark.parametrize("server", ["rclone", "s3rver", "pys3local"], indirect=True)
def test_a_server_that_overwrites_is_refused_or_kept_for_one_writer(
    server: Server, store: Store, tmp_path: Path
) -> None:
    url, options = "s3://bucket/remote", server.options
    with pytest.raises(PlaceError, match="would lose what others push"):
        init_remote(url, options)
    given = ["--option", f"endpoint={options['endpoint']}", "--option", "region=us-east-1"]
    here = ("--store", str(store.path))
    made = run(*here, "remote", "init", "alone", url, *given, "--single-writer")
    assert made.exit_code == 0, made.output
    pushed = run(*here, "push")
    assert pushed.exit_code == 0 and "12 versions" in pushed.stdout
    assert (
        pushed.stderr
        == f"Warning: {url}: only this store may push there (--single-writer); what others push may be lost\n"
    )
    assert '"single_writer": true' in run(*here, "remote", "ls", "--json").stdout
    remote = Remote("origin", url, options)
    assert len(clone_of(remote, tmp_path / "clone")) == 12
    clone = ("--store", str(tmp_path / "clone"))
    run(*clone, "rm", "t0@1", "--yes")
    refused = run(*clone, "push")
    assert refused.exit_code == 12 and "it can only be read" in refused.stderr and refused.stderr.count("\n") == 1
    store.add(small_task("more"))
    assert run(*here, "push").exit_code == 0
    assert "took more@1" in run(*clone, "pull").stdout


@pytest.mark.parametrize("server", ["localbucket"], indirect=True)
def test_a_server_that_keeps_names_is_written_by_several(server: Server, store: Store, tmp_path: Path) -> None:
    remote = Remote("origin", "s3://bucket/remote", server.options, single_writer=False)
    init_remote(remote.url, remote.options)
    add_remote(store.path, remote)
    assert len(store.push().versions) == 12
    assert len(clone_of(remote, tmp_path / "clone")) == 12


def test_a_directory_without_hard_links_takes_one_writer(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def refuse(*args: Any, **named: Any) -> None:
        if "src_dir_fd" in named and str(tmp_path / "remote") in os.readlink(f"/proc/self/fd/{named['dst_dir_fd']}"):
            raise PermissionError(1, "Operation not permitted")
        real(*args, **named)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PlaceError, match="--single-writer"):
        init_remote(str(tmp_path / "remote"))
    remote = Remote("origin", str(tmp_path / "remote"), single_writer=True)
    init_remote(remote.url, single_writer=True)
    add_remote(store.path, remote)
    with pytest.warns(UserWarning, match="only this store may push there"):
        assert len(store.push().versions) == 12
    assert len(clone_of(Remote("origin", remote.url), tmp_path / "clone")) == 12


def every_request(made: Place) -> list[Callable[[], object]]:
    """By a name that is no status."""
    return [
        lambda: made.get("log/416", 10), lambda: made.get_ranges("log/416", [(0, 3)]),
        lambda: made.put("log/416", b"x"), lambda: made.create("log/416", b"x"),
        lambda: list(made.list("log/")), lambda: made.delete("log/416"),
    ]  # fmt: skip


# ---- what servers refuse ---------------------------------------------------------------------


REFUSALS = [
    (400, "ExpiredToken", "the environment's credentials have expired; renew them"),
    (403, "InvalidAccessKeyId", "does not accept the environment's credentials; set valid ones"),
    (403, "SignatureDoesNotMatch", "does not accept the environment's credentials; set valid ones"),
    (403, "AccessDenied", "access is denied; check which rights"),
    (403, "RequestTimeTooSkewed", "this machine's clock and the server's differ"),
    (401, "", "does not accept the environment's credentials"),
    (507, "", "no space left"),
    (503, "SlowDown", "busy"),
    (500, "InternalError", "busy"),
    (418, "Teapot", "the server refuses"),
]


@pytest.mark.parametrize(("status", "code", "text"), REFUSALS)
def test_what_a_server_refuses_is_one_line_that_says_what_to_do(
    listen: Callable[..., int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    status: int, code: str, text: str,
) -> None:  # fmt: skip
    """The body repeats secrets, as some servers' do; nothing shows them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><StringToSign>{CANARY}</StringToSign></Error>".encode()
    url = "s3://bucket/remote"
    port = listen(answering(status, body, Content_Type="application/xml"))
    made = ObjectPlace(url, {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"})
    acts: list[Callable[[], object]] = [*every_request(made), lambda: made.put("packs/ab/one", bytes(12 << 20))]
    with closing(made), caplog.at_level(logging.DEBUG):
        for act in acts:
            with pytest.raises(PearStoreError) as found:
                act()
            error = found.value
            assert url in str(error) and text in str(error) and "\n" not in str(error)
            assert error.__cause__ is None and error.__context__ is None
            assert CANARY not in repr(error) + repr(vars(error))
            if isinstance(error, PlaceError):
                assert error.again == (status >= 500 and status != 507)
    assert CANARY not in caplog.text


def test_credentials_that_are_not_there_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    made = ObjectPlace("s3://bucket/x", {"endpoint": "http://127.0.0.1:9", "region": "us-east-1"})
    with closing(made), pytest.raises(PlaceError, match="no credentials are set in the environment") as found:
        made.get("log/1", 10)
    assert not found.value.again


def test_a_key_that_is_refused_or_not_there_is_one_line(sshd: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    (tmp_path / "changed").write_text(
        f"[127.0.0.1]:{sshd['url'].rpartition(':')[2]} {other.with_suffix('.pub').read_text()}"
    )
    known, key = sshd["known_hosts"], sshd["key_file"]
    for key_file, known_hosts, text in (
        (str(other), known, "accepts no key of this user; check the user's name"),
        (str(tmp_path / "none"), known, "none cannot be read"),
        (key, str(tmp_path / "none"), "none cannot be read"),
        (key, os.devnull, "not in known_hosts"),
        (key, str(tmp_path / "changed"), "may not be the server that you know"),
    ):
        before = threading.active_count()
        made = SftpPlace(f"{sshd['url']}{tmp_path}", {"key_file": key_file, "known_hosts": known_hosts})
        with closing(made), pytest.raises(PlaceError, match=text) as found:
            made.get("log/1", 10)
        assert not found.value.again and sshd["url"] in str(found.value)
        for _ in range(100):
            if threading.active_count() > before:
                time.sleep(0.02)
        assert threading.active_count() <= before, "the connection was given back"


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    return filler


def test_a_full_disk_behind_sftp_leaves_nothing_half_done(sshd: dict[str, str], small_disk: Path, store: Store) -> None:
    options = {name: sshd[name] for name in ("key_file", "known_hosts")}
    remote = Remote("origin", f"{sshd['url']}{small_disk}/remote", options)
    init_remote(remote.url, options)
    add_remote(store.path, remote)
    filler = fill(small_disk)
    with pytest.raises(DiskFullError, match="no space left"):
        store.push()
    assert not list((small_disk / "remote" / "tmp").iterdir())
    filler.unlink()
    assert len(store.push().versions) == 12
    assert len(clone_of(remote, store.path.parent / "clone")) == 12


def test_a_full_directory_leaves_nothing_half_done(small_disk: Path, store: Store) -> None:
    remote = Remote("origin", str(small_disk / "remote"))
    init_remote(remote.url)
    add_remote(store.path, remote)
    filler = fill(small_disk)
    done = run("--store", store.path, "push")
    assert done.exit_code == 6 and done.stderr.count("\n") == 1
    assert [file.name for file in (small_disk / "remote").rglob("*") if file.is_file()] == ["pear-remote.json"]
    filler.unlink()
    assert len(store.push().versions) == 12
    assert len(clone_of(remote, store.path.parent / "clone")) == 12


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_is_a_day_off_changes_nothing(
    store: Store, tmp_path: Path, days: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one store that pushes, and of the files that the place keeps."""
    remote = Remote("origin", str(tmp_path / "remote"))
    init_remote(remote.url)
    add_remote(store.path, remote)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + days * 86_400 * 10**9)
    store.push(tasks=["t0", "t1"])
    monkeypatch.undo()
    for file in (tmp_path / "remote").rglob("*"):
        os.utime(file, (time.time() - days * 86_400,) * 2)
    assert clone_of(remote, tmp_path / "clone") == {"t0@1", "t1@1"}
    with Store(tmp_path / "clone") as clone:
        clone.add(small_task("new"))
        clone.push()
    assert store.pull().versions == [("new", 1)]
    assert len(store.push().versions) == 10


# ---- networks that fail ----------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries, and short times of a stall."""
    from datetime import timedelta

    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 1.0)
    monkeypatch.setattr(objects, "_STALL", timedelta(seconds=1))
    monkeypatch.setattr(sftp, "_TIMEOUT_S", 1)
    monkeypatch.setattr(web, "_TIMEOUT_S", 1)


@pytest.fixture(params=["localbucket", "sftp", "web"])
def through(
    request: pytest.FixtureRequest, tmp_path: Path, patient: None
) -> Iterator[tuple[Place, Callable[[], Place], Proxy]]:
    """A place, what connects to it through a proxy, and that."""
    path = f"remote-{os.urandom(4).hex()}"
    plain: Place
    if request.param == "localbucket":
        request.getfixturevalue("keys")
        server = request.getfixturevalue("localbucket")
        with Proxy(server.port) as proxy:
            plain = ObjectPlace(f"s3://bucket/{path}", server.options)
            through = {**server.options, "endpoint": f"http://127.0.0.1:{proxy.port}"}
            with closing(plain):
                yield plain, lambda: ObjectPlace(f"s3://bucket/{path}", through), proxy
    elif request.param == "sftp":
        sshd = request.getfixturevalue("sshd")
        with Proxy(int(sshd["url"].rpartition(":")[2])) as proxy:
            host_key = Path(sshd["known_hosts"]).read_text().partition(" ")[2]
            (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{proxy.port} {host_key}")
            options = {"key_file": sshd["key_file"], "known_hosts": str(tmp_path / "known_hosts")}
            url = f"sftp://root@127.0.0.1:{proxy.port}{tmp_path}/{path}"
            (tmp_path / path).mkdir()
            yield DirectoryPlace(tmp_path / path), lambda: SftpPlace(url, options), proxy
    else:
        (tmp_path / path).mkdir()
        url = request.getfixturevalue("serve")(tmp_path / path)
        with Proxy(int(url.rpartition(":")[2])) as proxy:
            yield DirectoryPlace(tmp_path / path), lambda: WebPlace(f"http://127.0.0.1:{proxy.port}"), proxy


FAULTS = pytest.mark.parametrize("fault", ["cut", pytest.param("stall", marks=pytest.mark.slow)])
Through = tuple[Place, Callable[[], Place], Proxy]


@FAULTS
def test_a_body_that_is_cut_or_stalls_is_read_again(through: Through, fault: str) -> None:
    plain, connect, proxy = through
    data = os.urandom(600_000)
    plain.put("packs/ab/one", data)
    ranges = [(500_000, 1000), (0, 400_000)]
    with closing(Persistent(connect())) as made:
        proxy.faults = Faults(**{f"{fault}_down_bytes": 200_000}, connections=2)
        assert made.get("packs/ab/one", len(data)) == data
        assert made.get_ranges("packs/ab/one", ranges) == [data[at : at + length] for at, length in ranges]
        assert proxy.harmed == 2
    proxy.faults = Faults(**{f"{fault}_down_bytes": 200_000})
    started = time.monotonic()
    with closing(connect()) as bare, pytest.raises(PlaceError, match="cut|did not answer in time") as found:
        bare.get("packs/ab/one", len(data))
    assert found.value.again and time.monotonic() - started < 30


@FAULTS
def test_a_write_that_is_cut_or_stalls_is_done_again(through: Through, fault: str) -> None:
    plain, connect, proxy = through
    data = os.urandom(600_000)
    with closing(connect()) as made:
        if not made.can_write:
            return
        proxy.faults = Faults(**{f"{fault}_up_bytes": 200_000}, connections=2)
        Persistent(made).put("packs/ab/one", data)
    assert proxy.harmed == 2
    assert plain.get("packs/ab/one", len(data)) == data
    assert list(plain.list("packs/")) == ["packs/ab/one"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["localbucket", "sshd"])
def test_a_server_that_starts_again_meanwhile_costs_nothing(
    request: pytest.FixtureRequest, kind: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed again and again while a store pushes, and while another one is cloned."""
    monkeypatch.setattr("pear_store.remote.groups.GROUP_VERSIONS", 2)
    monkeypatch.setattr("pear_store.remote.pull.GROUP_VERSIONS", 2)
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 2.0)
    if kind == "localbucket":
        server = request.getfixturevalue("server")
        remote = Remote("origin", "s3://bucket/remote", server.options)
        kill, start = server.kill, server.start
    else:
        daemon = OwnSshd(request.getfixturevalue("sshd"), tmp_path)
        request.addfinalizer(daemon.kill)
        kill, start = daemon.kill, daemon.start
        start()
        remote = Remote("origin", f"sftp://root@127.0.0.1:{daemon.port}{tmp_path}/remote", daemon.options)
    init_remote(remote.url, remote.options)
    add_remote(store.path, remote)
    restarts = 0
    is_done = threading.Event()

    def disturb() -> None:
        nonlocal restarts
        while not is_done.wait(0.15):
            kill()
            restarts += 1
            time.sleep(0.1)
            start()

    thread = threading.Thread(target=disturb)
    thread.start()
    rounds = attempts = 0
    try:
        while restarts < RESTARTS:
            rounds += 1
            for number in range(30):
                store.add(small_task(f"more{number}", seed=100 * rounds + number))
            attempts += until_done(lambda: store.push())
            attempts += until_done(partial(clone_store, tmp_path / f"clone{rounds}", remote))
    finally:
        is_done.set()
        thread.join()
    assert len(clone_of(remote, tmp_path / "fresh")) == 12 + 30 * rounds
    with Store(tmp_path / f"clone{rounds}") as clone:
        assert len(clone.versions()) == 12 + 30 * rounds
    keep_log(f"{restarts} restarts of {kind}, {rounds} pushes and clones in {attempts} tries: 0 versions lost")


def until_done(act: Callable[[], object]) -> int:
    for attempt in range(1, 30):
        try:
            act()
            return attempt
        except PlaceError as error:
            assert error.again or "run the same again" in str(error), error
    raise AssertionError("it never was done")


class OwnSshd:
    """A server whose sessions die with it."""

    def __init__(self, sshd: dict[str, str], folder: Path) -> None:
        self.port = free_port()
        source = Path(sshd["known_hosts"]).parent
        text = (source / "config").read_text().splitlines()
        self.config = folder / "config"
        self.config.write_text("\n".join([f"Port {self.port}", f"PidFile {folder}/pid", *(
            line for line in text if not line.startswith(("Port ", "PidFile ")))]) + "\n")  # fmt: skip
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(source / 'host.pub').read_text()}")
        self.options = {"key_file": sshd["key_file"], "known_hosts": str(folder / "known")}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.config)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(self.port)

    def kill(self) -> None:
        if self.process is not None:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                with suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for line in subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.splitlines()[1:]:
        child, parent = map(int, line.split())
        if parent == pid:
            found += [*descendants(child), child]
    return found


# ---- servers that lie ------------------------------------------------------------------------


def s3_place(port: int) -> ObjectPlace:
    return ObjectPlace("s3://bucket/remote", {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_leads_to_another_host(listen: Callable[..., int], keys: None, status: int) -> None:
    there = answering(200, b"abc", ETag='"x"', Last_Modified="Wed, 21 Oct 2015 07:28:00 GMT")
    target = f"http://127.0.0.2:{listen(there, '127.0.0.2')}/latest"
    port = listen(answering(status, Location=target))
    for made in (s3_place(port), WebPlace(f"http://127.0.0.1:{port}")):
        for act in every_request(made):
            with pytest.raises(PearStoreError):
                act()
        made.close()
    assert not there.asked


@pytest.mark.parametrize("kind", [s3_place, lambda port: WebPlace(f"http://127.0.0.1:{port}")])
def test_more_than_was_asked_for_is_not_taken(
    listen: Callable[..., int], keys: None, kind: Callable[[int], Place]
) -> None:
    fields = {"ETag": '"x"', "Last_Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    many = bytes(5 << 20)
    for handler in (
        answering(206, many, Content_Range="bytes 0-2/100", **fields),
        answering(206, b"a", Content_Range="bytes 0-2/100", **fields),
        answering(206, b"abc", Content_Range="bytes 5-7/100", **fields),
    ):
        with closing(kind(listen(handler))) as made, pytest.raises(PearStoreError):
            made.get_ranges("packs/ab/one", [(0, 3)])
    with closing(kind(listen(answering(200, many, **fields)))) as made, pytest.raises(DamagedRemoteError):
        made.get("log/1", 100)


HOSTILE = ["../x", "packs/../../x", "/etc/passwd", "packs/ab/../x", "packs/a\0b", "packs/\x1b[2J", "packs//x",
           "packs/UPPER", "packs/" + "a" * 300, "packs/a/b/c/d/e", "packs/ok", "log/1"]  # fmt: skip


def test_of_a_hostile_listing_only_names_of_objects_are_taken(listen: Callable[..., int], keys: None) -> None:
    assert list(own_names("url", "packs/", HOSTILE)) == ["packs/ok"]
    shown = "".join(f"<Contents><Key>remote/{name}</Key><Size>1</Size><ETag>x</ETag><LastModified>"
                    "2015-10-21T07:28:00.000Z</LastModified></Contents>"
                    for name in HOSTILE if name.isprintable() and not re.search(r"\.\.|//|^/", name))  # fmt: skip
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{shown}</ListBucketResult>".encode()
    with closing(s3_place(listen(answering(200, body)))) as made:
        assert list(made.list("packs/")) == ["packs/ok"]


def test_a_listing_without_an_end_is_given_up(
    listen: Callable[..., int], keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "MOST_NAMES", 5000)
    shown = "".join(f"<Contents><Key>remote/packs/{n}</Key><Size>1</Size><ETag>x</ETag><LastModified>"
                    "2015-10-21T07:28:00.000Z</LastModified></Contents>" for n in range(1000))  # fmt: skip
    body = (
        "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>next</NextContinuationToken>"
        f"{shown}</ListBucketResult>"
    ).encode()
    with closing(s3_place(listen(answering(200, body)))) as made, pytest.raises(DamagedRemoteError, match="5000 names"):
        list(made.list("packs/"))


def test_a_million_names_are_listed_in_little_memory() -> None:
    assert sum(1 for _ in own_names("url", "packs/", (f"packs/ab/{n}" for n in range(10**6)))) == 10**6


def test_folders_of_a_directory_that_no_remote_has_are_not_entered(tmp_path: Path) -> None:
    made = DirectoryPlace(tmp_path)
    probe(made)
    made.put("packs/ab/one", b"x")
    deep = tmp_path / "packs" / "ab"
    for _ in range(20):
        deep = deep / "a"
        deep.mkdir()
    (deep / "two").write_bytes(b"")
    (tmp_path / "packs" / "Not ours").write_bytes(b"")
    assert list(made.list("packs/")) == ["packs/ab/one"]
