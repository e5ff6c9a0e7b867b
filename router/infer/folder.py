"""Pictures of a folder, or those that a pattern matches, in place of a list."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic, iglob
from pathlib import Path

import pyarrow as pa

from router.infer.lists import ROW_GROUP_ROWS, ListError, Rows
from router.pictures import extensions

SCHEMA = pa.schema([("image", pa.string())])


def is_folder_or_pattern(source: Path) -> bool:
    """Whether a source is a folder, or a pattern such as ``pictures/*.jpg``. A file of that very name wins."""
    return os.path.isdir(source) or (has_magic(str(source)) and not os.path.lexists(source))


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder by their endings, or the files that a pattern matches, in order of names.

    It is asked as an `ImageList` is. `digest` is of names, sizes and times: if a picture comes, goes or changes, it is
    another run.
    """

    path: Path
    folder: Path
    """Where relative paths begin."""
    names: tuple[str, ...]
    digest: str
    left_out: int = 0
    """Files of the folder that are no pictures by their endings."""
    schema: pa.Schema = SCHEMA
    encoding: str = "utf-8"
    most_rows: int = ROW_GROUP_ROWS
    """Of a part."""

    @classmethod
    def scan(cls, path: Path) -> "ImageFolder":
        """Looks through all sub-folders; names that begin with a dot are passed over, links to folders not followed.

        Raises:
            ListError: there is no picture.
            OSError: a folder cannot be looked into.
        """
        if os.path.isdir(path):
            folder, found = path, list(_files_below(path))
            names = [name for name in found if os.path.splitext(name)[1].lower() in extensions()]
        else:
            folder = Path()
            names = found = [name for name in iglob(str(path), recursive=True) if os.path.isfile(name)]
        if not names:
            there = f"{len(found)} files of other kinds" if found else "nothing"
            raise ListError(path, f"no picture is there: found {there}")
        names.sort(key=os.fsencode)
        digest = hashlib.sha256()
        for name in names:
            status = os.stat(folder / name)
            digest.update(os.fsencode(name) + b"\0%d %d\n" % (status.st_size, status.st_mtime_ns))
        return cls(path, folder, tuple(names), digest.hexdigest(), len(found) - len(names))

    @property
    def rows(self) -> int:
        return len(self.names)

    def parts(self, rows: int) -> Iterator[Rows]:
        """The pictures in parts of that many."""
        for start in range(0, len(self.names), rows):
            names = self.names[start : start + rows]
            shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
            faults = [
                None if name == text else "its name is not UTF-8: rename it"
                for name, text in zip(names, shown, strict=True)
            ]
            yield Rows(pa.table([pa.array(shown)], schema=SCHEMA), list(names), [None] * len(names), list(faults))

    def tasks(self, table: pa.Table) -> list[str | None]:
        """None names a task of its own."""
        return [None] * table.num_rows


def _files_below(path: Path) -> Iterator[str]:
    """Files by their paths below a folder."""
    for folder, folders, files in os.walk(path, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), path)


def _fail(error: OSError) -> None:
    raise error
