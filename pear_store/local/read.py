"""Reads stored tasks."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

from pear_store.errors import DamagedError, NotFoundError, PearStoreError
from pear_store.format.checkpoint import Task
from pear_store.format.digest import RawTensor
from pear_store.format.manifest import from_stored
from pear_store.format.record import tensor_names
from pear_store.format.summary import Summary
from pear_store.local.index import View
from pear_store.local.log import Operation, is_on
from pear_store.local.opened import OpenStore, PackGoneError
from pear_store.local.references import Version, manifest_of, resolve

_LOOK_UPS = 3
_AT_ONCE = 256
"""How many records are read in one view of the index"""


def read_version(opened: OpenStore, reference: str, copy: bool) -> Task:
    """See :meth:`pear_store.Store.get`."""
    if is_on(__name__):
        with Operation(__name__, "get", f"{reference} of {opened.path}") as operation:
            task = _read_where_it_is(opened, reference, copy)
            operation.size_bytes = sum(tensor.size_bytes for tensor in task.tensors.values())
            return task
    return _read_where_it_is(opened, reference, copy)


def _read_where_it_is(opened: OpenStore, reference: str, copy: bool) -> Task:
    for _ in range(_LOOK_UPS):
        try:
            return _read(opened, reference, copy)
        except PackGoneError:  # a gc moved its tensors meanwhile: look them up again
            continue
    return _read(opened, reference, copy)


def _read(opened: OpenStore, reference: str, copy: bool) -> Task:
    manifest, tensors = opened.look(lambda view: _found(opened, view, reference))
    if copy:
        tensors = {
            digest: RawTensor.checked(t.dtype, t.shape, bytearray(t.data), t.digest) for digest, t in tensors.items()
        }
    # its contents were checked when it was added, and its hash when it was read
    return from_stored(manifest, tensors, f"version {reference}")


def _found(opened: OpenStore, view: View, reference: str) -> tuple[bytes, dict[str, RawTensor]]:
    """A version's manifest and tensors."""
    kept = opened.kept(view)
    found = kept.get(reference)
    if found is None:
        name, number, row = resolve(view, reference, opened.path)
        manifest, hints = manifest_of(view, row, f"version {name}@{number}")
        names = sorted(tensor_names(json.loads(manifest)))
        found = kept[reference] = manifest, opened.tensors(view, names, f"version {name}@{number}", hints)
    return found


def read_record(opened: OpenStore, reference: str) -> Mapping[str, Any]:
    """See :meth:`pear_store.readable.ReadableStore.record`."""

    def look(view: View) -> bytes:
        name, number, row = resolve(view, reference, opened.path)
        return manifest_of(view, row, f"version {name}@{number}")[0]

    record: Mapping[str, Any] = json.loads(opened.look(look))
    return record


def read_summaries(opened: OpenStore, versions: Iterable[Version]) -> Iterator[Summary | PearStoreError]:
    """See :meth:`pear_store.readable.ReadableStore.summaries`."""
    waiting = iter(versions)
    while part := list(islice(waiting, _AT_ONCE)):
        yield from opened.look(partial(_summaries, versions=part))


def _summaries(view: View, versions: list[Version]) -> list[Summary | PearStoreError]:
    return [_summary(view, version) for version in versions]


def _summary(view: View, version: Version) -> Summary | PearStoreError:
    what = f"version {version.task}@{version.version}"
    try:
        row = view.versions.get(version.task, version.version)
        if row is None:
            return NotFoundError(f"{what} was removed meanwhile")
        return Summary.of(json.loads(manifest_of(view, row, what)[0]))
    except DamagedError as error:
        return error
