"""Opens the local files that a user names. Only regular files are opened; links are followed. No pipe is waited for."""

import codecs
import os
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from pear_store.errors import NotFoundError, SourceError

MAX_TEXT_BYTES = 16 * 1024**2
LFS_POINTER = "a Git LFS pointer, not the file that it stands for; 'git lfs pull' fetches that"
_LFS_START = b"version https://git-lfs.github.com/spec/"


def ending(path: str | Path) -> str:
    """The ending of a file's name in small letters: ``.csv`` of ``list.csv`` and of ``LIST.CSV``."""
    return Path(path).suffix.lower()


def is_lfs_pointer(start: bytes | memoryview) -> bool:
    """Whether a file that begins with these bytes is a pointer of Git LFS in place of a large file."""
    return bytes(start[: len(_LFS_START)]) == _LFS_START


def open_regular_file(path: str | Path, root: Path | None = None) -> BufferedReader:
    """Opens a file for reading. Links are followed, as users expect of their own files.

    Raises:
        NotFoundError: there is nothing at the path.
        SourceError: it is a directory, a pipe, a device or a socket; it may not be read; or it lies outside of `root`.
    """
    try:
        return open_regular(path if root is None else _inside(path, root), path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise SourceError(path, f"cannot be read: {error.strerror}") from None
    except ValueError:  # a null byte, or text that file names cannot hold
        raise NotFoundError(f"{str(path)!r}: no such file") from None


def open_regular(path: str | Path, name: str | Path) -> BufferedReader:
    """Like :func:`open_regular_file`, but raises the system's own errors. Messages call the file `name`."""
    _check_regular(os.stat(path), name)  # first: opening a device can do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_regular(os.fstat(descriptor), name)
        return open(descriptor, "rb")
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise


def read_whole(file: BinaryIO, name: str | Path, most_bytes: int) -> bytes:
    """All bytes of an open file. Messages call it `name`.

    Raises:
        SourceError: it cannot be read, has more than `most_bytes`, or is a Git LFS pointer.
    """
    try:
        data = file.read(most_bytes + 1)
    except OSError as error:
        raise SourceError(name, f"cannot be read: {error.strerror or error}") from None
    if len(data) > most_bytes:
        raise SourceError(name, f"more than {most_bytes} bytes: larger files are not read")
    if is_lfs_pointer(data):
        raise SourceError(name, LFS_POINTER)
    return data


def read_text(source: str | Path, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file. A byte order mark (BOM) at its beginning is dropped.

    Raises:
        NotFoundError: there is no such file.
        SourceError: it cannot be read, has more than `most_bytes`, or is not UTF-8. Then the message names the line.
    """
    with open_regular_file(source) as file:
        data = read_whole(file, source, most_bytes).removeprefix(codecs.BOM_UTF8)
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


def _inside(path: str | Path, root: Path) -> str:
    """The path with links resolved. Raises a SourceError if it lies outside of `root`."""
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
