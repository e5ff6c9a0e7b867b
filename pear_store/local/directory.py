"""Opens a store's own folders and files without following links. Changes are relative to the open folder.

A copy or an archive of a store may hold a link instead of a folder, or a pipe instead of a file. Nothing behind a link
is created, renamed or deleted. Only regular files with Pear's own names are deleted.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from pear_store.errors import FormatError, NotFoundError, PearStoreError, from_os_error

PACK_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
INTENT_NAME = re.compile(r"[0-9a-f]{64}\.placing")
WRITTEN_NAME = re.compile(r"(?:[0-9a-f]{32}|[0-9a-f]{64})\.safetensors|[0-9a-f]{64}\.placing")
"""Names of files in tmp/"""
FAN_NAME = re.compile(r"[0-9a-f]{2}")
"""Names of the folders in packs/"""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_INDEX_FILES = ("data.mdb", "lock.mdb")


class Folder:
    """An open folder of a store. The end of its context closes it. Methods take names of entries in it."""

    __slots__ = ("descriptor", "path")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.descriptor))

    def look(self, name: str) -> os.stat_result:
        """The status of an entry. A link is not followed."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def is_file(self, name: str) -> bool:
        """Whether an entry is a regular file. A link to one is not."""
        return stat.S_ISREG(self.look(name).st_mode)

    def is_folder(self, name: str) -> bool:
        return stat.S_ISDIR(self.look(name).st_mode)

    def open(self, name: str, flags: int) -> int:
        """Opens a regular file, and returns its descriptor.

        Raises:
            FormatError: the entry is something else.
        """
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        with suppress(FileNotFoundError):
            self.check(name)  # first, because opening a device may have effects
        descriptor = os.open(name, flags, 0o666, dir_fd=self.descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            self.check(name)
        return descriptor

    def unlink(self, name: str) -> bool:
        """Deletes a regular file. Returns whether there was one."""
        try:
            if not self.is_file(name):
                return False
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return False
        return True

    def rename(self, name: str, to: str, folder: "Folder | None" = None) -> None:
        os.rename(name, to, src_dir_fd=self.descriptor, dst_dir_fd=(folder or self).descriptor)

    def link(self, name: str, to: str, folder: "Folder") -> None:
        """Gives a file a second name in another folder."""
        os.link(name, to, src_dir_fd=self.descriptor, dst_dir_fd=folder.descriptor, follow_symlinks=False)

    def sync(self) -> None:
        """Makes renames and new files in this folder durable."""
        os.fsync(self.descriptor)

    def folder(self, name: str, create: bool = False) -> "Folder":
        """Opens a folder in this one. If it is missing and `create` is set, makes it durably.

        Raises:
            FileNotFoundError: it is missing.
            FormatError: the entry is a link, or something else that is no folder.
        """
        try:
            descriptor = self._open_folder(name)
        except FileNotFoundError:
            if not create:
                raise
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.descriptor)
                self.sync()
            descriptor = self._open_folder(name)
        return Folder(self.path / name, descriptor)

    def _open_folder(self, name: str) -> int:
        try:
            return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.descriptor)
        except NotADirectoryError:
            self.check(name, stat.S_IFDIR)
            raise

    def check(self, name: str, kind: int = stat.S_IFREG) -> None:
        """Raises a FormatError if the entry is of another kind. A link always is."""
        found = stat.S_IFMT(self.look(name).st_mode)
        if found != kind:
            raise FormatError(
                f"{self.path / name}: {_KINDS.get(found, 'a device')}, expected {_KINDS[kind]} of the store's own; "
                "nothing was changed; put the right one in its place, or move it away"
            )

    def remove_index(self, name: str) -> None:
        """Deletes the folder of an index that is not in use.

        Raises:
            PearStoreError: it holds another file, which stays.
        """
        try:
            with self.folder(name) as index:
                for file in _INDEX_FILES:
                    index.unlink(file)
                if left := index.names():
                    raise PearStoreError(f"{index.path / left[0]}: not a file of Pear's; move it away and run again")
            os.rmdir(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass


def open_folder(root: Path, *names: str, create: bool = False) -> Folder:
    """Opens a store's directory, or a folder in it. The directory itself may be a link, the folders may not.

    Args:
        root: the store's directory.
        names: the path of the folder in it, one name after the other.
        create: make the last folder if it is missing.

    Raises:
        FileNotFoundError: there is no such folder.
        FormatError: an entry is a link, or something else that is no folder.
    """
    found = Folder(root, os.open(root, _FOLDER))
    for depth, name in enumerate(names, 1):
        with found as outer:
            found = outer.folder(name, create and depth == len(names))
    return found


def check_index(path: Path) -> None:
    """Checks that an index is a folder with regular files, or is missing.

    Raises:
        FormatError: it is a link, or something else.
    """
    with suppress(FileNotFoundError), open_folder(path.parent, path.name) as index:
        for name in _INDEX_FILES:
            with suppress(FileNotFoundError):
                index.check(name)


def store_path(path: str | Path) -> Path:
    """A store's path as a user gave it: a leading ``~`` is the home directory.

    Raises:
        PearStoreError: it begins with ``~`` and a name that is no user of this system.
    """
    expanded = os.path.expanduser(path)
    if str(expanded).startswith("~"):
        raise PearStoreError(f"{path}: no such user; a directory of that name is written {os.path.join('.', path)}")
    found = Path(expanded)
    return found.absolute() if str(found).startswith("~") else found  # Path has dropped a leading ./


def require_packs(path: Path) -> None:
    """Checks that a store has packs.

    Raises:
        NotFoundError: it has none.
        AccessError: this process may not look.
    """
    try:
        os.listdir(path / "packs")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: no store there: expected a folder 'packs'; name a store's directory") from None

    except OSError as error:
        raise from_os_error(error, path) from None


def sync_directory(path: Path) -> None:
    """Makes renames and new files in a directory durable."""
    with open_folder(path) as folder:
        folder.sync()


_KINDS = {
    stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip
