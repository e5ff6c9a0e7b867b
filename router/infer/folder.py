"""The pictures of a folder, or the files that a pattern matches, used like a list."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from router.infer.formats.columns import ROW_GROUP_ROWS
from router.infer.lists import Rows
from router.infer.source import Source

SCHEMA = pa.schema([("image", pa.string())])


@dataclass(frozen=True)
class ImageFolder:
    """Pictures by their names, in the order that `source` found them.

    It has the interface of `ImageList`. `digest` is a sha256 of names, sizes and times. So an added, removed or changed
    picture makes another run.
    """

    path: str
    folder: str
    """The folder where relative paths start."""
    names: tuple[str, ...]
    digest: str
    schema: pa.Schema = SCHEMA
    encoding: str = "utf-8"
    most_rows: int = ROW_GROUP_ROWS
    """Most rows of a part."""

    @classmethod
    def scan(cls, source: Source) -> "ImageFolder":
        """Raises an OSError if a picture's size and time cannot be read."""
        digest = hashlib.sha256()
        for name in source.files:
            status = os.stat(os.path.join(source.folder, name))
            digest.update(os.fsencode(name) + b"\0%d %d\n" % (status.st_size, status.st_mtime_ns))
        return cls(source.name, os.path.realpath(source.folder), source.files, digest.hexdigest())

    @property
    def rows(self) -> int:
        return len(self.names)

    def parts(self, rows: int) -> Iterator[Rows]:
        """The pictures in parts of `rows` rows."""
        for start in range(0, len(self.names), rows):
            names = self.names[start : start + rows]
            shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
            faults = [
                None if name == text else "its name is not UTF-8: rename it"
                for name, text in zip(names, shown, strict=True)
            ]
            table, folders = pa.table([pa.array(shown)], schema=SCHEMA), [self.folder] * len(names)
            yield Rows(table, list(names), folders, [None] * len(names), list(faults))

    def tasks(self, table: pa.Table) -> list[str | None]:
        """None for each row, because pictures name no task."""
        return [None] * table.num_rows
