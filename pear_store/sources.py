"""Where `add` takes task checkpoints from: tasks in memory, paths, directories, streams and fsspec URLs."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

from pear_store.checkpoint import KnownTensors, Task, read_checkpoint, task_from_container
from pear_store.container import parse_container
from pear_store.errors import CheckpointError
from pear_store.reading import Access, check_url, is_url, open_source

Source: TypeAlias = Task | str | Path | BinaryIO


def label(source: Source) -> str:
    """What messages call a source."""
    if isinstance(source, Task):
        return source.name
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "name", "stream"))


def read_task(source: Source, known: KnownTensors | None = None, access: Access | None = None) -> Task:
    """A source's task, checked whole; `known` are tensors of sources read before.

    Raises:
        NotFoundError: there is nothing at the path or URL.
        CheckpointError: it is no task checkpoint.
        SourceError: it is not opened, or cannot be read.
    """
    if isinstance(source, Task):
        return source
    if isinstance(source, Path) or (isinstance(source, str) and not is_url(source)):
        return read_checkpoint(source, known)
    if not isinstance(source, str):
        if not hasattr(source, "read"):
            expected = "expected a Task, a path, a URL or a binary file; add_many takes several"
            raise CheckpointError("source", f"{type(source).__name__}: {expected}")
        return task_from_container(*parse_container(source, label(source)), label(source), known)
    with open_source(source, access) as file:
        return task_from_container(*parse_container(file, source), source, known)


def expand(sources: Iterable[str], access: Access | None = None) -> Iterator[str]:
    """Paths and URLs, with each directory replaced by the ``.safetensors`` files below it, by name.

    A directory that has none, or cannot be listed, comes back as it is, for `add` to refuse.
    """
    for source in sources:
        found = list(_files_below(source, access or Access()))
        yield from found or [source]


def _files_below(source: str, access: Access) -> Iterator[str]:
    if is_url(source):
        try:
            check_url(source, access)
            import fsspec

            fs, path = fsspec.core.url_to_fs(source)
            if not path.endswith(".safetensors") and fs.isdir(path):
                below = (file for file in fs.find(path) if file.endswith(".safetensors"))
                yield from sorted(fs.unstrip_protocol(file) for file in below)
        except Exception:  # the same error comes when it is read, with a name to it
            return
    elif os.path.isdir(source):
        for folder, folders, files in os.walk(source):
            folders.sort()
            yield from (os.path.join(folder, file) for file in sorted(files) if file.endswith(".safetensors"))
