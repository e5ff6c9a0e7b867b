"""A place on an SSH server, by SFTP. Uses paramiko (extra `remote`)."""

import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pear_store.errors import AbsentError, DiskFullError, PearStoreError, PlaceError
from pear_store.format.digest import fresh_name
from pear_store.remote.answers import failure
from pear_store.remote.place import Place, Range, check_size, check_whole, checked_name, cut, is_name, joined, own_names

T = TypeVar("T")
_TIMEOUT_S = 30
_OPTIONS = ("key_file", "known_hosts")


class SftpPlace(Place):
    """Objects are files. `create` writes a file in tmp/, syncs it, and renames it by SFTP's own rename.

    That rename fails if the name is taken; OpenSSH's posix-rename would replace the file.

    The server's key must be in ~/.ssh/known_hosts. The user logs in by the agent, and by keys and configuration in
    ~/.ssh. There is one connection, and one request at a time. Reads are requested ahead.

    Args:
        options: ``key_file`` and ``known_hosts``, paths of files.
    """

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        try:
            import paramiko
        except ImportError as error:
            raise PlaceError(url, f"needs paramiko: {error}; pip install 'pear-adapters[remote]'") from None
        if unknown := set(options) - set(_OPTIONS):
            raise PlaceError(url, f"option {min(unknown)!r}: expected one of {', '.join(_OPTIONS)}")
        parts = urlsplit(url)
        if not parts.hostname:
            raise PlaceError(url, "expected sftp://USER@HOST/PATH")
        self.url = url
        self._paramiko: Any = paramiko
        self._options = options
        self._address = (parts.hostname, parts.port, parts.username)
        self._root = unquote(parts.path).removeprefix("/~/") or "."
        self._lock = threading.Lock()
        self._ssh: Any = None
        self._sftp: Any = None
        self._made: set[str] = set()

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._ssh is not None:
            self._ssh.close()
        self._ssh = self._sftp = None

    def _connect(self) -> Any:
        paramiko = self._paramiko
        host, port, user = self._address
        config = Path("~/.ssh/config").expanduser()
        known: dict[str, Any] = {}
        if config.is_file():
            known = paramiko.SSHConfig.from_path(str(config)).lookup(host)
        keys = [self._options["key_file"]] if "key_file" in self._options else known.get("identityfile")
        self._ssh = ssh = paramiko.SSHClient()
        ssh.set_missing_host_key_policy(paramiko.RejectPolicy())
        if "known_hosts" in self._options:
            ssh.load_host_keys(self._options["known_hosts"])
        else:
            ssh.load_system_host_keys()
        ssh.connect(
            known.get("hostname", host), port or int(known.get("port", 22)), user or known.get("user"),
            key_filename=keys, timeout=_TIMEOUT_S, banner_timeout=_TIMEOUT_S, auth_timeout=_TIMEOUT_S,
        )  # fmt: skip
        sftp = ssh.open_sftp()
        sftp.get_channel().settimeout(_TIMEOUT_S)
        return sftp

    def _do(self, name: str, act: Callable[[Any], T]) -> T:
        with self._lock:
            try:
                if self._sftp is None:
                    self._sftp = self._opened()
                return act(self._sftp)
            except PearStoreError:
                raise
            except FileNotFoundError:
                problem: PearStoreError = AbsentError(self.url, name)
            except PermissionError:
                problem = PlaceError(self.url, f"{name}: access is denied; check which rights the user has there")
            except (OSError, EOFError, self._paramiko.SSHException) as error:
                self._close()
                problem = failure(self.url, name, f"{type(error).__name__}: {error}")
        raise problem

    def _opened(self) -> Any:
        """Connects. Errors name the connection, not an object."""
        paramiko = self._paramiko
        try:
            return self._connect()
        except paramiko.BadHostKeyException:
            problem = (
                "the server's key differs from the one in known_hosts; it may not be the server that you know: ask its "
                "administrator"
            )
        except paramiko.AuthenticationException as error:
            if "shut down" in str(error) or "timeout" in str(error):  # the connection is at fault, not a key
                raise
            problem = "the server accepts no key of this user; check the user's name, 'ssh-add' and key_file"
        except (FileNotFoundError, PermissionError, ValueError) as error:
            problem = f"{getattr(error, 'filename', None) or 'a file of keys'} cannot be read; check the options"
        except paramiko.SSHException as error:
            if "not found in known_hosts" not in str(error):
                raise
            problem = "the server's key is not in known_hosts; 'ssh' to it once, and check the key that it shows"
        self._close()
        raise PlaceError(self.url, problem)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def get(self, name: str, at_most: int) -> bytes:
        def act(sftp: Any) -> bytes:
            with sftp.open(self._path(checked_name(name)), "rb") as file:
                self._ask_quietly(file)
                size = file.stat().st_size
                check_size(self.url, name, size, at_most)
                file.prefetch(size)
                data: bytes = file.read(at_most + 1)
                check_size(self.url, name, len(data), at_most)
                return data

        return self._do(name, act)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        runs = joined(ranges)

        def act(sftp: Any) -> list[bytes]:
            with sftp.open(self._path(checked_name(name)), "rb") as file:
                self._ask_quietly(file)
                size = file.stat().st_size
                for (start, length), _ in runs:
                    check_whole(self.url, name, b"", length if start + length > size else 0)
                wanted = [run for run, _ in runs if run[1]]
                read = iter(file.readv(wanted) if wanted else ())
                found = [next(read) if length else b"" for (_, length), _ in runs]
                return cut(
                    runs, [check_whole(self.url, name, d, r[0][1]) for d, r in zip(found, runs, strict=True)], ranges
                )

        return self._do(name, act)

    def _ask_quietly(self, file: Any) -> None:
        """Silences the thread in which paramiko reads ahead.

        It prints a traceback if the connection is lost. The reader raises that error anyway.
        """
        ask = file._prefetch_thread

        def asked(*args: Any) -> None:
            with suppress(OSError, EOFError, self._paramiko.SSHException):
                ask(*args)

        file._prefetch_thread = asked

    def put(self, name: str, data: bytes) -> None:
        def act(sftp: Any) -> None:
            written = self._write(sftp, name, data)
            sftp.posix_rename(written, self._path(name))

        self._do(name, act)

    def create(self, name: str, data: bytes) -> bool:
        def act(sftp: Any) -> bool:
            written = self._write(sftp, name, data)
            try:
                sftp.rename(written, self._path(name))
                return True
            except OSError:
                with suppress(OSError):
                    sftp.remove(written)
                sftp.stat(self._path(name))  # raises if the name is not taken: then the rename failed otherwise
                return False

        return self._do(name, act)

    def _write(self, sftp: Any, name: str, data: bytes) -> str:
        *folders, _ = checked_name(name).split("/")
        for depth in range(len(folders) + 1):
            self._make(sftp, "/".join(folders[:depth]))
        self._make(sftp, "tmp")
        written = self._path(f"tmp/{fresh_name()}")
        try:
            with sftp.open(written, "wxb") as file:
                file.set_pipelined(True)
                file.write(data)
                file.flush()
                file.set_pipelined(False)
                with suppress(OSError):  # not every server has it
                    sftp._request(self._paramiko.sftp.CMD_EXTENDED, "fsync@openssh.com", file.handle)
            if sftp.stat(written).st_size != len(data):
                raise OSError("what was written arrived only in part")
        except (OSError, self._paramiko.SSHException):
            with suppress(OSError, EOFError, self._paramiko.SSHException):
                is_full = self._free_bytes(sftp) < len(data)  # SFTP has no error for a full disk
                sftp.remove(written)
                if is_full:
                    raise DiskFullError(self.url) from None
            raise
        return written

    def _free_bytes(self, sftp: Any) -> int:
        """The bytes that are free for this user on the server. Raises an OSError if the server does not say."""
        _, answer = sftp._request(self._paramiko.sftp.CMD_EXTENDED, "statvfs@openssh.com", self._root)
        _, fragment_bytes, _, _, available = (answer.get_int64() for _ in range(5))
        return int(fragment_bytes * available)

    def _make(self, sftp: Any, folder: str) -> None:
        if folder in self._made:
            return
        path = self._path(folder).rstrip("/") or "/"
        if not _is_there(sftp, path):
            try:
                sftp.mkdir(path)
            except OSError:
                if not _is_there(sftp, path):  # else another store has made it
                    raise
        self._made.add(folder)

    def list(self, prefix: str) -> Iterator[str]:
        def act(sftp: Any) -> list[str]:
            return list(own_names(self.url, prefix, self._names(sftp, prefix.rstrip("/"))))

        return iter(self._do(prefix, act))

    def _names(self, sftp: Any, top: str) -> Iterator[str]:
        folders = [top]
        while folders:
            within = folders.pop()
            with suppress(FileNotFoundError):
                for entry in sftp.listdir_iter(self._path(within)):
                    kind, name = stat.S_IFMT(entry.st_mode or 0), f"{within}/{entry.filename}"
                    if kind == stat.S_IFREG:
                        yield name
                    elif kind == stat.S_IFDIR and "/" not in entry.filename and is_name(name):
                        folders.append(name)

    def delete(self, name: str) -> None:
        def act(sftp: Any) -> None:
            with suppress(FileNotFoundError):
                sftp.remove(self._path(checked_name(name)))

        self._do(name, act)


def _is_there(sftp: Any, path: str) -> bool:
    try:
        sftp.stat(path)
    except FileNotFoundError:
        return False
    return True
