"""What lies where a run is to write: the same run's file, another's, or something that is no run's at all."""

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
        run: gives the identity; asked only where there is something to compare, for it reads the data.

    Raises:
        ConfigError: another run's checkpoint or interrupted state lies there, and `overwrite` does not allow to replace
            it: says what differs; or what lies there is no run's at all.
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
            partial_path(out).unlink(missing_ok=True)  # of a run that was killed between its last two steps
            return True
        if not overwrite:
            raise ConfigError(
                f"{out}: trained already, but otherwise: {'; '.join(different)}. --overwrite trains again and replaces "
                "it; another --out keeps both"
            )
    if state is not None and not overwrite and (different := differences(state.get("identity", {}), now)):
        raise ConfigError(
            f"{partial_path(out)}: the state of an interrupted run, but of another one: {'; '.join(different)}. The "
            "same command goes on with it; --overwrite begins anew and replaces it"
        )
    return False


def partial_path(out: Path) -> Path:
    """Where the state of the run that will write `out` is kept."""
    return out.with_name(out.name + ".partial")


def checkpoint_at(out: Path) -> Task | None:
    """The task checkpoint that lies where a run is to write one, if any does.

    Raises:
        ConfigError: something else lies there, which is not replaced.
    """
    if not _holds_something(out):
        return None
    try:
        return read_checkpoint(out)
    except PearStoreError as error:
        raise ConfigError(
            f"--out {out}: there is something that is no task checkpoint, and it is not replaced ({error}). Move it "
            "away, or name another --out"
        ) from None


def state_at(out: Path) -> dict[str, Any] | None:
    """The record of an interrupted run's state, if there is one beside `out`.

    Raises:
        ConfigError: something else lies there, which is not replaced.
    """
    path = partial_path(out)
    if not _holds_something(path):
        return None
    problem: object = "no state of a run"
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("run", "{}"))
        if str(record.get("format")).startswith("pear-run/"):
            return dict(record)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        problem = error
    raise ConfigError(f"{path}: a run keeps its state there, but finds {problem}. Move it away, or name another --out")


def epochs_ended(config: TrainConfig, out: Path) -> int:
    """Epochs of a run with these options that its state holds; 0 without one."""
    try:
        state = state_at(out) or {}
    except ConfigError:
        return 0
    options = {name: getattr(config, name) for name in ("task", *OPTIONS) if name != "device"}
    return 0 if differences(state.get("identity", {}), options) else int(state["epoch"]) - 1


def _holds_something(path: Path) -> bool:
    """Whether there is anything at a path but an empty file; a ConfigError where that is no regular file."""
    if not os.path.exists(path):  # nothing, or a link to nothing
        return False
    try:
        with open_regular_file(path) as file:
            return bool(file.read(1))
    except PearStoreError as error:
        raise ConfigError(f"--out {error}") from None


def check_out(out: Path) -> None:
    """Checks, before anything is trained, that a run's files can be written: the folder, their names, what lies there.

    Raises:
        ConfigError: they cannot: says why.
    """
    try:
        folder = stat.S_ISDIR(os.stat(out.parent).st_mode)
    except FileNotFoundError:
        raise ConfigError(f"--out {out}: folder {out.parent} does not exist; make it first") from None
    except OSError as error:
        raise ConfigError(f"--out {out}: folder {out.parent} cannot be used: {error.strerror}") from None
    if not folder:
        raise ConfigError(f"--out {out}: {out.parent} is no folder")
    checkpoint_at(out)
    state_at(out)
    trial = temporary_path(out)  # the longest of the names
    try:
        with open(trial, "wb") as file:
            file.write(b"\0")
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out}: folder {out.parent} takes no file: {error.strerror}") from None


def rehearse(out: Path, task: Task) -> Task:
    """A task as it comes back from a file beside `out`, which is removed. At `out` it would say that the run is done.

    Raises:
        PearStoreError: the disk or the record does not allow it.
    """
    looked_at = _evaluated_path(out)
    try:
        write_checkpoint(looked_at, task)
        return read_checkpoint(looked_at)
    finally:
        looked_at.unlink(missing_ok=True)


def temporary_path(out: Path) -> Path:
    """Where a run's state is written before it replaces the last one."""
    return out.with_name(f".{partial_path(out).name}.tmp")


def files_beside(out: Path) -> list[Path]:
    """The files that a run has beside `out` before it is written."""
    return [partial_path(out), temporary_path(out), _evaluated_path(out)]


def _evaluated_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.evaluated")


def check_room(out: Path, needed_bytes: int) -> None:
    """Checks that the disk has room.

    Raises:
        ResourceError: it has not.
    """
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"{out.parent}: a run keeps up to {needed_bytes:,} bytes there, and the disk has {free_bytes:,} free: make "
            "room, or name another --out"
        )
