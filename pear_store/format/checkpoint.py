"""A task, and the task checkpoint: the one file by which tasks are exchanged (docs/checkpoint.md)."""

import json
import marshal
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from pear_store.counted import counted
from pear_store.errors import CheckpointError, from_os_error
from pear_store.format.container import (
    FETCH_AGAIN,
    KnownHeaders,
    check_json,
    container_chunks,
    parse_json,
    read_container,
)
from pear_store.format.digest import ITEM_BYTES, Digest, Kept, RawTensor, fresh_name, is_digest
from pear_store.format.joined import JOINED_FORMAT, join, split_shapes, split_tensors
from pear_store.format.record import (
    FLOATS,
    HEAD_PARTS,
    Adapter,
    Head,
    Shapes,
    entry_names,
    is_sizes,
    short,
    tensor_names,
)

FORMAT, STACKED_FORMAT = "pear-task/1", "pear-task/2"
"""Of a record without stacks of adapters, and of one that may have some"""
FORMATS = (FORMAT, STACKED_FORMAT, JOINED_FORMAT)
HUB_CHECKPOINT, HUB_LORA = "pear.safetensors", "peft"
"""What a folder for the Hugging Face Hub calls its task checkpoint, and the folder of the same task as a LoRA"""
Activation = Literal["identity", "relu", "gelu"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
CropMode = Literal["center", "squash", "border"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
CROP_MODES: tuple[CropMode, ...] = get_args(CropMode)
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TAG_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_MAX_NAME = 1000
_REQUIRED = (
    "format", "task", "backbone", "activation", "adapters", "positions", "head", "labels", "preprocess",
    "metrics", "training",
)  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """One use of an adapter at a position."""

    adapter: str
    scale: float


def branch_adapter(branch: Sequence[Any]) -> str:
    """The name of the adapter that a branch of a record uses: of a stack, the stack's and the place."""
    return str(branch[0]) if len(branch) == 2 else f"{branch[0]}#{branch[2]}"


@dataclass(frozen=True)
class Task:
    """A task: its record (the checkpoint's JSON) and its tensors under the names that the record uses.

    The names are free in a checkpoint and digests in a store; code that reads a task need not care which.
    Build one with :func:`make_task`, which checks it.
    """

    record: Mapping[str, Any]
    tensors: Mapping[str, RawTensor] = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.record["task"])

    @property
    def backbone_model(self) -> str:
        return str(self.record["backbone"]["model"])

    @property
    def backbone_digest(self) -> Digest:
        return Digest(self.record["backbone"]["digest"])

    @property
    def activation(self) -> Activation:
        activation: Activation = self.record["activation"]
        return activation

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.record["labels"])

    @property
    def threshold(self) -> float | None:
        """The probability below which the likeliest class counts as unknown; None where none is stored."""
        threshold = self.record.get("threshold")
        return None if threshold is None else float(threshold)

    @property
    def preprocess(self) -> Mapping[str, Any]:
        preprocess: Mapping[str, Any] = self.record["preprocess"]
        return preprocess

    @property
    def positions(self) -> dict[str, list[Branch]]:
        return {
            position: [Branch(branch_adapter(branch), float(branch[1])) for branch in branches]
            for position, branches in self.record["positions"].items()
        }

    @Kept
    def adapters(self) -> dict[str, Adapter]:
        """Its adapters by name; of a stack, those that some position uses."""
        shapes = self._shapes
        parsed = {name: Adapter.parse(entry, shapes) for name, entry in self.record["adapters"].items()}
        found = {name: adapter for name, adapter in parsed.items() if adapter.stack is None}
        for branch in chain(*self.record["positions"].values()):
            if len(branch) == 3:
                found[branch_adapter(branch)] = parsed[branch[0]].at(branch[2])
        return found

    def entry(self, adapter: str) -> tuple[Mapping[str, Any], int | None]:
        """What the record says of an adapter: of one in a stack what it says of the stack, and the place in it."""
        entries: Mapping[str, Mapping[str, Any]] = self.record["adapters"]
        if adapter in entries:
            return entries[adapter], None
        stack, _, place = adapter.rpartition("#")
        return entries[stack], int(place)

    @Kept
    def head(self) -> Head | None:
        """Its classifier; None: it gives features."""
        return None if self.record["head"] is None else Head.parse(self.record["head"], self._shapes)

    @property
    def _shapes(self) -> Shapes:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    @Kept
    def size_bytes(self) -> int:
        """Tensor bytes, each distinct tensor once."""
        return sum({tensor.digest: tensor.size_bytes for tensor in self.tensors.values()}.values())


def make_task(record: Mapping[str, Any], tensors: Mapping[str, RawTensor], where: str | Path = "task") -> Task:
    """A task from a record and tensors, checked whole.

    Raises:
        CheckpointError: naming `where`, the field, what was expected and what was found.
    """
    try:
        check_json(dict(record))
    except ValueError as error:
        raise CheckpointError(where, f"record: {error}") from None
    return checked_task(record, tensors, where)


def checked_task(
    record: Mapping[str, Any],
    tensors: Mapping[str, RawTensor],
    where: str | Path,
    finite: Container[str] = (),
) -> Task:
    """As :func:`make_task`, of a record that is known to be JSON.

    Args:
        finite: names of tensors that are known to hold no NaN and no infinity.
    """
    try:
        record, tensors = split_tensors(record, tensors)
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None
    check_record(record, {name: (t.dtype, t.shape) for name, t in tensors.items()}, where)
    for name, tensor in tensors.items():
        if name not in finite and tensor.dtype in FLOATS and not _all_finite(tensor):
            raise CheckpointError(where, f"tensor {name!r}: holds NaN or infinity: expected finite values")
    return Task(record, tensors)


class KnownTensors:
    """Tensors that several checkpoints hold, as they were read first: one that equals such a copy byte for byte has its
    digest and needs no hashing. Holds at most 16 MiB."""

    def __init__(self) -> None:
        self._copies: OrderedDict[Digest, tuple[str, tuple[int, ...], bytes]] = OrderedDict()
        self._bytes = 0
        self._seen: set[Digest] = set()

    def prove(self, tensor: RawTensor, digest: Digest) -> bool:
        """Whether a copy of that digest equals the tensor; if so, the tensor takes the digest on."""
        copy = self._copies.get(digest) if isinstance(digest, str) else None
        # two bytes objects compare by memcmp, memory views item by item
        if copy is None or copy[:2] != (tensor.dtype, tensor.shape) or copy[2] != bytes(tensor.data):
            return False
        self._copies.move_to_end(digest)
        tensor.__dict__["digest"] = digest
        return True

    def remember(self, tensor: RawTensor) -> None:
        """Takes a checked tensor's digest down; the second time, a copy of it."""
        if tensor.digest not in self._seen:
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen.add(tensor.digest)
        elif tensor.digest not in self._copies:
            self._copies[tensor.digest] = (tensor.dtype, tensor.shape, bytes(tensor.data))
            self._bytes += tensor.size_bytes
            while self._bytes > _KNOWN_BYTES:
                self._bytes -= len(self._copies.popitem(last=False)[1][2])


_KNOWN_BYTES = 16 * 1024 * 1024
_SEEN = 100_000


class ReadBefore:
    """What was found good in files that were read before. It spares work for the next ones and changes no verdict."""

    def __init__(self) -> None:
        self.headers = KnownHeaders()
        self.tensors = KnownTensors()


def read_checkpoint(path: str | Path, known: ReadBefore | None = None) -> Task:
    """Reads and checks a task checkpoint; `known` is of those read before.

    Raises:
        NotFoundError: no such file.
        CheckpointError: anything in it that is not as docs/checkpoint.md says.
    """
    return task_from_container(*read_container(path, known.headers if known else None), path, known)


def task_from_container(
    metadata: Mapping[str, str],
    tensors: Mapping[str, RawTensor],
    path: str | Path,
    known: ReadBefore | None = None,
) -> Task:
    """The task that a file's metadata and tensors hold; see :func:`read_checkpoint`."""
    if "pear" not in metadata:
        raise CheckpointError(path, "metadata key 'pear' is missing: a safetensors file, but no task checkpoint")
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    try:
        record = parse_json(metadata["pear"])
        is_judged = isinstance(record, dict) and _is_judged(record, shapes)
        check_json({k: v for k, v in record.items() if k not in _STRUCTURE} if is_judged else record)
    except ValueError as error:
        raise CheckpointError(path, f"metadata key 'pear' is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise CheckpointError(path, f"metadata key 'pear': expected an object, found {type(record).__name__}")
    digests = record.pop("digests", None)
    proven: set[str] = set()
    if digests is not None:
        if not isinstance(digests, dict) or set(digests) != set(tensors):
            raise CheckpointError(path, "field 'digests': expected one digest for each tensor")
        for name, tensor in tensors.items():
            if known is not None and known.tensors.prove(tensor, digests[name]):
                proven.add(name)
            elif tensor.digest != digests[name]:
                problem = f"tensor {name!r} is damaged: its bytes do not hash to its digest"
                raise CheckpointError(path, problem, FETCH_AGAIN)
    task = checked_task(record, tensors, path, proven)
    if known is not None:
        for name in tensors.keys() - proven:
            known.tensors.remember(tensors[name])
    return task


def write_checkpoint(path: str | Path, task: Task) -> int:
    """Writes a task checkpoint whole or not at all, with digests; returns the file's bytes.

    Raises:
        DiskFullError: no space left; a file already at `path` is untouched.
        PearStoreError: it cannot be written; likewise.
    """
    path = Path(path)
    record, tensors = join(task.record, task.tensors)
    record = {**record, "digests": {name: tensor.digest for name, tensor in tensors.items()}}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    temporary = path.parent / f".{fresh_name()}.tmp"
    try:
        with open(temporary, "wb") as file:
            for chunk in container_chunks(tensors, {"pear": text}):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise from_os_error(error, path, "cannot be written") from None
    return size


MOST_OF_LABEL = 60


def shown_label(label: str) -> str:
    """A label as tables and lines show it: cut where it would fill them. JSON and files have it whole."""
    return label if len(label) <= MOST_OF_LABEL else f"{label[: MOST_OF_LABEL - 1]}…"


def natural_key(position: str) -> list[tuple[int, str]]:
    """Sort key that puts blocks.2 before blocks.10, and words before numbers."""
    parts = ((part, part.lstrip("0")) for part in position.split("."))
    return [(len(number), number) if part.isascii() and part.isdigit() else (0, part) for part, number in parts]


def check_record(
    record: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]], where: str | Path
) -> None:
    """Checks a record against the dtypes and shapes of its tensors.

    Raises:
        CheckpointError: see :func:`make_task`.
    """
    try:
        record, tensors = split_shapes(record, tensors)
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None
    for problem in _problems(record, tensors):
        raise CheckpointError(where, problem)


def check_format(record: Mapping[str, Any]) -> None:
    """Raises a ValueError for a record of a format that this version does not know."""
    if record.get("format") not in FORMATS:
        expected = f"{', '.join(map(repr, FORMATS[:-1]))} or {FORMATS[-1]!r}"
        raise ValueError(f"field 'format': expected {expected}, found {short(record.get('format'))}")


def _problems(record: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[str]:
    """What is wrong with a record, first things first; a caller stops at the first."""
    try:
        check_format(record)
    except ValueError as error:
        yield str(error)
    for key in _REQUIRED:
        if key not in record:
            yield f"field {key!r} is missing"
    if not (isinstance(record["task"], str) and TASK_NAME.fullmatch(record["task"])):
        yield (
            f"field 'task': {short(record['task'])}: expected a letter or digit, then up to 99 letters, digits, "
            "'.', '_' or '-'"
        )
    backbone = record["backbone"]
    if not (isinstance(backbone, dict) and isinstance(backbone.get("model"), str)) or not is_digest(
        backbone.get("digest")
    ):
        yield "field 'backbone': expected a model name and a digest 'sha256:' + 64 hex digits"
    yield from _name_problems("field 'backbone'", [backbone["model"]])
    for key in ("metrics", "training"):
        if not isinstance(record[key], dict):
            yield f"field {key!r}: expected an object"
    yield from _name_problems("field 'metrics'", record["metrics"])
    if "threshold" in record and not (_is_number(record["threshold"]) and 0 <= record["threshold"] <= 1):
        yield f"field 'threshold': expected a number from 0 to 1, found {short(record['threshold'])}"
    structure = _structure_key(record, tensors)
    if structure is None:
        yield from _structure_problems(record, tensors)
        named = frozenset(tensor_names({**record, "head": None}))
    else:
        try:
            named = _good_structure(structure)
        except ValueError as error:
            yield str(error)
    if record["format"] == FORMAT and any("stack" in entry for entry in record["adapters"].values()):
        yield f"field 'adapters': a stack: expected format {STACKED_FORMAT!r}, found {FORMAT!r}"
    yield from _head_problems(record["head"], record["labels"], tensors)
    head = record["head"]
    if unnamed := tensors.keys() - named - {name for _, name in entry_names(head or {}, HEAD_PARTS)}:
        yield f"tensor {short(min(unnamed))}: nothing in the record names it"


def _name_problems(where: str, names: Iterable[Any]) -> Iterator[str]:
    for name in names:
        if not isinstance(name, str) or len(name) > _MAX_NAME or CONTROL.search(name):
            expected = f"at most {_MAX_NAME} characters, none of them a control character"
            yield f"{where}: name {short(name)}: expected {expected}"


_STRUCTURE = ("activation", "adapters", "positions", "preprocess")
_MAX_STRUCTURE_BYTES = 1 << 16


def _structure_key(record: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes | None:
    """The structure of a record and the shapes of its tensors as bytes: equal ones are equally good. None where they
    are not of Python's own types, nested too deeply, or more than is worth keeping."""
    with suppress(ValueError):
        found = marshal.dumps((*map(record.get, _STRUCTURE), dict(tensors)), 2)  # 2: references would differ by run
        return found if len(found) <= _MAX_STRUCTURE_BYTES else None
    return None


def _is_judged(record: Mapping[str, Any], tensors: Shapes) -> bool:
    """Whether the structure of a file's record was found good. Nothing of the record needs to be good JSON yet."""
    with suppress(ValueError, RecursionError):
        structure = _structure_key(*split_shapes(record, tensors))
        if structure is not None:
            _good_structure(structure)
            return True
    return False


@lru_cache(64)
def _good_structure(structure: bytes) -> frozenset[str]:
    """The tensors that a structure names, if it is JSON and nothing is wrong with it; else a ValueError.

    It is the same for all tasks of one kind. At most 64 good ones are kept, each of at most 64 KiB.
    """
    *parts, tensors = marshal.loads(structure)
    record = dict(zip(_STRUCTURE, parts, strict=True))
    check_json(record)
    for problem in _structure_problems(record, tensors):
        raise ValueError(problem)
    return frozenset(tensor_names({**record, "head": None}))


def _structure_problems(record: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[str]:
    if record["activation"] not in ACTIVATIONS:
        yield f"field 'activation': expected one of {', '.join(ACTIVATIONS)}, found {short(record['activation'])}"
    adapters: dict[str, Adapter] = {}
    if not isinstance(record["adapters"], dict):
        yield "field 'adapters': expected an object"
    yield from _name_problems("field 'adapters'", record["adapters"])
    for name, entry in record["adapters"].items():
        try:
            adapters[name] = Adapter.parse(entry, tensors)
        except ValueError as error:
            yield f"field 'adapters', {short(name)}: {error}"
    if any(adapter.stack for adapter in adapters.values()) and (odd := [name for name in adapters if "#" in name]):
        yield f"field 'adapters', {short(odd[0])}: expected no '#' in names beside a stack"
    yield from _position_problems(record["positions"], adapters)
    yield from _preprocess_problems(record["preprocess"])


def _position_problems(positions: Any, adapters: Mapping[str, Adapter]) -> Iterator[str]:
    if not isinstance(positions, dict):
        yield "field 'positions': expected an object"
    yield from _name_problems("field 'positions'", positions)
    for position, branches in positions.items():
        field_name = f"field 'positions', {short(position)}"
        if not (isinstance(branches, list) and branches):
            yield f"{field_name}: names no adapter: expected a list of [adapter, scale]"
        widths = set()
        for branch in branches:
            if not (isinstance(branch, list) and len(branch) in (2, 3) and isinstance(branch[0], str)):
                yield f"{field_name}: {short(branch)}: expected [adapter, scale], or [adapter, scale, place in a stack]"
            if branch[0] not in adapters:
                yield f"{field_name}: names adapter {short(branch[0])}, which field 'adapters' lacks"
            if not _is_number(branch[1]):
                yield f"{field_name}: scale {short(branch[1])}: expected a finite number"
            if problem := _place_problem(branch, adapters[branch[0]].stack):
                yield f"{field_name}: {short(branch)}: {problem}"
            widths.add(adapters[branch[0]].shape)
        if len(widths) > 1:
            yield f"{field_name}: adapters of different widths {sorted(widths)}: expected one d_in and d_out"


def _place_problem(branch: list[Any], stack: int | None) -> str | None:
    """What is wrong with a branch's place in a stack."""
    if stack is None:
        return None if len(branch) == 2 else "this adapter is no stack: expected [adapter, scale]"
    if len(branch) == 3 and type(branch[2]) is int and 0 <= branch[2] < stack:
        return None
    return f"a stack of {stack}: expected [adapter, scale, place in the stack]"


def _head_problems(head: Any, labels: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[str]:
    if not (isinstance(labels, list) and all(isinstance(x, str) and not CONTROL.search(x) for x in labels)):
        yield "field 'labels': expected a list of texts without control characters"
    if head is None:
        if labels:
            yield f"field 'labels': {len(labels)} labels without a head: expected none"
        return
    try:
        classes = Head.parse(head, tensors).weight.shape[0]
    except ValueError as error:
        yield f"field 'head': {error}"
        return
    if len(labels) != classes:
        found = f"{counted(len(labels), 'label')}, the head has {counted(classes, 'row')}"
        yield f"field 'labels': {found}: expected one label a row"


def _preprocess_problems(preprocess: Any) -> Iterator[str]:
    if not isinstance(preprocess, dict):
        yield "field 'preprocess': expected an object"
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "input_size": (lambda v: is_sizes(v, 3) and v[0] == 3 and max(v) <= 16384, "[3, height, width]"),
        "mean": (lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_number, v)), "3 numbers"),
        "std": (
            lambda v: isinstance(v, list) and len(v) == 3 and all(_is_number(x) and x >= 1e-6 for x in v),
            "3 numbers above 0",
        ),
        "interpolation": (lambda v: v in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
        "crop_pct": (lambda v: _is_number(v) and 0.05 <= v <= 4, "a number from 0.05 to 4"),
        "crop_mode": (lambda v: v in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
    }
    for key, (good, expected) in checks.items():
        if key not in preprocess or not good(preprocess[key]):
            yield f"field 'preprocess', {key!r}: expected {expected}, found {short(preprocess.get(key))}"
    reading = preprocess.get("reading", 0)  # which of these rules it knows is the router's to say
    if type(reading) is not int or reading < 0:
        yield f"field 'preprocess', 'reading': expected an integer of at least 0, found {short(reading)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _all_finite(tensor: RawTensor) -> bool:
    """Whether no element is NaN or infinite: those have all exponent bits set.

    Looks at the elements' high bytes first, which almost never come close; without numpy, whose import would take
    longer than all else that adding a task does.
    """
    size = ITEM_BYTES[tensor.dtype]
    data = bytes(tensor.data)
    mask, low = {"F32": (0x7F, 0x80), "BF16": (0x7F, 0x80), "F16": (0x7C, 0x00)}[tensor.dtype]
    high = data[size - 1 :: size]
    suspects = (0x7F, 0xFF) if low else (0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF)
    if not any(byte in high for byte in suspects):
        return True
    return not any(a & mask == mask and b & low == low for a, b in zip(high, data[size - 2 :: size], strict=True))
