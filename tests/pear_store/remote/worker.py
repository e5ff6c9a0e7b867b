"""Pushes to, pulls from, collects or mends a remote, without an end: for tests that kill it.

python -m tests.pear_store.remote.worker push|pull|gc|repair STORE MIRROR REMOTE OPTIONS FIRST
(OPTIONS: the place's, as JSON; repair takes a directory only)
"""

import json
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

from pear_store import Store
from pear_store.errors import ClashError, DamagedError
from pear_store.remote import gc, pull, push, repair
from pear_store.remote.mirror import opened_mirror
from pear_store.remote.opening import open_place
from pear_store.remote.retry import Persistent
from tests.helpers.makers import small_task


def spoil(remote: str, name: str) -> None:
    """Writes a damaged copy of a pack over it."""
    path = Path(remote) / name
    with suppress(FileNotFoundError):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        written = path.with_suffix(".spoilt")
        written.write_bytes(data)
        written.rename(path)


def main(verb: str, store_path: str, mirror_path: str, remote: str, options: str, first: str) -> None:
    place = Persistent(open_place(remote, json.loads(options)))
    with Store.create(store_path) as store, opened_mirror(Path(mirror_path), remote) as mirror:
        print("ready", flush=True)
        for number in count(int(first)):
            if verb == "push":
                added = store.add(small_task(f"t{number % 7}", seed=number))
                print("added", f"{added.task}@{added.version}", flush=True)
                try:
                    for task, version in push.push(store._open, place, mirror).versions:
                        print("pushed", f"{task}@{version}", flush=True)
                except ClashError:
                    for task, old, new in pull.pull(store._open, place, mirror).renumbered:
                        print("renumbered", f"{task}@{old}", f"{task}@{new}", flush=True)
            elif verb == "gc":
                found = gc.collect(place, mirror, keep=2, grace_s=0.0)
                for task, version in found.removed:
                    print("removed", f"{task}@{version}", flush=True)
            elif verb == "repair":
                with suppress(DamagedError):  # what one before was killed over
                    pull.pull(store._open, place, mirror)
                name = next(iter(sorted(place.list("packs/"))), None)
                if name is not None:
                    spoil(remote, name)
                repair.repair(place, mirror, [store._open])
            else:
                for task, version in pull.pull(store._open, place, mirror).versions:
                    print("pulled", f"{task}@{version}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
