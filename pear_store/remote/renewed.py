"""A state that any process may reset while others ask it. They wait until the log is read as far as before."""

import sqlite3
from collections.abc import Callable
from typing import TypeVar

from pear_store.errors import PearStoreError
from pear_store.remote.place import Place
from pear_store.remote.tables import LogTables

T = TypeVar("T")


class RenewedState(LogTables):
    """Notes how far the log was read."""

    _place: Place | None = None
    _read_again: Callable[[], None]
    _is_catching_up = False

    def attach(self, place: Place, read_again: Callable[[], None]) -> None:
        """Sets the place from which shards are read, and the function that reads the log again if a base is bad."""
        self._place, self._read_again = place, read_again

    def _note(self, key: str, value: bytes | None) -> None:
        if value is None:
            self._db.execute("DELETE FROM known WHERE key = ?", (key,))
        else:
            self._db.execute("INSERT OR REPLACE INTO known VALUES (?, ?)", (key, value))

    def _known(self, key: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM known WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def _catch_up(self) -> None:
        """Reads the log if a process has forgotten it. No question is answered before that."""
        if self._is_catching_up or self._place is None or self._db.in_transaction:
            return
        while self._known("until") is not None and not self.note_read(self.times_begun):
            self._is_catching_up = True
            try:
                self._read_again()
            finally:
                self._is_catching_up = False

    def note_read(self, times: bytes | None) -> bool | None:
        """Notes that the log was read, if that was as far as before it was forgotten.

        Args:
            times: `times_begun` from before the log was read to its end.

        Returns:
            whether it was as far as before. None: another process has forgotten the log meanwhile.
        """
        if self._known("until") is None and self.times_begun == times:  # the usual case, which needs no lock
            return True
        with self._transaction():
            if self.times_begun != times:
                return None
            until = self._known("until")
            if until is None or until <= (self._known("head") or b"")[:8]:
                self._note("until", None)
                return True
            return False

    @property
    def times_begun(self) -> bytes | None:
        """How often processes have forgotten what the log says."""
        return self._known("times begun")

    def _times_begun(self) -> bytes | None:
        self._catch_up()
        return self.times_begun

    def stable(self, ask: Callable[[], T]) -> T:
        """What `ask` finds. If another process resets this mirror meanwhile, `ask` is called again."""
        while True:
            before = self._times_begun()
            try:
                found = ask()
            except (PearStoreError, sqlite3.DatabaseError):
                if self._times_begun() == before:
                    raise
                continue
            if self._times_begun() == before:
                return found
