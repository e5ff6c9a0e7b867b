"""A long run's finished parts, beside its output: what is finished stays finished."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq

from tools.lists import write_list


class Parts:
    """A folder with the finished parts of a run, for one process at a time.

    A file gets its name when it is whole and durable, so a run may be killed at any moment.

    Args:
        out: the output; the folder is beside it.
        plan: what makes it the same run when it is taken up again.
        chosen: makes what is decided once, when the run begins, and kept.
        restart: forget what an unfinished run had done.

    Raises:
        ClickException: another process writes this output, or the folder is another run's, or none's.
    """

    def __init__(self, out: Path, plan: dict[str, Any], chosen: Callable[[], Any], restart: bool) -> None:
        self.folder = out.with_name(out.name + ".parts")
        self.folder.mkdir(exist_ok=True)
        self._plan = self.folder / "plan.json"
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.chosen = self._begin(plan, chosen, restart)
        except BlockingIOError:
            os.close(self._lock)
            raise click.ClickException(f"{out}: another run is writing it") from None
        except BaseException:
            with suppress(OSError):  # it holds something
                self.folder.rmdir()
            os.close(self._lock)
            raise

    def _begin(self, plan: dict[str, Any], chosen: Callable[[], Any], restart: bool) -> Any:
        if self._plan.exists() and not restart:
            began = json.loads(self._plan.read_text())
            if began["plan"] != plan:
                was = began["plan"]
                differ = ", ".join(
                    f"{key} was {was.get(key)}, is {plan[key]}" for key in plan if was.get(key) != plan[key]
                )
                raise click.ClickException(
                    f"{self.folder}: holds an unfinished run of other options ({differ}): repeat those, or --restart"
                )
            return began["chosen"]
        strange = next((p.name for p in self.folder.iterdir() if p.suffix != ".tmp"), None)
        if strange and not self._plan.exists():
            raise click.ClickException(f"{self.folder}: holds {strange} and no unfinished run: remove or rename it")
        self._empty()
        made = {"plan": plan, "chosen": chosen()}
        with self._named(self._plan) as file:
            file.write_text(json.dumps(made))
        return made["chosen"]

    def has(self, number: int) -> bool:
        return self._part(number).exists()

    def write(self, number: int, table: pa.Table) -> None:
        with self._named(self._part(number)) as file:
            pq.write_table(table, file)

    def tables(self) -> Iterator[pa.Table]:
        """The finished parts, in order."""
        for number in count():
            if not self.has(number):
                return
            yield pq.read_table(self._part(number), partitioning=None)

    def finish(self, out: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """Writes the output, whole or not at all, and gives the folder up."""
        with self._named(out) as file:
            write_list(file, out.suffix, schema, tables)
        self._empty()
        self.folder.rmdir()

    def close(self) -> None:
        os.close(self._lock)

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:08}.parquet"

    @contextmanager
    def _named(self, path: Path) -> Iterator[Path]:
        """A file to write, which then gets its name durably."""
        temporary = self.folder / f"{path.name}.tmp"
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)

    def _empty(self) -> None:
        for path in sorted(self.folder.iterdir(), key=lambda path: path == self._plan):  # the plan last: see _begin
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
