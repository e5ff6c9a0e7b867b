"""A place on a web server, which is only read: no listing is needed to read a remote."""

import http.client
import re
import ssl
import threading
from collections.abc import Iterator, Sequence
from urllib.parse import quote, urlsplit

from pear_store.errors import AbsentError, DamagedRemoteError, PlaceError
from pear_store.remote.place import Place, Range, check_size, check_whole, checked_name, cut, joined

_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:\d+|\*)")


class WebPlace(Place):
    """Objects under an http or https URL. Redirects are not followed: a remote cannot lead a client to another host.

    A server that knows no ranges sends whole objects; what was asked for is cut out while they arrive.
    """

    can_write = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.username or parts.query or parts.fragment or not parts.hostname:
            raise PlaceError(parts.hostname or "URL", "expected http(s)://HOST/PATH without a password or a query")
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path
        self._is_secure = parts.scheme == "https"
        self._local = threading.local()
        self._open: list[http.client.HTTPConnection] = []

    def close(self) -> None:
        for connection in self._open:
            connection.close()
        self._open.clear()
        self._local = threading.local()

    def get(self, name: str, at_most: int) -> bytes:
        response = self._request(name, {})
        length = response.headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and len(length) < 19 and int(length) > at_most:
            self._drop()
            check_size(self.url, name, int(length), at_most)
        data = self._read(response, name, at_most + 1)
        if len(data) > at_most:
            self._drop()
            raise DamagedRemoteError(self.url, name, f"more than {at_most} bytes")
        return data

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        runs = joined(ranges)
        read: list[bytes] = []
        for (start, size), _ in runs:
            if not size:
                read.append(b"")
                continue
            response = self._request(name, {"Range": f"bytes={start}-{start + size - 1}"})
            if response.status == 200:  # it knows no ranges
                return self._sieve(response, name, ranges)
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != start:
                self._drop()
                raise PlaceError(self.url, f"{name}: the server sent another range than was asked for")
            data = self._read(response, name, size)
            if len(data) != size:
                self._drop()
            read.append(check_whole(self.url, name, data, size))
        return cut(runs, read, ranges)

    def _sieve(self, response: http.client.HTTPResponse, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Cuts ranges out of a whole object as it arrives; holds only those."""
        found: list[list[bytes]] = [[] for _ in ranges]
        at, end = 0, max(offset + length for offset, length in ranges)
        while at < end and (chunk := self._chunk(response, name)):
            for number, (offset, length) in enumerate(ranges):
                if (low := max(offset - at, 0)) < (high := min(offset + length - at, len(chunk))):
                    found[number].append(chunk[low:high])
            at += len(chunk)
        if not response.isclosed():
            self._drop()
        return [
            check_whole(self.url, name, b"".join(parts), length)
            for parts, (_, length) in zip(found, ranges, strict=True)
        ]

    def _read(self, response: http.client.HTTPResponse, name: str, at_most: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while size < at_most and (chunk := self._chunk(response, name, at_most - size)):
            parts.append(chunk)
            size += len(chunk)
        return b"".join(parts)

    def _chunk(self, response: http.client.HTTPResponse, name: str, at_most: int = _CHUNK_BYTES) -> bytes:
        try:
            return response.read(min(at_most, _CHUNK_BYTES))
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            raise PlaceError(self.url, f"{name}: {_text(error)}", again=True) from None

    def _request(self, name: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        path = quote(f"{self._path}/{checked_name(name)}", safe="/%~+,;=@:!$&'()*")
        for attempt in range(2):
            connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
            is_kept = connection is not None
            try:
                if connection is None:
                    connection = self._connect()
                connection.request("GET", path, headers={"Accept-Encoding": "identity", **headers})
                response = connection.getresponse()
                break
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if not is_kept or attempt:  # a server may have closed a connection that was kept
                    raise PlaceError(self.url, f"{name}: {_text(error)}", again=True) from None
        if response.status in (200, 206):
            return response
        status, location = response.status, response.headers.get("Location", "")
        self._drop()
        if status in (404, 410):
            raise AbsentError(self.url, name)
        if 300 <= status < 400:
            raise PlaceError(self.url, f"{name}: the server redirects to {location[:200]!r}, which is not followed")
        if status in (401, 403):
            raise PlaceError(self.url, f"{name}: access is denied (status {status})")
        if status == 416:
            raise DamagedRemoteError(self.url, name, "it is shorter than the log says")
        raise PlaceError(self.url, f"{name}: the server answered with status {status}", again=status >= 500)

    def _connect(self) -> http.client.HTTPConnection:
        if self._is_secure:
            context = ssl.create_default_context()
            made: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=_TIMEOUT_S, context=context
            )
        else:
            made = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        self._local.connection = made
        self._open.append(made)
        return made

    def _drop(self) -> None:
        """Closes this thread's connection, of which something is left unread."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None
            if connection in self._open:
                self._open.remove(connection)

    def put(self, name: str, data: bytes) -> None:
        raise self._only_read()

    def create(self, name: str, data: bytes) -> bool:
        raise self._only_read()

    def list(self, prefix: str) -> Iterator[str]:
        raise self._only_read()

    def delete(self, name: str) -> None:
        raise self._only_read()

    def _only_read(self) -> PlaceError:
        return PlaceError(self.url, "a web server can only be read")


def _text(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__
