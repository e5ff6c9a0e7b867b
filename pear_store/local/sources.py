"""Reads what users name: tasks in memory, paths, directories, streams and fsspec URLs. Nothing that is read is run.

A caller makes one `Access` and passes it on. Only commands make one from options and the environment.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeAlias

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

    try:
        with fsspec.open(url, "rb", expand=False) as file:
            data: bytes = file.read(most_bytes + 1)
    except PearStoreError:
        raise
    except Exception as error:  # each file system has its own errors
        while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # fsspec's HTTP raises it for any failure
        if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
            raise NotFoundError(f"{url}: no such file") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = _package_for(url) if isinstance(error, ImportError) else ""
        raise SourceError(url, f"cannot be read: {reason}{remedy}") from None
    return data


def _package_for(url: str) -> str:
    """How to install what fsspec needs for a URL's protocol; empty where it has no extra for that."""
    from importlib.metadata import metadata

    protocol = _protocol(url.rpartition("::")[2])
    extra = {"https": "http", "s3a": "s3", "az": "abfs", "abfss": "abfs"}.get(protocol, protocol)
    return f": pip install 'fsspec[{extra}]'" if extra in (metadata("fsspec").get_all("Provides-Extra") or ()) else ""


def _is_hub(url: str) -> bool:
    return url.startswith(HUB) and "::" not in url


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
