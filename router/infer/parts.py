"""The finished parts of a long run, kept beside its output, so that an interrupted run can resume.

OUT.parts holds the parts during the run. OUT.run.json says afterwards which run wrote OUT. OUT is a file in one of the
lists' formats, or a folder of numbered Parquet files.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_store.files import ending
from router.infer.lists import OutputError
from router.infer.writing import write_folder, write_list

RECORD = {"run", "plan", "sha256", "report"}
"""The keys of OUT.run.json."""


def is_folder(out: Path) -> bool:
    """Whether the output is a folder of Parquet files."""
    return not out.suffix


class Parts:
    """A folder with the finished parts of a run, for one process at a time.

    A file gets its name only when it is whole and safely on disk, so a run may be killed at any moment. An output is
    only replaced if a run wrote it and it was not changed since.

    Args:
        out: the output, a file or a folder. The folder of parts is beside it.
        plan: identifies the run. Only a run with an equal plan resumes.
        chosen: makes the choices of the run. It is called once, when the run starts; the result is kept.
        restart: drop the finished parts of an unfinished run.
        overwrite: replace the output of a finished run.
    Raises:
        OutputError: another process is writing this output, the folder holds another run or other files, or the
            output exists and may not be replaced.
    """

    finished: dict[str, Any] | None = None
    """The report of an earlier finished run of the same plan. Then there is nothing to do."""

    def __init__(
        self, out: Path, plan: dict[str, Any], chosen: Callable[[], Any], restart: bool = False, overwrite: bool = False
    ) -> None:
        self.folder = out.with_name(out.name + ".parts")
        self.is_folder = is_folder(out)
        self._out, self._record = out, out.with_name(out.name + ".run.json")
        self._plan, self._staged = self.folder / "plan.json", self.folder / "run.json"
        self._content = plan
        self._own = re.compile(rf"(plan\.json|run\.json|\d{{8}}\.parquet|{re.escape(out.name)})(\.tmp|\.old)?")
        self.folder.mkdir(exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.chosen = self._begin(chosen, restart, overwrite)
        except BlockingIOError:
            os.close(self._lock)
            raise OutputError(f"{out}: another run is writing it: wait for its end, or choose another output") from None
        except BaseException:
            with suppress(OSError):  # it is not empty
                self.folder.rmdir()
            os.close(self._lock)
            raise

    def _begin(self, chosen: Callable[[], Any], restart: bool, overwrite: bool) -> Any:
        began = _read(self._plan, {"plan", "chosen", "run"})
        strange = [p.name for p in self.folder.iterdir() if not self._own.fullmatch(p.name)]
        if not strange and began is None:
            strange = [p.name for p in self.folder.iterdir() if p.suffix != ".tmp"]
        if strange:
            raise OutputError(f"{self.folder}: holds {min(strange)}, which no run wrote: move it away")
        if began is not None and self._has_finished(began):
            began = None
        if began is not None and not restart and self._goes_on(began):
            self._check_replaceable()
        else:
            self.finished = self._earlier(overwrite)
            if self.finished is not None:
                return None
            self._empty()
            began = {"plan": self._content, "chosen": chosen(), "run": os.urandom(8).hex()}
            with self._named(self._plan) as file:
                file.write_text(json.dumps(began))
        self._run = began["run"]
        return began["chosen"]

    def _has_finished(self, began: dict[str, Any]) -> bool:
        """Whether that run was killed after it had put its output in place. If so, does the rest of its work."""
        for path in (self._staged, self._record):
            record = _read(path, RECORD)
            if record is not None and record["run"] == began["run"] and _is_of(self._out, record):
                if path == self._staged:
                    os.replace(self._staged, self._record)
                    _sync(self._record.parent)
                self._empty()
                return True
        return False

    def _goes_on(self, began: dict[str, Any]) -> bool:
        """Whether this run resumes the unfinished one. False if that one has no finished part.

        Raises:
            OutputError: the unfinished one has other options.
        """
        if began["plan"] == self._content or not self._numbers():
            return bool(began["plan"] == self._content)
        raise OutputError(
            f"{self.folder}: holds an unfinished run with other options ({self._differences(began['plan'])}): "
            "repeat those options, or drop its parts with --restart"
        )

    def _earlier(self, overwrite: bool) -> dict[str, Any] | None:
        """The report of the finished run that wrote the output, if this is the same run."""
        earlier = self._check_replaceable()
        if earlier is None or overwrite or not earlier["report"]["predictions"]:
            return None
        if earlier["plan"] != self._content:
            raise OutputError(
                f"{self._out}: was written with other options ({self._differences(earlier['plan'])}): "
                "choose another output, or replace it with --overwrite"
            )
        report: dict[str, Any] = earlier["report"]
        return report

    def _differences(self, was: dict[str, Any]) -> str:
        plan = self._content
        return ", ".join(f"{key} was {was.get(key)}, is {plan[key]}" for key in plan if was.get(key) != plan[key])

    def _check_replaceable(self) -> dict[str, Any] | None:
        """The record of the run that wrote the output. None if there is no output.

        Raises:
            OutputError: no run wrote the output or the record.
        """
        for path in (self._out, self._record):
            folder = self.is_folder and path == self._out
            if path.is_symlink() or (path.exists() and not (path.is_dir() if folder else path.is_file())):
                kind = "a link" if path.is_symlink() else "not a folder" if folder else "not a regular file"
                raise OutputError(f"{path}: is {kind}, so it is not replaced: choose another output")
        record = _read(self._record, RECORD)
        if self._record.exists() and record is None:
            raise OutputError(f"{self._record}: no run wrote this file: move it away")
        if not self._out.exists():
            return None
        if record is None or not _is_of(self._out, record):
            found = "it was changed since a run wrote it" if record else "no run wrote it"
            raise OutputError(f"{self._out}: {found}, so it is not replaced: move it away, or choose another output")
        return record

    def has(self, number: int) -> bool:
        return self._part(number).exists()

    def write(self, number: int, table: pa.Table) -> None:
        with self._named(self._part(number)) as file:
            pq.write_table(table, file)

    def tables(self) -> Iterator[pa.Table]:
        """The finished parts, in order."""
        for number in self._numbers():
            yield pq.read_table(self._part(number), partitioning=None)

    def _numbers(self) -> list[int]:
        """The numbers of the finished parts. Parts may finish in any order."""
        return sorted(int(path.stem) for path in self.folder.iterdir() if re.fullmatch(r"\d{8}\.parquet", path.name))

    def finish(self, schema: pa.Schema, tables: Iterable[pa.Table], report: dict[str, Any]) -> None:
        """Writes the output and the record of this run, as a whole or not at all, and removes the folder of parts."""
        with self._named(self._out) as file:
            if self.is_folder:
                _remove(file)  # left by a run that was killed while it wrote
                for inner in write_folder(file, schema, tables):
                    _sync(inner)
            else:
                write_list(file, ending(self._out), schema, tables)
            record = {"run": self._run, "plan": self._content, "sha256": _sha256(file), "report": report}
            with self._named(self._staged) as staged:
                staged.write_text(json.dumps(record))
            self._check_replaceable()  # another file may have been put there meanwhile
        os.replace(self._staged, self._record)
        _sync(self._record.parent)
        self.give_up()

    def give_up(self) -> None:
        """Removes the finished parts."""
        self._empty()
        with suppress(OSError):  # another file was put there
            self.folder.rmdir()

    def close(self) -> None:
        if self.finished is not None:
            with suppress(OSError):
                self.folder.rmdir()
        os.close(self._lock)

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:08}.parquet"

    @contextmanager
    def _named(self, path: Path) -> Iterator[Path]:
        """A temporary path to write to. At the end it is synced to disk and gets its name."""
        temporary = self.folder / f"{path.name}.tmp"
        yield temporary
        _sync(temporary)
        if temporary.is_dir() and path.exists():  # a rename cannot replace a folder
            _remove(old := self.folder / f"{path.name}.old")
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)

    def _empty(self) -> None:
        for path in sorted(self.folder.iterdir(), key=lambda path: path == self._plan):  # the plan last: see _begin
            if self._own.fullmatch(path.name):
                _remove(path)


def _read(path: Path, keys: set[str]) -> dict[str, Any] | None:
    """A JSON object with these keys. None if there is no such file, or if it holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() >= keys else None


def _is_of(out: Path, record: dict[str, Any]) -> bool:
    """Whether the run of that record wrote the output as it is now."""
    return out.exists() and not out.is_symlink() and _sha256(out) == record["sha256"]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _sha256(path: Path) -> str:
    """The sha256 of a file's bytes, or of the names and hashes of a folder's files."""
    if path.is_dir():
        inner = [f"{file.name} {_sha256(file)}" for file in sorted(path.iterdir())]
        return hashlib.sha256("\n".join(inner).encode()).hexdigest()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
