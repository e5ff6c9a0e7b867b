"""Places in object stores: S3 and compatible ones, Google Cloud Storage, Azure. Uses obstore (extra `remote`)."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pear_store.errors import AbsentError, DamagedRemoteError, PearStoreError, PlaceError
from pear_store.pools import ThreadPool
from pear_store.remote.answers import failure, plain, status_of
from pear_store.remote.place import Place, Range, check_size, check_whole, checked_name, cut, joined, own_names

T = TypeVar("T")
_PART_BYTES = 5 << 20
_PARTS = 2
"""How many parts of an object are sent at once. Each must arrive within the time of a stall, also on a slow line."""
_TELLING_BYTES = 1 << 20
"""Sending an object larger than this shows how fast the line is"""
_WHOLE_BYTES = 64 << 20
_WHOLE_S = 10.0
"""One request sends an object of at most `_WHOLE_BYTES`, if that should take at most `_WHOLE_S` seconds."""
_THREADS = 8
_CHUNK_BYTES = 1 << 20
_STALL = timedelta(seconds=60)
_LONGEST = timedelta(hours=1)
_NO_PROXY = "http://127.0.0.1:0"
_OF_CLIENT = frozenset((
    "allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "http1_only",
    "http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle", "http2_only",
    "pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url",
    "randomize_addresses", "read_timeout", "timeout", "user_agent",
))  # fmt: skip
"""Options of obstore's HTTP client"""
_OF_AWS = ("amazonaws.com", "amazonaws.com.cn", "169.254.169.254", "169.254.170.2", "169.254.170.23")


class ObjectPlace(Place):
    """Objects under a URL's path. `create` is a conditional write: the server refuses it if the name is taken.

    Args:
        options: obstore's options, such as ``endpoint`` and ``region``. Credentials come from the environment.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        try:
            import obstore
            from obstore import exceptions
            from obstore import store as stores
        except ImportError as error:
            raise PlaceError(url, f"needs obstore: {error}; pip install 'pear-adapters[remote]'") from None
        self.url = url
        self._obstore: Any = obstore
        self._errors: Any = (exceptions.BaseError, OSError)
        self._absent: Any = (exceptions.NotFoundError, FileNotFoundError)
        self._taken: Any = exceptions.AlreadyExistsError
        self._store: Any = None
        if ours := sorted(_OF_CLIENT & {key.lower() for key in options}):  # on these obstore panics
            raise PlaceError(f"option {ours[0]!r}", "Pear itself sets up the HTTP client; leave it out")
        problem = ""
        defaults = {"disable_bulk_delete": "true"} if url.startswith("s3") else {}  # not every server has it
        try:
            settings: dict[str, Any] = {"config": {**defaults, **options}, "client_options": _client(options)}
            self._store = stores.from_url(url, retry_config={"max_retries": 0}, **settings)
        except (exceptions.BaseError, ValueError, TypeError) as error:
            problem = plain(str(error))
        if self._store is None:
            raise PlaceError(url, problem)
        self._pool = ThreadPool(_THREADS)
        self._whole_bytes = _TELLING_BYTES
        """Larger objects are sent in parts"""
        self._slowly = threading.Lock()
        """One object at a time is sent in parts"""

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _do(self, name: str, act: Callable[[], T]) -> T:
        try:
            return act()
        except self._errors as error:
            problem = self._error(error, name)
        raise problem  # outside of the except block: its context may show a signed request in a log

    def get(self, name: str, at_most: int) -> bytes:
        def act() -> bytes:
            found = self._obstore.get(self._store, checked_name(name))
            check_size(self.url, name, found.meta["size"], at_most)
            return self._read(found, name, at_most)

        return self._do(name, act)

    def _read(self, found: Any, name: str, at_most: int) -> bytes:
        """Reads a body as it arrives. At most `at_most` bytes are kept, whatever its header says."""
        parts: list[Any] = []
        size = 0
        for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
            size += len(chunk)
            check_size(self.url, name, size, at_most)
            parts.append(chunk)
        return b"".join(parts)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        # obstore's own get_ranges panics if an object is shorter than a range
        checked_name(name)
        runs = joined(ranges)
        return cut(runs, list(self._pool.map(lambda run: self._get_range(name, *run[0]), runs)), ranges)

    def _get_range(self, name: str, start: int, length: int) -> bytes:
        if not length:
            return b""

        def act() -> bytes:
            try:
                found = self._obstore.get(self._store, name, options={"range": (start, start + length)})
            except self._errors as error:
                if "non-partial response" not in str(error):
                    raise
                return self._read_between(name, start, start + length)  # the server knows no ranges
            return self._read(found, name, length)

        return check_whole(self.url, name, self._do(name, act), length)

    def _read_between(self, name: str, start: int, end: int) -> bytes:
        """Cuts a range out of a whole object as it arrives. Keeps only the range."""
        parts: list[bytes] = []
        at = 0
        for chunk in self._obstore.get(self._store, name).stream(min_chunk_size=_CHUNK_BYTES):
            parts.append(bytes(chunk)[max(start - at, 0) : max(end - at, 0)])
            at += len(chunk)
            if at >= end:
                break
        return b"".join(parts)

    def put(self, name: str, data: bytes) -> None:
        if len(data) <= self._whole_bytes:  # fewer requests, and less work for the server
            self._put(name, data, {"use_multipart": False})
        else:
            with self._slowly:
                self._put(name, data, {"chunk_size": _PART_BYTES, "max_concurrency": _PARTS})

    def _put(self, name: str, data: bytes, how: Mapping[str, Any]) -> None:
        start = time.monotonic()
        try:
            self._do(name, lambda: self._obstore.put(self._store, checked_name(name), bytes(data), **how))
        except PearStoreError:
            self._whole_bytes = _TELLING_BYTES  # the line may have become slow
            raise
        if len(data) > _TELLING_BYTES:
            bytes_s = len(data) / max(time.monotonic() - start, 1e-3)
            self._whole_bytes = min(max(_TELLING_BYTES, round(_WHOLE_S * bytes_s)), _WHOLE_BYTES)

    def create(self, name: str, data: bytes) -> bool:
        def act() -> bool:
            try:
                self._obstore.put(self._store, checked_name(name), bytes(data), mode="create", use_multipart=False)
                return True
            except self._taken:
                return False

        return self._do(name, act)

    def list(self, prefix: str) -> Iterator[str]:
        return own_names(self.url, prefix, self._names(prefix))

    def _names(self, prefix: str) -> Iterator[str]:
        chunks = self._do(prefix, lambda: self._obstore.list(self._store, prefix))
        while (chunk := self._do(prefix, lambda: next(chunks, None))) is not None:
            yield from (found["path"] for found in chunk)

    def delete(self, name: str) -> None:
        def act() -> None:
            with suppress(self._absent):
                self._obstore.delete(self._store, checked_name(name))

        self._do(name, act)

    def _error(self, error: BaseException, name: str) -> PearStoreError:
        text = str(error)
        if isinstance(error, self._absent) and "NoSuchBucket" not in text and "ContainerNotFound" not in text:
            return AbsentError(self.url, name)
        if status_of(text) == 416:
            return DamagedRemoteError(self.url, name, "it is shorter than the log says")
        return failure(self.url, name, text)


def _client(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the HTTP client.

    The client follows redirects, and no setting forbids that. So if the user names a server, requests to other hosts
    go to a proxy on port 0. Nothing listens there, so they fail.
    """
    server = str(options.get("endpoint") or options.get("base_url") or "")
    found: dict[str, Any] = {
        "allow_http": server.startswith("http://"),
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": _STALL,
        "timeout": _LONGEST,
    }
    if server:
        found["proxy_url"] = _NO_PROXY
        found["proxy_excludes"] = ",".join([urlsplit(server).hostname or "", *_OF_AWS])
    return found
