"""A mirror of a remote that is only read. It is opened for each question, and made anew if it is damaged."""

import sqlite3
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from pear_store.errors import DamagedError, PlaceError
from pear_store.remote.flights import Flights
from pear_store.remote.mirror import Mirror, is_damage, is_replaced
from pear_store.remote.place import Place
from pear_store.remote.reading import read_on

T = TypeVar("T")
PATIENCE_S = 5.0
"""Seconds to wait for news of the remote, if what was known can be used instead"""
_TRIES = 5
"""How often a mirror is opened again, if other processes make it anew meanwhile"""
_AFTER_FAILURE_S = 10.0
"""Seconds for which a remote that gave no answer is not asked again"""


class AskedMirror:
    """A mirror on this machine. The remote is asked what is new at most once per `ttl_s`. Thread-safe.

    Args:
        file: the mirror's file. Several processes may share it.
        place: the remote's place.
        ttl_s: seconds for which an answer is used before the remote is asked again.
        timeout_s: seconds that a caller waits for an answer.
    """

    def __init__(self, file: Path, place: Place, ttl_s: float, timeout_s: float) -> None:
        self._file, self._place, self.url = file, place, place.url
        self._ttl_s, self._timeout_s = ttl_s, timeout_s
        self._asking: Flights[None] = Flights(1)
        self._due = 0.0
        self._head = -1
        self._lock = threading.Lock()
        self._is_out = False
        """Whether the remote gave no answer last time, and a warning has said so"""

    # ---- the mirror

    def _look(self, act: Callable[[Mirror], T]) -> T:
        """What `act` finds in the mirror. A damaged mirror is made anew from the log."""
        try:
            return self._look_once(act)
        except sqlite3.DatabaseError:
            self._forget()
            self.ask()
            try:
                return self._look_once(act)
            except sqlite3.DatabaseError as error:
                raise PlaceError(self.url, f"{self._file}: {error}") from None

    def _look_once(self, act: Callable[[Mirror], T]) -> T:
        def ask_first(mirror: Mirror) -> T:
            mirror.attach(self._place, self.ask)  # `ask` reads once for all who wait, and has a time limit
            if mirror.head[0] < self._head:  # it was deleted, or made anew, since the last look
                self.ask()
            return mirror.stable(lambda: act(mirror))

        return self._open(ask_first)

    def _open(self, act: Callable[[Mirror], T]) -> T:
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
        left = _TRIES
        while True:
            left -= 1
            try:
                with closing(Mirror(self._file, self.url)) as mirror:
                    return act(mirror)
            except sqlite3.DatabaseError as error:
                if is_damage(error):
                    raise
                if not (is_replaced(error) and left):  # such as a full disk, or a folder that was deleted
                    raise PlaceError(self.url, f"{self._file}: {error}") from None

    def _forget(self) -> None:
        """Deletes the mirror, because it is damaged."""
        self._head, self._due = -1, 0.0
        with suppress(OSError):
            self._file.unlink()

    # ---- asking the remote

    def ask(self, wait_s: float | None = None) -> None:
        """Reads new entries of the log now. If another thread is doing so, waits for it.

        Args:
            wait_s: seconds to wait at most. None: `timeout_s`.

        Raises:
            PlaceError, DamagedRemoteError: there was no usable answer in time.
            NotFoundError: there is no remote.
        """
        wait_s = self._timeout_s if wait_s is None else wait_s
        was_answered = False
        try:
            self._asking.join("log", self._read_on).result(wait_s)
            was_answered, self._is_out = True, False
        except TimeoutError:
            raise PlaceError(self.url, f"no answer within {wait_s:g} s", again=True) from None
        finally:
            if was_answered:
                self._due = time.monotonic() + self._ttl_s
            else:  # if nothing is known, each question asks again
                self._due = time.monotonic() + max(self._ttl_s, _AFTER_FAILURE_S) if self._head > 0 else 0.0

    def _read_on(self, future: "Future[None]") -> None:
        def act(mirror: Mirror) -> int:
            read_on(mirror, self._place)
            return mirror.head[0]

        try:
            head = self._open(act)
        except sqlite3.DatabaseError:
            self._forget()
            head = self._open(act)
        with self._lock:
            self._head = head
        future.set_result(None)

    def ask_if_due(self) -> None:
        """Reads new entries if that is due. If there is no answer, what is known is used, with one warning."""
        if self._head >= 0 and time.monotonic() < self._due:
            return
        if self._head < 0 and self._file.exists():
            self._head = self._look(lambda mirror: mirror.head[0]) or -1
        try:
            self.ask(min(self._timeout_s, PATIENCE_S) if self._head > 0 else None)
        except (PlaceError, DamagedError) as error:
            if self._head <= 0:  # nothing is known
                raise
            if not self._is_out:
                self._is_out = True
                warnings.warn(f"{error}; what was known before is used", stacklevel=4)
