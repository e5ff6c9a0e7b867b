"""Options under headings, and the step from the command line to options of runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import click
from click.core import ParameterSource

from pear_train.config import OPTIONS
from pear_train.errors import ConfigError
from pear_train.options import choices, kinds, parse_settings
from pear_train.tasks import DATA_OPTIONS

F = TypeVar("F", bound=Callable[..., Any])
KNOWN = OPTIONS | DATA_OPTIONS
"""Every option of a run and of its data, by its name in a file of tasks."""

Heading: TypeAlias = Literal[
    "Data", "Store", "Backbone", "Method", "Training", "Several tasks", "Sharing between tasks", "Output", "Gate",
    "Machine", "Other",
]  # fmt: skip
ARGUMENTS = "pear_train.arguments"
_PLAIN = {"int": int, "float": float, "str": str}


class HeadedOption(click.Option):
    """An option that --help shows under a heading."""

    def __init__(self, *args: Any, heading: Heading, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.heading: Heading = heading


class HeadedCommand(click.Command):
    """A command whose --help shows options under headings. Headings come in the order of their first options.

    The arguments of the call are in ``ctx.meta[ARGUMENTS]``.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                heading = str(getattr(parameter, "heading", "Other"))
                shown.setdefault(heading, []).append(record)
        for heading, records in shown.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def option(heading: Heading, *names: str, **settings: Any) -> Callable[[F], F]:
    """An option of the command that is not an option of a run."""
    return click.option(*names, cls=HeadedOption, heading=heading, **settings)


def run_option(heading: Heading, flag: str, help: str) -> Callable[[F], F]:
    """An option of a run. Its type and default come from the field of the same name."""
    field = KNOWN[flag.removeprefix("--").replace("-", "_")]
    settings: dict[str, Any] = {"default": field.default, "show_default": field.default is not None}
    if fixed := choices(field):
        settings["type"] = click.Choice(fixed)
    elif (kind := kinds(field)[0]) == "bool":
        settings["is_flag"] = True
    else:
        settings["type"] = _PLAIN[kind]
    return option(heading, flag, help=help, **settings)


@dataclass(frozen=True)
class Told:
    """Options of runs from the command line."""

    options: Mapping[str, Any]
    """Every option, by name, with its default if it was not given."""
    shown: Mapping[str, str]
    """The form in which each given option was given: ``--rank`` or ``--set sharing``."""


def read_options(ctx: click.Context, settings: Sequence[str]) -> Told:
    """Reads the options of runs from flags and --set.

    Raises:
        ConfigError: --set has an unknown name or a bad value, or sets an option that a flag sets, too.
    """
    values = {name: value for name, value in ctx.params.items() if name in KNOWN}
    said = [name for name in values if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    shown = {name: f"--{name.replace('_', '-')}" for name in said}
    told = parse_settings("--set", settings, KNOWN)
    for name in told:
        if name in shown:
            raise ConfigError(f"--set: {name} is also given as {shown[name]}: give it once")
    return Told({**values, **told}, {**shown, **{name: f"--set {name}" for name in told}})
