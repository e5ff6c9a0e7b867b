"""The tables of the index. Their methods take and return names and rows, where a view has keys and bytes.

`rows` and `every` both walk a table. Only `every` notices rows that a damaged page hides, and raises a DamagedError.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NewType, Protocol

from pear_store.errors import DamagedError
from pear_store.format.digest import Digest, from_digest, to_digest
from pear_store.local.rows import (
    ContentsRow,
    ManifestRow,
    NameRow,
    PackRow,
    RemovedRow,
    TagRow,
    TensorRow,
    VersionRow,
    name_key,
    parse_tag_key,
    parse_version_key,
    tag_key,
    version_key,
)

StoredTensor = NewType("StoredTensor", bytes)
"""A tensor's row as the index has it, encoded. A manifest's row contains the rows of its tensors."""


class Bytes(Protocol):
    """What tables need of a view: rows as bytes, by table and key."""

    def get(self, table: str, key: bytes) -> bytes | None: ...
    def put(self, table: str, key: bytes, value: bytes) -> None: ...
    def delete(self, table: str, key: bytes) -> None: ...
    def count(self, table: str) -> int: ...
    def rows(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]: ...
    def every(self, table: str) -> Iterator[tuple[bytes, bytes]]: ...
    def last(self, table: str, prefix: bytes) -> tuple[bytes, bytes] | None: ...
    def next(self, table: str, key: bytes) -> tuple[bytes, bytes] | None: ...
    def delete_where(self, table: str, dead: Callable[[bytes, bytes], bool]) -> None: ...


class _Table:
    __slots__ = ("_view",)
    name: str

    def __init__(self, view: Bytes) -> None:
        self._view = view

    def __len__(self) -> int:
        return self._view.count(self.name)


def _of_task(task: str) -> bytes:
    """The prefix of the keys of a task's versions and tags."""
    return task.encode("ascii", "replace") + b"\0"


class Versions(_Table):
    __slots__ = ()
    name = "versions"

    def get(self, task: str, number: int) -> VersionRow | None:
        row = self._view.get("versions", key := version_key(task, number))
        return None if row is None else VersionRow.decode(key, row)

    def has(self, task: str, number: int) -> bool:
        return self._view.get("versions", version_key(task, number)) is not None

    def put(self, task: str, number: int, row: VersionRow) -> None:
        self._view.put("versions", key := version_key(task, number), row.encode(key))

    def delete(self, task: str, number: int) -> None:
        self._view.delete("versions", version_key(task, number))

    def newest(self, task: str) -> int:
        """The highest number of a version that is there. 0: there is none."""
        last = self._view.last("versions", _of_task(task))
        return parse_version_key(last[0])[1] if last else 0

    def of(self, task: str) -> Iterator[tuple[int, VersionRow]]:
        for key, row in self._view.rows("versions", _of_task(task)):
            yield parse_version_key(key)[1], VersionRow.decode(key, row)

    def rows(self) -> Iterator[tuple[str, int, VersionRow]]:
        return _versions(self._view.rows("versions"))

    def every(self) -> Iterator[tuple[str, int, VersionRow]]:
        return _versions(self._view.every("versions"))


def _versions(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, int, VersionRow]]:
    decode = VersionRow.decode
    for key, row in rows:
        yield *parse_version_key(key), decode(key, row)


class Names(_Table):
    __slots__ = ()
    name = "names"

    def get(self, task: str) -> NameRow | None:
        """A task's row, under any case of its name."""
        row = self._view.get("names", key := name_key(task))
        return None if row is None else NameRow.decode(key, row)

    def put(self, row: NameRow) -> None:
        self._view.put("names", key := name_key(row.name), row.encode(key))

    def delete(self, task: str) -> None:
        self._view.delete("names", name_key(task))

    def rows(self) -> Iterator[NameRow]:
        return self.beginning("")

    def beginning(self, start: str) -> Iterator[NameRow]:
        """Rows of names that begin with a text, in any case."""
        for key, row in self._view.rows("names", name_key(start)):
            yield NameRow.decode(key, row)

    def branches(self, start: str) -> Iterator[str]:
        """The distinct beginnings, one letter longer, of names that begin with a text, in any case."""
        key = name_key(start)
        while (found := self._view.next("names", key)) and found[0].startswith(name_key(start)):
            name = NameRow.decode(*found).name[: len(start) + 1]
            yield name
            key = name_key(name) + (b"\xff" if len(name) > len(start) else b"\0")

    def every(self) -> Iterator[NameRow]:
        for key, value in self._view.every("names"):
            row = NameRow.decode(key, value)
            if row.name.lower().encode("ascii") != key:
                raise DamagedError(f"index row of {row.name!r}", "it lies under the key of another name")
            yield row


class Tags(_Table):
    __slots__ = ()
    name = "tags"

    def get(self, task: str, tag: str) -> TagRow | None:
        row = self._view.get("tags", key := tag_key(task, tag))
        return None if row is None else TagRow.decode(key, row)

    def put(self, task: str, tag: str, row: TagRow) -> None:
        self._view.put("tags", key := tag_key(task, tag), row.encode(key))

    def delete(self, task: str, tag: str) -> None:
        self._view.delete("tags", tag_key(task, tag))

    def of(self, task: str) -> Iterator[tuple[str, str, TagRow]]:
        return _tags(self._view.rows("tags", _of_task(task)))

    def rows(self) -> Iterator[tuple[str, str, TagRow]]:
        return _tags(self._view.rows("tags"))

    def every(self) -> Iterator[tuple[str, str, TagRow]]:
        return _tags(self._view.every("tags"))


def _tags(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, str, TagRow]]:
    for key, row in rows:
        yield *parse_tag_key(key), TagRow.decode(key, row)


class Removed(_Table):
    __slots__ = ()
    name = "removed"

    def get(self, task: str, number: int) -> RemovedRow | None:
        row = self._view.get("removed", key := version_key(task, number))
        return None if row is None else RemovedRow.decode(key, row)

    def put(self, task: str, number: int, row: RemovedRow) -> None:
        self._view.put("removed", key := version_key(task, number), row.encode(key))

    def delete(self, task: str, number: int) -> None:
        self._view.delete("removed", version_key(task, number))

    def of(self, task: str) -> Iterator[tuple[str, int, RemovedRow]]:
        return _removed(self._view.rows("removed", _of_task(task)))

    def rows(self) -> Iterator[tuple[str, int, RemovedRow]]:
        return _removed(self._view.rows("removed"))

    def every(self) -> Iterator[tuple[str, int, RemovedRow]]:
        return _removed(self._view.every("removed"))

    def delete_where(self, dead: Callable[[RemovedRow], bool]) -> None:
        self._view.delete_where("removed", lambda key, row: dead(RemovedRow.decode(key, row)))


def _removed(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, int, RemovedRow]]:
    for key, row in rows:
        yield *parse_version_key(key), RemovedRow.decode(key, row)


class Packs(_Table):
    """Rows of packs, by their hashes."""

    __slots__ = ()
    name = "packs"

    def get(self, pack: bytes) -> PackRow | None:
        row = self._view.get("packs", pack)
        return None if row is None else PackRow.decode(pack, row)

    def __contains__(self, pack: bytes) -> bool:
        return self._view.get("packs", pack) is not None

    def is_row(self, pack: bytes, row: PackRow) -> bool:
        """Whether a pack has exactly this row. A damaged row differs."""
        return self._view.get("packs", pack) == row.encode(pack)

    def put(self, pack: bytes, row: PackRow) -> None:
        self._view.put("packs", pack, row.encode(pack))

    def hashes(self) -> Iterator[bytes]:
        return (pack for pack, _ in self._view.rows("packs"))

    def every(self) -> Iterator[tuple[bytes, PackRow]]:
        for pack, row in self._view.every("packs"):
            yield pack, PackRow.decode(pack, row)

    def drop(self, pack: bytes) -> None:
        """Deletes a pack's rows. The caller deletes the rows of its tensors."""
        self._view.delete("packs", pack)
        self._view.delete("contents", pack)


class Contents(_Table):
    """The tensors that the index lists in each pack, by the pack's hash. NO_PACK lists those that no pack has."""

    __slots__ = ()
    name = "contents"

    def get(self, pack: bytes) -> ContentsRow:
        """What the index lists in a pack.

        Raises:
            DamagedError: the row is missing or damaged.
        """
        return ContentsRow.decode(pack, self._view.get("contents", pack) or b"", self._view.count("tensors"))

    def __contains__(self, pack: bytes) -> bool:
        return self._view.get("contents", pack) is not None

    def put(self, pack: bytes, row: ContentsRow) -> None:
        self._view.put("contents", pack, row.encode(pack))

    def enter(self, pack: bytes, numbers: Iterable[int], lengths: Iterable[int]) -> None:
        """Enters the tensors that a new pack holds. They must not be listed elsewhere."""
        self.put(pack, ContentsRow.of(numbers, lengths))

    def unlist(self, pack: bytes, numbers: Container[int]) -> None:
        """Removes tensors that moved elsewhere from a pack's contents."""
        if pack in self:
            self.put(pack, self.get(pack).without(numbers))

    def every(self) -> Iterator[tuple[bytes, ContentsRow]]:
        at_most = self._view.count("tensors")
        for pack, row in self._view.every("contents"):
            yield pack, ContentsRow.decode(pack, row, at_most)


class Tensors(_Table):
    __slots__ = ()
    name = "tensors"

    def get(self, digest: Digest) -> TensorRow | None:
        row = self._view.get("tensors", key := from_digest(digest))
        return None if row is None else TensorRow.decode(key, row)

    def peek(self, digest: Digest) -> TensorRow | None:
        """Like :meth:`get`, but does not check the row's checksum. For callers that hash the tensor anyway."""
        row = self._view.get("tensors", from_digest(digest))
        return None if row is None else TensorRow.peek(row)

    def stored(self, digest: Digest) -> StoredTensor | None:
        row = self._view.get("tensors", from_digest(digest))
        return None if row is None else StoredTensor(row)

    def number_and_length(self, digest: Digest) -> tuple[int, int] | None:
        """A tensor's number and length. The row's checksum is not checked."""
        row = self._view.get("tensors", from_digest(digest))
        return None if row is None else TensorRow.number_and_length(row)

    @staticmethod
    def decode(digest: Digest, row: StoredTensor) -> TensorRow:
        return TensorRow.decode(from_digest(digest), row)

    def put(self, digest: Digest, row: TensorRow) -> StoredTensor:
        coded = row.encode(key := from_digest(digest))
        self._view.put("tensors", key, coded)
        return StoredTensor(coded)

    def delete(self, digest: Digest) -> None:
        self._view.delete("tensors", from_digest(digest))

    def delete_where(self, dead: Callable[[TensorRow, Callable[[], TensorRow]], bool]) -> None:
        """Deletes the rows that `dead` picks. It gets each row unchecked, and a function that checks the row."""
        self._view.delete_where(
            "tensors", lambda key, row: dead(TensorRow.peek(row), lambda: TensorRow.decode(key, row))
        )

    def rows(self) -> Iterator[tuple[Digest, TensorRow]]:
        """All rows. Checksums are not checked."""
        return ((to_digest(key), TensorRow.peek(row)) for key, row in self._view.rows("tensors"))

    def every(self) -> Iterator[tuple[Digest, TensorRow]]:
        for key, row in self._view.every("tensors"):
            found = TensorRow.decode(key, row)
            if len(key) != 32:
                raise DamagedError(f"index key {key[:150]!r}", "it is no digest")
            yield to_digest(key), found


class Manifests(_Table):
    """Rows of manifests, by their hashes."""

    __slots__ = ()
    name = "manifests"

    def get(self, manifest: bytes) -> ManifestRow | None:
        row = self._view.get("manifests", manifest)
        return None if row is None else ManifestRow.decode(manifest, row)

    def __contains__(self, manifest: bytes) -> bool:
        return self._view.get("manifests", manifest) is not None

    def text(self, manifest: bytes) -> bytes:
        """A manifest's bytes, unchecked. Empty if there is no such manifest, or its row is unreadable."""
        row = self._view.get("manifests", manifest)
        return b"" if row is None else ManifestRow.manifest_of(row)

    def unpack(self, manifest: bytes) -> tuple[bytes, list[TensorRow]] | None:
        """A manifest's bytes, unchecked, and cached places of its tensors. The bytes are empty if unreadable."""
        row = self._view.get("manifests", manifest)
        return None if row is None else ManifestRow.unpack(row)

    def put(self, manifest: bytes, number: int, tensors: Sequence[StoredTensor], text: bytes) -> None:
        """Enters a manifest. `tensors` are the rows of the tensors that it names, in the order of their digests."""
        self._view.put("manifests", manifest, ManifestRow.encode(manifest, number, tensors, text))

    def hashes(self) -> Iterator[bytes]:
        return (manifest for manifest, _ in self._view.rows("manifests"))

    def every(self) -> Iterator[tuple[bytes, ManifestRow]]:
        for manifest, row in self._view.every("manifests"):
            yield manifest, ManifestRow.decode(manifest, row)

    def delete_where(self, dead: Callable[[int, Callable[[], ManifestRow]], bool]) -> None:
        """Deletes the rows that `dead` picks. It gets each number unchecked, and a function that checks the row."""
        self._view.delete_where(
            "manifests", lambda key, row: dead(ManifestRow.number_of(row), lambda: ManifestRow.decode(key, row))
        )
