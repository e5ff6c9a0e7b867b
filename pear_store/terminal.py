"""Prints lines without control characters, for all commands. Also holds the options that several packages' commands
share."""

import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import click

from pear_store.version import __version__

Row = Mapping[str, Any]
_ROWS_AT_ONCE = 1000
F = TypeVar("F", bound=Callable[..., Any])


def printable(value: object) -> str:
    r"""A value's text on one line. Characters that a terminal would obey or cannot show are escaped, as ``\x1b``."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return ascii(character)[1:-1]


def echo(line: object = "", err: bool = False) -> None:
    """Prints one line. Characters that the stream's encoding lacks are escaped, too."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    click.echo(printable(line).encode(encoding, "backslashreplace").decode(encoding), err=err)


def echo_json(value: Any) -> None:
    """Prints one JSON value, in ASCII."""
    click.echo(json.dumps(value, allow_nan=False))


def echo_json_rows(rows: Iterable[Row]) -> None:
    """Prints one JSON list, in ASCII. Each row is printed when it comes."""
    before = "["
    for row in rows:
        click.echo(f"{before}{json.dumps(row, allow_nan=False)}", nl=False)
        before = ", "
    click.echo("[]" if before == "[" else "]")


def echo_table(rows: Sequence[Row], colalign: Sequence[str] | None = None, **settings: Any) -> None:
    """Prints rows under their keys. By default, the first column is aligned left and the others right."""
    from tabulate import tabulate

    shown = [{printable(key): printable(value) for key, value in row.items()} for row in rows]
    align = colalign or ["left"] + ["right"] * (len(rows[0]) - 1)
    for line in tabulate(shown, headers="keys", disable_numparse=True, colalign=align, **settings).splitlines():
        echo(line)


def echo_long_table(rows: Iterable[Row], left: Collection[str]) -> None:
    """Prints a table of any length, a thousand rows at a time. Columns are as wide as the first thousand rows need.

    Args:
        left: the columns that are aligned left. The others are aligned right.
    """
    waiting = iter(rows)
    widths: dict[str, int] = {}
    while part := [{key: printable(value) for key, value in row.items()} for row in islice(waiting, _ROWS_AT_ONCE)]:
        first = not widths
        for key in part[0]:
            widths[key] = max(widths.get(key, len(key)), *(len(row[key]) for row in part))
        if first:
            part = [{key: key for key in widths}, {key: "-" * width for key, width in widths.items()}, *part]
        for row in part:
            cells = [row[key].ljust(width) if key in left else row[key].rjust(width) for key, width in widths.items()]
            echo("  ".join(cells).rstrip())


version_option = click.version_option(__version__)
"""``--version`` of every command."""


class NamedPath(click.Path):
    """A path that is not empty. An empty text, as of an unset shell variable, would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("expected a path, found an empty text", param, ctx)
        return super().convert(value, param, ctx)


class NumberRange(click.FloatRange):
    """A range that refuses NaN. click compares only, and NaN is neither below nor above any bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is no number.", param, ctx) if math.isnan(number) else number


class PrintableGroup(click.Group):
    """A group of commands. Its usage errors contain no control characters."""

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        try:
            return super().make_context(*args, **settings)
        except click.ClickException as error:
            vars(error)["message"] = printable(error.message)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            vars(error)["message"] = printable(error.message)
            raise


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")(command)


def allow_option(command: F) -> F:
    return click.option(
        "--allow", "allowed", multiple=True, metavar="PROTOCOL", envvar="PEAR_ALLOW",
        help="Also open URLs of this protocol, and chains of allowed ones; may be repeated [default: $PEAR_ALLOW].",
    )(command)  # fmt: skip
