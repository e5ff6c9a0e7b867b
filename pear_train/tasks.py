"""A TOML file of tasks to train."""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pear_store import PearStoreError
from pear_store.errors import unreadable
from pear_store.files import read_text
from pear_store.format.checkpoint import TASK_NAME
from pear_train.config import OPTIONS, TrainConfig
from pear_train.data.options import DataOptions
from pear_train.errors import ConfigError
from pear_train.options import checked_options

DATA_OPTIONS: dict[str, Field[Any]] = {option.name: option for option in fields(DataOptions)}
"""Every option of the data by its name."""


@dataclass(frozen=True)
class TaskEntry:
    """One task of a file of tasks."""

    config: TrainConfig
    data: str
    """Path or name of its data, as :func:`open_dataset` takes it."""
    data_options: DataOptions = field(default_factory=DataOptions)
    """How the data is read."""
    given: frozenset[str] = frozenset()
    """Names of the options that the file gives it."""

    @classmethod
    def of(cls, task: str, data: str, options: Mapping[str, Any]) -> "TaskEntry":
        """Makes an entry.

        Args:
            task: name of the task.
            options: options of :class:`TrainConfig` and of the data together, by name.
        Raises:
            ConfigError: an option does not allow its value.
        """
        of_data = {name: value for name, value in options.items() if name in DATA_OPTIONS}
        others = {name: value for name, value in options.items() if name not in DATA_OPTIONS}
        return cls(TrainConfig(task=task, **others), data, DataOptions(**of_data))


def read_tasks(path: Path, given: Mapping[str, Any]) -> list[TaskEntry]:
    """Reads a file of tasks.

        epochs = 30                     # options of all tasks: those of pear-train, with _ for -

        [tasks.dtd]
        data = "sets/dtd"               # relative to the file
        ratio = 0.75                    # of this task alone

    Args:
        path: the TOML file.
        given: options by name, which the file may override.
    Returns:
        The tasks in the file's order.
    Raises:
        ConfigError: the file does not exist or is not TOML, or a key, name or value is wrong. The message says which
            task, and what was expected.
    """
    try:
        record = tomllib.loads(read_text(path))
    except PearStoreError as error:
        raise ConfigError(str(error)) from None
    except RecursionError:
        raise ConfigError(f"{path}: not a readable TOML file: nested too deeply") from None
    except ValueError as error:  # wrong TOML, or a number of more digits than Python reads
        raise ConfigError(f"{path}: not a readable TOML file: {unreadable(error)}") from None
    tasks = record.pop("tasks", None)
    if not isinstance(tasks, dict) or not tasks:
        raise ConfigError(f'{path}: names no task: expected tables such as [tasks.dtd] with data = "…"')
    common = checked_options(f"{path}: the options of all tasks", record, OPTIONS | DATA_OPTIONS)
    entries, folded = [], set()
    for name, table in tasks.items():
        where = f"task {name!r}"
        if not TASK_NAME.fullmatch(name):
            raise ConfigError(f"{path}: {where}: expected up to 100 letters, digits, '.', '_', '-'")
        if name.casefold() in folded:
            raise ConfigError(f"{path}: {where}: another task has the same name except for case: rename one of them")
        folded.add(name.casefold())
        if not isinstance(table, dict) or not isinstance(table.get("data"), str) or not table["data"]:
            raise ConfigError(f'{path}: {where}: expected data = "a folder, an .npz file or a name"')
        told = {key: value for key, value in table.items() if key != "data"}
        options = checked_options(f"{path}: {where}", told, OPTIONS | DATA_OPTIONS)
        try:
            beside = path.parent / table["data"]
            named = re.match(r"(torch|hfi?ds|tfds|wds)/", table["data"], re.IGNORECASE)  # as open_dataset takes names
            data = table["data"] if named and not os.path.exists(beside) else str(beside)
            entry = TaskEntry.of(name, data, {**given, **common, **options})
            entries.append(replace(entry, given=frozenset(common | options)))
        except ConfigError as error:
            raise ConfigError(f"{path}: {where}: {error}") from None
    return entries
