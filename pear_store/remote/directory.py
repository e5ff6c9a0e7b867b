"""A place in a directory: on this machine, or on a file system that several machines share."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pear_store.errors import AbsentError, AccessError, DiskFullError, PearStoreError, PlaceError, from_os_error
from pear_store.format.digest import fresh_name
from pear_store.local.directory import Folder, open_folder
from pear_store.remote.place import Place, Range, check_size, check_whole, checked_name, is_name, own_names


class DirectoryPlace(Place):
    """Objects are files. `create` writes a file in tmp/, syncs it, and then gives it its name by a hard link.

    The hard link fails if the name is taken. Symbolic links in the place of folders and files are not followed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.url = str(self.path)

    def get(self, name: str, at_most: int) -> bytes:
        try:
            with self._folder(name) as folder:
                handle = folder.open(_last(name), os.O_RDONLY)
                with open(handle, "rb") as file:
                    check_size(self.url, name, os.fstat(handle).st_size, at_most)
                    return file.read()
        except OSError as error:
            raise self._error(error, name) from None

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        try:
            with self._folder(name) as folder, open(folder.open(_last(name), os.O_RDONLY), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                found = []
                for offset, length in ranges:  # never more memory than the file has bytes
                    data = os.pread(file.fileno(), min(length, max(size - offset, 0)), offset)
                    found.append(check_whole(self.url, name, data, length))
                return found
        except OSError as error:
            raise self._error(error, name) from None

    def put(self, name: str, data: bytes) -> None:
        try:
            with open_folder(self.path, "tmp", create=True) as tmp, self._folder(name, create=True) as folder:
                written = self._write(tmp, data)
                try:
                    tmp.rename(written, _last(name), folder)
                except BaseException:
                    tmp.unlink(written)
                    raise
                folder.sync()
        except OSError as error:
            raise self._error(error, name) from None

    def create(self, name: str, data: bytes) -> bool:
        try:
            with open_folder(self.path, "tmp", create=True) as tmp, self._folder(name, create=True) as folder:
                written = self._write(tmp, data)
                try:
                    tmp.link(written, _last(name), folder)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                        raise PlaceError(
                            self.url,
                            "its file system has no hard links, so two stores could write the same name; it can only "
                            "be read, or written by one store alone ('remote init' with --single-writer)",
                        ) from None
                    raise
                finally:
                    tmp.unlink(written)
                folder.sync()
                return True
        except OSError as error:
            raise self._error(error, name) from None

    def _write(self, tmp: Folder, data: bytes) -> str:
        name = fresh_name()
        handle = tmp.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        except BaseException:
            tmp.unlink(name)
            raise
        finally:
            os.close(handle)
        return name

    def list(self, prefix: str) -> Iterator[str]:
        return own_names(self.url, prefix, self._names(prefix.rstrip("/")))

    def _names(self, top: str) -> Iterator[str]:
        folders = [top]
        while folders:
            within = folders.pop()
            with suppress(FileNotFoundError), open_folder(self.path, *within.split("/")) as folder:
                for name in folder.names():
                    if folder.is_folder(name) and is_name(f"{within}/{name}"):
                        folders.append(f"{within}/{name}")
                    elif folder.is_file(name):
                        yield f"{within}/{name}"

    def delete(self, name: str) -> None:
        try:
            with suppress(FileNotFoundError), self._folder(name) as folder:
                folder.unlink(_last(name))
        except OSError as error:
            raise self._error(error, name) from None

    def _folder(self, name: str, create: bool = False) -> Folder:
        *folders, _ = checked_name(name).split("/")
        found = open_folder(self.path)
        for one in folders:
            with found as outer:
                found = outer.folder(one, create)
        return found

    def _error(self, error: OSError, name: str) -> PearStoreError:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if not self.path.is_dir():
                return PlaceError(self.url, "there is no such directory; check the path, and that its disk is mounted")
            return AbsentError(self.url, name)
        found = from_os_error(error, self.path)
        if isinstance(found, AccessError | DiskFullError):
            return found
        return PlaceError(
            self.url, f"{name}: {error.strerror or error}", again=error.errno in (errno.EIO, errno.ESTALE)
        )


def _last(name: str) -> str:
    return name.rpartition("/")[2]
