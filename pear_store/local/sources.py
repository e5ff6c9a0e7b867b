"""Reads what users name: tasks in memory, paths, directories, streams and fsspec URLs. Nothing that is read is run.

A caller makes one `Access` and passes it on. Only commands make one from options and the environment.
"""

import errno
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from pear_store.errors import CheckpointError, NotFoundError, PearStoreError, SourceError
from pear_store.files import ending, open_regular_file, read_whole
from pear_store.format.checkpoint import (
    HUB_CHECKPOINT,
    HUB_LORA,
    ReadBefore,
    Task,
    read_checkpoint,
    task_from_container,
)
from pear_store.format.container import parse_container
from pear_store.local.hub import HUB, checkpoint_url, read_hub

PROTOCOLS = frozenset(
    (
        "file", "local", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "sftp", "ssh",
        "ftp", "webdav", "hdfs", "webhdfs", "oci", "oss", "memory",
    )
)  # fmt: skip
"""Protocols whose URLs may be opened. Each only moves bytes: none interprets, unpacks or caches what it reads."""
MAX_SOURCE_BYTES = 4 * 1024**3
Source: TypeAlias = Task | str | Path | BinaryIO


@dataclass(frozen=True)
class Access:
    """Which files and URLs may be opened.

    Args:
        root: only files below this directory, after links are followed, and no URLs. Relative paths begin there. None:
            any file, and URLs.
        allowed: protocols that may be opened besides the common ones (file, http, https, s3, gs, az, hf, sftp and
            others). A chain of URLs (``a://x::b://y``) is opened only if all its protocols are among these.
    """

    root: Path | None = None
    allowed: frozenset[str] = frozenset()


def is_url(source: object) -> bool:
    """Whether a source is a URL or a chain of URLs. If there is a file of exactly that name, it is no URL."""
    return isinstance(source, str) and ("://" in source or "::" in source) and not os.path.lexists(source)


@contextmanager
def open_source(
    source: str | Path, access: Access | None = None, most_bytes: int = MAX_SOURCE_BYTES
) -> Iterator[BinaryIO]:
    """Opens a path or URL. What a URL names is first read into memory, whole.

    Raises:
        NotFoundError: there is nothing at the path or URL.
        SourceError: `access` does not allow it; it is no regular file; it cannot be read; or it has more than
            `most_bytes`.
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


@contextmanager
def open_copy(source: str | Path, access: Access | None = None) -> Iterator[BufferedReader]:
    """Opens a path or URL of any size; reading may start anywhere in it. What a URL names is first copied to a file.

    The copy is in the folder for temporary files. It is deleted at the end.

    Raises:
        NotFoundError: there is nothing at the path or URL.
        SourceError: `access` does not allow it; it is no regular file; it cannot be read or copied.
    """
    access = access or Access()
    path = _local_path(source, access)
    if path is not None:
        with open_regular_file(path, access.root) as file:
            yield file
        return
    url = str(source)
    with tempfile.NamedTemporaryFile(prefix="pear-") as copy:
        with _errors_named(url):
            files, path = _file_system(url)
            files.get_file(path, copy.name)  # in one request: blocks would need a server that gives ranges
        with open(copy.name, "rb") as file:
            yield file


def read_source(source: str | Path, access: Access | None = None, most_bytes: int = MAX_SOURCE_BYTES) -> bytes:
    """Reads all bytes of a file or URL.

    Args:
        source: a path or a URL.
        access: which files and URLs may be opened. None: any file, and URLs of common protocols.
        most_bytes: larger files are refused. The default is 4 GiB.

    Raises:
        NotFoundError: there is nothing at the path or URL.
        SourceError: `access` does not allow it; it is no regular file, or a Git LFS pointer; it cannot be read; or it
            has more than `most_bytes`.
    """
    with open_source(source, access, most_bytes) as file:
        return read_whole(file, source, most_bytes)


def _local_path(source: str | Path, access: Access) -> str | Path | None:
    """The path of a source that is a local file. None: the source is a URL, which may be opened."""
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
    """Raises a SourceError unless `access` allows the URL's protocol, or each protocol of a chain."""
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
    if colon or re.fullmatch(r"[A-Za-z0-9_+-]*", link):  # in a chain, fsspec takes a single word for a protocol
        return protocol
    return "data" if link.startswith("data:") else "file"


def _download(url: str, most_bytes: int) -> bytes:
    if _is_hub(url):
        return read_hub(url, most_bytes)
    import fsspec  # here: importing it takes longer than most commands

    with _errors_named(url), fsspec.open(url, "rb", expand=False) as file:
        data: bytes = file.read(most_bytes + 1)
    return data


@contextmanager
def _errors_named(url: str) -> Iterator[None]:
    """Turns every error of an fsspec file system into one that names the URL."""
    try:
        yield
    except PearStoreError:
        raise
    except Exception as error:  # each file system has its own errors
        while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # fsspec's HTTP raises it for any failure
        if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
            raise NotFoundError(f"{url}: no such file") from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = tempfile.gettempdir()
            raise SourceError(
                url, f"no space for its copy in {folder}: free some space, or set TMPDIR to another folder"
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = _package_for(url) if isinstance(error, ImportError) else ""
        raise SourceError(url, f"cannot be read: {reason}{remedy}") from None


def _package_for(url: str) -> str:
    """How to install what fsspec needs for a URL's protocol; empty where it has no extra for that."""
    from importlib.metadata import metadata

    protocol = _protocol(url.rpartition("::")[2])
    extra = {"https": "http", "s3a": "s3", "az": "abfs", "abfss": "abfs"}.get(protocol, protocol)
    return f": pip install 'fsspec[{extra}]'" if extra in (metadata("fsspec").get_all("Provides-Extra") or ()) else ""


def _is_hub(url: str) -> bool:
    return url.startswith(HUB) and "::" not in url


# ---- the path within a URL ----------------------------------------------------------------------


def path_in_url(url: str) -> str:
    """The link of a chain that has a path, with its protocol. The query of a web address is left out."""
    link = _links(url)[1]
    return re.split("[?#]", link)[0] if _is_web(link) else link


def is_url_pattern(url: str) -> bool:
    """Whether a URL's path is a pattern, such as ``s3://bucket/lists/*.csv``. A web address's ``?`` makes none."""
    return _pattern_at(_links(url)[1]) is not None


def url_folder(url: str) -> str:
    """The URL of the folder that holds a URL's file."""
    before, _, after = _links(url)
    protocol, slashes, path = path_in_url(url).partition("://")
    return before + protocol + slashes + path.rpartition("/")[0] + after


def url_below(folder: str, path: str) -> str:
    """The URL of a path relative to a folder."""
    before, link, after = _links(folder)
    protocol, slashes, start = link.partition("://")
    return before + protocol + slashes + os.path.normpath(os.path.join(start, path)) + after


def files_at(url: str, access: Access | None = None) -> list[str]:
    """The URLs of files that match a URL's pattern. If it names a folder, those of its files, without sub-folders.

    Raises:
        NotFoundError: there is nothing at the URL.
        SourceError: `access` does not allow it, or it cannot be read.
    """
    check_url(url, access or Access())
    before, link, after = _links(url)
    pattern_at = _pattern_at(link)
    with _errors_named(url):
        files, path = _file_system(url)
        files.invalidate_cache()
        if pattern_at is None:
            folder = link if link.endswith("/") else f"{link}/"
            found = files.ls(path, detail=True)
        elif files.isfile(path):
            return [url]
        else:
            folder = link[:pattern_at].rpartition("/")[0] + "/"
            found = files.glob(path, detail=True).values()
        root = _file_system(before + folder + after)[1].strip("/")
        start = f"{root}/" if root else ""
        paths = [entry["name"].strip("/") for entry in found if entry["type"] != "directory"]
        return [before + folder + path.removeprefix(start) + after for path in paths if path.startswith(start)]


def _links(url: str) -> tuple[str, str, str]:
    """A chain's links before the one that has a path, that one, and those after it. A single word has no path."""
    links = url.split("::")
    at = next((at for at, link in enumerate(links) if "://" in link), 0)
    return "".join(f"{link}::" for link in links[:at]), links[at], "".join(f"::{link}" for link in links[at + 1 :])


def _pattern_at(link: str) -> int | None:
    found = re.search(r"[*[]" if _is_web(link) else r"[*?[]", link)
    return None if found is None else found.start()


def _is_web(link: str) -> bool:
    return link.startswith(("http://", "https://"))


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and its path there.

    A file from a web server may take any time while bytes arrive. By default, fsspec gives up after 5 minutes.
    """
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if _is_web(url):
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    found: tuple[Any, str] = url_to_fs(url, **options)
    return found


# ---- tasks --------------------------------------------------------------------------------------


def label(source: Source) -> str:
    """What messages call a source."""
    if isinstance(source, Task):
        return source.name
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "name", "stream"))


def read_task(source: Source, known: ReadBefore | None = None, access: Access | None = None) -> Task:
    """Reads a source's task and checks all of it. `known` has what sources read earlier had in common.

    Raises:
        NotFoundError: there is nothing at the path or URL.
        CheckpointError: it is no task checkpoint.
        SourceError: it is not opened, or cannot be read.
    """
    if isinstance(source, Task):
        return source
    if isinstance(source, Path) or (isinstance(source, str) and not is_url(source)):
        return read_checkpoint(source, known)
    headers = known.headers if known else None
    if not isinstance(source, str):
        if not hasattr(source, "read"):
            expected = "expected a Task, a path, a URL or a binary file; add_many takes several"
            raise CheckpointError("source", f"{type(source).__name__}: {expected}")
        return task_from_container(*parse_container(source, label(source), headers), label(source), known)
    if _is_hub(source):
        source = checkpoint_url(source)
    with open_source(source, access) as file:
        return task_from_container(*parse_container(file, source, headers), source, known)


def expand(sources: Iterable[str], access: Access | None = None) -> Iterator[str]:
    """Replaces each directory among paths and URLs by the ``.safetensors`` files below it, sorted by name.

    Files that `export-hub` wrote for PEFT beside a task checkpoint are left out. A directory that has no such file, or
    cannot be listed, stays, and `add` refuses it. A URL of the Hub stays, too: `read_task` knows the file's name.
    """
    for source in sources:
        found = list(_files_below(source, access or Access()))
        yield from found or [source]


def _files_below(source: str, access: Access) -> Iterator[str]:
    if is_url(source):
        if _is_hub(source):
            return
        try:
            check_url(source, access)
            import fsspec

            fs, path = fsspec.core.url_to_fs(source)
            if not _is_checkpoint(path) and fs.isdir(path):
                below = {file for file in fs.find(path) if _is_checkpoint(file)}
                below = {file for file in below if not _is_lora_beside_a_task(file, below)}
                yield from sorted(fs.unstrip_protocol(file) for file in below)
        except Exception:  # reading it will raise the same error, with the source's name
            return
    elif os.path.isdir(source):
        for folder, folders, files in os.walk(source):
            if HUB_CHECKPOINT in files and HUB_LORA in folders:
                folders.remove(HUB_LORA)
            folders.sort()
            yield from (os.path.join(folder, file) for file in sorted(files) if _is_checkpoint(file))


def _is_checkpoint(file: str) -> bool:
    return ending(file) == ".safetensors"


def _is_lora_beside_a_task(file: str, others: Collection[str]) -> bool:
    folder, slash, _ = file.rpartition(f"/{HUB_LORA}/")
    return bool(slash) and f"{folder}/{HUB_CHECKPOINT}" in others
