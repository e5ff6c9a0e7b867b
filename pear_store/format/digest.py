"""Tensors as bytes, and their digests (docs/formats.md)."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Generic, NewType, TypeVar

Digest = NewType("Digest", str)
T = TypeVar("T")


class Kept(Generic[T]):
    """A property that is computed once for each object.

    Before Python 3.12, functools.cached_property has one lock for all objects of a class. If a process forks while
    another thread computes such a property, the child waits for that lock for ever.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if instance is None:
            raise AttributeError(self._name)
        value: T = self._compute(instance)
        instance.__dict__[self._name] = value
        return value


ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
"""The dtypes that a store holds, by safetensors' names, and the bytes of one element"""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def fresh_name() -> str:
    """32 random hex digits. No two results are alike."""
    return os.urandom(16).hex()


def is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def to_digest(raw: bytes) -> Digest:
    """A 32-byte hash as a digest: ``sha256:`` and 64 hex digits."""
    return Digest("sha256:" + raw.hex())


def to_digests(raw: bytes) -> list[Digest]:
    """Hashes of 32 bytes, one after another, as digests."""
    text = raw.hex()
    return [Digest("sha256:" + text[start : start + 64]) for start in range(0, len(text), 64)]


def from_digest(digest: Digest) -> bytes:
    """The 32-byte hash of a digest."""
    return bytes.fromhex(digest[7:])


def tensor_digest(dtype: str, shape: Iterable[int], data: bytes | bytearray | memoryview) -> Digest:
    """The digest of a tensor: sha256 over ``"{dtype} {d0},{d1}\\n"`` (ASCII), then the data.

    Args:
        dtype: "F32", "F16", "BF16", "I8" or "U8".
        shape: the tensor's sizes. Empty for a scalar.
        data: the elements, row-major and little-endian.

    Returns:
        ``sha256:`` and 64 hex digits.
    """
    return to_digest(raw_digest(dtype, tuple(shape), data))


def raw_digest(dtype: str, shape: tuple[int, ...], data: bytes | bytearray | memoryview) -> bytes:
    """The 32 bytes of :func:`tensor_digest`."""
    state = begin_digest(dtype, shape)
    state.update(data)
    return state.digest()


def begin_digest(dtype: str, shape: tuple[int, ...]) -> "hashlib._Hash":
    """A hash that has taken dtype and shape. The caller updates it with the tensor's bytes."""
    return _started(dtype, shape).copy()


@lru_cache(256)
def _started(dtype: str, shape: tuple[int, ...]) -> "hashlib._Hash":
    return hashlib.sha256(f"{dtype} {','.join(map(str, shape))}\n".encode("ascii"))


@dataclass(frozen=True)
class RawTensor:
    """A tensor as bytes.

    Args:
        dtype: "F32", "F16", "BF16", "I8" or "U8".
        shape: its sizes. Empty for a scalar.
        data: the elements, row-major and little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @Kept
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @Kept
    def digest(self) -> Digest:
        """See :func:`tensor_digest`."""
        return tensor_digest(self.dtype, self.shape, self.data)

    @classmethod
    def unchecked(
        cls, dtype: str, shape: tuple[int, ...], data: bytes | bytearray | memoryview, size_bytes: int
    ) -> "RawTensor":
        """A tensor whose size is known. Three times faster than the constructor."""
        made = object.__new__(cls)
        made.__dict__.update(dtype=dtype, shape=shape, data=data, size_bytes=size_bytes)
        return made

    @classmethod
    def checked(
        cls, dtype: str, shape: tuple[int, ...], data: bytes | bytearray | memoryview, digest: Digest
    ) -> "RawTensor":
        """A tensor whose digest is known: no hash is computed."""
        made = object.__new__(cls)
        made.__dict__.update(dtype=dtype, shape=shape, data=data, digest=digest)
        return made
