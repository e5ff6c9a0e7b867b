"""Reads a remote through a cache, for tests that start several of it and kill them.

python -m tests.pear_store.remote.lazy_worker once|loop URL CACHE LIMIT SEED
"""

import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pear_store.format.manifest import to_manifest
from pear_store.remote import lazy
from pear_store.remote.cache import CacheSettings
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.place import Place, Range
from tests.helpers.makers import small_task


class SlowPlace(DirectoryPlace):
    """A directory whose packs take a while."""

    reads = 0

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        type(self).reads += 1
        time.sleep(0.3)
        return super().get_ranges(name, ranges)


def open_slow(url: str, options: Mapping[str, str] | None = None) -> Place:
    return SlowPlace(Path(url.removeprefix("file://")))


def main(verb: str, url: str, cache: str, limit: str, seed: str) -> None:
    chosen = random.Random(int(seed))
    if verb == "once":
        vars(lazy)["open_place"] = open_slow
    with lazy.RemoteStore(url, {}, CacheSettings(Path(cache), int(limit), ttl_s=60)) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        while True:
            number = 0 if verb == "once" else chosen.randrange(20)
            task = store.get(f"t{number}", copy=False)
            if to_manifest(task) != to_manifest(small_task(f"t{number}", seed=number)):
                print("wrong", number, flush=True)
            for name, tensor in task.tensors.items():
                if tensor.digest != name:
                    print("wrong", name, flush=True)
            if verb == "once":
                break
            print("read", number, flush=True)
    print("reads", SlowPlace.reads, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
