"""The log of a full run of the faults."""

import os
import time


def keep_log(line: str) -> None:
    """Appends a line to it where this is such a run (`make faults`)."""
    if log := os.environ.get("PEAR_FAULT_LOG"):
        with open(log, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime())} {line}\n")
