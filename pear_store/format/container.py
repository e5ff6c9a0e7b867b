"""The safetensors container, read strictly and written canonically.

The layout is Hugging Face's: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without
gaps. Ours is its own reader because a store must know where bytes lie, refuse duplicate keys, and bound what a
hostile header can cost; every file written here opens with the ``safetensors`` package.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import chain
from math import isfinite, prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pear_store.errors import CheckpointError, SourceError, unreadable
from pear_store.files import LFS_POINTER, is_lfs_pointer, open_regular_file, read_text
from pear_store.format.digest import ITEM_BYTES, RawTensor

MAX_HEADER_BYTES = 64 * 1024 * 1024
MAX_FILE_BYTES = 4 * 1024**3
"""A task checkpoint is read into memory whole; a larger file is refused."""
_MAX_DIMENSIONS = 8
_MAX_DEPTH = 64


class Place(NamedTuple):
    """Where a tensor's bytes lie in its file; offset in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, str]
    places: dict[str, Place]
    file_bytes: int


def strict_json(text: str | bytes) -> Any:
    """Parses JSON, refusing duplicate keys, NaN and infinities, and absurd nesting, with a ValueError."""
    value = parse_json(text)
    check_json(value)
    return value


def read_json(path: str | Path) -> Any:
    """The JSON of a UTF-8 file of the user's, as :func:`strict_json`.

    Raises:
        NotFoundError, SourceError: it cannot be read, or is no such JSON.
    """
    text = read_text(path)
    try:
        return strict_json(text)
    except ValueError as error:
        raise SourceError(path, f"not valid JSON: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """JSON without duplicate keys, NaN, infinities and numbers of thousands of digits; else a ValueError."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError(unreadable(error)) from None


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) == len(items):
        return found
    found = {}
    for key, value in items:
        if key in found:
            raise ValueError(f"duplicate key {key[:80]!r}")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def check_json(value: Any) -> None:
    """Raises a ValueError unless the value is JSON that UTF-8 can hold: finite, at most 64 levels deep."""
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            for item in chain(container, container.values()) if isinstance(container, dict) else container:
                kind = type(item)
                if kind is str:
                    if not item.isascii():
                        item.encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, a ValueError
                elif kind is dict or kind is list:
                    below.append(item)
                elif kind is float:
                    if not isfinite(item):
                        raise ValueError(f"{item} is not a JSON number")
                elif isinstance(item, dict | list):
                    below.append(item)
                elif item is not None and not isinstance(item, int | str | float):
                    raise ValueError(f"{kind.__name__} is no JSON type")
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")


class KnownHeaders:
    """What follows the metadata in headers that were found good. It is the same for all tasks of one shape, so the next
    one needs no look at each tensor. Holds at most 4 MiB."""

    def __init__(self) -> None:
        self._ends: dict[bytes, tuple[dict[str, Place], int]] = {}
        """The places, from the end of the header on, and the bytes of all tensors"""

    def __len__(self) -> int:
        return len(self._ends)

    def find(self, end: bytes, start: int, file_bytes: int) -> dict[str, Place] | None:
        """The places that a header with this end gives, in a file whose tensors begin at `start`."""
        kept = self._ends.get(end)
        if kept is None or start + kept[1] != file_bytes:
            return None
        return {n: Place(dtype, shape, start + at, length) for n, (dtype, shape, at, length) in kept[0].items()}

    def remember(self, end: bytes, start: int, header: Header) -> None:
        if len(end) < _MAX_END_BYTES:
            if len(self._ends) >= _MAX_ENDS:
                self._ends.clear()
            places = {n: p._replace(offset=p.offset - start) for n, p in header.places.items()}
            self._ends[end] = (places, header.file_bytes - start)


_MAX_END_BYTES, _MAX_ENDS = 1 << 16, 64


def read_header(file: BinaryIO, where: str | Path, file_bytes: int) -> Header:
    """Reads and checks the header of an open file of `file_bytes`; leaves the file just behind it.

    Raises:
        CheckpointError: the file is no safetensors file, or its header does not describe its bytes exactly.
    """
    start = file.read(8)
    length = _header_length(start, where, file_bytes)
    return _parse_header(file.read(length), where, file_bytes)


def read_metadata(file: BinaryIO, where: str | Path, file_bytes: int) -> dict[str, str]:
    """The metadata of an open file; what else its header says is not looked at where they come first.

    Raises:
        CheckpointError: the file is no safetensors file, or its header cannot be read.
    """
    text = file.read(_header_length(file.read(8), where, file_bytes))
    head, cut, _ = text.partition(_END_OF_METADATA)
    metadata = _only_metadata(head) if cut else None
    return _parse_header(text, where, file_bytes).metadata if metadata is None else metadata


def parse_buffer(
    data: memoryview, where: str | Path, known: KnownHeaders | None = None
) -> tuple[Header, dict[str, RawTensor]]:
    """A file that lies in memory: its header and its tensors, as views; `known` are headers of files read before.

    Raises:
        CheckpointError: it is not a file that safetensors could have written.
    """
    length = _header_length(bytes(data[:64]), where, len(data))
    header = _checked_header(bytes(data[8 : 8 + length]), where, len(data), known)
    tensors = {
        name: RawTensor.unchecked(p.dtype, p.shape, data[p.offset : p.offset + p.length], p.length)
        for name, p in header.places.items()
    }
    return header, tensors


FETCH_AGAIN = "copy or download the file again"


def _header_length(start: bytes, where: str | Path, file_bytes: int) -> int:
    length = int.from_bytes(start[:8], "little")
    is_length = len(start) >= 8 and length <= MAX_HEADER_BYTES  # a header of 640 bytes begins as a pickle does
    if not is_length and start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise CheckpointError(where, "a pickle (.pth, .pt): expected safetensors; pickles are never read, convert it")
    if len(start) < 8:
        raise CheckpointError(where, f"{file_bytes} bytes: too short for a safetensors file", FETCH_AGAIN)
    if is_lfs_pointer(start):
        raise CheckpointError(where, LFS_POINTER)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(where, f"header of {length} bytes: at most {MAX_HEADER_BYTES} are read; not safetensors?")
    if 8 + length > file_bytes:
        problem = f"truncated: the header needs {8 + length} bytes, the file has {file_bytes}"
        raise CheckpointError(where, problem, FETCH_AGAIN)
    return length


def _checked_header(text: bytes, where: str | Path, file_bytes: int, known: KnownHeaders | None) -> Header:
    if known is None:
        return _parse_header(text, where, file_bytes)
    start = 8 + len(text)
    head, cut, end = text.partition(_END_OF_METADATA)
    metadata = _only_metadata(head) if cut else None
    if metadata is None:
        return _parse_header(text, where, file_bytes)
    places = known.find(end, start, file_bytes)
    if places is not None:
        return Header(metadata, places, file_bytes)
    found = _parse_header(text, where, file_bytes)
    known.remember(end, start, found)
    return found


_END_OF_METADATA = b'"},"'
"""In a header that begins with its metadata, the first of these is where they end: within a text, a quotation mark that
follows a comma would be escaped."""


def _only_metadata(head: bytes) -> dict[str, str] | None:
    """The metadata, if the beginning of a header is these and nothing else."""
    try:
        header = parse_json(head + b'"}}')
    except ValueError:
        return None
    metadata = header.get("__metadata__") if isinstance(header, dict) and len(header) == 1 else None
    return metadata if isinstance(metadata, dict) and {str}.issuperset(map(type, metadata.values())) else None


def _parse_header(text: bytes, where: str | Path, file_bytes: int) -> Header:
    try:
        header = parse_json(text.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(where, f"header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(where, f"header: expected a JSON object, found {type(header).__name__}")
    if not _is_unicode("".join(header)):
        raise CheckpointError(where, "header: a tensor's name is no Unicode text: it holds half a surrogate pair")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(where, "header field '__metadata__': expected an object of strings")
    end = 8 + len(text)
    places = {name: _place(name, entry, end, where) for name, entry in header.items()}
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].length)):
        if place.offset != end:
            raise CheckpointError(where, f"tensor {name!r}: starts at byte {place.offset}, expected {end}")
        end += place.length
    if end > file_bytes:
        problem = f"truncated: the tensors need {end} bytes, the file has {file_bytes}"
        raise CheckpointError(where, problem, FETCH_AGAIN)
    if end < file_bytes:
        raise CheckpointError(where, f"{file_bytes - end} bytes after the last tensor: expected none")
    return Header(metadata, places, file_bytes)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _place(name: str, entry: Any, data_start: int, where: str | Path) -> Place:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise CheckpointError(where, f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    try:  # what most are: of a dtype and shape that came before
        kept_dtype, kept_shape, length = _sized(dtype, *shape)
        begin, end = offsets
        if (
            type(shape) is list
            and type(begin) is int and type(end) is int and end - begin == length and 0 <= begin < 2**48
        ):  # fmt: skip
            return Place(kept_dtype, kept_shape, data_start + begin, length)
    except (KeyError, TypeError, ValueError):
        pass
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(where, f"tensor {name!r}: dtype {dtype!r}: expected one of {', '.join(ITEM_BYTES)}")
    if not (isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS and all(_is_size(n) for n in shape)):
        raise CheckpointError(where, f"tensor {name!r}: shape {shape!r}: expected at most 8 sizes")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_size(n) for n in offsets)):
        raise CheckpointError(where, f"tensor {name!r}: data_offsets {offsets!r}: expected begin and end")
    length = prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != length:
        problem = f"{dtype} {shape} is {length} bytes, data_offsets say {offsets[1] - offsets[0]}"
        raise CheckpointError(where, f"tensor {name!r}: {problem}")
    return Place(dtype, tuple(shape), data_start + offsets[0], length)


_FIELDS = {"dtype", "shape", "data_offsets"}


@lru_cache(1024, typed=True)  # typed: True == 1 == 1.0
def _sized(dtype: str, *shape: int) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and bytes of what is a tensor's dtype and shape; else a KeyError or ValueError."""
    if len(shape) > _MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise ValueError
    return dtype, shape, prod(shape) * ITEM_BYTES[dtype]


def _is_size(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48


def read_container(path: str | Path, known: KnownHeaders | None = None) -> tuple[dict[str, str], dict[str, RawTensor]]:
    """The metadata and tensors of one file.

    Raises:
        NotFoundError: there is no such file.
        SourceError: it is no regular file, or may not be read.
        CheckpointError: it is not a file that safetensors could have written.
    """
    try:
        with open_regular_file(path) as file:
            return _parse(file, path, os.fstat(file.fileno()).st_size, known)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None


def parse_container(
    stream: BinaryIO, where: str | Path, known: KnownHeaders | None = None
) -> tuple[dict[str, str], dict[str, RawTensor]]:
    """Like :func:`read_container`, from a stream that cannot tell its length."""
    try:
        content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SourceError(where, f"cannot be read: {error.strerror or error}") from None
    if not isinstance(content, bytes):
        raise CheckpointError(where, f"its read gives {type(content).__name__}: expected a file opened in binary mode")
    return _parse(BytesIO(content), where, len(content), known)


def _parse(
    file: BinaryIO, where: str | Path, file_bytes: int, known: KnownHeaders | None
) -> tuple[dict[str, str], dict[str, RawTensor]]:
    if file_bytes > MAX_FILE_BYTES:
        raise CheckpointError(where, f"more than {MAX_FILE_BYTES} bytes: larger files are not read")
    data = memoryview(file.read(file_bytes + 1))
    if len(data) != file_bytes:
        raise CheckpointError(where, "changed while it was read")
    header, tensors = parse_buffer(data, where, known)
    return header.metadata, tensors


def lay_out(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Place]]:
    """The header bytes of a file with these tensors, and where each tensor comes to lie.

    Wider dtypes come first and the header is padded to 8 bytes, so that every tensor is aligned for a memory map;
    tensors of one width stay in the order given.
    """
    order = sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name].dtype])
    parts = [f'"__metadata__":{_json(dict(metadata))}'] if metadata else []
    end = 0
    begins = []
    for name in order:
        tensor = tensors[name]
        begins.append(end)
        end += tensor.size_bytes
        sizes = ",".join(map(str, tensor.shape))
        parts.append(
            f'{_json(name)}:{{"dtype":"{tensor.dtype}","shape":[{sizes}],"data_offsets":[{begins[-1]},{end}]}}'
        )
    text = f"{{{','.join(parts)}}}".encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"header of {len(text)} bytes: at most {MAX_HEADER_BYTES}")
    start = 8 + len(text)
    places = {
        name: Place(tensors[name].dtype, tensors[name].shape, start + begin, tensors[name].size_bytes)
        for name, begin in zip(order, begins, strict=True)
    }
    return len(text).to_bytes(8, "little") + text, places


_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def container_chunks(
    tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]
) -> Iterable[bytes | bytearray | memoryview]:
    """The file's bytes, in order: the header, then each tensor, by name. Equal input gives equal bytes."""
    head, places = lay_out(dict(sorted(tensors.items())), metadata)
    yield head
    for name in places:
        yield tensors[name].data
