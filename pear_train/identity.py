"""What a run depends on: its options, its backbone, its data, and its base set, bank or common bases."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from pear_store import Task
from pear_store.format.manifest import manifest_hash, to_manifest
from pear_train.config import OPTIONS, TrainConfig
from pear_train.data import Dataset, preprocess_record
from router import Backbone

BASES = "bases"
"""The `method` that a checkpoint of common bases records."""

Identity: TypeAlias = dict[str, Any]
"""What a run depends on. On one machine, runs of equal identities give equal files."""


def identity(
    config: TrainConfig, backbone: str, preprocess: Mapping[str, Any], data: str, given: str | None
) -> Identity:
    """The identity of a run.

    Args:
        backbone: the backbone's digest.
        data: the data set's fingerprint.
        given: digest of base set, bank and common bases; None without any.
    """
    options = {key: value for key, value in asdict(config).items() if key != "device"}
    told = {**options, "backbone": backbone, "preprocess": dict(preprocess), "data": data, "given": given}
    plain: Identity = json.loads(json.dumps(told))
    return plain


def run_identity(config: TrainConfig, backbone: Backbone, dataset: Dataset, given: str | None) -> Identity:
    """The identity of a run that has not begun. Reads the data."""
    preprocess = preprocess_record(backbone, config.img_size)
    return identity(config, backbone.digest, preprocess, dataset.fingerprint, given)


def given_digest(base: Task | None, bank: Sequence[Task], bases: Task | None = None) -> str | None:
    """A sha256 of the manifests of base set, bank and common bases. None without any."""
    lines = [f"bank {manifest_hash(to_manifest(task)).hex()}" for task in bank]
    if base is not None:
        lines.append(f"base {manifest_hash(to_manifest(base)).hex()}")
    if bases is not None:
        lines.append(f"bases {manifest_hash(to_manifest(bases)).hex()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() if lines else None


def fingerprint(run: Identity) -> str:
    """One sha256 of an identity."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def identity_of(task: Task) -> Identity:
    """The identity of the run that wrote a task checkpoint. Keys that an older Pear did not record are absent."""
    training = task.record["training"]
    options = {key: training[key] for key in OPTIONS if key in training and key not in ("device", "importance")}
    if "importance_score" in training:
        options["importance"] = training["importance_score"]
    found = {"task": task.name, **options, "backbone": task.backbone_digest, "preprocess": dict(task.preprocess)}
    return {**found, **{new: training[key] for new, key in _RECORDED.items() if key in training}}


_RECORDED = {"data": "data_fingerprint", "given": "given"}
_SAID = {
    "data": "other pictures, classes or splits",
    "backbone": "another backbone",
    "preprocess": "pictures read or resized in another way",
    "given": "made from other tasks or bases, or changed after training",
}


_LATER = (
    "core_dtype", "own_rank", "own_bytes", "core_lr", "bases_lr", "balance", "label_smoothing", "threshold_accuracy",
)  # fmt: skip
"""Options that older checkpoints do not record. At its default, such an option changes nothing."""


def differences(there: Identity, now: Identity) -> list[str]:
    """How the run that is there differs from the one to come, each difference in a few words."""
    found = []
    for key, wanted in now.items():
        if key in _LATER and key not in there and wanted == OPTIONS[key].default:
            continue
        if key not in there:
            found.append("no record of its data" if key == "data" else f"no record of its {key.replace('_', ' ')}")
        elif there[key] != wanted:
            found.append(_SAID.get(key) or f"{key.replace('_', ' ')} {there[key]} there, {wanted} now")
    return found
