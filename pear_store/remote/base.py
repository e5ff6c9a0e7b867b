"""A base: what the log says up to an entry, sorted, so that a reader of few tasks reads few bytes (docs/remotes.md).

A base is a list of runs. Each run says what a stretch of entries says, and is a list of shards. A shard has the format
of an entry's index. The log has the last word: a base that does not fit it is ignored, and the log is read.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from pear_store.format.checkpoint import TASK_NAME
from pear_store.remote.log import (
    MAX_INDEX_BYTES,
    BaseName,
    LoggedTag,
    LogIndex,
    dump_json,
    parsed,
    to_count,
    to_hash,
    to_list,
    unpacked,
)

BASE_FORMAT = "pear-base/1"
Kind = Literal["tasks", "packs", "drop"]
"""Kinds of shards. "tasks": versions, tags and numbers by task, and the places of their tensors. "packs": packs by
hash. "drop": packs of an earlier run that are dropped."""
KINDS: tuple[Kind, ...] = get_args(Kind)
END = "\x7f"
"""A text that sorts after each task's name in lower case, and after each hash in hex"""


class Shard(NamedTuple):
    """A shard of a run: the first name in it (a task's case-folded name, or a pack's hash), and its object."""

    first: str
    hash: bytes
    size_bytes: int


@dataclass
class Run:
    """What a stretch of entries says, up to the entry `last`. Shards of each kind are sorted by their first names."""

    last: int
    shards: dict[Kind, list[Shard]] = field(default_factory=dict)

    @property
    def all_shards(self) -> list[Shard]:
        return [shard for shards in self.shards.values() for shard in shards]

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.all_shards)


@dataclass
class Root:
    """A base: its runs in order, and the hash of the last entry that they cover."""

    entry: bytes
    runs: list[Run]

    @property
    def size_bytes(self) -> int:
        return sum(run.size_bytes for run in self.runs)

    def encode(self) -> bytes:
        """Raises a ValueError if it is too large for a reader."""
        runs = [
            {
                "last": run.last,
                **{kind: [[s.first, s.hash.hex(), s.size_bytes] for s in run.shards.get(kind, [])] for kind in KINDS},
            }
            for run in self.runs
        ]
        text = dump_json({"format": BASE_FORMAT, "entry": self.entry.hex(), "runs": runs})
        if len(text) > MAX_INDEX_BYTES:
            raise ValueError(f"a base of {len(text)} bytes: at most {MAX_INDEX_BYTES} are read")
        return zlib.compress(text, 6)


def base_name(base: BaseName) -> str:
    return f"base/{base.number:020d}-{base.hash.hex()}"


def shard_name(shard: bytes) -> str:
    return f"base/shards/{shard.hex()}"


def parse_root(data: bytes, place: str, base: BaseName) -> Root:
    """Raises as :func:`pear_store.remote.log.parse_index`."""

    def parse(value: Any) -> Root:
        runs = [Run(to_count(run["last"]), {kind: _shards(run[kind], kind) for kind in KINDS}) for run in value["runs"]]
        lasts = [0, *(run.last for run in runs)]
        if lasts != sorted(set(lasts)) or lasts[-1] != base.number:
            raise ValueError("its runs are out of order")
        return Root(to_hash(value["entry"]), runs)

    name = base_name(base)
    return parsed(place, name, unpacked(place, name, data, base.hash), BASE_FORMAT, parse)


def _shards(value: Any, kind: Kind) -> list[Shard]:
    shards: list[Shard] = []
    for first, name, size_bytes in to_list(value):
        if kind != "tasks":
            to_hash(first)
        elif not (isinstance(first, str) and TASK_NAME.fullmatch(first) and first == first.casefold()):
            raise ValueError("an invalid first name of a shard")
        if to_count(size_bytes) > MAX_INDEX_BYTES:
            raise ValueError("an invalid size of a shard")
        if shards and shards[-1].first >= first:
            raise ValueError("overlapping shards")
        shards.append(Shard(first, to_hash(name), size_bytes))
    return shards


def by_task(index: LogIndex) -> Mapping[str, LogIndex]:
    """Splits an index by task. Keys are case-folded names."""
    found: dict[str, LogIndex] = {}

    def of(task: str) -> LogIndex:
        return found.setdefault(task.casefold(), LogIndex())

    for version in index.versions:
        of(version.task).versions.append(version)
    for task, highest in index.highest.items():
        of(task).highest[task] = highest
    for tag in index.tags:
        of(tag.task).tags.append(tag)
    for task, number in index.removed:
        of(task).removed.append((task, number))
    return found


def merged(news: list[LogIndex]) -> LogIndex:
    """Merges what consecutive indexes say of one task into one index."""
    found = LogIndex()
    tags: dict[tuple[str, str], LoggedTag] = {}
    for index in news:
        found.versions += index.versions
        found.removed += index.removed
        for task, highest in index.highest.items():
            found.highest[task] = max(highest, found.highest.get(task, 0))
        for tag in index.tags:
            before = tags[tag.task, tag.tag].before if (tag.task, tag.tag) in tags else tag.before
            tags[tag.task, tag.tag] = LoggedTag(tag.task, tag.tag, tag.version, before)
    found.tags = [tag for _, tag in sorted(tags.items()) if tag.version != tag.before]
    return found
