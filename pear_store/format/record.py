"""What a task's record says of its adapters and its head, parsed and judged once (docs/checkpoint.md).

Another kind of adapter is another part of `Adapter`, and what :meth:`Adapter.parse` accepts: everything else (names of
tensors, keys by which tensors are shared, shapes, bytes) follows from an adapter's matrices.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from pear_store.format.digest import ITEM_BYTES, RawTensor

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of each tensor, by name"""
Part = Literal["down", "up", "basis", "weight"]
"""A matrix of an adapter or of a head, as records call it"""
FLOATS = ("F32", "F16", "BF16")
PARTS = ("down", "up", "basis")
"""Of an adapter: what of it names tensors."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix as a record names it: one tensor, or codes with a scale for each index of the rank axis.

    Args:
        name: of its tensor, float [rows, columns] or U8 codes.
        shape: (rows, columns) of the matrix itself.
        rank_axis: along which scales lie: 1 for `down`, 0 for all others.
        bits: of a code; None: no codes.
        scale: name of the scales' tensor, float [shape[rank_axis]].
        place: which of them it is, where its tensors are stacks of matrices along another first axis.
    """

    name: str
    shape: tuple[int, int]
    rank_axis: int
    bits: int | None = None
    scale: str | None = None
    place: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.scale is None else (self.name, self.scale)

    def key(self, tensors: Mapping[str, RawTensor]) -> str:
        """Equal for matrices of equal values, by digests: what slots are shared by."""
        digest = str(tensors[self.name].digest)
        if self.scale is not None:
            digest = f"{digest} {tensors[self.scale].digest} {self.bits} {list(self.shape)}"
        return digest if self.place is None else f"{digest} at {self.place}"

    def tensor(self, tensors: Mapping[str, RawTensor]) -> RawTensor:
        """What holds its numbers or codes, and nothing else."""
        return _at_place(tensors[self.name], self.place)

    def scales(self, tensors: Mapping[str, RawTensor]) -> RawTensor | None:
        return None if self.scale is None else _at_place(tensors[self.scale], self.place)


@dataclass(frozen=True, slots=True)
class Adapter:
    """`down` [d_in, r] and `up` [r, d_out], or with a core: `down` [d_in, r], `core` [r, s] and `up` [s, d_out].

    `up` is what reaches d_out: where there is a core, the record calls that `basis`, and the core `up`.
    """

    down: Matrix
    up: Matrix
    core: Matrix | None = None
    role: str | None = None
    stack: int | None = None
    """How many adapters this is: its tensors have so many along another first axis."""

    @classmethod
    def parse(cls, entry: Any, tensors: Shapes) -> "Adapter":
        """An adapter whose shapes chain, or a stack of such.

        Raises:
            ValueError: anything else; says what was expected and found.
        """
        if not (isinstance(entry, dict) and {"down", "up"} <= set(entry)):
            raise ValueError("expected the tensor names 'down' and 'up'")
        stack = entry.get("stack")
        if stack is not None:
            tensors = _without_stack(entry, stack, tensors)
        outer: Part = "basis" if "basis" in entry else "up"
        down = _matrix("down", entry, tensors, rank_axis=1)
        up = _matrix(outer, entry, tensors)
        core = _matrix("up", entry, tensors) if outer == "basis" else None
        shapes = [one.shape for one in (down, core, up) if one is not None]
        if any(a[1] != b[0] for a, b in pairwise(shapes)):
            found, expected = f"down {list(down.shape)} and up {list(up.shape)}", "[d_in, r] and [r, d_out]"
            if core is not None:
                found = f"down {list(down.shape)}, up {list(core.shape)} and basis {list(up.shape)}"
                expected = "[d_in, r], [r, s] and [s, d_out]"
            raise ValueError(f"{found} do not chain: expected {expected}")
        role = entry.get("role")
        return cls(down, up, core, role if isinstance(role, str) else None, stack)

    def at(self, place: int) -> "Adapter":
        """One of a stack."""
        down, up = replace(self.down, place=place), replace(self.up, place=place)
        core = None if self.core is None else replace(self.core, place=place)
        return Adapter(down, up, core, self.role)

    @property
    def matrices(self) -> Iterator[Matrix]:
        yield self.down
        if self.core is not None:
            yield self.core
        yield self.up

    @property
    def parts(self) -> dict[Part, Matrix]:
        """Its matrices as its record calls them."""
        if self.core is None:
            return {"down": self.down, "up": self.up}
        return {"down": self.down, "basis": self.up, "up": self.core}

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return self.down.shape[0], self.up.shape[1]

    @property
    def rank(self) -> int:
        """The rank of the product as it runs: of `down`."""
        return self.down.shape[1]

    def keys(self, tensors: Mapping[str, RawTensor]) -> tuple[str, str]:
        """Of what is multiplied: `down`, and `up` with the core before it."""
        up = self.up.key(tensors)
        return self.down.key(tensors), up if self.core is None else f"{self.core.key(tensors)} @ {up}"


def _without_stack(entry: Mapping[str, Any], stack: Any, tensors: Shapes) -> Shapes:
    """The shapes of one of a stack's adapters; else a ValueError."""
    if type(stack) is not int or not 0 < stack < 2**31:
        raise ValueError(f"field 'stack': expected a count of adapters, found {short(stack)}")
    quant = entry.get("quant", {})
    forms = [quant[part] for part in PARTS if part in quant] if isinstance(quant, dict) else [None]
    if not all(isinstance(form, dict) and isinstance(form.get("scale"), str) for form in forms):
        raise ValueError(f"field 'quant': expected forms that name a 'scale', found {short(quant)}")
    found = {}
    for use, name in entry_names(entry):
        shape = tensor_shape(name, tensors, ITEM_BYTES)
        if shape[:1] != (stack,):
            raise ValueError(f"{use} {list(shape)}: expected a stack of {stack}")
        found[name] = tensors[name][0], shape[1:]
    return found


def _at_place(tensor: RawTensor, place: int | None) -> RawTensor:
    """One of a stack, on the stack's own memory."""
    if place is None:
        return tensor
    size = tensor.size_bytes // tensor.shape[0]
    return RawTensor(tensor.dtype, tensor.shape[1:], memoryview(tensor.data)[place * size : (place + 1) * size])


@dataclass(frozen=True, slots=True)
class Head:
    """A linear classifier: weight [classes, features] and bias [classes]."""

    weight: Matrix
    bias: str

    @classmethod
    def parse(cls, entry: Any, tensors: Shapes) -> "Head":
        """A head whose shapes agree.

        Raises:
            ValueError: anything else; says what was expected and found.
        """
        if not (isinstance(entry, dict) and {"weight", "bias"} <= set(entry)):
            raise ValueError("expected null or the tensor names 'weight' and 'bias'")
        weight = _matrix("weight", entry, tensors)
        bias = tensor_shape(entry["bias"], tensors, FLOATS)
        if bias != weight.shape[:1]:
            raise ValueError(f"weight {list(weight.shape)} and bias {list(bias)}: expected [classes, d] and [classes]")
        return cls(weight, entry["bias"])

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.weight.names, self.bias)

    def key(self, tensors: Mapping[str, RawTensor]) -> str:
        return " ".join(str(tensors[name].digest) for name in (self.weight.name, self.bias, *self.weight.names[1:]))


def _matrix(part: Part, entry: Mapping[str, Any], tensors: Shapes, rank_axis: int = 0) -> Matrix:
    """One matrix of an adapter's or a head's entry; else a ValueError."""
    stored = entry[part]
    if "quant" not in entry or ("basis" in entry and isinstance(entry["quant"], dict) and part not in entry["quant"]):
        shape = tensor_shape(stored, tensors, FLOATS)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{part} {list(shape)}: expected {_AXES[part]}")
        return Matrix(stored, (shape[0], shape[1]), rank_axis)
    quant = entry["quant"]
    bits = _bits(quant, part)
    form = quant.get(part)
    if not (isinstance(form, dict) and is_sizes(form.get("shape"), 2)):
        raise ValueError(f"field 'quant': expected 'shape' and 'scale' for {part!r}")
    bits = _bits(form, part) if "bits" in form else bits
    rows, columns = form["shape"]
    packed_bytes = (math.prod((rows, columns)) * bits + 7) // 8
    if (found := tensor_shape(stored, tensors, ("U8",))) != (packed_bytes,):
        raise ValueError(f"{part}: {bits}-bit {[rows, columns]} is U8 [{packed_bytes}], found {list(found)}")
    scales = (rows, columns)[rank_axis]
    if (found := tensor_shape(form.get("scale"), tensors, FLOATS)) != (scales,):
        raise ValueError(f"scale of {part}: expected [{scales}], found {list(found)}")
    return Matrix(stored, (rows, columns), rank_axis, bits, form["scale"])


def _bits(quant: Any, part: Part) -> int:
    """Bits of a code, as `quant` or a form in it says; else a ValueError."""
    allowed = (2, 4, 8) if part == "weight" else (1, 2, 4, 8)
    if not (isinstance(quant, dict) and type(quant.get("bits")) is int and quant["bits"] in allowed):
        raise ValueError(f"field 'quant': expected 'bits' {' or '.join(map(str, allowed))}")
    bits: int = quant["bits"]
    return bits


_AXES: dict[Part, str] = {
    "down": "[d_in, r]",
    "up": "[r, d_out], or [r, s] before a basis",
    "basis": "[s, d_out]",
    "weight": "[classes, d] and [classes] of its bias",
}


def tensor_shape(name: Any, tensors: Shapes, dtypes: Collection[str]) -> tuple[int, ...]:
    """The shape of a tensor that a record names.

    Raises:
        ValueError: there is none of that name, or it is of another dtype.
    """
    if not isinstance(name, str) or name not in tensors:
        raise ValueError(f"names tensor {short(name)}, which the file lacks")
    dtype, shape = tensors[name]
    if dtype not in dtypes:
        raise ValueError(f"tensor {short(name)} is {dtype}: expected {' or '.join(dtypes)}")
    return shape


def is_sizes(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31 for n in value)
    )


def short(value: Any) -> str:
    """A value in a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- names of tensors, of records that need no tensors at hand ------------------------------------------------------


def _forms(entry: Mapping[str, Any], parts: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Those parts of an adapter or a head that are codes, and their forms in `quant`. No other form was judged."""
    for part in parts if "quant" in entry else ():
        if part != "bias" and part in entry and part in entry["quant"]:
            yield part, entry["quant"][part]


def entry_names(entry: Mapping[str, Any], parts: tuple[str, ...] = PARTS) -> Iterator[tuple[str, str]]:
    """What an adapter's (or with other parts a head's) entry names: use (``down``, ``down.scale``) and tensor."""
    for part in parts:
        if part in entry:
            yield part, entry[part]
    for part, form in _forms(entry, parts):
        yield f"{part}.scale", form["scale"]


def with_matrices(entry: Mapping[str, Any], matrices: Mapping[Part, Matrix]) -> dict[str, Any]:
    """An entry whose parts are these matrices, or stacks of them. Nothing else is touched, unknown keys included."""
    made = {key: value for key, value in entry.items() if key != "quant"}
    made |= {part: matrix.name for part, matrix in matrices.items()}
    coded = {part: matrix for part, matrix in matrices.items() if matrix.bits is not None}
    if coded:
        bits = next(iter(coded.values())).bits
        forms = {
            part: {"shape": list(one.shape), "scale": one.scale, **({} if one.bits == bits else {"bits": one.bits})}
            for part, one in coded.items()
        }
        made["quant"] = {"bits": bits, **forms}
    return made


HEAD_PARTS = ("weight", "bias")


def with_names(entry: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """An entry that names these tensors, by use. Nothing else is touched, unknown keys included."""
    made = {**entry, **{use: name for use, name in names.items() if "." not in use}}
    scales = {use.partition(".")[0]: name for use, name in names.items() if "." in use}
    if scales:
        forms = {part: {**entry["quant"][part], "scale": name} for part, name in scales.items()}
        made["quant"] = {**entry["quant"], **forms}
    return made


def renamed(entry: Mapping[str, Any], rename: Callable[[str], str], parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """An entry with every tensor name replaced."""
    return with_names(entry, {use: rename(name) for use, name in entry_names(entry, parts)})


def with_core(entry: Mapping[str, Any], core: str, codes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An adapter's entry with a core of that tensor's name before what was its `up`.

    Args:
        codes: of a core that is codes: `bits`, `shape` and `scale`.
    """
    made = {**entry, "up": core, "basis": entry["up"]}
    if "quant" in entry:
        made["quant"] = {**entry["quant"], "basis": entry["quant"]["up"]}
        del made["quant"]["up"]
    if codes is not None:
        quant = made.get("quant", {"bits": codes["bits"]})
        form = {key: value for key, value in codes.items() if key != "bits" or value != quant["bits"]}
        made["quant"] = {**quant, "up": form}
    return made


def without_core(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of the adapter whose core another's has before its `up`."""
    made = {**entry, "up": entry["basis"]}
    del made["basis"]
    if "quant" in entry:
        quant = {key: value for key, value in entry["quant"].items() if key not in ("up", "basis")}
        if "basis" in entry["quant"]:
            quant["up"] = entry["quant"]["basis"]
        made["quant"] = quant
        if "down" not in quant and "up" not in quant:  # the core alone was codes
            del made["quant"]
    return made


def map_tensor_names(record: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """The record with every tensor name replaced."""
    adapters = {name: renamed(entry, rename) for name, entry in record["adapters"].items()}
    head = record["head"]
    return {**record, "adapters": adapters, "head": head and renamed(head, rename, HEAD_PARTS)}


def tensor_names(record: Mapping[str, Any]) -> set[str]:
    """Every tensor name that a record uses."""
    names = {name for entry in record["adapters"].values() for _, name in entry_names(entry)}
    if (head := record["head"]) is not None:
        names.update(name for _, name in entry_names(head, HEAD_PARTS))
    return names


def names_around_cores(record: Mapping[str, Any]) -> set[str]:
    """The names of what lies before and behind cores. Of tasks on common bases, these are the bases."""
    cored = [entry for entry in record["adapters"].values() if "basis" in entry]
    return {name for entry in cored for use, name in entry_names(entry) if use.partition(".")[0] != "up"}
