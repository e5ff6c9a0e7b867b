"""A place on an SSH server, by SFTP. Through paramiko (extra `remote`)."""

import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pear_store.errors import AbsentError, PlaceError
from pear_store.format.digest import fresh_name
from pear_store.remote.place import Place, Range, check_size, check_whole, checked_name, cut, joined

T = TypeVar("T")
_TIMEOUT_S = 30
_OPTIONS = ("key_file", "known_hosts")


class SftpPlace(Place):
    """An object is a file. It is written in tmp/, synced, and then renamed by SFTP's own rename, which fails where the
    name is taken (not by OpenSSH's posix-rename, which replaces).

    The server's key must be known (~/.ssh/known_hosts). Who logs in is settled by the agent, the keys and the
    configuration in ~/.ssh. One connection, one request at a time; reads are sent ahead.

    Args:
        options: ``key_file``, ``known_hosts``: paths of files.
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
        ssh = paramiko.SSHClient()
        ssh.set_missing_host_key_policy(paramiko.RejectPolicy())
        if "known_hosts" in self._options:
            ssh.load_host_keys(self._options["known_hosts"])
        else:
            ssh.load_system_host_keys()
        ssh.connect(
            known.get("hostname", host), port or int(known.get("port", 22)), user or known.get("user"),
            key_filename=keys, timeout=_TIMEOUT_S, banner_timeout=_TIMEOUT_S, auth_timeout=_TIMEOUT_S,
        )  # fmt: skip
        self._ssh = ssh
        sftp = ssh.open_sftp()
        sftp.get_channel().settimeout(_TIMEOUT_S)
        return sftp

    def _do(self, name: str, act: Callable[[Any], T]) -> T:
        with self._lock:
            try:
                if self._sftp is None:
                    self._sftp = self._connect()
                return act(self._sftp)
            except FileNotFoundError:
                raise AbsentError(self.url, name) from None
            except PermissionError:
                raise PlaceError(self.url, f"{name}: access is denied") from None
            except self._paramiko.AuthenticationException:
                self._close()
                raise PlaceError(self.url, "the server accepts none of the keys at hand") from None
            except (OSError, EOFError, self._paramiko.SSHException) as error:
                self._close()
                again = not isinstance(error, self._paramiko.BadHostKeyException)
                again = again and "not found in known_hosts" not in str(error)
                problem = str(error)[:200] or type(error).__name__
                raise PlaceError(self.url, f"{name}: {problem}", again=again) from None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def get(self, name: str, at_most: int) -> bytes:
        def act(sftp: Any) -> bytes:
            with sftp.open(self._path(checked_name(name)), "rb") as file:
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
                sftp.stat(self._path(name))  # it is there, or else that is the error
                return False

        return self._do(name, act)

    def _write(self, sftp: Any, name: str, data: bytes) -> str:
        *folders, _ = checked_name(name).split("/")
        for depth in range(len(folders) + 1):
            self._make(sftp, "/".join(folders[:depth]))
        self._make(sftp, "tmp")
        written = self._path(f"tmp/{fresh_name()}")
        with sftp.open(written, "wxb") as file:
            file.set_pipelined(True)
            file.write(data)
            file.flush()
            file.set_pipelined(False)
            with suppress(OSError):  # a server may not offer it
                sftp._request(self._paramiko.sftp.CMD_EXTENDED, "fsync@openssh.com", file.handle)
        if sftp.stat(written).st_size != len(data):
            raise OSError("what was written arrived only in part")
        return written

    def _make(self, sftp: Any, folder: str) -> None:
        if folder in self._made:
            return
        path = self._path(folder).rstrip("/") or "/"
        try:
            sftp.stat(path)
        except FileNotFoundError:
            with suppress(OSError):  # another was first, or else the next request says why
                sftp.mkdir(path)
        self._made.add(folder)

    def list(self, prefix: str) -> Iterator[str]:
        def act(sftp: Any) -> list[str]:
            found, folders = [], [prefix.rstrip("/")]
            while folders:
                within = folders.pop()
                with suppress(FileNotFoundError):
                    for entry in sftp.listdir_attr(self._path(within)):
                        kind = stat.S_IFMT(entry.st_mode or 0)
                        name = os.path.basename(entry.filename)
                        if kind == stat.S_IFDIR:
                            folders.append(f"{within}/{name}")
                        elif kind == stat.S_IFREG:
                            found.append(f"{within}/{name}")
            return found

        return iter(self._do(prefix, act))

    def delete(self, name: str) -> None:
        def act(sftp: Any) -> None:
            with suppress(FileNotFoundError):
                sftp.remove(self._path(checked_name(name)))

        self._do(name, act)
