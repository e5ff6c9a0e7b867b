"""Manifests: a stored task's JSON, which names tensors by digest (docs/formats.md)."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pear_store.errors import CheckpointError
from pear_store.format.checkpoint import Task, check_format
from pear_store.format.container import strict_json
from pear_store.format.digest import Digest, RawTensor, is_digest
from pear_store.format.joined import join, split_tensors
from pear_store.format.record import HEAD_PARTS, entry_names, map_tensor_names, short, tensor_names


def to_manifest(task: Task) -> bytes:
    """The canonical manifest bytes; equal tasks give equal bytes, whatever their tensors are called."""
    return as_stored(task)[0]


def as_stored(task: Task) -> tuple[bytes, dict[Digest, RawTensor]]:
    """A task as a store has it: its manifest, and the tensors that this names."""
    record, tensors = join(task.record, task.tensors)
    manifest = dump_manifest(map_tensor_names(record, lambda name: tensors[name].digest))
    return manifest, {tensor.digest: tensor for tensor in tensors.values()}


def from_stored(manifest: bytes, tensors: Mapping[str, RawTensor], where: str) -> Task:
    """The task of a manifest that was checked before, and of the tensors that it names, by digest.

    Raises:
        CheckpointError: a later Pear wrote it, in a format that this one does not know; or it was never checked, and
            its slices are not as docs/checkpoint.md says.
    """
    told = json.loads(manifest)
    try:
        check_format(told)
        record, found = split_tensors(told, tensors)
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None
    if found is tensors:
        return Task(record, dict(tensors))
    try:
        record = map_tensor_names(record, lambda name: found[name].digest)
    except KeyError as error:
        raise CheckpointError(where, f"names tensor {short(error.args[0])}, in which only slices lie") from None
    return Task(record, {tensor.digest: tensor for tensor in found.values()})


def dump_manifest(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def manifest_digests(manifest: bytes) -> list[Digest]:
    """The digests of the tensors that a manifest names, in order.

    Raises:
        ValueError: it is no manifest.
    """
    return parse_manifest(manifest)[1]


def parse_manifest(manifest: bytes) -> tuple[dict[str, Any], list[Digest]]:
    """A manifest's record, which is strict JSON, and the digests that it names, in order. Raises as
    :func:`manifest_digests`."""
    record = strict_json(manifest)
    names = _names(record)
    if not all(map(is_digest, names)):
        raise ValueError("it names what is no digest")
    return record, [Digest(name) for name in sorted(names)]


def manifest_names(manifest: bytes) -> set[str]:
    """What a manifest, checked before, calls the tensors that it needs.

    Raises:
        ValueError: it is no manifest.
    """
    return _names(json.loads(manifest))


def _names(record: Any) -> set[str]:
    try:
        return tensor_names(record)
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("no task's record") from None


def manifest_hash(manifest: bytes) -> bytes:
    return hashlib.sha256(manifest).digest()


def with_plain_names(task: Task) -> Task:
    """The task with its tensors named after their use (``a3.down``, ``head.weight``) instead of by digest."""
    names: dict[str, str] = {}
    record: dict[str, Any] = dict(task.record)
    for adapter, entry in record["adapters"].items():
        for use, stored in entry_names(entry):
            names.setdefault(stored, f"{adapter}.{use}")
    for use, stored in entry_names(record["head"] or {}, HEAD_PARTS):
        names.setdefault(stored, f"head.{use}")
    tensors: dict[str, RawTensor] = {names[name]: task.tensors[name] for name in tensor_names(record)}
    return Task(map_tensor_names(record, names.__getitem__), tensors)
