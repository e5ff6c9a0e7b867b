#!/usr/bin/env python3
"""How many transfers at once: push and clone of a store over S3, without and with a delay of the network.

    python -m benchmarks.store.transfers --out benchmarks/results/store_transfers.json

A localbucket server and the delaying proxy of the tests run in processes of their own. Rounds are interleaved.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click

from benchmarks.store.scale import make_tasks
from pear_store import Store
from pear_store.remote import objects, pull
from pear_store.remote.remotes import Remote, add_remote, clone_store, init_remote
from tests.pear_store.remote.real_servers import KEYS, Server

READERS = (2, 4, 8, 16, 32)


@click.command(help=__doc__)
@click.option("--tasks", default=400, show_default=True)
@click.option("--pushes", default=10, show_default=True, help="Pushes that bring the tasks: as many packs.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--delays", default="0,20", show_default=True, help="Of a round trip, in ms.")
@click.option("--out", type=click.Path(path_type=Path))
def main(tasks: int, pushes: int, rounds: int, delays: str, out: Path | None) -> None:
    os.environ.update(KEYS)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server("localbucket", folder / "served").start()
        try:
            server.make_bucket()
            init_remote("s3://bucket/r", server.options)
            with Store.create(folder / "store") as store:
                add_remote(store.path, Remote("origin", "s3://bucket/r", server.options))
                for number in range(pushes):
                    added = list(store.add_many(make_tasks(number * tasks // pushes, tasks // pushes)))
                    assert len(store.push().versions) == len(added) > 0
            for delay in map(int, delays.split(",")):
                times: dict[int, list[float]] = {readers: [] for readers in READERS}
                for round_ in range(rounds):
                    for readers in READERS:
                        times[readers].append(clone(server, folder / f"c{delay}-{round_}-{readers}", readers, delay))
                for readers, seconds in times.items():
                    rows.append({"delay_ms": delay, "readers": readers, "clone_s": statistics.median(seconds)})
                    print(json.dumps(rows[-1]), flush=True)
        finally:
            server.kill()
    if out is not None:
        out.write_text(
            json.dumps(
                {
                    "command": " ".join(["python", "-m", "benchmarks.store.transfers", *sys.argv[1:]]),
                    "tasks": tasks,
                    "packs": pushes,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


def clone(server: Server, path: Path, readers: int, delay: int) -> float:
    command = [sys.executable, "-m", "tests.pear_store.remote.proxy", str(server.port), str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None and proxy.stdin is not None
        options = {**server.options, "endpoint": f"http://127.0.0.1:{int(proxy.stdout.readline())}"}
        pull.READERS = objects._THREADS = readers
        start = time.perf_counter()
        clone_store(path, Remote("origin", "s3://bucket/r", options))
        seconds = time.perf_counter() - start
        with suppress(OSError):
            proxy.stdin.close()
    return seconds


if __name__ == "__main__":
    main()
