"""Text files that a user wrote: lists and tables in UTF-8."""

from pathlib import Path

from pear_store.reading import open_regular_file
from pear_train.errors import DataError


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        NotFoundError, SourceError: it is not there, is no regular file, or may not be read.
        DataError: it is not UTF-8: which line, and the remedy.
    """
    with open_regular_file(path) as file:
        data = file.read()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: UTF-16 text: save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8: save the file as UTF-8 (from Latin-1: "
            f"iconv -f latin1 -t utf-8)"
        ) from None
