"""On a worker's PYTHONPATH: whoever opens a file called deadly.png dies at once, as if the kernel had killed it."""

import os
import signal
import sys


def _die_of_it(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and isinstance(args[0], str) and args[0].endswith("deadly.png"):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(_die_of_it)
