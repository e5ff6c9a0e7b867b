"""What is opened of what a user names, and what isn't."""

import errno
import io
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pear_store import (
    Access,
    Added,
    CheckpointError,
    NotFoundError,
    PearStoreError,
    Refused,
    SourceError,
    Store,
    read_checkpoint,
    read_source,
)
from pear_store.files import open_regular_file
from pear_store.local.sources import is_url, open_source
from tests.helpers.makers import small_task
from tests.pear_store.test_cli import run

ROOT = os.geteuid() == 0
CODE = "reference://x::data:application/json,%s"
SPEC = '{"version":1,"templates":{"u":"{{ \'\'.__class__ }}"},"refs":{"x":["{{u}}"]}}'


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    """A folder with one of each thing that is no regular file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path may have 107 characters
        listener.bind("socket")
        os.chdir(here)
        yield tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pipe", "a pipe"), ("folder", "a directory"), ("link", "a pipe"), ("device", "a device"), ("socket", "a socket")],
)
def test_only_regular_files_are_opened_and_nothing_waits(odd: Path, name: str, kind: str) -> None:
    for source in (odd / name, str(odd / name), f"file://{odd / name}"):
        with pytest.raises(SourceError, match=f"{name}: {kind}: expected a file"):
            read_source(source)
    with pytest.raises(SourceError, match=kind):
        read_checkpoint(odd / name)
    with Store.create(odd / "store") as store, pytest.raises(SourceError, match=kind):
        store.add(odd / name)


def test_links_are_followed_and_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "to").symlink_to("a")
    (tmp_path / "round").symlink_to("round")
    assert read_source(tmp_path / "to") == b"abc"
    for missing in ("gone", "a/b", "nul\0l", "bad\ud800"):
        with pytest.raises(NotFoundError, match="no such file"):
            read_source(str(tmp_path / missing))
    with pytest.raises(SourceError, match="cannot be read: Too many levels"):
        read_source(tmp_path / "round")
    with pytest.raises(SourceError, match="cannot be read: File name too long"):
        read_source("x" * 5000)
    with pytest.raises(SourceError, match="more than 2 bytes"):
        read_source(tmp_path / "a", most_bytes=2)


@pytest.mark.skipif(not ROOT, reason="needs root to be somebody else")
def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    (tmp_path / "secret").write_bytes(b"abc")
    (tmp_path / "secret").chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(SourceError, match="cannot be read: Permission denied"):
            read_source(tmp_path / "secret")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["a::b.png", "s3:/b.png", "reference::b", "data:x"])
def test_a_file_that_exists_is_opened_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(b"abc")
    assert read_source(name) == b"abc"
    assert not is_url(name)
    if name == "s3:/b.png":
        assert read_source("s3://b.png") == b"abc"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        (CODE % SPEC, "a chain of URLs"),
        ("reference://x", "protocol 'reference'"),
        ("jupyter://x/y", "protocol 'jupyter'"),
        ("simplecache::memory://a", "a chain of URLs"),
        ("zip://a.png::http://x/y.zip", "a chain of URLs"),
        ("reference::x", "a chain of URLs"),
        ("::", "a chain of URLs"),
        ("HTTP+x://y", r"protocol 'HTTP\+x'"),
        ("://y", "protocol ''"),
    ],
)
def test_only_listed_protocols_are_opened_and_no_chains(monkeypatch: pytest.MonkeyPatch, url: str, found: str) -> None:
    monkeypatch.setattr(fsspec, "open", lambda *_, **__: pytest.fail("was opened"))
    with pytest.raises(SourceError, match=f"{found} is not opened unless allowed; .*--allow"):
        read_source(url)


def test_a_protocol_or_chain_that_is_allowed_is_opened(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/pear-test", b"abc")
    assert read_source("memory://pear-test") == b"abc"
    with pytest.raises(SourceError, match="--allow simplecache or|--allow simplecache, or"):
        read_source("simplecache::memory://pear-test", Access(allowed=frozenset({"memory"})))
    allowed = Access(allowed=frozenset({"simplecache", "memory"}))
    assert read_source("simplecache::memory://pear-test", allowed) == b"abc"
    with pytest.raises(NotFoundError):
        read_source("memory://pear-nothing")
    with pytest.raises(SourceError, match="more than 2 bytes"):
        read_source("memory://pear-test", most_bytes=2)
    with pytest.raises(SourceError, match="cannot be read: "):
        read_source("https://127.0.0.1:1/a.png")


def test_a_root_keeps_everything_below_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "rooted").mkdir()
    for file in (root / "deep" / "a", tmp_path / "outside", tmp_path / "rooted" / "a", root / "x::y"):
        file.write_bytes(file.name.encode())
    (root / "in").symlink_to("deep/a")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "up").symlink_to("..")
    (tmp_path / "way").symlink_to(root)
    access = Access(root=tmp_path / "way")
    for source in (
        "deep/a",
        "in",
        "deep/../deep/a",
        str(root / "in"),
        root / "deep" / "a",
        f"file://{root}/in",
        "x::y",
    ):
        assert read_source(source, access)
    for source in ("out", "up/outside", "../outside", "up/rooted/a", str(tmp_path / "outside"), "/etc/passwd",
                   f"file://{tmp_path}/outside", "file://../outside"):  # fmt: skip
        with pytest.raises(SourceError, match="outside of .*way"):
            read_source(source, access)
    with pytest.raises(SourceError, match="a URL: only files below"):
        read_source("memory://pear-test", access)
    with pytest.raises(NotFoundError):
        read_source("nothing", access)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n")
    with pytest.raises(SourceError, match="a Git LFS pointer.*'git lfs pull'"):
        read_source(file)
    with pytest.raises(PearStoreError, match="a Git LFS pointer.*'git lfs pull'"):
        read_checkpoint(file)


def test_streams_and_files_close(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with open_source(tmp_path / "a") as file:
        assert file.read() == b"abc"
    assert file.closed
    with open_regular_file(tmp_path / "a") as file:
        assert not os.get_inheritable(file.fileno())


def test_add_takes_what_access_allows(tmp_path: Path, store: Store) -> None:
    from pear_store import write_checkpoint

    write_checkpoint(tmp_path / "a.safetensors", small_task())
    fsspec.filesystem("memory").pipe("/pear-add/a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    chain = "simplecache::memory://pear-add/a.safetensors"
    with pytest.raises(SourceError, match="a chain of URLs"):
        store.add(chain)
    assert store.add(chain, access=Access(allowed=frozenset({"simplecache", "memory"}))).changed
    assert store.add("memory://pear-add/a.safetensors").changed is False
    assert run("--store", store.path, "add", chain).exit_code == 10
    done = run("--store", store.path, "add", chain, "--allow", "simplecache", "--allow", "memory")
    assert "is unchanged" in done.stdout


def test_add_says_what_it_takes(tmp_path: Path, store: Store) -> None:
    for source, message in (
        ([tmp_path], "list: expected a Task, a path, a URL or a binary file; add_many takes several"),
        (None, "NoneType: expected a Task"),
        (b"a.safetensors", "bytes: expected a Task"),
        (io.StringIO("{}"), "gives str: expected a file opened in binary mode"),
    ):
        with pytest.raises(CheckpointError, match=message):
            store.add(source)  # type: ignore[arg-type]
    results = list(store.add_many([[tmp_path], small_task()]))  # type: ignore[list-item]
    assert isinstance(results[0], Refused) and results[1] == Added("dtd", 1, True, 152, 0)
    with pytest.raises(SourceError, match="cannot be read: Input/output error"):
        store.add(Broken())


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("https://a.example/t.safetensors", "aiohttp", "http"),
        ("http://a.example/t.safetensors", "aiohttp", "http"),
        ("s3://bucket/t.safetensors", "s3fs", "s3"),
        ("gs://bucket/t.safetensors", "gcsfs", "gs"),
        ("az://bucket/t.safetensors", "adlfs", "abfs"),
        ("sftp://a.example/t.safetensors", "paramiko", "sftp"),
    ],
)
def test_a_package_that_a_url_needs_is_said(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("http", "sftp"):
        monkeypatch.delitem(sys.modules, f"fsspec.implementations.{module}", raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(SourceError, match=rf"cannot be read: .*{package}.*: pip install 'fsspec\[{extra}\]'$"):
        read_source(url)
