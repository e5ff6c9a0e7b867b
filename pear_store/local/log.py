"""Logs each operation: one line at DEBUG, and rarely one at INFO, to the standard library's loggers.

Each module has the logger of its name, such as `pear_store.local.gc`. No handler, level or filter is set here. A record
also has its figures as attributes: `operation`, `seconds` and `size_bytes`.

Importing `logging` takes 3 ms. A program that wants records has imported it, so this module does not import it first.
"""

import sys
import time
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

_DEBUG, _INFO = 10, 20  # as logging has them


@lru_cache(64)
def _logger(module: str) -> "logging.Logger":
    import logging

    return logging.getLogger(module)


def is_on(module: str, level: int = _DEBUG) -> bool:
    """Whether a module's records at this level are wanted. Takes a quarter of a microsecond."""
    return "logging" in sys.modules and _logger(module).isEnabledFor(level)


def info(module: str, message: str, *values: object) -> None:
    """Logs what an administrator wants to know even if all went well."""
    if is_on(module, _INFO):
        _logger(module).info(message, *values)


class Operation:
    """A context that logs how long it took, and the bytes that were counted in it.

    Args:
        module: the module whose logger is used.
        what: the operation, such as "gc".
        on: the store or task.
    """

    __slots__ = ("_away_s", "_began_s", "_module", "_on", "_what", "size_bytes")

    def __init__(self, module: str, what: str, on: object) -> None:
        self._module = module
        self._what = what
        self._on = on
        self._began_s = self._away_s = 0.0
        self.size_bytes = 0

    def __enter__(self) -> "Operation":
        self._began_s = time.perf_counter()
        return self

    def leave(self) -> None:
        """Stops the clock, until :meth:`come_back`: the caller works now."""
        self._away_s -= time.perf_counter()

    def come_back(self) -> None:
        self._away_s += time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if not is_on(self._module):
            return
        if kind is GeneratorExit:  # the caller wanted no more
            self.come_back()
            kind = None
        seconds = time.perf_counter() - self._began_s - self._away_s
        ended = "" if kind is None else f", failed: {kind.__name__}"
        _logger(self._module).debug(
            "%s %s: %.6f s, %d bytes%s", self._what, self._on, seconds, self.size_bytes, ended,
            extra={"operation": self._what, "seconds": seconds, "size_bytes": self.size_bytes},
        )  # fmt: skip
