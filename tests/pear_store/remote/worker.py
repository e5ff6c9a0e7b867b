"""Pushes to, or pulls from, a directory, without an end: for tests that kill it.

python -m tests.pear_store.remote.worker push|pull STORE MIRROR REMOTE FIRST
"""

import sys
from itertools import count
from pathlib import Path

from pear_store import Store
from pear_store.errors import ClashError
from pear_store.remote import pull, push
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.mirror import opened_mirror
from tests.helpers.makers import small_task


def main(verb: str, store_path: str, mirror_path: str, remote: str, first: str) -> None:
    place = DirectoryPlace(remote)
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
            else:
                for task, version in pull.pull(store._open, place, mirror).versions:
                    print("pulled", f"{task}@{version}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
