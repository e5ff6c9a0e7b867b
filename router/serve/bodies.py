"""From a request's body to images, each with its tasks. No path and no URL in it is ever opened."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from router.serve.limits import RequestLimits
from router.serve.problems import Problem

RAW = ("application/octet-stream", "binary/octet-stream")
LARGE_BYTES = 64 * 1024
"""Larger bodies are parsed in a thread, away from the event loop."""
MOST_HEADERS = 16
"""Of one part of a multipart body."""


@dataclass(frozen=True)
class Asked:
    """One image of a request."""

    image: bytes
    tasks: list[str] | None
    """None where the request's own are meant."""
    name: str | None
    """Of its file, if it had one."""


class Held:
    """Counts the bytes of all bodies that are held."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self.size_bytes = most_bytes, 0

    def add(self, size_bytes: int) -> None:
        """Raises a Problem if there would be too many."""
        if self.size_bytes + size_bytes > self._most:
            raise Problem(
                429, "the bodies of other requests fill the memory: try again in 1 s", headers={"Retry-After": "1"}
            )
        self.size_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.size_bytes -= size_bytes


async def read_body(request: Request, limits: RequestLimits, held: Held) -> bytes:
    """A request's body; `held` counts it: whoever reads it gives its length back.

    Raises:
        Problem: it is too large, too slow, or ended too early.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in _chunks(request):
                if len(body) + len(chunk) > limits.body_bytes:
                    raise _too_large(limits)
                held.add(len(chunk))
                body += chunk
    except TimeoutError:
        held.give_back(len(body))
        raise Problem(408, f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    except BaseException:
        held.give_back(len(body))
        raise
    return bytes(body)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise Problem(400, "the body ended too early") from None


async def images_of(body: bytes, content_type: str | None, limits: RequestLimits) -> list[Asked]:
    """The images of a body: its bytes, the files of a form, or what JSON holds in base64.

    Raises:
        Problem: it cannot be read as what it is said to be, or holds no or too many images.
    """
    kind, options = parse_options_header(content_type or RAW[0])
    name = kind.decode("latin-1").lower()
    read: Callable[[], list[Asked]]
    if name in RAW or name.startswith("image/"):
        asked = [Asked(body, None, None)]
    else:
        if name == "application/json":
            read = partial(_from_json, body, limits)
        elif name == "multipart/form-data":
            read = partial(_from_form, body, options.get(b"boundary", b""), limits)
        else:
            raise Problem(
                415,
                f"content type {name!r:.100}: expected image/*, application/octet-stream, multipart/form-data or "
                "application/json; with curl, say -H 'Content-Type: image/jpeg'",
            )
        asked = await asyncio.to_thread(read) if len(body) > LARGE_BYTES else read()
    if not asked:
        raise Problem(400, "no image: expected at least one")
    for number, one in enumerate(asked):
        if not one.image:
            raise Problem(400, f"image {one.name or number!r:.100} is empty")
    return asked


def _too_large(limits: RequestLimits) -> Problem:
    return Problem(413, f"the body is too large: the limit is {limits.body_bytes} bytes")


def _check_count(count: int, limits: RequestLimits) -> None:
    if count > limits.images:
        raise Problem(413, f"too many images: the limit is {limits.images} in a request")


# ---- JSON -------------------------------------------------------------------------------------


def _from_json(body: bytes, limits: RequestLimits) -> list[Asked]:
    found = read_json(body)
    if not isinstance(found, dict) or ("image" in found) == ("images" in found):
        raise Problem(400, 'expected a JSON object with either "image" or "images"')
    items = found.get("images", [found])
    if not isinstance(items, list):
        raise Problem(400, '"images": expected a list')
    _check_count(len(items), limits)
    return [_from_item(item, number) for number, item in enumerate(items)]


def read_json(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        Problem: it is none.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is no JSON: {' '.join(str(error).split())}"[:200]) from None


def _from_item(item: object, number: int) -> Asked:
    if isinstance(item, str):
        item = {"image": item}
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise Problem(400, f'image {number}: expected base64, or an object with "image" in base64')
    if "task" in item and "tasks" in item:
        raise Problem(400, f'image {number}: expected either "task" or "tasks"')
    tasks = item.get("tasks", item.get("task"))
    names = [tasks] if isinstance(tasks, str) else tasks
    if names is not None and not (isinstance(names, list) and names and all(isinstance(one, str) for one in names)):
        raise Problem(400, f'image {number}: "tasks": expected names of tasks, at least one, or "all"')
    return Asked(from_base64(item["image"], f"image {number}"), names, None)


def from_base64(text: str, what: str) -> bytes:
    """The bytes of base64, also as a data URL.

    Raises:
        Problem: it is none.
    """
    if text.startswith("data:"):
        text = text.partition(";base64,")[2] or "-"
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(400, f"{what}: expected base64; paths and URLs are not opened here") from None


# ---- forms ------------------------------------------------------------------------------------


def _from_form(body: bytes, boundary: bytes, limits: RequestLimits) -> list[Asked]:
    """A form's files. The name of a file's field is its task, where the URL names none. Other fields are ignored."""
    if not boundary:
        raise Problem(400, "multipart/form-data without a boundary")
    parts = _Parts(limits)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem(400, f"the body is no form: {' '.join(str(error).split())}"[:200]) from None
    if not parts.is_whole:
        raise Problem(400, "the body is no form: it has no end")
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

    def callbacks(self) -> dict[str, Callable[..., None]]:
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
            raise Problem(400, "the body is no form: a part has too many headers")
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
