"""Writes a model's file, and a JSON file beside it with the model's classes and preprocessing."""

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
    """The description of an exported model, for the JSON file.

    Args:
        name: name of the task with its version.
    """
    told = ("backbone", "labels", "preprocess", "metrics", "threshold")
    said = {key: task.record[key] for key in told if key in task.record}
    transform = {key: value for key, value in task.preprocess.items() if key != "reading"}
    return {"task": name, **said, "create_transform": transform}


def json_beside(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def check_free(file: Path, force: bool) -> None:
    """Raises a PearStoreError if a file would be replaced without `force`, or if the path has no file name."""
    if not file.name:
        raise PearStoreError(f"{file}: expected a file's name")
    for path in (file, json_beside(file)):
        if os.path.lexists(path) and (path.is_dir() or not force):
            raise PearStoreError(
                f"{path} exists" + ("; it is a directory: name a file" if path.is_dir() else "; --force replaces it")
            )


def write(file: Path, save: Callable[[Path], object], said: Mapping[str, Any]) -> dict[str, int]:
    """Writes both files, each as a whole or not at all.

    Args:
        save: writes the model to a path.
        said: the content of the JSON file.
    Returns:
        Path -> bytes of each file.
    Raises:
        PearStoreError: a file cannot be written.
    """
    temporary = file.parent / f".{uuid4().hex}.tmp"
    text = json.dumps(said, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        temporary.mkdir()
        made = {file: temporary / "model", json_beside(file): temporary / "about"}
        made[json_beside(file)].write_text(text, encoding="utf-8")
        save(made[file])
        made[file].chmod(made[json_beside(file)].stat().st_mode)  # safetensors makes files that only the owner reads
        for path in made.values():
            with open(path, "rb") as written:
                os.fsync(written.fileno())
        for path, source in reversed(made.items()):  # the model last, so that it never lacks its description
            os.replace(source, path)
        return {str(path): path.stat().st_size for path in made}
    except OSError as error:
        raise from_os_error(error, file, "cannot be written") from None
    except SafetensorError as error:  # for example if the disk is full
        raise PearStoreError(f"{file}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
