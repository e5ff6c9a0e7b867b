"""What users name to be read: tasks in memory, paths, directories, streams and fsspec URLs. Nothing read is run.

A caller keeps one `Access` and hands it down. Only a command reads options and the environment to build one.
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
"""What URLs may begin with. Each of these only moves bytes: none interprets, unpacks or caches what it reads."""
MAX_SOURCE_BYTES = 4 * 1024**3
Source: TypeAlias = Task | str | Path | BinaryIO


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


@contextmanager
def open_copy(source: str | Path, access: Access | None = None) -> Iterator[BufferedReader]:
    """Opens a path or URL of any size, to be read from anywhere in it. What a URL names is copied to a file first.

    The copy lies in the folder for temporary files, and goes when it is closed.

    Raises:
        NotFoundError, SourceError: as :func:`open_source`.
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
            files.get_file(path, copy.name)  # in one request: blocks would need a server that serves ranges
        with open(copy.name, "rb") as file:
            yield file


def read_source(source: str | Path, access: Access | None = None, most_bytes: int = MAX_SOURCE_BYTES) -> bytes:
    """All bytes of a path or URL.

    Raises:
        NotFoundError, SourceError: as :func:`open_source`; or it is a Git LFS pointer.
    """
    with open_source(source, access, most_bytes) as file:
        return read_whole(file, source, most_bytes)


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
    if _is_hub(url):
        return read_hub(url, most_bytes)
    import fsspec  # here: its import takes longer than most commands

    with _errors_named(url), fsspec.open(url, "rb", expand=False) as file:
        data: bytes = file.read(most_bytes + 1)
    return data


@contextmanager
def _errors_named(url: str) -> Iterator[None]:
    """Turns whatever a file system of fsspec raises into an error that names the URL."""
    try:
        yield
    except PearStoreError:
        raise
    except Exception as error:  # each file system has its own
        while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # fsspec's HTTP calls any failure that
        if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
            raise NotFoundError(f"{url}: no such file") from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = tempfile.gettempdir()
            raise SourceError(
                url, f"its copy has no room in {folder}: free some, or name another folder in TMPDIR"
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(url, f"cannot be read: {reason}") from None


def _is_hub(url: str) -> bool:
    return url.startswith(HUB) and "::" not in url


# ---- the path within a URL ----------------------------------------------------------------------


def path_in_url(url: str) -> str:
    """The link of a chain that names a path, with its protocol and without a web address's query."""
    link = _links(url)[1]
    return re.split("[?#]", link)[0] if _is_web(link) else link


def is_url_pattern(url: str) -> bool:
    """Whether a URL has a pattern for its path, such as ``s3://bucket/lists/*.csv``. A web address's ``?`` is none."""
    return _pattern_at(_links(url)[1]) is not None


def url_folder(url: str) -> str:
    """The URL of the folder that a URL's file lies in."""
    before, _, after = _links(url)
    protocol, slashes, path = path_in_url(url).partition("://")
    return before + protocol + slashes + path.rpartition("/")[0] + after


def url_below(folder: str, path: str) -> str:
    """The URL of what has that path from a folder."""
    before, link, after = _links(folder)
    protocol, slashes, start = link.partition("://")
    return before + protocol + slashes + os.path.normpath(os.path.join(start, path)) + after


def files_at(url: str, access: Access | None = None) -> list[str]:
    """URLs of the files that match a URL's pattern, or that lie right in the folder that it names.

    Raises:
        NotFoundError, SourceError: as :func:`open_source`.
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
    """A chain's links before the one that names a path, that one, and those after it. Lone words name none."""
    links = url.split("::")
    at = next((at for at, link in enumerate(links) if "://" in link), 0)
    return "".join(f"{link}::" for link in links[:at]), links[at], "".join(f"::{link}" for link in links[at + 1 :])


def _pattern_at(link: str) -> int | None:
    found = re.search(r"[*[]" if _is_web(link) else r"[*?[]", link)
    return None if found is None else found.start()


def _is_web(link: str) -> bool:
    return link.startswith(("http://", "https://"))


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and its path there.

    A web server's file may take as long as bytes come: of itself, fsspec's HTTP gives up after 5 minutes.
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
    """A source's task, checked whole; `known` is of sources read before.

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
    """Paths and URLs, with each directory replaced by the ``.safetensors`` files below it, by name.

    What `export-hub` wrote for PEFT beside a task checkpoint is left out. A directory that has none, or cannot be
    listed, comes back as it is, for `add` to refuse. So does what lies on the Hub: `read_task` knows the file's name.
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
        except Exception:  # the same error comes when it is read, with a name to it
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
