"""Reads images and their tasks from a request's body. fetching.py opens the paths and URLs in it."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from pear_store.errors import unreadable
from router.serve.fetching import FilePath, Place, Url
from router.serve.limits import RequestLimits
from router.serve.problems import Problem
from router.threads import side_threads

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

R = TypeVar("R")
Args = TypeVarTuple("Args")

RAW = ("application/octet-stream", "binary/octet-stream")
LARGE_BYTES = 64 * 1024
"""Larger bodies are parsed in a thread, away from the event loop."""
SINGLE = {"image", "path", "url"}
"""Keys of an image in JSON. Exactly one of them is expected."""
MOST_HEADERS = 16
"""Most headers of a part of a multipart body."""


@dataclass(frozen=True)
class Asked:
    """One image of a request."""

    image: bytes | Place
    tasks: list[str] | None
    """Its own tasks. None: those of the request."""
    name: str | None
    """Name of its file. None if it had none."""


class Held:
    """Counts the bytes of all bodies in memory."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self.size_bytes = most_bytes, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that counts the bytes of one request. It raises a Problem if there would be too many."""
        mine = 0

        def count(size_bytes: int) -> None:
            nonlocal mine
            if self.size_bytes + size_bytes > self._most:
                raise Problem(
                    429, "the bodies of other requests fill the memory: try again in 1 s", headers={"Retry-After": "1"}
                )
            self.size_bytes += size_bytes
            mine += size_bytes

        try:
            yield count
        finally:
            self.size_bytes -= mine


async def read_body(request: Request, limits: RequestLimits, count: Callable[[int], None]) -> bytes:
    """Reads a request's body.

    Args:
        count: is called with the number of bytes as they arrive; it may raise an error.
    Raises:
        Problem: the body is too large, too slow, compressed, or ended too early.
    """
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        raise Problem(415, f"content encoding {coding!r:.100}: expected a body that is not compressed")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in _chunks(request):
                if len(body) + len(chunk) > limits.body_bytes:
                    raise _too_large(limits)
                count(len(chunk))
                body += chunk
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    return bytes(body)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise Problem(400, "the body ended too early") from None


class Parser:
    """Parses bodies; large ones in a thread. All requests share it, because parsed JSON may be much larger than its
    bytes."""

    def __init__(self) -> None:
        self._thread = side_threads(1, "pear-serve-parse")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def read(self, read: Callable[[bytes, *Args], R], body: bytes, *args: *Args) -> R:
        """Calls `read` with a body and further arguments."""
        if len(body) <= LARGE_BYTES:
            return read(body, *args)
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(read, body, *args))


async def images_of(body: bytes, content_type: str | None, limits: RequestLimits, parser: Parser) -> list[Asked]:
    """The images of a body: the body itself, the files of a form, or base64, paths and URLs in JSON.

    Raises:
        Problem: the body does not fit its content type, or holds no or too many images.
    """
    kind, options = parse_options_header(content_type or RAW[0])
    name = kind.decode("latin-1").lower()
    read: Callable[[bytes], list[Asked]]
    if name in RAW or name.startswith("image/"):
        asked = [Asked(body, None, None)]
    else:
        if name == "application/json":
            read = partial(_from_json, limits=limits)
        elif name == "multipart/form-data":
            read = partial(_from_form, boundary=options.get(b"boundary", b""), limits=limits)
        else:
            raise Problem(
                415,
                f"content type {name!r:.100}: expected image/*, application/octet-stream, multipart/form-data or "
                "application/json; with curl, give -H 'Content-Type: image/jpeg'",
            )
        asked = await parser.read(read, body)
    if not asked:
        raise Problem(400, "expected at least one image, found none")
    for number, one in enumerate(asked):
        if not one.image:
            raise Problem(400, f"image {one.name or number!r:.100}: expected a file's bytes, found none")
    return asked


def _too_large(limits: RequestLimits) -> Problem:
    return Problem(413, f"the body is too large: the limit is {limits.body_bytes} bytes")


def _check_count(count: int, limits: RequestLimits) -> None:
    if count > limits.images:
        raise Problem(413, f"too many images: the limit is {limits.images} in a request")


# ---- JSON -------------------------------------------------------------------------------------


def _from_json(body: bytes, *, limits: RequestLimits) -> list[Asked]:
    found = read_json(body)
    if not isinstance(found, dict) or ("images" in found) == bool(SINGLE & found.keys()):
        raise Problem(400, 'expected a JSON object with either "image" or "images"')
    items = found.get("images", [found])
    if not isinstance(items, list):
        raise Problem(400, '"images": expected a list')
    _check_count(len(items), limits)
    return [_from_item(item, number) for number, item in enumerate(items)]


def read_json(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        Problem: the body is not JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {unreadable(error)}"[:200]) from None


def _from_item(item: object, number: int) -> Asked:
    if isinstance(item, str):
        item = {"image": item}
    given = [name for name in SINGLE if name in item] if isinstance(item, dict) else []
    if not isinstance(item, dict) or len(given) != 1 or not isinstance(text := item[given[0]], str):
        raise Problem(400, f'image {number}: expected base64, or an object with "image" in base64, a "path" or a "url"')
    if "task" in item and "tasks" in item:
        raise Problem(400, f'image {number}: expected either "task" or "tasks"')
    tasks = item.get("tasks", item.get("task"))
    names = [tasks] if isinstance(tasks, str) else tasks
    if names is not None and not (
        isinstance(names, list) and names and all(isinstance(one, str) and is_text(one) for one in names)
    ):
        raise Problem(400, f'image {number}: "tasks": expected names of tasks, at least one, or "all"')
    if given == ["image"]:
        return Asked(from_base64(text, f"image {number}"), names, None)
    return Asked(FilePath(text) if given == ["path"] else Url(text), names, None)


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8. JSON can hold halves of surrogate pairs, which UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def from_base64(text: str, what: str) -> bytes:
    """The bytes of base64, also in a data URL.

    Raises:
        Problem: the text is not base64.
    """
    if text.startswith("data:"):
        text = text.partition(";base64,")[2] or "-"
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(400, f'{what}: expected base64; for a path or URL use "path" or "url" instead') from None


# ---- forms ------------------------------------------------------------------------------------


def _from_form(body: bytes, *, boundary: bytes, limits: RequestLimits) -> list[Asked]:
    """A form's files. If the URL names no task, the name of a file's field is its task. Other fields are ignored."""
    if not boundary:
        raise Problem(400, "multipart/form-data: expected a boundary in its content type")
    parts = _Parts(limits)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem(400, f"the body is not a form: {' '.join(str(error).split())}"[:200]) from None
    if not parts.is_whole:
        raise Problem(400, "the body is not a form: it has no end")
    return parts.files


class _Parts:
    """Collects the files of a form."""

    def __init__(self, limits: RequestLimits) -> None:
        self.files: list[Asked] = []
        self.is_whole = False
        self._limits = limits
        self._field = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._data = bytearray()
        self._count = 0

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._add,
            "on_part_end": self._finish,
            "on_header_field": self._add_field,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > 2 * self._limits.images + 16:
            raise Problem(413, "too many parts in the form")
        self._headers, self._data = {}, bytearray()

    def _add(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _add_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if len(self._headers) >= MOST_HEADERS:
            raise Problem(400, f"the body is not a form: a part has more than {MOST_HEADERS} headers")
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _finish(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"filename" in options:
            _check_count(len(self.files) + 1, self._limits)
            task = options.get(b"name", b"").decode("utf-8", "replace")
            file = options[b"filename"].decode("utf-8", "replace")
            self.files.append(Asked(bytes(self._data), [task] if task else None, file))

    def _end(self) -> None:
        self.is_whole = True
