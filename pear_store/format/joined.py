"""The small tensors of a task as one tensor, in files and stores (docs/checkpoint.md, "Slices").

A tensor costs a store about 300 bytes of names, digests and rows, however small it is. In a record of the format
`JOINED_FORMAT`, `slices` of an adapter or of the head say which parts of a tensor of bytes its tensors are. Whoever
reads such a record takes it apart at once. So a task in memory has its tensors by themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pear_store.format.digest import ITEM_BYTES, RawTensor
from pear_store.format.record import HEAD_PARTS, PARTS, Shapes, entry_names, names_around_cores, short, with_names

JOINED_FORMAT = "pear-task/3"
_MOST_BYTES = 1 << 16
"""A larger tensor stays by itself: there, 300 bytes are little, and versions that have it in common keep it once."""
_MOST_AXES = 8

_Record = Mapping[str, Any]
_Tensors = Mapping[str, RawTensor]


@dataclass(frozen=True, order=True, slots=True)
class Slice:
    """A tensor that lies in another one's bytes, from `begin` on."""

    tensor: str
    begin: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.begin + prod(self.shape) * ITEM_BYTES[self.dtype]


# ---- to a file or a store -------------------------------------------------------------------------------------------


def join(record: _Record, tensors: _Tensors) -> tuple[_Record, _Tensors]:
    """A record and its tensors as a file or a store has them: of `JOINED_FORMAT`, the small ones as one.

    Equal tasks give equal results, whatever their tensors are called. Bases stay by themselves, because other tasks
    have them, too. What is joined already stays as it is.
    """
    if record["format"] != JOINED_FORMAT or _is_joined(record):
        return record, tensors
    small = _small_ones(record, tensors)
    if not small:
        return record, tensors
    begins, data = _laid_out(small)
    whole = RawTensor("U8", (len(data),), data)
    stay = {name: tensor for name, tensor in tensors.items() if name not in small}
    if whole.digest in {tensor.digest for tensor in stay.values()}:
        return record, tensors  # a store names tensors by digest, and could not tell the two apart
    own = "own"
    while own in stay:
        own += "_"

    def joined(_: str, entry: _Record, parts: tuple[str, ...]) -> _Record:
        uses = {use: name for use, name in entry_names(entry, parts) if name in small}
        slices = {use: [small[name].dtype, list(small[name].shape), begins[name]] for use, name in uses.items()}
        return {**with_names(entry, dict.fromkeys(uses, own)), "slices": slices} if uses else entry

    return _with_each(record, joined), {**stay, own: whole}


def _is_joined(record: _Record) -> bool:
    return any("slices" in entry for entry in (*record["adapters"].values(), record["head"] or {}))


def _small_ones(record: _Record, tensors: _Tensors) -> dict[str, RawTensor]:
    """The tensors to be joined, in the order in which a record with sorted names uses them."""
    names = [name for _, entry in sorted(record["adapters"].items()) for _, name in entry_names(entry)]
    names += [name for _, name in entry_names(record["head"] or {}, HEAD_PARTS)]
    small = {name: tensors[name] for name in names if tensors[name].size_bytes <= _MOST_BYTES}
    bases = {tensors[name].digest for name in names_around_cores(record)}  # by digest, as a store names them
    return {name: tensor for name, tensor in small.items() if tensor.digest not in bases}


def _laid_out(tensors: _Tensors) -> tuple[dict[str, int], bytes]:
    """Where each begins, and the bytes of all. Equal ones lie there once. Wide numbers come first, to be aligned."""
    places: dict[tuple[str, tuple[int, ...], bytes], int] = {}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name].dtype]):
        tensor = tensors[name]
        begins[name] = places.setdefault((tensor.dtype, tensor.shape, bytes(tensor.data)), end)
        end = max(end, begins[name] + tensor.size_bytes)
    return begins, b"".join(data for _, _, data in places)


# ---- from a file or a store -----------------------------------------------------------------------------------------


def split(record: _Record, tensors: Shapes) -> tuple[_Record, dict[str, Slice]]:
    """The record of a task whose tensors are by themselves, and those of them that lie in others, under new names.

    The record no longer names the tensors in which they lie. What else is wrong with it is not judged.

    Raises:
        ValueError: a slice is not as docs/checkpoint.md says.
    """
    if record.get("format") != JOINED_FORMAT:
        return record, {}
    found: dict[str, Slice] = {}
    taken = {*tensors, *_texts(record.get("adapters")), *_texts(record.get("head"))}

    def apart(where: str, entry: _Record, parts: tuple[str, ...]) -> _Record:
        if "slices" not in entry:
            return entry
        uses, slices = _uses(where, entry, parts), entry["slices"]
        if not (isinstance(slices, dict) and slices.keys() <= uses.keys()):
            raise ValueError(f"field 'slices' of {short(where)}: expected some of {', '.join(uses)}")
        names = {}
        for use, value in slices.items():
            one = _slice(f"slice {short(f'{where}.{use}')}", uses[use], value, tensors)
            names[use] = f"{where}.{use}"
            while names[use] in taken:
                names[use] += "_"
            taken.add(names[use])
            found[names[use]] = one
        return {key: value for key, value in with_names(entry, names).items() if key != "slices"}

    record = _with_each(record, apart)
    _check_whole(found, tensors)
    return record, found


def split_shapes(record: _Record, tensors: Shapes) -> tuple[_Record, Shapes]:
    """See :func:`split`."""
    record, found = split(record, tensors)
    return record, {**_outside(found, tensors), **{name: (one.dtype, one.shape) for name, one in found.items()}}


def split_tensors(record: _Record, tensors: _Tensors) -> tuple[_Record, _Tensors]:
    """See :func:`split`. The tensors are views of those in which they lie."""
    record, found = split(record, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    views = {
        name: RawTensor(one.dtype, one.shape, memoryview(tensors[one.tensor].data)[one.begin : one.end])
        for name, one in found.items()
    }
    return record, {**_outside(found, tensors), **views} if found else tensors


def _outside(found: Mapping[str, Slice], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors in which no other lies."""
    inside = {one.tensor for one in found.values()}
    return {name: value for name, value in tensors.items() if name not in inside}


def _texts(value: Any) -> Iterator[str]:
    """All texts in the entries of a record: what it may name as a tensor, even if the file lacks that."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)


def _uses(where: str, entry: _Record, parts: tuple[str, ...]) -> dict[str, Any]:
    try:
        return dict(entry_names(entry, parts))
    except (KeyError, TypeError):
        raise ValueError(f"field 'quant' of {short(where)}: expected forms that name a 'scale'") from None


def _slice(what: str, name: Any, value: Any, tensors: Shapes) -> Slice:
    if not (isinstance(value, list) and len(value) == 3):
        raise ValueError(f"{what}: expected [dtype, sizes, first byte], found {short(value)}")
    dtype, sizes, begin = value
    if not (isinstance(dtype, str) and dtype in ITEM_BYTES):
        raise ValueError(f"{what}: expected a dtype of {', '.join(ITEM_BYTES)}, found {short(dtype)}")
    if not (
        isinstance(sizes, list)
        and len(sizes) <= _MOST_AXES
        and all(type(size) is int and 0 < size < 2**31 for size in sizes)
    ):
        raise ValueError(f"{what}: expected at most {_MOST_AXES} sizes above 0, found {short(sizes)}")
    if not (isinstance(name, str) and name in tensors):
        raise ValueError(f"{what}: names tensor {short(name)}, which the file lacks")
    found, shape = tensors[name]
    if found != "U8" or len(shape) != 1:
        raise ValueError(f"{what}: tensor {short(name)}: expected U8 of one axis, found {found} {list(shape)}")
    one = Slice(name, begin if type(begin) is int else -1, dtype, tuple(sizes))
    if not 0 <= one.begin < one.end <= shape[0]:
        raise ValueError(f"{what}: [{dtype}, {sizes}, {short(begin)}] is not in the {shape[0]} bytes of {short(name)}")
    return one


def _check_whole(found: Mapping[str, Slice], tensors: Shapes) -> None:
    """Slices leave no bytes of a tensor out, and overlap only if they are equal."""
    ends: dict[str, int] = {}
    for one in sorted(set(found.values())):
        if one.begin != ends.get(one.tensor, 0):
            raise ValueError(f"tensor {short(one.tensor)}: its slices overlap, or leave bytes out, at {one.begin}")
        ends[one.tensor] = one.end
    for name, end in ends.items():
        if (size := tensors[name][1][0]) != end:
            raise ValueError(f"tensor {short(name)}: its slices end at {end}: expected {size}")


def _with_each(record: _Record, change: Callable[[str, _Record, tuple[str, ...]], _Record]) -> _Record:
    """The record with every entry that names tensors changed: of adapters, and of the head. None other is judged."""
    made, adapters, head = dict(record), record.get("adapters"), record.get("head")
    if isinstance(adapters, dict):
        made["adapters"] = {
            name: change(name, entry, PARTS) if isinstance(entry, dict) else entry for name, entry in adapters.items()
        }
    if isinstance(head, dict):
        made["head"] = change("head", head, HEAD_PARTS)
    return made
