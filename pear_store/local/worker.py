"""Does work in a forked process, which has its own core and interpreter. If it crashes, this process goes on."""

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
"""Seconds between a worker's looks whether its parent is still there"""


class WorkerDiedError(Exception):
    """The process ended before it answered."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"ended with exit code {exit_code}")
        self.exit_code = exit_code


def can_fork() -> bool:
    """Whether this process has one thread only. With more, a forked child may inherit locks that nobody releases."""
    try:
        return threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1
    except OSError:  # no /proc: there may be threads that Python does not know of
        return False


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def end_with(parent: int) -> None:
    """Makes this process end soon after its parent has ended. Nobody would use its results."""

    def look(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # the interpreter drops signal handlers before it ends


def run_python(code: str, *arguments: str) -> tuple[int, str]:
    """Runs Python code in a new process. Returns its exit code, and what it printed.

    No pipe is waited for: a child that another thread forks meanwhile would hold it open, perhaps while that child
    waits for a lock of this process.
    """
    import subprocess  # here, because it is slow to import
    import sys
    import tempfile

    has_memory_files = hasattr(os, "memfd_create")  # else this is macOS
    with open(os.memfd_create("printed"), "w+b") if has_memory_files else tempfile.TemporaryFile() as printed:
        command = [sys.executable, "-c", code, *arguments]
        # close_fds: else subprocess itself waits for a pipe. Python opens no files that such a process would inherit
        done = subprocess.run(command, stdout=printed, stderr=subprocess.DEVNULL, close_fds=False)
        printed.seek(0)
        return done.returncode, printed.read().decode()


class Worker:
    """A forked process that answers requests one after the other, with what `work` returns for each.

    Requests and answers are Python's own plain types, which `marshal` takes: data, never code. The process ends when
    this process closes it or dies, even in the middle of its work.

    Raises:
        OSError: the system gives no more processes or files.
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
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # else only the smallest answers fit the pipe, and the worker waits for us
            with suppress(OSError):
                fcntl.fcntl(self_answer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._requests = open(self_request, "wb")  # noqa: SIM115 (`close` closes both)
        self._answers = open(self_answer, "rb")  # noqa: SIM115 (the same)

    def ask(self, request: Any) -> None:
        """Sends a request. If the process has died, :meth:`answer` notices it."""
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
        except (EOFError, ValueError, TypeError):  # the process died, perhaps in the middle of an answer
            raise WorkerDiedError(self.close()) from None

    def close(self) -> int:
        """Kills the process, and returns its exit code. Does nothing in a forked child of the process that made it.

        To close the pipe is not enough: another process that was forked since may hold a copy of it.
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
