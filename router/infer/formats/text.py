"""Lines of text, numbered, whatever bytes they hold."""

from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from typing import BinaryIO

LINE_CHARACTERS = 16 << 20


def numbered_lines(binary: BinaryIO, encoding: str) -> Iterator[tuple[int, str]]:
    """Numbered lines. Bytes outside of the encoding come as lone surrogates. A long line comes in pieces."""
    file = TextIOWrapper(binary, encoding=encoding, errors="surrogateescape", newline="")
    try:
        number, whole = 1, True
        while line := file.readline(LINE_CHARACTERS):
            yield number, line
            whole = line.endswith(("\n", "\r"))
            number += whole
    finally:
        with suppress(ValueError):  # it is already closed
            file.detach()  # so that `binary` stays open for its owner


def foreign_byte(line: str) -> tuple[int, int] | None:
    """The first byte outside of the encoding, and the number of its character in the line, from 1."""
    if line.isascii():
        return None
    return next(((ord(c) - 0xDC00, i) for i, c in enumerate(line, 1) if "\udc80" <= c <= "\udcff"), None)
