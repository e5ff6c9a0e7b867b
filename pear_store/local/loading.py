"""Reads the sources of an `add`, in groups. Many files are read by worker processes.

Reading a task checkpoint is mostly Python's work and hashing. If there are many local files and this process may be
forked, workers read them into shared memory. Otherwise they are read here. The results are the same.
"""

import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from stat import S_ISREG

from pear_store.errors import CheckpointError, PearStoreError
from pear_store.format.checkpoint import TASK_NAME, ReadBefore, Task, task_from_container
from pear_store.format.container import parse_buffer
from pear_store.format.digest import Digest, RawTensor
from pear_store.format.manifest import as_stored, manifest_hash
from pear_store.local import sources
from pear_store.local.sources import Access, Source, is_url
from pear_store.local.worker import Worker, WorkerDiedError, can_fork, cores

GROUP_TASKS = 200
"""Tasks that one `add` commits together: a commit costs a few fsyncs, whatever its size."""
GROUP_BYTES = 32 * 1024 * 1024
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
"""The largest manifest that is accepted. A commit is full once its manifests have this many bytes."""
_WORKERS = 4
_REQUEST_CHARACTERS = 8000
"""Two requests must fit a pipe of 64 KiB, or we block writing to a worker that blocks writing to us."""
_SLOTS = 2
"""How many groups a worker may be ahead"""


@dataclass(frozen=True)
class Loaded:
    """A source of `add`, read and checked.

    Args:
        tensors: its distinct tensors.
        size_bytes: their bytes.
        manifest: its manifest.
        hash: the manifest's hash.
    """

    name: str
    tensors: Mapping[Digest, RawTensor]
    size_bytes: int
    manifest: bytes
    hash: bytes


@dataclass(frozen=True)
class Refused:
    """A source that `add_many` did not add. `error` says why."""

    error: PearStoreError


Group = list[Loaded | Refused]


def load_groups(given: Iterable[Source], name: str | None, access: Access | None = None) -> Iterator[Group]:
    """The sources in order, in groups of what one commit takes.

    A group's tensors are valid until the next group is asked for. Only a list or tuple is read ahead. A source of
    another iterable may be gone, or changed, when the next one is asked for.
    """
    with Loader(name, access) as loader:
        yield from loader.load(given)


class Loader:
    """Reads for one `add`: keeps what earlier files had in common, and the workers.

    It is closed with the `add`, also if that is not finished. Workers and their memory then end.
    """

    def __init__(self, name: str | None, access: Access | None) -> None:
        self._name = name
        self._access = access
        self._known = ReadBefore()
        self._workers: _Workers | None = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
        self._workers = None
        self._known = ReadBefore()

    def load(self, given: Iterable[Source]) -> Iterator[Group]:
        """See :func:`load_groups`."""
        if isinstance(given, list | tuple) and can_fork() and (count := cores()) > 1:
            chunks = _chunks(iter(given))
            first = next(chunks, [])
            if len(first) < len(given):
                try:
                    self._workers = _Workers(min(count, _WORKERS), self._name, self._access, self._known)
                except OSError:  # the system gives no more processes
                    pass
                else:
                    yield from self._workers.load(chain([first], chunks))
                    return
        alone = isinstance(given, list | tuple) and len(given) == 1  # no later source could use what is known
        known = None if alone else self._known
        yield from _split(load(source, self._name, known, self._access) for source in given)


def _chunks(pending: Iterator[Source]) -> Iterator[list[Source]]:
    while chunk := list(_take(pending)):
        yield chunk


def _take(pending: Iterator[Source]) -> Iterator[Source]:
    """The next sources that make a group, by the sizes of their files."""
    size = 0
    for count, source in enumerate(pending, 1):
        yield source
        size += _file_bytes(source) or 0
        if count == GROUP_TASKS or size >= GROUP_BYTES - (GROUP_BYTES >> 4):
            return


def _file_bytes(source: Source) -> int | None:
    """The size of a local regular file. None for any other source."""
    if not isinstance(source, str | os.PathLike) or is_url(source):
        return None
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return None
    return found.st_size if S_ISREG(found.st_mode) else None


def _split(results: Iterable[Loaded | Refused]) -> Iterator[Group]:
    """Splits results into groups that one commit takes."""
    group: Group = []
    size = manifest_bytes = 0
    for one in results:
        group.append(one)
        if isinstance(one, Loaded):
            size += one.size_bytes
            manifest_bytes += len(one.manifest)
        if len(group) == GROUP_TASKS or size >= GROUP_BYTES or manifest_bytes >= MAX_MANIFEST_BYTES:
            yield group
            group, size, manifest_bytes = [], 0, 0
    if group:
        yield group


def load(
    source: Source, name: str | None, known: ReadBefore | None = None, access: Access | None = None
) -> Loaded | Refused:
    """Reads and checks one source. `name`, if given, replaces the task's name."""
    try:
        return _loaded(sources.read_task(source, known, access), name, sources.label(source))
    except PearStoreError as error:
        return Refused(error)


def _loaded(task: Task, name: str | None, where: str) -> Loaded:
    if name is not None:
        if not TASK_NAME.fullmatch(name):
            raise CheckpointError(where, f"task name {name!r}: expected up to 100 of letters, digits, '.', '_' and '-'")
        task = Task({**task.record, "task": name}, task.tensors)
    manifest, tensors = as_stored(task)
    if len(manifest) > MAX_MANIFEST_BYTES:
        raise CheckpointError(where, f"record: expected at most {MAX_MANIFEST_BYTES} bytes, found {len(manifest)}")
    size_bytes = sum(tensor.size_bytes for tensor in tensors.values())
    return Loaded(task.name, tensors, size_bytes, manifest, manifest_hash(manifest))


_Placed = tuple[str, tuple[int, ...], int, int]
"""A tensor in a slot: dtype, shape, offset and length in bytes"""
_Read = tuple[str, dict[Digest, _Placed], int, bytes, bytes]
"""A file that a worker read: the fields of a `Loaded`, with places in the slot instead of tensors"""
_Answer = list[_Read | None]
"""One for each file. None: the worker refused it or had no room; this process reads it."""


class _InSlot(Mapping[Digest, RawTensor]):
    """Tensors in shared memory. Each is made when it is asked for, because most are stored already."""

    def __init__(self, places: dict[Digest, _Placed], slot: memoryview) -> None:
        self._places, self._slot = places, slot

    def __getitem__(self, digest: Digest) -> RawTensor:
        dtype, shape, offset, length = self._places[digest]
        return RawTensor.checked(dtype, shape, self._slot[offset : offset + length], digest)

    def __iter__(self) -> Iterator[Digest]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Workers:
    """Processes that read groups of files into slots of shared memory. Each may be ahead by two slots."""

    def __init__(self, count: int, name: str | None, access: Access | None, known: ReadBefore) -> None:
        self._name, self._access, self._known = name, access, known
        self._slots = [[mmap.mmap(-1, GROUP_BYTES) for _ in range(_SLOTS)] for _ in range(count)]
        self._workers: list[Worker] = []
        try:
            for slots in self._slots:
                self._workers.append(Worker(partial(self._read, slots)))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def load(self, chunks: Iterator[list[Source]]) -> Iterator[Group]:
        ahead: deque[tuple[list[Source], tuple[int, int] | None]] = deque()
        asked = 0
        exhausted = False
        while True:
            while not exhausted and len(ahead) < len(self._workers) * _SLOTS:
                chunk = next(chunks, None)
                if chunk is None:
                    exhausted = True
                    break
                place = None
                paths = [str(source) for source in chunk if _file_bytes(source) is not None]
                if len(paths) == len(chunk) and sum(map(len, paths)) <= _REQUEST_CHARACTERS:
                    place = (asked % len(self._workers), asked // len(self._workers) % _SLOTS)
                    asked += 1
                    self._workers[place[0]].ask((place[1], paths))
                ahead.append((chunk, place))
            if not ahead:
                return
            yield from self._group(*ahead.popleft())

    def _group(self, chunk: list[Source], place: tuple[int, int] | None) -> Iterator[Group]:
        answer: _Answer = [None] * len(chunk)
        data = memoryview(b"")
        if place is not None:
            data = memoryview(self._slots[place[0]][place[1]])
            with suppress(WorkerDiedError):  # then the files are read here
                answer = self._workers[place[0]].answer()
        yield from _split(
            load(source, self._name, self._known, self._access)
            if one is None
            else Loaded(one[0], _InSlot(one[1], data), *one[2:])
            for source, one in zip(chunk, answer, strict=True)
        )

    def _read(self, slots: list[mmap.mmap], request: tuple[int, list[str]]) -> _Answer:
        """Reads files into a slot, one behind the other. This runs in the worker."""
        slot, paths = request
        memory = memoryview(slots[slot])
        answer: _Answer = []
        end = 0
        for path in paths:
            answer.append(None)
            try:
                with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
                    size = os.fstat(file.fileno()).st_size
                    start, end = end, end + (size + 7) // 8 * 8
                    if end > len(memory) or file.readinto(memory[start:]) != size:
                        end = start
                        continue
                header, tensors = parse_buffer(memory[start : start + size], path, self._known.headers)
                task = task_from_container(header.metadata, tensors, path, self._known)
                one = _loaded(task, self._name, path)
            except (OSError, PearStoreError):
                continue
            places = {
                tensors[name].digest: (dtype, shape, start + offset, length)
                for name, (dtype, shape, offset, length) in header.places.items()
            }
            if places.keys() == one.tensors.keys():  # else the store joins tensors otherwise than the file
                answer[-1] = (one.name, places, one.size_bytes, one.manifest, one.hash)
        return answer


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a file that may have been replaced by a pipe since it was looked at."""

    return os.open(path, flags | os.O_NONBLOCK)
