"""Work in a forked process: it has a core and an interpreter of its own, and its crash is not ours."""

import atexit
import fcntl
import marshal
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_PIPE_BYTES = 1 << 20
_LOOK_S = 0.5
"""How often a worker looks whether its parent is still there"""


class WorkerDiedError(Exception):
    """The process ended before it answered."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"ended with exit code {exit_code}")
        self.exit_code = exit_code


def can_fork() -> bool:
    """Whether this process may be forked: a child of one with several threads inherits locks that nobody releases."""
    try:
        return threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1
    except OSError:  # no /proc: threads that Python does not know of cannot be ruled out
        return False


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def end_with(parent: int) -> None:
    """Has this process end soon after its parent did, whatever it does: nobody will take what it finds."""

    def look(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # the interpreter gives up its handlers before it ends


class Worker:
    """A forked process that answers requests, one after the other, with what `work` returns for each.

    Requests and answers are of Python's own plain types, as `marshal` takes them: data, never code. It ends when this
    process closes it or dies: its work must leave nothing undone.

    Raises:
        OSError: there can be no more processes or files.
    """

    def __init__(self, work: Callable[[Any], Any]) -> None:
        ends: list[int] = []
        try:
            for _ in range(2):
                ends += os.pipe()
            parent = os.getpid()
            self._pid = os.fork()
        except OSError:
            for end in ends:
                os.close(end)
            raise
        request_end, self_request, self_answer, answer_end = ends
        self._owner = os.getpid()
        if self._pid == 0:
            code = 1
            try:
                end_with(parent)
                os.close(self_request)
                os.close(self_answer)
                with open(request_end, "rb") as requests, open(answer_end, "wb") as answers:
                    while requests.peek(1):
                        marshal.dump(work(marshal.load(requests)), answers)
                        answers.flush()
                code = 0
            finally:
                os._exit(code)
        os.close(request_end)
        os.close(answer_end)
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # else it waits for us with all but the smallest answers
            with suppress(OSError):
                fcntl.fcntl(self_answer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._requests = open(self_request, "wb")  # noqa: SIM115 (`close` closes both)
        self._answers = open(self_answer, "rb")  # noqa: SIM115 (the same)

    def ask(self, request: Any) -> None:
        """Sends a request; a process that died is noticed when it should answer."""
        if self._requests.closed or self._owner != os.getpid():
            return
        with suppress(BrokenPipeError):
            marshal.dump(request, self._requests)
            self._requests.flush()

    def answer(self) -> Any:
        """The next answer.

        Raises:
            WorkerDiedError: the process died.
        """
        try:
            if self._answers.closed or self._owner != os.getpid():
                raise EOFError
            return marshal.load(self._answers)
        except (EOFError, ValueError, TypeError):  # cut off where it died
            raise WorkerDiedError(self.close()) from None

    def close(self) -> int:
        """Ends the process, whatever it does; its exit code. Does nothing in a child of the process that made it.

        It is killed: another process, forked since, may hold the pipe whose end would end it.
        """
        if self._owner != os.getpid():
            return 0
        for end in (self._requests, self._answers):
            with suppress(BrokenPipeError):
                end.close()
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._pid = 0
        return self._code
