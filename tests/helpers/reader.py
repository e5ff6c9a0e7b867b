"""Prints what each version of a store gives, for tests whose damage may kill the reader; imports the store only."""

import json
import sys

from pear_store import PearStoreError, Store

WANT = {"one": "one@1", "two": "two@1", "three": "three@3", "three@prod": "three@1"}


def read_all(path: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for reference in (*WANT, "one@1", "two@1", "three@1", "three@2", "three@3"):
        try:
            with Store(path) as store:
                version, task = store.resolve(reference), store.get(reference)
                name = f"{version.task}@{version.version}"
                digests = sorted(tensor.digest for tensor in task.tensors.values())  # hashed anew, from the bytes
                found[name] = [version.time_ns, list(version.tags), digests]
                if name != WANT.get(reference, reference):
                    found[reference] = f"wrong version {name}"
        except PearStoreError:
            found[reference] = "error"
    return found


if __name__ == "__main__":
    print(json.dumps(read_all(sys.argv[1])))
