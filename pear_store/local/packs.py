"""Packs as files. A pack is immutable, and written and synced before it gets its name. What is read is not trusted."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, TypeVar

from pear_store.errors import AccessError, CheckpointError, DamagedError, SourceError, from_os_error
from pear_store.files import open_regular
from pear_store.format.container import Header, Place, lay_out, read_header, read_metadata
from pear_store.format.digest import Digest, RawTensor, begin_digest, fresh_name
from pear_store.format.pack import Commit, Records, pack_metadata, records_in
from pear_store.local.directory import FAN_NAME, INTENT_NAME, PACK_NAME, Folder, open_folder

T = TypeVar("T")


@dataclass(frozen=True)
class WrittenPack:
    """A pack that is written to `path` in tmp/, but has no place among the packs yet.

    Args:
        wait_synced: waits until the file is durable.
    """

    path: Path
    hash: bytes
    file_bytes: int
    tensor_bytes: int
    places: Mapping[Digest, Place]
    wait_synced: Callable[[], None]
    commit: Commit


def pack_path(root: Path, pack: bytes) -> Path:
    name = pack.hex()
    return root / "packs" / name[:2] / f"{name}.safetensors"


def find_packs(root: Path, foreign: list[str]) -> Iterator[bytes]:
    """The hashes of all files in packs/ that may be packs. Links are not followed.

    Args:
        foreign: gets the paths of everything else there.
    """
    with open_folder(root, "packs") as packs:
        for fan in packs.names():
            if not (FAN_NAME.fullmatch(fan) and packs.is_folder(fan)):
                foreign.append(str(packs.path / fan))
                continue
            with packs.folder(fan) as folder:
                for name in folder.names():
                    with suppress(FileNotFoundError):
                        if PACK_NAME.fullmatch(name) and name[:2] == fan and folder.is_file(name):
                            yield bytes.fromhex(name[:64])
                        else:
                            foreign.append(str(folder.path / name))


def write_pack(root: Path, tensors: Mapping[Digest, RawTensor], records: Records, commit: Commit) -> WrittenPack:
    """Writes a pack into the store's tmp/. It is synced while the caller goes on; :func:`place_pack` waits for that."""
    named = {str(digest): tensor for digest, tensor in tensors.items()}
    head, places = lay_out(named, pack_metadata(records, commit))
    with open_folder(root, "tmp", create=True) as tmp:
        return _write_pack(tmp, named, head, places, commit)


def _write_pack(
    tmp: Folder, named: Mapping[str, RawTensor], head: bytes, places: Mapping[str, Place], commit: Commit
) -> WrittenPack:
    name = f"{fresh_name()}.safetensors"
    state = hashlib.sha256()
    size = 0
    process = os.getpid()
    handle = tmp.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    sync = _Sync(handle)
    try:
        for run in _runs((head, *(named[name].data for name in places))):
            for chunk in run:
                state.update(chunk)
            size += _write(handle, run, size)
        pack = WrittenPack(
            tmp.path / f"{state.hexdigest()}.safetensors", state.digest(), size,
            sum(tensor.size_bytes for tensor in named.values()),
            {Digest(name): place for name, place in places.items()}, sync.wait, commit,
        )  # fmt: skip
        tmp.rename(name, pack.path.name)
    except BaseException:
        os.close(handle)
        if os.getpid() == process:  # else this is a child, forked meanwhile: the parent still writes it
            tmp.unlink(name)
        raise
    sync.start(apart=size >= _SYNC_APART_BYTES)
    return pack


_SYNC_APART_BYTES = 1 << 20


class _Sync:
    """Syncs and closes a file, in a thread of its own if the file is large."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self, apart: bool) -> None:
        try:
            if apart:
                self._thread.start()
                return
        except RuntimeError:  # the system gives no more threads
            pass
        self._run()

    def _run(self) -> None:
        try:
            os.fsync(self._handle)
        except OSError as error:
            self._error = error
        finally:
            os.close(self._handle)

    def wait(self) -> None:
        """Waits for the sync.

        Raises:
            OSError: it failed.
        """
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


def _runs(chunks: Iterable[bytes | bytearray | memoryview]) -> Iterator[list[bytes | bytearray | memoryview]]:
    """Groups chunks into runs of about 1 MiB, so that a run is still in the processor's cache when it is written."""
    run: list[bytes | bytearray | memoryview] = []
    size = 0
    for chunk in chunks:
        run.append(chunk)
        size += len(chunk)
        if size >= 1 << 20 or len(run) == _MAX_RUN:
            yield run
            run, size = [], 0
    yield run


_MAX_RUN = 1000  # one system call takes 1,024 pieces


def _write(handle: int, run: list[bytes | bytearray | memoryview], at: int) -> int:
    """Writes a run at the file's end. The disk begins to write it at once, so that the sync takes less time."""
    size = sum(map(len, run))
    written = os.writev(handle, run) if size else 0
    if written < size:  # a full disk, or a signal
        rest = memoryview(b"".join(run))[written:]
        while rest:
            rest = rest[os.write(handle, rest) :]
    if size and hasattr(os, "posix_fadvise"):  # Linux begins to write dirty pages, and keeps them
        with suppress(OSError):  # advice
            os.posix_fadvise(handle, at, size, os.POSIX_FADV_DONTNEED)
    return size


def place_pack(root: Path, pack: WrittenPack) -> None:
    """Gives a written pack its name in packs/, durably, once it is synced.

    Its name in tmp/ stays until after the commit. If the process dies before the commit, the next writer sees both
    names and deletes the pack (:func:`find_unfinished`). No caller was told that its tasks are stored.
    """
    pack.wait_synced()
    name, fan = pack.path.name, pack.path.name[:2]
    with open_folder(root, "tmp") as tmp, open_folder(root, "packs", fan, create=True) as folder:
        try:
            folder.check(name)  # it is there already if a change runs again
        except FileNotFoundError:
            try:
                tmp.link(name, name, folder)
            except OSError:  # a file system without hard links: an empty file marks the pack instead
                os.close(tmp.open(_intent(pack.hash), os.O_WRONLY | os.O_CREAT))
                tmp.rename(name, name, folder)
        folder.sync()


def doom_packs(root: Path, packs: Sequence[bytes]) -> None:
    """Marks packs whose rows are deleted in this commit, so that the next writer deletes their files.

    The next writer does so only if the index does not list them by then. So no outdated pack stays, even if this
    process dies right after the commit.
    """
    if not packs:
        return
    with open_folder(root, "tmp", create=True) as tmp:
        for pack in packs:
            name = f"{pack.hex()}.safetensors"
            with suppress(FileNotFoundError), open_folder(root, "packs", name[:2]) as folder:
                folder.check(name)
                try:
                    folder.link(name, name, tmp)
                except FileExistsError:
                    pass
                except OSError:  # a file system without hard links
                    os.close(tmp.open(_intent(pack), os.O_WRONLY | os.O_CREAT))
        tmp.sync()


def _intent(pack: bytes) -> str:
    return f"{pack.hex()}.placing"


def find_unfinished(root: Path) -> list[bytes]:
    """Packs that tmp/ marks. Under the write lock, each is committed, or is left from a process that died."""
    with suppress(FileNotFoundError), open_folder(root, "tmp") as tmp:
        return [
            bytes.fromhex(name[:64])
            for name in tmp.names()
            if (PACK_NAME.fullmatch(name) and _is_linked(tmp, name)) or INTENT_NAME.fullmatch(name)
        ]
    return []


def _is_linked(folder: Folder, name: str) -> bool:
    try:
        return folder.is_file(name) and folder.look(name).st_nlink > 1
    except FileNotFoundError:
        return False


def unlink_packs(root: Path, packs: Iterable[bytes]) -> None:
    """Deletes the files of packs durably. Missing files are ignored."""
    for fan, names in groupby(sorted(f"{pack.hex()}.safetensors" for pack in packs), key=lambda name: name[:2]):
        with suppress(FileNotFoundError), open_folder(root, "packs", fan) as folder:
            for name in names:
                folder.unlink(name)
            folder.sync()


def unlink_written(root: Path, packs: Iterable[bytes], unless_placed: bool = False) -> None:
    """Deletes packs' names in tmp/.

    Args:
        unless_placed: only delete names of packs that have no name in packs/.
    """
    with suppress(FileNotFoundError), open_folder(root, "tmp") as tmp:
        for pack in packs:
            name = f"{pack.hex()}.safetensors"
            if not (unless_placed and _is_linked(tmp, name)):
                tmp.unlink(name)
            if not unless_placed:
                tmp.unlink(_intent(pack))


def open_pack(path: Path) -> BinaryIO:
    """Opens a pack's file for reading. A link is followed, because everything that is read is checked.

    Raises:
        AccessError: it may not be read.
        DamagedError: it is no regular file, or cannot be opened.
        OSError: it is missing, or too many files are open.
    """
    try:
        return open_regular(path, path)
    except SourceError as error:
        raise DamagedError(f"pack {path.stem}", error.problem) from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EMFILE, errno.ENFILE):
            raise
        found = from_os_error(error, path)
        raise found if isinstance(found, AccessError) else DamagedError(f"pack {path.stem}", str(found)) from None


def is_unfinished(root: Path, pack: bytes) -> bool:
    """Whether tmp/ says that a pack may not be committed yet. Else, a view that begins later lists the pack."""
    return any((root / "tmp" / name).exists() for name in (f"{pack.hex()}.safetensors", _intent(pack)))


class PackReader:
    """Reads a pack's tensors without a map, so that a disk error is an exception and no signal.

    It is fastest in the order in which the tensors lie in the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self._window = memoryview(b"")
        self._start = 0

    def digest(self, dtype: str, shape: tuple[int, ...], offset: int, length: int) -> bytes | None:
        """The digest of a tensor's bytes in the file. None if they cannot all be read."""
        state = begin_digest(dtype, shape)
        at, end = offset - self._start, offset + length
        if at >= 0 and at + length <= len(self._window):
            state.update(self._window[at : at + length])
            return state.digest()
        try:
            while offset < end:
                data = self._read(offset, min(end - offset, _WINDOW_BYTES))
                if not data:
                    return None
                state.update(data)
                offset += len(data)
        except OSError:
            return None
        return state.digest()

    def _read(self, offset: int, length: int) -> memoryview:
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            try:
                self._window = memoryview(os.pread(self._descriptor, _WINDOW_BYTES, offset))
            except OSError:  # perhaps only bytes behind the tensor cannot be read
                self._window = memoryview(os.pread(self._descriptor, length, offset))
            self._start, at = offset, 0
        return self._window[at : at + length]


_WINDOW_BYTES = 1 << 20


def read_records(path: Path) -> tuple[Header, Records, list[str]]:
    """A pack's header, its records, and what is wrong with single records, such as a damaged manifest.

    Raises:
        DamagedError: the header, or all of the records, cannot be trusted.
    """
    header = _read(path, read_header)
    return header, *records_in(path, header.metadata)


def read_records_alone(path: Path) -> Records:
    """A pack's records. The rest of its header is not checked.

    Raises:
        DamagedError: they cannot be trusted.
    """
    return records_in(path, _read(path, read_metadata))[0]


def _read(path: Path, read: Callable[[BinaryIO, Path, int], T]) -> T:
    try:
        with open_pack(path) as file:
            return read(file, path, os.fstat(file.fileno()).st_size)
    except CheckpointError as error:
        raise DamagedError(f"pack {path.stem}", error.problem) from None
    except OSError as error:
        raise DamagedError(f"pack {path.stem}", f"it cannot be read: {error.strerror}") from None


def bare_header(file: Path) -> Header | None:
    """The header of a pack whose records are damaged. None if the header cannot be read either."""
    try:
        with open_pack(file) as handle:
            return read_header(handle, file, os.fstat(handle.fileno()).st_size)
    except (OSError, CheckpointError, DamagedError):
        return None
