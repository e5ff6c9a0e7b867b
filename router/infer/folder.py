"""The pictures of a folder, or the files that a pattern matches, used like a list."""

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
    """Whether a source is a folder, or a pattern such as ``pictures/*.jpg``. An existing file of that name wins."""
    return os.path.isdir(source) or (has_magic(str(source)) and not os.path.lexists(source))


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder by their endings, or the files that a pattern matches, sorted by name.

    It has the interface of `ImageList`. `digest` is a sha256 of names, sizes and times. So an added, removed or changed
    picture makes another run.
    """

    path: Path
    folder: Path
    """The folder where relative paths start."""
    names: tuple[str, ...]
    digest: str
    left_out: int = 0
    """Number of files of the folder that do not end like pictures."""
    schema: pa.Schema = SCHEMA
    encoding: str = "utf-8"
    most_rows: int = ROW_GROUP_ROWS
    """Most rows of a part."""

    @classmethod
    def scan(cls, path: Path) -> "ImageFolder":
        """Lists all sub-folders. It skips names with a leading dot, and does not follow links to folders.

        Raises:
            ListError: there is no picture.
            OSError: a folder cannot be read.
        """
        if os.path.isdir(path):
            folder, found = path, list(_files_below(path))
            names = [name for name in found if os.path.splitext(name)[1].lower() in extensions()]
        else:
            folder = Path()
            names = found = [name for name in iglob(str(path), recursive=True) if os.path.isfile(name)]
        if not names:
            there = f"{len(found)} files of other kinds" if found else "nothing"
            raise ListError(path, f"expected pictures, found {there}")
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
        """The pictures in parts of `rows` rows."""
        for start in range(0, len(self.names), rows):
            names = self.names[start : start + rows]
            shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
            faults = [
                None if name == text else "its name is not UTF-8: rename it"
                for name, text in zip(names, shown, strict=True)
            ]
            yield Rows(pa.table([pa.array(shown)], schema=SCHEMA), list(names), [None] * len(names), list(faults))

    def tasks(self, table: pa.Table) -> list[str | None]:
        """None for each row, because pictures name no task."""
        return [None] * table.num_rows


def _files_below(path: Path) -> Iterator[str]:
    """The files below a folder, as paths relative to it."""
    for folder, folders, files in os.walk(path, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), path)


def _fail(error: OSError) -> None:
    raise error
