"""Places in object stores: S3 and what speaks like it, Google Cloud Storage, Azure; by obstore (extra `remote`)."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from pear_store.errors import AbsentError, DamagedRemoteError, PearStoreError, PlaceError
from pear_store.remote.place import Place, Range, check_size, check_whole, checked_name, cut, joined

_PART_BYTES = 8 << 20
_THREADS = 8
_RETRY_TIMEOUT = timedelta(seconds=60)


class ObjectPlace(Place):
    """Objects under a URL's path. `create` is a write that the server refuses where the name is there.

    Args:
        options: obstore's, such as ``endpoint`` and ``region``. Credentials are the environment's.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as error:
            raise PlaceError(url, f"needs obstore: {error}; pip install 'pear-adapters[remote]'") from None
        self.url = url
        self._obstore: Any = obstore
        self._errors: Any = exceptions
        plain = str(options.get("endpoint", "")).startswith("http://")
        client: Any = {"allow_http": plain, "timeout": "60s", "connect_timeout": "10s"}
        try:
            self._store: Any = from_url(
                url, client_options=client, retry_config={"max_retries": 4, "retry_timeout": _RETRY_TIMEOUT}, **options
            )
        except (exceptions.BaseError, ValueError, TypeError) as error:
            raise PlaceError(url, _first_line(error)) from None
        self._pool = ThreadPoolExecutor(_THREADS)

    def close(self) -> None:
        self._pool.shutdown()

    def get(self, name: str, at_most: int) -> bytes:
        try:
            found = self._obstore.get(self._store, checked_name(name))
            check_size(self.url, name, found.meta["size"], at_most)
            return bytes(found.bytes())
        except (self._errors.BaseError, FileNotFoundError) as error:
            raise self._error(error, name) from None

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        # not obstore's own get_ranges, which panics where an object is shorter than a range
        checked_name(name)
        runs = joined(ranges)
        return cut(runs, list(self._pool.map(lambda run: self._get_range(name, *run[0]), runs)), ranges)

    def _get_range(self, name: str, start: int, length: int) -> bytes:
        if not length:
            return b""
        try:
            data = bytes(self._obstore.get_range(self._store, name, start=start, length=length))
        except (self._errors.BaseError, FileNotFoundError) as error:
            if "416" in _first_line(error):
                raise DamagedRemoteError(self.url, name, "it is shorter than the log says") from None
            raise self._error(error, name) from None
        return check_whole(self.url, name, data, length)

    def put(self, name: str, data: bytes) -> None:
        try:
            self._obstore.put(self._store, checked_name(name), bytes(data), chunk_size=_PART_BYTES)
        except (self._errors.BaseError, FileNotFoundError) as error:
            raise self._error(error, name) from None

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._obstore.put(self._store, checked_name(name), bytes(data), mode="create", use_multipart=False)
            return True
        except self._errors.AlreadyExistsError:
            return False
        except (self._errors.BaseError, FileNotFoundError) as error:
            raise self._error(error, name) from None

    def list(self, prefix: str) -> Iterator[str]:
        try:
            for chunk in self._obstore.list(self._store, prefix):
                yield from (found["path"] for found in chunk)
        except (self._errors.BaseError, FileNotFoundError) as error:
            raise self._error(error, prefix) from None

    def delete(self, name: str) -> None:
        try:
            self._obstore.delete(self._store, checked_name(name))
        except (FileNotFoundError, self._errors.NotFoundError):
            pass
        except self._errors.BaseError as error:
            raise self._error(error, name) from None

    def _error(self, error: BaseException, name: str) -> PearStoreError:
        text = _first_line(error)
        if isinstance(error, self._errors.NotFoundError | FileNotFoundError):
            return (
                PlaceError(self.url, "there is no such bucket")
                if "NoSuchBucket" in str(error)
                else AbsentError(self.url, name)
            )
        if isinstance(error, self._errors.PermissionDeniedError | self._errors.UnauthenticatedError):
            return PlaceError(self.url, f"{name}: access is denied; credentials are those of the environment")
        return PlaceError(self.url, f"{name}: {text}", again=isinstance(error, self._errors.GenericError))


def _first_line(error: BaseException) -> str:
    """obstore's errors show a request's whole state below their first line."""
    return str(error).split("\n")[0][:300] or type(error).__name__
