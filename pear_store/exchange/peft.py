"""Imports LoRA adapters that Hugging Face PEFT made for timm models as tasks, and exports tasks to PEFT.

A PEFT folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Pear adds ``pear.json`` with what those
cannot say: {"task", "backbone": {"model", "digest"}, "labels", "preprocess", "metrics", "training"}. PEFT's matrices
have the orientation of a Linear's weight; ours are transposed:

    down = lora_A.weight.T [d_in, r]        up = lora_B.weight.T [r, d_out]        scale = lora_alpha / r

or lora_alpha / sqrt(r) with ``use_rslora``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

from pear_store.counted import counted
from pear_store.errors import CheckpointError, NotFoundError, PearStoreError, SourceError, from_os_error
from pear_store.files import read_text
from pear_store.format.checkpoint import CONTROL, FORMAT, Branch, Task, make_task, natural_key
from pear_store.format.codes import matrix_values, up_values
from pear_store.format.container import container_chunks, read_container, read_json
from pear_store.format.digest import ITEM_BYTES, RawTensor

if TYPE_CHECKING:
    pass

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "pear.json"
BACKBONES = "pear_store.backbones"
"""The group of entry points that describe backbones; see :func:`describe_backbone`."""

_PREFIX = "base_model.model."
_WRAPPED = _PREFIX + "timm_model."  # a timm model inside transformers' TimmWrapper
_LORA_KEY = re.compile(r"(.+)\.lora_(A|B)\.weight")
_MAX_PATTERN, _MAX_PATTERNS, _PATTERN_BYTES = 200, 1000, 1 << 18
_MAX_NAME, _MAX_MATCHES = 500, 1_000_000

# Fields that import_peft reads, and fields that a trained LoRA's outputs do not depend on, as of PEFT 0.21. Any other
# field that is set is refused: it may turn on a variant of LoRA.
_KNOWN_FIELDS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias",
    "fan_in_fan_out", "init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # the other initialisations change base weights


class _Pair(NamedTuple):
    """A position's tensors as PEFT has them, lora_A [r, d_in] and lora_B [d_out, r], and the branch's scale."""

    a: RawTensor
    b: RawTensor
    scale: float


def describe_backbone(model: str, weights: str | Path | None = None) -> dict[str, Any] | None:
    """Loads a timm model with its weights, and says what exchange with PEFT needs to know of it.

    Args:
        model: its timm name.
        weights: a local safetensors file of its weights. None: timm loads them.

    Returns:
        "model", "digest", "head" (the classifier's module path; None: there are several), "linears" ({module path:
        (d_in, d_out)}) and "preprocess" (the model's own, as in a task's record). None: no package that knows timm is
        installed.

    Raises:
        PearStoreError: the model cannot be loaded.
    """
    from importlib.metadata import entry_points  # as slow to import as all of pear_store

    for entry in entry_points(group=BACKBONES, name="timm"):
        try:
            return dict(entry.load()(model, weights))
        except Exception as error:  # another package may raise anything
            raise PearStoreError(" ".join(str(error).split()) or type(error).__name__) from error
    return None


def read_labels(path: str | Path) -> list[str]:
    """Reads class names from a UTF-8 file, one per line.

    Raises:
        NotFoundError: there is no such file.
        SourceError: it cannot be read, or a line is empty or holds control characters.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    labels = lines[:-1] if lines[-1] == "" else lines
    for number, label in enumerate(labels, 1):
        if not label.strip() or CONTROL.search(label):
            found = "empty" if not label.strip() else f"{label[:80]!r}"
            raise SourceError(path, f"line {number} is {found}: expected a class name without control characters")
    return labels


def import_peft(
    folder: str | Path,
    *,
    name: str | None = None,
    backbone: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    features_only: bool = False,
) -> Task:
    """Makes a task of a folder that PEFT's ``save_pretrained`` wrote.

    Positions whose two tensors are equal byte for byte use one adapter, each with its own scale. The classifier is
    the one module of ``modules_to_save``. If it has no bias, the bias is zeros. Without a classifier, the task has no
    head.

    Args:
        folder: holds ``adapter_config.json``, ``adapter_model.safetensors`` and perhaps ``pear.json``. That says name,
            backbone, labels and preprocess wherever the argument is None.
        name: the task's name.
        backbone: as :func:`describe_backbone` returns it. "model" and "digest" are enough. If "linears" and "head" are
            there, positions and classifier are checked against them.
        labels: one for each row of the classifier.
        preprocess: what the LoRA was trained with, as in a task's record. It is never guessed. The model's own is in
            what :func:`describe_backbone` returns.
        features_only: accept a LoRA without a classifier. Its task gives features and no labels.

    Raises:
        NotFoundError: there is no such folder, or no ``adapter_config.json`` in it.
        CheckpointError: the folder holds more than plain LoRA on Linear modules and one linear classifier; or something
            that a task checkpoint may not hold.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    pairs, head = _read_weights(folder, config)
    sidecar = _read_sidecar(folder / SIDECAR)
    record = _describe(folder, sidecar, name, backbone)
    if backbone is not None:
        _check_modules(pairs, head, backbone, folder / WEIGHTS)
    labels = sidecar.get("labels") if labels is None else list(labels)
    if labels is None and head:
        classes = next(iter(head.values()))["weight"].shape[0]
        raise CheckpointError(
            folder,
            f"field 'labels': the classifier has {counted(classes, 'row')} and no names for them: give labels "
            f"(--labels), or "
            f'write {{"labels": […]}} to {SIDECAR}',
        )
    if labels is None and not features_only:
        raise CheckpointError(
            folder,
            "holds no classifier (modules_to_save names none): the task would give features, not labels; say "
            "features_only (--features-only) if that is what you want",
        )
    if features_only and head:
        raise CheckpointError(folder, f"expected no classifier (features only), found {next(iter(head))!r}")
    preprocess = sidecar.get("preprocess") if preprocess is None else preprocess
    if preprocess is None:
        raise CheckpointError(
            folder,
            "field 'preprocess': nothing says which pictures the LoRA was trained on: give preprocess (--preprocess "
            f"timm for the model's own, or a JSON file), or write it to {SIDECAR}",
        )
    tensors: dict[str, RawTensor] = {}
    owners: dict[tuple[str, str], str] = {}
    for position, pair in pairs.items():
        down, up = _transposed(pair.a), _transposed(pair.b)
        if owners.setdefault((down.digest, up.digest), position) == position:
            tensors |= {f"{position}.down": down, f"{position}.up": up}
        record["positions"][position] = [[owners[down.digest, up.digest], pair.scale]]
    record["adapters"] = {a: {"down": f"{a}.down", "up": f"{a}.up"} for a in owners.values()}
    for saved in head.values():
        weight = saved["weight"]
        rows = weight.shape[:1]
        zeros = RawTensor(weight.dtype, rows, bytes(rows[0] * ITEM_BYTES[weight.dtype]))
        tensors |= {"head.weight": weight, "head.bias": saved.get("bias", zeros)}
        record["head"] = {"weight": "head.weight", "bias": "head.bias"}
    return make_task({**record, "labels": labels or [], "preprocess": preprocess}, tensors, folder)


def export_peft(
    task: Task, folder: str | Path, *, linears: Mapping[str, tuple[int, int]] | None, head: str = "head"
) -> None:
    """Writes a folder that PEFT's ``PeftModel.from_pretrained`` loads, with equal outputs. Whole or not at all.

    Load it onto ``timm.create_model(model, pretrained=True, num_classes=classes)``. An unquantised adapter that is
    alone at its position keeps its bytes, and its scale is lora_alpha / r. Several branches at one position become
    one branch of the summed rank: each `up` is multiplied by its scale, in float32. Quantised adapters are dequantised
    to float32. A shared adapter is written once for each position. :func:`import_peft` makes it one adapter again.

    Args:
        task: its activation must be "identity".
        folder: a new folder, or an empty one.
        linears: {module path: (d_in, d_out)} of the backbone's Linear modules, see :func:`describe_backbone`. None:
            positions are not checked.
        head: the classifier's module path in the timm model.

    Raises:
        CheckpointError: the task has an activation, no adapter, or a position that is no Linear module.
        PearStoreError: `folder` is not empty, or cannot be written.
    """
    folder, positions = Path(folder), task.positions
    if task.activation != "identity":
        found = f"field 'activation': expected 'identity', found {task.activation!r}"
        raise CheckpointError(task.name, f"{found}: PEFT's LoRA has no activation between down and up")
    if not positions:
        raise CheckpointError(task.name, "field 'positions': expected an adapter, found none: PEFT loads no empty LoRA")
    if linears is not None and (foreign := sorted(positions.keys() - linears.keys(), key=natural_key)):
        some = ", ".join(map(repr, foreign[:5])) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise CheckpointError(
            task.name,
            f"positions {some}: expected Linear modules of {task.backbone_model}, which PEFT's LoRA needs; "
            "to export to PEFT, train the task with 'pear-train --positions linear'",
        )
    tensors: dict[str, RawTensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for position in sorted(positions, key=natural_key):
        pair = _one_pair(task, position, positions[position])
        found_widths = (pair.a.shape[1], pair.b.shape[0])
        if linears is not None and found_widths != tuple(linears[position]):
            expected = f"the backbone's are {tuple(linears[position])}"
            raise CheckpointError(task.name, f"position {position!r}: widths {found_widths}, {expected}")
        tensors |= {f"{_PREFIX}{position}.lora_A.weight": pair.a, f"{_PREFIX}{position}.lora_B.weight": pair.b}
        ranks[position] = pair.a.shape[0]
        alphas[position] = pair.scale * ranks[position]
    if task.record["head"] is not None:
        for side in ("weight", "bias"):
            tensors[f"{_PREFIX}{head}.{side}"] = _head_part(task, side)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": task.backbone_model,
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
        "modules_to_save": [head] if task.record["head"] is not None else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    told = ("task", "backbone", "labels", "preprocess", "metrics", "training", "threshold")
    sidecar = {key: task.record[key] for key in told if key in task.record}
    files = {CONFIG: [_json(config)], WEIGHTS: container_chunks(tensors, {"format": "pt"}), SIDECAR: [_json(sidecar)]}
    _write_folder(folder, files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except NotFoundError:
        raise NotFoundError(f"{path}: no such file; expected a folder that PEFT's save_pretrained wrote") from None
    except SourceError as error:
        raise CheckpointError(path, error.problem) from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"expected a JSON object, found {type(value).__name__}")
    return value


def _read_sidecar(path: Path) -> dict[str, Any]:
    return _read_json(path) if os.path.lexists(path) else {}


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises a CheckpointError unless the config is of plain LoRA with valid numbers."""

    def expect(good: bool, key: str, expected: str) -> None:
        if not good:
            raise CheckpointError(path, f"field {key!r}: expected {expected}, found {config.get(key)!r:.80}")

    expect(config.get("peft_type") == "LORA", "peft_type", "'LORA'")
    for key in sorted(config.keys() - _KNOWN_FIELDS):
        expect(not config[key], key, "plain LoRA, without this variant")
    expect(config.get("bias", "none") == "none", "bias", "'none': no bias of the backbone may be trained")
    expect(not config.get("fan_in_fan_out"), "fan_in_fan_out", "false, as for every Linear")
    start = config.get("init_lora_weights", True)
    expect(start in _KEEPS_BASE, "init_lora_weights", "one that leaves the backbone's weights as they are")
    expect(_is_rank(config.get("r")), "r", "a rank")
    expect(_is_number(config.get("lora_alpha")), "lora_alpha", "a number")
    expect(isinstance(config.get("use_rslora", False), bool), "use_rslora", "true or false")
    saved = config.get("modules_to_save") or []
    expect(isinstance(saved, list) and all(isinstance(m, str) for m in saved), "modules_to_save", "a list of modules")
    for key, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(key) or {}
        expect(isinstance(patterns, dict) and all(map(good, patterns.values())), key, "module patterns with numbers")
        expect(len(patterns) <= _MAX_PATTERNS, key, f"at most {_MAX_PATTERNS} patterns")
        for pattern in patterns:
            if len(pattern) > _MAX_PATTERN or _compiled(pattern) is None:
                expected = f"a regular expression of at most {_MAX_PATTERN} characters that RE2 takes"
                raise CheckpointError(path, f"field {key!r}: expected {expected}, found {pattern!r:.80}")


def _read_weights(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, _Pair], dict[str, dict[str, RawTensor]]]:
    """The LoRA pairs by position, in natural order; and the saved classifier: {} or {its path: {leaf: tensor}}."""
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            folder / "adapter_model.bin",
            f"a pickle, which is never read: expected {WEIGHTS}; load it with peft and save_pretrained it again",
        )
    _, tensors = read_container(path)
    prefix = _WRAPPED if all(key.startswith(_WRAPPED) for key in tensors) else _PREFIX
    lora: dict[str, dict[str, RawTensor]] = {}
    saved: dict[str, dict[str, RawTensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(prefix) or len(key) > _MAX_NAME:
            raise CheckpointError(
                path,
                f"tensor {key!r:.120}: expected a name of at most {_MAX_NAME} characters that starts with {prefix!r}",
            )
        name = key.removeprefix(prefix)
        module, _, leaf = name.rpartition(".")
        if match := _LORA_KEY.fullmatch(name):
            lora.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" not in name and module and leaf in ("weight", "bias") and config.get("modules_to_save"):
            saved.setdefault(module, {})[leaf] = tensor
        else:
            expected = "lora_A.weight or lora_B.weight of a Linear, or weight or bias of a module of modules_to_save"
            raise CheckpointError(path, f"tensor {key!r:.120}: expected {expected}")
    if not lora:
        raise CheckpointError(path, "no tensors of a LoRA: expected lora_A.weight and lora_B.weight of some module")
    for field in ("rank_pattern", "alpha_pattern"):
        if (count := len(config.get(field) or {})) * len(lora) > _MAX_MATCHES:
            problem = f"{count} patterns for {len(lora)} modules: expected at most {_MAX_MATCHES:,} pairs of them"
            raise CheckpointError(folder / CONFIG, f"field {field!r}: {problem}")
    _check_saved(saved, config, path)
    matched = prefix.removeprefix(_PREFIX)  # PEFT matches patterns with the path below base_model.model
    pairs = {
        position: _pair(lora[position], prefix + position, matched + position, config, path)
        for position in sorted(lora, key=natural_key)
    }
    return pairs, saved


def _pair(sides: Mapping[str, RawTensor], key: str, module: str, config: Mapping[str, Any], path: Path) -> _Pair:
    for side in ("A", "B"):
        if side not in sides:
            raise CheckpointError(path, f"tensor '{key}.lora_{side}.weight' is missing")
    a, b = sides["A"], sides["B"]
    shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
    if len(a.shape) == 4 or len(b.shape) == 4:
        raise CheckpointError(path, f"{key!r}: {shapes} are of a convolution: expected LoRA on Linear modules only")
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    if len(a.shape) != 2 or len(b.shape) != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(path, f"{key!r}: {shapes}: expected [{rank}, d_in] and [d_out, {rank}], as {CONFIG} says")
    if 0 in (*a.shape, *b.shape):
        raise CheckpointError(path, f"{key!r}: {shapes}: empty; expected [{rank}, d_in] and [d_out, {rank}]")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return _Pair(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _check_saved(saved: Mapping[str, Mapping[str, RawTensor]], config: Mapping[str, Any], path: Path) -> None:
    named = ", ".join(config.get("modules_to_save") or [])
    if named and not saved:
        raise CheckpointError(path, f"the weights of {named} are missing, which field 'modules_to_save' names")
    if len(saved) > 1:
        raise CheckpointError(path, f"modules_to_save: expected the classifier alone, found {', '.join(sorted(saved))}")
    for module, leaves in saved.items():
        shape = leaves["weight"].shape if "weight" in leaves else ()
        if len(shape) != 2 or 0 in shape or ("bias" in leaves and leaves["bias"].shape != shape[:1]):
            found = ", ".join(f"{leaf} {list(tensor.shape)}" for leaf, tensor in sorted(leaves.items(), reverse=True))
            raise CheckpointError(path, f"{module!r}: expected weight [classes, d] and bias [classes], found {found}")


def _describe(
    folder: Path, sidecar: Mapping[str, Any], name: str | None, backbone: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The parts of the record that do not depend on the weights."""
    told = sidecar.get("backbone")
    if backbone is None:
        if told is None:
            raise CheckpointError(folder, f"field 'backbone' is missing: give backbone, or write it to {SIDECAR}")
        identity = told
    else:
        identity = {"model": backbone["model"], "digest": backbone["digest"]}
        if isinstance(told, dict) and told.get("digest", identity["digest"]) != identity["digest"]:
            expected = f"{identity['model']} {identity['digest']!s:.19}…"
            raise CheckpointError(
                folder / SIDECAR,
                f"field 'backbone': expected {expected}, found {told.get('model')} {told['digest']!s:.19}…: "
                "a task runs on the backbone it was made for",
            )
    name = sidecar.get("task") if name is None else name
    if name is None:
        raise CheckpointError(folder, f"field 'task' is missing: give name (--name), or write it to {SIDECAR}")
    return {
        "format": FORMAT,
        "task": name,
        "backbone": identity,
        "activation": "identity",
        "adapters": {},
        "positions": {},
        "head": None,
        "metrics": sidecar.get("metrics", {}),
        "training": sidecar.get("training", {"method": "lora"}),
        **({"threshold": sidecar["threshold"]} if "threshold" in sidecar else {}),
    }


def _check_modules(pairs: Mapping[str, _Pair], head: Iterable[str], backbone: Mapping[str, Any], path: Path) -> None:
    """Raises a CheckpointError if a position or the classifier does not match the backbone's description."""
    classifier = backbone.get("head")
    for module in head:
        if classifier is not None and module != classifier:
            problem = (
                f"modules_to_save: expected the classifier {classifier!r} of {backbone['model']}, found {module!r}"
            )
            raise CheckpointError(path, problem)
    linears = backbone.get("linears")
    for position, pair in pairs.items():
        if position == classifier:
            problem = f"{position!r}: LoRA on the classifier itself: expected it in modules_to_save, whole"
            raise CheckpointError(path, problem)
        if linears is None:
            continue
        if position not in linears:
            raise CheckpointError(path, f"{position!r}: expected a Linear module of {backbone['model']}")
        found, expected = (pair.a.shape[1], pair.b.shape[0]), tuple(linears[position])
        if found != expected:
            problem = f"{position!r}: widths (d_in, d_out) {found}, those of {backbone['model']} are {expected}"
            raise CheckpointError(path, problem)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that ends the module's path at a dot, as PEFT's get_pattern_key picks it."""
    for pattern, value in (patterns or {}).items():
        if (compiled := _compiled(pattern)) is not None and compiled.match(module):
            return value
    return (patterns or {}).get(module, default)


def _patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    """PEFT's patterns for values that differ from the default. Each pattern is one whole path."""
    return {f"^{re.escape(position)}": value for position, value in values.items() if value != default}


@lru_cache(2 * _MAX_PATTERNS)
def _compiled(pattern: str) -> Any:
    """The pattern, anchored as PEFT does it. None if it is invalid. RE2 takes linear time for any pattern."""

    import re2

    options = re2.Options()
    options.log_errors, options.max_mem = False, _PATTERN_BYTES
    try:
        return re2.compile(rf"(?:.*\.)?(?:{pattern})$", options)
    except re2.error:
        return None


def _one_pair(task: Task, position: str, branches: Sequence[Branch]) -> _Pair:
    """A position's branches as one LoRA."""
    import numpy as np

    adapters = [task.adapters[branch.adapter] for branch in branches]
    if len(branches) == 1 and adapters[0].down.bits is None and adapters[0].core is None:
        down, up = (part.tensor(task.tensors) for part in (adapters[0].down, adapters[0].up))
        return _Pair(_transposed(down), _transposed(up), branches[0].scale)
    downs = [matrix_values(adapter.down, task.tensors).astype(np.float32) for adapter in adapters]
    ups = [up_values(adapter, task.tensors).astype(np.float32) for adapter in adapters]
    scale = branches[0].scale
    if len(branches) > 1:
        scale = 1.0
        with np.errstate(over="ignore"):
            ups = [up * np.float32(branch.scale) for up, branch in zip(ups, branches, strict=True)]
    a, b = np.concatenate(downs, axis=1).T, np.concatenate(ups, axis=0).T
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise CheckpointError(task.name, f"position {position!r}: its branches exceed float32 once scaled")
    return _Pair(RawTensor("F32", a.shape, a.tobytes()), RawTensor("F32", b.shape, b.tobytes()), scale)


def _head_part(task: Task, side: Literal["weight", "bias"]) -> RawTensor:
    """The head's weight or bias, dequantised to float32."""
    head = task.head
    assert head is not None
    if side == "bias" or head.weight.bits is None:
        return task.tensors[head.bias if side == "bias" else head.weight.name]
    matrix = matrix_values(head.weight, task.tensors)
    return RawTensor("F32", matrix.shape, matrix.tobytes())


def _transposed(matrix: RawTensor) -> RawTensor:
    import numpy as np

    bits = np.frombuffer(matrix.data, f"<u{ITEM_BYTES[matrix.dtype]}").reshape(matrix.shape)
    return RawTensor(matrix.dtype, (matrix.shape[1], matrix.shape[0]), bits.T.tobytes())


def _write_folder(folder: Path, files: Mapping[str, Iterable[bytes | bytearray | memoryview]]) -> None:
    temporary = folder.parent / f".{uuid4().hex}.tmp"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise PearStoreError(f"{folder}: exists and is no empty folder; remove it, or name another")
        temporary.mkdir()
        for name, chunks in files.items():
            with open(temporary / name, "xb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, folder)
    except OSError as error:
        raise from_os_error(error, folder) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
