"""A model's file, and beside it a JSON file that says what the model's classes are and how images are prepared."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from pear_store import PearStoreError, Task
from pear_store.errors import from_os_error


def about(task: Task, name: str) -> dict[str, Any]:
    """What a user of an exported model must know of its task.

    Args:
        name: of the task, with its version.
    """
    told = ("backbone", "labels", "preprocess", "metrics", "threshold")
    said = {key: task.record[key] for key in told if key in task.record}
    transform = {key: value for key, value in task.preprocess.items() if key != "reading"}
    return {"task": name, **said, "create_transform": transform}


def json_beside(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def check_free(file: Path, force: bool) -> None:
    """Raises a PearStoreError where something would be replaced unasked, or the file has no name."""
    if not file.name:
        raise PearStoreError(f"{file}: expected a file's name")
    for path in (file, json_beside(file)):
        if os.path.lexists(path) and (path.is_dir() or not force):
            raise PearStoreError(
                f"{path} exists" + ("; it is a directory" if path.is_dir() else "; --force replaces it")
            )


def write(file: Path, save: Callable[[Path], object], said: Mapping[str, Any]) -> dict[str, int]:
    """Writes both files, each whole or not at all; returns the bytes of each.

    Args:
        save: writes the model to the path that it is given.
        said: the JSON.

    Raises:
        PearStoreError: they cannot be written.
    """
    temporary = file.parent / f".{uuid4().hex}.tmp"
    text = json.dumps(said, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        temporary.mkdir()
        made = {file: temporary / "model", json_beside(file): temporary / "about"}
        made[json_beside(file)].write_text(text, encoding="utf-8")
        save(made[file])
        made[file].chmod(made[json_beside(file)].stat().st_mode)  # safetensors makes files for their owner alone
        for path in made.values():
            with open(path, "rb") as written:
                os.fsync(written.fileno())
        for path, source in reversed(made.items()):  # the model last: where it is, its description is
            os.replace(source, path)
        return {str(path): path.stat().st_size for path in made}
    except OSError as error:
        raise from_os_error(error, file, "cannot be written") from None
    except SafetensorError as error:  # of a disk that is full, for one
        raise PearStoreError(f"{file}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
