"""Opens the files and URLs that a user names. It never waits for a pipe, and never runs what it reads.

How others use it:

    data = read_source(image, access)                # router: a picture, whole; its errors are all of pear_store
    access = Access(root=Path(root))                 # tools: --root DIR, no URL and no path outside of it
    access = Access(allowed=frozenset(protocols))    # tools: --allow PROTOCOL, what PROTOCOLS lacks, and chains

A caller keeps one `Access` and hands it down. Only a command reads options and the environment to build one.
"""

import codecs
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from pear_store.errors import NotFoundError, PearStoreError, SourceError

PROTOCOLS = frozenset(
    (
        "file", "local", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "sftp", "ssh",
        "ftp", "webdav", "hdfs", "webhdfs", "oci", "oss", "memory",
    )
)  # fmt: skip
"""What URLs may begin with. Each of these only moves bytes: none interprets, unpacks or caches what it reads."""
MAX_SOURCE_BYTES = 4 * 1024**3
MAX_TEXT_BYTES = 16 * 1024**2
LFS_POINTER = "a Git LFS pointer, not the file that it stands for; 'git lfs pull' fetches that"
_LFS_START = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Access:
    """What may be opened.

    Args:
        root: nothing but files below this directory, links followed; relative paths begin there. None: no such limit.
        allowed: protocols besides `PROTOCOLS`. A chain (``a://x::b://y``) is opened if each protocol in it is among
            these.
    """

    root: Path | None = None
    allowed: frozenset[str] = frozenset()


def is_url(source: object) -> bool:
    """Whether a source is a URL or a chain of them. A file of that very name wins."""
    return isinstance(source, str) and ("://" in source or "::" in source) and not os.path.lexists(source)


def is_lfs_pointer(start: bytes | memoryview) -> bool:
    """Whether a file that begins like this is what Git LFS leaves in the place of a large file."""
    return bytes(start[: len(_LFS_START)]) == _LFS_START


def open_regular_file(path: str | Path, root: Path | None = None) -> BinaryIO:
    """Opens a file for reading. Links are followed, as users expect of their own files.

    Raises:
        NotFoundError: there is nothing at the path.
        SourceError: it is a directory, a pipe, a device or a socket; may not be read; or lies outside of `root`.
    """
    try:
        return open_regular(path if root is None else _inside(path, root), path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise SourceError(path, f"cannot be read: {error.strerror}") from None
    except ValueError:  # a null byte, or text that file names cannot hold
        raise NotFoundError(f"{str(path)!r}: no such file") from None


def open_regular(path: str | Path, name: str | Path) -> BinaryIO:
    """Like :func:`open_regular_file`, with the system's own errors; `name` is what messages call the file."""
    _check_regular(os.stat(path), name)  # first: opening a device can do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_regular(os.fstat(descriptor), name)
        return open(descriptor, "rb")
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise


@contextmanager
def open_source(
    source: str | Path, access: Access | None = None, most_bytes: int = MAX_SOURCE_BYTES
) -> Iterator[BinaryIO]:
    """Opens a path or URL. A file comes as it is; what a URL names is read whole first.

    Raises:
        NotFoundError, SourceError: as :func:`open_regular_file`; the URL is not one that `access` lets through; it
            cannot be read; there are more than `most_bytes`.
    """
    access = access or Access()
    path = _local_path(source, access)
    if path is None:
        yield BytesIO(_download(str(source), most_bytes))
        return
    with open_regular_file(path, access.root) as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise SourceError(source, f"more than {most_bytes} bytes: larger files are not read")
        yield file


def read_source(source: str | Path, access: Access | None = None, most_bytes: int = MAX_SOURCE_BYTES) -> bytes:
    """All bytes of a path or URL.

    Raises:
        NotFoundError, SourceError: as :func:`open_source`; or it is a Git LFS pointer.
    """
    with open_source(source, access, most_bytes) as file:
        try:
            data = file.read(most_bytes + 1)
        except OSError as error:
            raise SourceError(source, f"cannot be read: {error.strerror or error}") from None
    if len(data) > most_bytes:
        raise SourceError(source, f"more than {most_bytes} bytes: larger files are not read")
    if is_lfs_pointer(data):
        raise SourceError(source, LFS_POINTER)
    return data


def read_text(source: str | Path, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file, without the mark (BOM) that some editors begin one with.

    Raises:
        NotFoundError, SourceError: as :func:`read_source`; or the text is not UTF-8: names the line and the remedy.
    """
    data = read_source(source, most_bytes=most_bytes).removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SourceError(source, "is UTF-16: expected UTF-8; save it as UTF-8") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(
            source,
            f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8, or convert it: "
            "iconv -f latin1 -t utf-8",
        ) from None


def _local_path(source: str | Path, access: Access) -> str | Path | None:
    """The path of a source that is a local file, or None for a URL that may be opened."""
    if isinstance(source, Path) or not ("://" in source or "::" in source):
        return source
    if os.path.lexists(source if access.root is None else os.path.join(access.root, source)):
        return source
    check_url(source, access)
    protocol, _, path = source.partition("://")
    if protocol in ("file", "local") and "::" not in source:
        return path
    if access.root is not None:
        raise SourceError(source, f"a URL: only files below {access.root} are opened here")
    return None


def check_url(url: str, access: Access) -> None:
    """Raises a SourceError unless the URL, or each link of a chain, has a protocol that `access` lets through."""
    links = url.split("::")
    protocols = [_protocol(link) for link in links]
    refused = [p for p in protocols if p not in access.allowed and (len(links) > 1 or p not in PROTOCOLS)]
    if refused:
        kind = "a chain of URLs" if len(links) > 1 else f"protocol {refused[0]!r}"
        options = " ".join(f"--allow {protocol}" for protocol in dict.fromkeys(refused))
        remedy = f"if you trust where it comes from, say {options}, or Access(allowed=...)"
        raise SourceError(url, f"{kind} is not opened unless allowed; {remedy}")


def _protocol(link: str) -> str:
    protocol, colon, _ = link.partition("://")
    if colon or re.fullmatch(r"[A-Za-z0-9_+-]*", link):  # fsspec takes a lone word in a chain for a protocol
        return protocol
    return "data" if link.startswith("data:") else "file"


def _download(url: str, most_bytes: int) -> bytes:
    import fsspec  # here: its import takes longer than most commands

    try:
        with fsspec.open(url, "rb", expand=False) as file:
            data: bytes = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{url}: no such file") from None
    except PearStoreError:
        raise
    except Exception as error:  # each file system has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(url, f"cannot be read: {reason}") from None
    return data


def _inside(path: str | Path, root: Path) -> str:
    """The path with links resolved; a SourceError where that leaves `root`."""
    resolved_root = os.path.realpath(root)
    resolved = os.path.realpath(os.path.join(resolved_root, path))
    if os.path.commonpath([resolved_root, resolved]) != resolved_root:
        raise SourceError(path, f"lies outside of {root}: only files below it are opened here")
    return resolved


def _check_regular(found: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise SourceError(path, f"{kind}: expected a file")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
