"""A place on a web server. It is only read, which needs no listing. Uses httpx (extra `remote`)."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from pear_store.errors import AbsentError, DamagedRemoteError, PearStoreError, PlaceError
from pear_store.remote.answers import failure, refusal
from pear_store.remote.place import Place, Range, check_size, check_whole, checked_name, cut, joined

T = TypeVar("T")
_TIMEOUT_S = 60
_LEAST_BYTES_S = 1000
"""A server that sends fewer bytes per second is given up"""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:\d+|\*)")


class WebPlace(Place):
    """Objects under an http or https URL. Redirects are not followed: a remote cannot lead a client to another host.

    A server that knows no ranges sends whole objects. The ranges are cut out as they arrive.
    """

    can_write = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.username or parts.query or parts.fragment or not parts.hostname:
            raise PlaceError(parts.hostname or "URL", "expected http(s)://HOST/PATH without a password or a query")
        try:
            import httpx
        except ImportError as error:
            raise PlaceError(url, f"needs httpx: {error}; pip install 'pear-adapters[remote]'") from None
        self._httpx: Any = httpx
        self._path = parts.path
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._client = httpx.Client(
            follow_redirects=False, trust_env=False, timeout=_TIMEOUT_S, headers={"Accept-Encoding": "identity"}
        )

    def close(self) -> None:
        self._client.close()

    def get(self, name: str, at_most: int) -> bytes:
        def act() -> bytes:
            with self._answer(name, {}) as response:
                length = response.headers.get("Content-Length", "")
                if length.isascii() and length.isdigit() and len(length) < 19:
                    check_size(self.url, name, int(length), at_most)
                return self._body(response, name, at_most)

        return self._do(name, act)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        runs = joined(ranges)
        read: list[bytes] = []
        for (start, size), _ in runs:
            data = self._do(name, partial(self._get_run, name, start, size, ranges)) if size else b""
            if isinstance(data, list):  # the server knows no ranges
                return data
            read.append(data)
        return cut(runs, read, ranges)

    def _get_run(self, name: str, start: int, size: int, ranges: Sequence[Range]) -> bytes | list[bytes]:
        with self._answer(name, {"Range": f"bytes={start}-{start + size - 1}"}) as response:
            if response.status_code == 200:
                return self._sieve(response, name, ranges)
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != start:
                raise PlaceError(self.url, f"{name}: the server sent another range than was asked for")
            return check_whole(self.url, name, self._body(response, name, size), size)

    def _sieve(self, response: Any, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Cuts ranges out of a whole object as it arrives. Keeps only the ranges."""
        found: list[list[bytes]] = [[] for _ in ranges]
        at, end = 0, max(offset + length for offset, length in ranges)
        for chunk in self._chunks(response, name):
            for number, (offset, length) in enumerate(ranges):
                if (low := max(offset - at, 0)) < (high := min(offset + length - at, len(chunk))):
                    found[number].append(chunk[low:high])
            at += len(chunk)
            if at >= end:
                break
        return [
            check_whole(self.url, name, b"".join(parts), length)
            for parts, (_, length) in zip(found, ranges, strict=True)
        ]

    def _body(self, response: Any, name: str, at_most: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        for chunk in self._chunks(response, name):
            parts.append(chunk)
            size += len(chunk)
            if size > at_most:
                raise DamagedRemoteError(self.url, name, f"more than {at_most} bytes")
        return b"".join(parts)

    def _chunks(self, response: Any, name: str) -> Iterator[bytes]:
        start, size = time.monotonic(), 0
        for chunk in response.iter_raw():
            size += len(chunk)
            if time.monotonic() - start > _TIMEOUT_S + size / _LEAST_BYTES_S:
                raise PlaceError(self.url, f"{name}: the server sends too slowly", again=True)
            yield chunk

    @contextmanager
    def _answer(self, name: str, headers: dict[str, str]) -> Iterator[Any]:
        path = quote(f"{self._path}/{checked_name(name)}", safe="/%~+,;=@:!$&'()*")
        with self._client.stream("GET", self._base + path, headers=headers) as response:
            if response.status_code not in (200, 206):
                raise self._refusal(response, name)
            yield response

    def _refusal(self, response: Any, name: str) -> PearStoreError:
        status = response.status_code
        if status in (404, 410):
            return AbsentError(self.url, name)
        if status == 416:
            return DamagedRemoteError(self.url, name, "it is shorter than the log says")
        return refusal(self.url, name, status, None)

    def _do(self, name: str, act: Callable[[], T]) -> T:
        try:
            return act()
        except (OSError, self._httpx.HTTPError, self._httpx.StreamError) as error:
            problem = failure(self.url, name, f"{type(error).__name__}: {error}")
        raise problem

    def put(self, name: str, data: bytes) -> None:
        raise self._only_read()

    def create(self, name: str, data: bytes) -> bool:
        raise self._only_read()

    def list(self, prefix: str) -> Iterator[str]:
        raise self._only_read()

    def delete(self, name: str) -> None:
        raise self._only_read()

    def _only_read(self) -> PlaceError:
        return PlaceError(self.url, "a web server can only be read; push to another kind of remote")
