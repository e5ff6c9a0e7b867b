"""Commands in processes of their own that start at once: forks of one process that has imported what they need.

A driver of a Ray cluster imports torch, timm and Ray for 5 s. `python -m tests.helpers.drivers SOCKET MODULE…` does it
once. No command outlives the process that asked for it, however that ends.
"""

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

PRELOADED = ("router.infer.cli", "router.cluster.infer", "pear_train.cli", "pear_train.cluster")
WAIT_S = 180
"""Longer than anything takes on a machine that does much else."""


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, or at once if that has ended already."""
    assert ctypes.CDLL(None).prctl(1, signal.SIGKILL) == 0  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class Driver:
    """A command that runs. Its output is kept in memory, so it never waits for a reader."""

    def __init__(self, server: socket.socket, module: str, args: list[str]) -> None:
        self.returncode: int | None = None
        self._output = os.memfd_create("stdout"), os.memfd_create("stderr")
        self._said, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with told:
            order = json.dumps({"module": module, "args": args}).encode()
            socket.send_fds(server, [order], [*self._output, told.fileno()])
        self.pid = self._number(WAIT_S)

    def _number(self, wait_s: float) -> int:
        if not select.select([self._said], [], [], wait_s)[0]:
            raise subprocess.TimeoutExpired("driver", wait_s)
        return int(self._said.recv(32))

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, wait_s: float) -> int:
        """The exit status; that of a signal is negative.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            self.returncode = self._number(wait_s)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def output(self, wait_s: float = WAIT_S) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, when it has ended."""
        self.wait(wait_s)
        out, errors = (os.pread(file, os.fstat(file).st_size, 0).decode() for file in self._output)
        return out, errors

    def __del__(self) -> None:
        self._said.close()
        for file in self._output:
            os.close(file)


@contextmanager
def server(environment: Mapping[str, str], preloaded: Sequence[str] = PRELOADED) -> Iterator[socket.socket]:
    """What :class:`Driver` asks for processes with this environment. At the end those that still run are killed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.helpers.drivers", str(theirs.fileno()), *preloaded]
    with ours, subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        try:
            yield ours
        finally:
            process.kill()


def _forks(asked: socket.socket) -> Iterator[tuple[str, list[str]]]:
    """In each fork, its order; nothing in the process that forks, which ends when no one can ask it any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getpid()
    while True:
        order, files, _, _ = socket.recv_fds(asked, 1 << 16, 3)
        if not order:
            return
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end_with(parent)
            asked.close()
            (out, errors, told), parent = files, os.getpid()
            if pid := os.fork():
                with suppress(BrokenPipeError):  # who asked has no use for it any more
                    os.write(told, b"%d" % pid)
                    _, status = os.waitpid(pid, 0)
                    os.write(told, b"%d" % os.waitstatus_to_exitcode(status))
                os._exit(0)
            end_with(parent)
            os.close(told)
            os.dup2(out, 1)
            os.dup2(errors, 2)
            yield (given := json.loads(order))["module"], given["args"]
            return
        for file in files:
            os.close(file)


def main() -> None:
    for module in sys.argv[2:]:
        importlib.import_module(module)
    for module, args in _forks(socket.socket(fileno=int(sys.argv[1]))):
        importlib.import_module(module).main(args)


if __name__ == "__main__":
    main()
