"""Manifests: a stored task's JSON, which names tensors by digest (docs/design.md, section 6)."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pear_store.format.checkpoint import PARTS, Task, map_tensor_names, outer_part, tensor_names
from pear_store.format.container import strict_json
from pear_store.format.digest import Digest, RawTensor, is_digest


def to_manifest(task: Task) -> bytes:
    """The canonical manifest bytes; equal tasks give equal bytes, whatever their tensors are called."""
    return dump_manifest(map_tensor_names(task.record, lambda name: task.tensors[name].digest))


def dump_manifest(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def manifest_digests(manifest: bytes) -> list[Digest]:
    """The digests of the tensors that a manifest names, in order.

    Raises:
        ValueError: it is no manifest.
    """
    strict_json(manifest)
    names = manifest_names(manifest)
    if not all(map(is_digest, names)):
        raise ValueError("it names what is no digest")
    return [Digest(name) for name in sorted(names)]


def manifest_names(manifest: bytes) -> set[str]:
    """What a manifest, checked before, calls the tensors that it needs.

    Raises:
        ValueError: it is no manifest.
    """
    try:
        return tensor_names(json.loads(manifest))
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("no task's record") from None


def manifest_hash(manifest: bytes) -> bytes:
    return hashlib.sha256(manifest).digest()


def plain_names(adapter: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """For each tensor name that an adapter's entry uses, one after its use."""
    names: dict[str, str] = {}
    for part in PARTS:
        if part in entry:
            names.setdefault(entry[part], f"{adapter}.{part}")
    if "quant" in entry:
        for part in ("down", outer_part(entry)):
            names.setdefault(entry["quant"][part]["scale"], f"{adapter}.{part}.scale")
    return names


def with_plain_names(task: Task) -> Task:
    """The task with its tensors named after their use (``a3.down``, ``head.weight``) instead of by digest."""
    names: dict[str, str] = {}
    record: dict[str, Any] = dict(task.record)
    for adapter, entry in record["adapters"].items():
        for stored, plain in plain_names(adapter, entry).items():
            names.setdefault(stored, plain)
    if record["head"] is not None:
        for side in ("weight", "bias"):
            names.setdefault(record["head"][side], f"head.{side}")
        if "quant" in record["head"]:
            names.setdefault(record["head"]["quant"]["weight"]["scale"], "head.weight.scale")
    tensors: dict[str, RawTensor] = {names[name]: task.tensors[name] for name in tensor_names(record)}
    return Task(map_tensor_names(record, names.__getitem__), tensors)
