"""A task as a router keeps it: its layout, which other tasks share, and little of its own."""

import json
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from pear_store import RawTensor, Task
from pear_store.format.digest import Digest, from_digest, to_digests
from pear_store.format.manifest import dump_manifest, manifest_hash
from pear_store.format.record import map_tensor_names
from router.layout import Ints, Key, Layout, Layouts, Part, Stands
from router.preprocess import Preprocess

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Use:
    """A task without its record and tensors. Both can be had again, see `task` and `read`."""

    key: Hashable
    """The hash of its manifest, as in a store. Equal tasks have equal hashes."""
    name: str
    labels: tuple[str, ...]
    threshold: float | None
    preprocess: Preprocess
    layout: Layout
    stands: Stands
    """The bases that it uses at each position. Equal ones are one object."""
    _digests: bytes = field(repr=False)
    """The digests of its tensors, by number."""
    _record: bytes = field(repr=False)
    """As JSON with digests in place of its tensors' names, compressed."""
    _source: Callable[[], Task] | tuple[Bytes, ...] = field(repr=False)
    """Reads the task with its tensors' bytes. Or these bytes, by number."""

    @classmethod
    def of(
        cls,
        task: Task,
        manifest: bytes,
        layouts: Layouts,
        preprocess: Preprocess,
        read: Callable[[], Task] | None = None,
    ) -> "Use":
        """The use of a task.

        Args:
            read: reads the task with its tensors' bytes. None: the bytes of `task` are kept.
        """
        layout, digests = layouts.of(task)
        source: Callable[[], Task] | tuple[Bytes, ...]
        if read is None:
            by_digest = {tensor.digest: tensor.data for tensor in task.tensors.values()}
            source = tuple(by_digest[digest] for digest in digests)
        else:
            source = read
        record = map_tensor_names(task.record, lambda name: task.tensors[name].digest)
        return cls(
            manifest_hash(manifest), task.name, task.labels, task.threshold, preprocess,
            layout, layout.stands(layout.keys(digests)),
            b"".join(map(from_digest, digests)), zlib.compress(dump_manifest(record), 1), source,
        )  # fmt: skip

    @property
    def task(self) -> Task:
        """The task, made anew. Its tensors have their bytes only if it was added to the router."""
        record = json.loads(zlib.decompress(self._record))
        return Task(record, {str(tensor.digest): tensor for tensor in self._own_tensors().values()})

    def read(self) -> Task:
        """The task with its tensors' bytes. Drop it soon: it may hold maps of packs, and so descriptors."""
        return self.task if isinstance(self._source, tuple) else self._source()

    def read_by(self, read: Callable[[], Task]) -> "Use":
        """The same task, read otherwise: for instance as another version of a store."""
        return replace(self, _source=read)

    def digests(self) -> list[Digest]:
        """The digests of its tensors, by number."""
        return to_digests(self._digests)

    def keys(self) -> list[Key]:
        """The keys of its layout's parts."""
        return self.layout.keys(self.digests())

    def sizes(self) -> dict[Key, int]:
        """Key -> bytes on the device."""
        return {key: part.size_bytes for key, part in zip(self.keys(), self.layout.parts, strict=True)}

    def adds(self) -> dict[str, Hashable]:
        """Position -> a value that is equal for two tasks if they add the same there."""
        return self.layout.adds(self.keys())

    def tensors(self, read: Callable[["Use"], Task]) -> Mapping[str, RawTensor]:
        """Its tensors with their bytes, under their layout's names.

        Args:
            read: reads the task, if its bytes are not kept.
        """
        if isinstance(self._source, tuple):
            return self._own_tensors()
        by_digest = {tensor.digest: tensor for tensor in read(self).tensors.values()}
        return dict(zip(self.layout.task.tensors, map(by_digest.__getitem__, self.digests()), strict=True))

    def _own_tensors(self) -> dict[str, RawTensor]:
        """Its tensors under their layout's names, with the bytes that are kept."""
        forms = self.layout.task.tensors
        kept = self._source if isinstance(self._source, tuple) else (b"",) * len(forms)
        return {
            name: RawTensor.checked(form.dtype, form.shape, data, digest)
            for (name, form), data, digest in zip(forms.items(), kept, self.digests(), strict=True)
        }


@dataclass(eq=False, slots=True)
class Entry:
    """A matrix, a core or a head that is loaded."""

    key: Key
    values: Tensor | Ints
    """Its rows in a pool, or the head or base itself."""
    size_bytes: int
    uses: int = 0
    """How many loaded tasks use it."""


@dataclass(frozen=True, eq=False, slots=True)
class LoadedTask:
    """A task in its slots."""

    use: Use
    rows: Ints
    """Rows in the pools of `down` and of `up`, position after position, int64 [2, rank]."""
    head: tuple[Tensor, Tensor] | None
    """Weight [classes, features] and bias [classes], float32."""
    cores: Ints
    """Rows in the pools of cores, in the order of the task's `stands`, int64 [branch]."""
    entries: tuple[Entry, ...] = field(repr=False)
    """Those of its layout's parts."""

    @property
    def parts(self) -> Iterator[tuple[Part, Entry]]:
        """Its layout's parts, with their entries."""
        return zip(self.use.layout.parts, self.entries, strict=True)
