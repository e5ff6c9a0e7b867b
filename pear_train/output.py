"""What is already at the path where a run will write: the same run's file, another run's, or something else."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pear_store import PearStoreError, Task, read_checkpoint, write_checkpoint
from pear_store.files import open_regular_file
from pear_train.config import OPTIONS, TrainConfig
from pear_train.errors import ConfigError, ResourceError
from pear_train.identity import BASES, Identity, differences, identity_of

STATE_FORMAT = "pear-run/3"


def is_finished(out: Path, run: Callable[[], Identity], overwrite: bool = False) -> bool:
    """Whether the checkpoint at `out` is the one that a run of this identity gives.

    Args:
        run: gives the identity. It is called only if there is a file to compare with, because it reads the data.
        overwrite: accept another run's checkpoint or state, to be replaced later.
    Raises:
        ConfigError: without `overwrite`, another run's checkpoint or state is there: says what differs. Or, always,
            something that no run wrote is there.
    """
    task, state = checkpoint_at(out), state_at(out)
    if task is None and state is None:
        return False
    now = run()
    if task is not None:
        different = differences(identity_of(task), now)
        if not different and now["method"] != BASES and "val_top1" not in task.record["metrics"]:
            different = ["no top-1 on val"]
        if not different:
            partial_path(out).unlink(missing_ok=True)  # left by a run that was killed after it wrote its checkpoint
            return True
        if not overwrite:
            raise ConfigError(
                f"{out}: trained already, but differently: {'; '.join(different)}. --overwrite trains again and "
                "replaces it; another --out keeps both"
            )
    if state is not None and not overwrite and (different := differences(state.get("identity", {}), now)):
        raise ConfigError(
            f"{partial_path(out)}: holds the state of another interrupted run: {'; '.join(different)}. That run's own "
            "command resumes it; --overwrite starts anew and replaces it"
        )
    return False


def partial_path(out: Path) -> Path:
    """The file that keeps the state of the run that will write `out`."""
    return out.with_name(out.name + ".partial")


def checkpoint_at(out: Path) -> Task | None:
    """The task checkpoint at `out`. None if there is nothing, or an empty file.

    Raises:
        ConfigError: something else is there; it is never replaced.
    """
    if not _holds_something(out):
        return None
    try:
        return read_checkpoint(out)
    except PearStoreError as error:
        raise ConfigError(
            f"--out {out}: what is there is not a task checkpoint, so it is not replaced ({error}). Move it away, or "
            "name another --out"
        ) from None


def state_at(out: Path) -> dict[str, Any] | None:
    """The record of an interrupted run's state beside `out`. None if there is none.

    Raises:
        ConfigError: something else is there; it is never replaced.
    """
    path = partial_path(out)
    if not _holds_something(path):
        return None
    problem: object = "not a run's state"
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("run", "{}"))
        if str(record.get("format")).startswith("pear-run/"):
            return dict(record)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        problem = error
    raise ConfigError(
        f"{path}: expected nothing or a run's state, found something else: {problem}. Move it away, or name another "
        "--out"
    )


def epochs_ended(config: TrainConfig, out: Path) -> int:
    """How many epochs the state of a run with these options has. 0 without a state."""
    try:
        state = state_at(out) or {}
    except ConfigError:
        return 0
    options = {name: getattr(config, name) for name in ("task", *OPTIONS) if name != "device"}
    return 0 if differences(state.get("identity", {}), options) else int(state["epoch"]) - 1


def _holds_something(path: Path) -> bool:
    """Whether a path holds anything but an empty file. Raises a ConfigError if it is not a regular file."""
    if not os.path.exists(path):  # nothing, or a dangling link
        return False
    try:
        with open_regular_file(path) as file:
            return bool(file.read(1))
    except PearStoreError as error:
        raise ConfigError(f"--out {error}") from None


def check_out(out: Path) -> None:
    """Checks, before training, that a run's files can be written: their folder, their names, what is already there.

    Raises:
        ConfigError: they cannot be written; says why.
    """
    try:
        folder = stat.S_ISDIR(os.stat(out.parent).st_mode)
    except FileNotFoundError:
        raise ConfigError(f"--out {out}: folder {out.parent} does not exist; make it first") from None
    except OSError as error:
        raise ConfigError(f"--out {out}: folder {out.parent} cannot be used: {error.strerror}") from None
    if not folder:
        raise ConfigError(f"--out {out}: {out.parent} is not a folder: name another --out")
    checkpoint_at(out)
    state_at(out)
    trial = temporary_path(out)  # the longest name of all files
    try:
        with open(trial, "wb") as file:
            file.write(b"\0")
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out}: folder {out.parent} takes no file: {error.strerror}") from None


def rehearse(out: Path, task: Task) -> Task:
    """Writes the task to a file beside `out`, reads it back and removes the file. A file at `out` means a finished run.

    Raises:
        PearStoreError: the disk is full, or the record is not valid.
    """
    looked_at = _evaluated_path(out)
    try:
        write_checkpoint(looked_at, task)
        return read_checkpoint(looked_at)
    finally:
        looked_at.unlink(missing_ok=True)


def temporary_path(out: Path) -> Path:
    """The file where a run's state is written before it replaces the last one."""
    return out.with_name(f".{partial_path(out).name}.tmp")


def files_beside(out: Path) -> list[Path]:
    """All files that a run may have beside `out`."""
    return [partial_path(out), temporary_path(out), _evaluated_path(out)]


def _evaluated_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.evaluated")


def check_room(out: Path, needed_bytes: int) -> None:
    """Checks that the disk of `out` has `needed_bytes` free.

    Raises:
        ResourceError: it has less.
    """
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"{out.parent}: the run needs up to {needed_bytes:,} bytes there, the disk has {free_bytes:,} free: make "
            "room, or name another --out"
        )
