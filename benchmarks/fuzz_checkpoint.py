#!/usr/bin/env python3
"""Coverage-guided fuzzing of the checkpoint reader with atheris (pip install atheris).

    python benchmarks/fuzz_checkpoint.py -max_total_time=300 runs/fuzz_corpus

Options and corpus folders are libFuzzer's. Any exception but our own, or 2 GiB of memory, ends the run with the input.
"""

import sys
from contextlib import suppress
from io import BytesIO

import atheris

with atheris.instrument_imports(include=["pear_store"]):
    from pear_store import CheckpointError
    from pear_store.checkpoint import task_from_container
    from pear_store.container import parse_container


def read(content: bytes) -> None:
    # the first 8 bytes are the header's length: guessing them would be all that a fuzzer does
    header, _, data = content.partition(b"\n")
    whole = len(header).to_bytes(8, "little") + header + data
    for attempt in (content, whole):
        with suppress(CheckpointError):
            task_from_container(*parse_container(BytesIO(attempt), "fuzz"), "fuzz")


if __name__ == "__main__":
    atheris.Setup([*sys.argv, "-max_len=4096", "-rss_limit_mb=2048", "-timeout=10"], read)
    atheris.Fuzz()
