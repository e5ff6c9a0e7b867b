"""A disk that loses power: replays the system calls of a real run, and drops what nothing had synced.

A trace of strace is read call by call. Of a file, the bytes that an fsync (or an O_DSYNC write) covered are durable.
Of a directory, the names that an fsync of it covered are durable. When power is lost, every other write and every
other change of a name is kept or dropped by chance, in any combination that respects the order of changes to one
name. That is harsher than ext4, whose journal keeps an order.
"""

import os
import random
import re
import shutil
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "openat,open,creat,write,writev,pwrite64,pwritev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,"
    "unlinkat,rmdir,mkdir,mkdirat,ftruncate,truncate,fallocate,close,dup,dup2,dup3,fcntl,sendfile,copy_file_range,symlink,"
    "symlinkat,lseek"
)
BLOCK = 512


@dataclass(eq=False)
class File:
    """A file's durable bytes, and writes since: (offset, bytes), or (length, None) where it was cut or grown."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    size: int = 0

    def write(self, at: int, data: bytes | None) -> None:
        self.pending.append((at, data))
        self.size = at if data is None else max(self.size, at + len(data))

    def sync(self, count: int | None = None) -> None:
        """Makes the first `count` pending writes durable; all by default."""
        count = len(self.pending) if count is None else count
        self.durable = _applied(self.durable, self.pending[:count])
        del self.pending[:count]

    def after_power_loss(self, rng: random.Random, kept: float) -> bytes:
        survivors: list[tuple[int, bytes | None]] = []
        for at, data in self.pending:
            if rng.random() < kept:
                if data and rng.random() < 0.2:  # torn
                    data = data[: rng.randrange(len(data) + 1) // BLOCK * BLOCK]
                survivors.append((at, data))
        return _applied(self.durable, survivors)


@dataclass(eq=False)
class Folder:
    """A directory as programs see it, and what of it is durable."""

    names: dict[str, "File | Folder"] = field(default_factory=dict)
    durable: dict[str, "File | Folder"] = field(default_factory=dict)


Change = list[tuple[Folder, str, "File | Folder | None"]]
"""Names that change together: a rename's two."""


def _applied(data: bytes, writes: list[tuple[int, bytes | None]]) -> bytes:
    found = bytearray(data)
    for at, piece in writes:
        if piece is None:
            del found[at:]
            found.extend(bytes(at - len(found)))
        else:
            found.extend(bytes(max(0, at - len(found))))
            found[at : at + len(piece)] = piece
    return bytes(found)


class Disk:
    """One directory, `root`, as a trace changes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = self._load(root)
        self._changes: list[Change] = []

    def _load(self, path: Path) -> Folder:
        names: dict[str, File | Folder] = {}
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                names[entry.name] = self._load(Path(entry.path))
            else:
                data = Path(entry.path).read_bytes()
                names[entry.name] = File(data, size=len(data))
        return Folder(names, dict(names))

    def find(self, path: str) -> "File | Folder | None":
        """What is at a path; None outside of the root, or where nothing is."""
        relative = os.path.relpath(path, self.root)
        node: File | Folder | None = self.top
        for part in [] if relative == "." else relative.split("/"):
            node = node.names.get(part) if isinstance(node, Folder) else None
        return node

    def holds(self, path: str) -> bool:
        return path == str(self.root) or path.startswith(f"{self.root}/")

    def change(self, *entries: tuple[str, "File | Folder | None"]) -> None:
        """Points names elsewhere, or at nothing, at once."""
        change: Change = []
        for path, node in entries:
            parent = self.find(os.path.dirname(path))
            assert isinstance(parent, Folder), path
            name = os.path.basename(path)
            change.append((parent, name, node))
            _set(parent.names, name, node)
        self._changes.append(change)

    def sync(self, folder: Folder) -> None:
        wanted = [any(entry[0] is folder for entry in change) for change in self._changes]
        chosen = _with_earlier(self._changes, wanted)
        for change, is_chosen in zip(self._changes, chosen, strict=True):
            if is_chosen:
                for parent, name, node in change:
                    _set(parent.durable, name, node)
        self._changes = [change for change, is_chosen in zip(self._changes, chosen, strict=True) if not is_chosen]

    def sync_all(self) -> None:
        """What a clean shutdown does."""
        for change in self._changes:
            for parent, name, node in change:
                _set(parent.durable, name, node)
                if isinstance(node, File):
                    node.sync()
        self._changes.clear()
        folders: list[File | Folder] = [self.top]
        for node in folders:
            if isinstance(node, File):
                node.sync()
            else:
                folders += node.names.values()

    def lose_power(self, rng: random.Random, target: Path) -> None:
        """Writes what is left into a fresh directory."""
        kept_names, kept_data = rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 0.5, 1.0])
        wanted = [rng.random() < kept_names for _ in self._changes]
        durable: dict[int, dict[str, File | Folder]] = {}

        def names_of(folder: Folder) -> dict[str, File | Folder]:
            return durable.setdefault(id(folder), copy(folder.durable))

        for change, is_chosen in zip(self._changes, _with_earlier(self._changes, wanted), strict=True):
            if is_chosen:
                for parent, name, node in change:
                    _set(names_of(parent), name, node)
        written: dict[int, Path] = {}

        def write(folder: Folder, path: Path) -> None:
            path.mkdir()
            for name, node in names_of(folder).items():
                if isinstance(node, Folder):
                    write(node, path / name)
                elif id(node) in written:
                    os.link(written[id(node)], path / name)
                else:
                    (path / name).write_bytes(node.after_power_loss(rng, kept_data))
                    written[id(node)] = path / name

        shutil.rmtree(target, ignore_errors=True)
        write(self.top, target)


def _set(names: "dict[str, File | Folder]", name: str, node: "File | Folder | None") -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _with_earlier(changes: list[Change], wanted: list[bool]) -> list[bool]:
    """The wanted changes, and all before them that touch a name that they touch."""
    chosen = list(wanted)
    touched: set[tuple[int, str]] = set()
    for i in reversed(range(len(changes))):
        keys = {(id(folder), name) for folder, name, _ in changes[i]}
        if chosen[i] or keys & touched:
            chosen[i] = True
            touched |= keys
    return chosen


@dataclass
class Call:
    """One system call that has returned: its arguments as strace shows them."""

    name: str
    text: str
    result: int


_LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)", re.S)
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_DESCRIPTOR = re.compile(r"(AT_FDCWD|\d+)<((?:\\x[0-9a-f]{2})*)>")


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


class Replay:
    """Applies a trace to a disk, a call at a time. What the program wrote to its standard output is in `said`."""

    def __init__(self, root: Path, trace: Path) -> None:
        self.disk = Disk(root)
        self.said: list[str] = []
        self._lines = trace.read_text().splitlines()
        self._table: dict[int, tuple[File | Folder, str, list[int]]] = {}
        """Descriptor -> node, flags, place. Threads share it; a trace of several processes is not understood."""
        self._begun: dict[int, tuple[str, str, int | None]] = {}

    def steps(self) -> Iterator[str]:
        """Applies the calls one after the other; yields the name of each that changed the disk or said something."""
        for line in self._lines:
            match = _LINE.fullmatch(line)
            if match is None:
                continue
            process, resumed, begun, rest = int(match[1]), match[2], match[3], match[4]
            count: int | None = None
            if begun is not None and rest.endswith("<unfinished ...>"):
                text = rest.removesuffix("<unfinished ...>")
                self._begun[process] = (begun, text, self._pending(begun, text))
                continue
            if resumed is not None:
                name, text, count = self._begun.pop(process)
                rest = text + rest
            else:
                name = begun
            arguments, _, result = rest.rpartition(" = ")
            number = re.match(r"-?\d+", result)
            call = Call(name, arguments, int(number[0]) if number else -1)
            if call.result >= 0 and self._apply(call, count):
                yield call.name

    def _pending(self, name: str, text: str) -> int | None:
        """What an fsync that has begun covers: the writes before it."""
        if name in ("fsync", "fdatasync") and (found := self._node(text)) and isinstance(found[0], File):
            return len(found[0].pending)
        return None

    def _node(self, text: str) -> "tuple[File | Folder, str, list[int]] | None":
        match = re.match(r"(\d+)<", text)
        return self._table.get(int(match[1])) if match else None

    def _paths(self, text: str) -> list[str]:
        """The paths among a call's arguments, each against the directory before it."""
        base, paths = "", []
        for match in re.finditer(f"{_DESCRIPTOR.pattern}|{_STRING.pattern}", text):
            if match[3] is None:
                base = _bytes(match[2]).decode()
            else:
                paths.append(os.path.normpath(os.path.join(base or os.getcwd(), _bytes(match[3]).decode())))
        return paths

    def _apply(self, call: Call, synced: int | None) -> bool:
        disk, name, text = self.disk, call.name, call.text
        found = self._node(text)
        if name in ("openat", "open", "creat"):
            return self._open(call)
        if name == "close":
            match = re.match(r"(\d+)<", text)
            return bool(match and self._table.pop(int(match[1]), None)) and False
        if name in ("write", "writev", "pwrite64", "pwritev"):
            data = b"".join(_bytes(match[1]) for match in _STRING.finditer(text))
            if text.startswith("1<"):
                self.said += data.decode().splitlines()
                return True
            if found is None or not isinstance(found[0], File):
                return False
            file, flags, place = found[0], found[1], found[2]
            data = data[: call.result]
            if name.startswith("p"):
                at = int(re.findall(r", (\d+)\)$", text)[-1])
            else:
                at = file.size if "O_APPEND" in flags else place[0]
                place[0] = at + len(data)
            file.write(at, data)
            if "SYNC" in flags:
                write = file.pending.pop()
                file.durable = _applied(file.durable, [write])
            return True
        if name in ("fsync", "fdatasync") and found is not None:
            if isinstance(found[0], Folder):
                disk.sync(found[0])
            else:
                found[0].sync(synced)
            return True
        if name == "ftruncate" and found is not None:
            assert isinstance(found[0], File)
            found[0].write(int(re.findall(r", (\d+)", text)[-1]), None)
            return True
        if name == "fallocate" and found is not None:
            return False  # space, no bytes: what is never written reads as zeros
        paths = [path for path in self._paths(text) if disk.holds(path)]
        if name == "lseek":
            if found:
                found[2][0] = call.result
            return False
        if name.startswith("dup") or (name == "fcntl" and "F_DUPFD" in text):
            if found:
                self._table[call.result] = found
            else:
                self._table.pop(call.result, None)
            return False
        if name in ("sendfile", "copy_file_range", "truncate", "symlink", "symlinkat") and (found or paths):
            raise NotImplementedError(f"the model does not know {name}({text[:200]})")
        if not paths:
            return False
        if name.startswith("rename"):
            assert len(paths) == 2, "a rename into or out of the store"
            disk.change((paths[0], None), (paths[1], disk.find(paths[0])))
        elif name.startswith("link"):
            disk.change((paths[1], disk.find(paths[0])))
        elif name.startswith("unlink") or name == "rmdir":
            disk.change((paths[0], None))
        elif name.startswith("mkdir"):
            disk.change((paths[0], Folder()))
        else:
            return False
        return True

    def _open(self, call: Call) -> bool:
        (path,) = self._paths(call.text)[:1] or [""]
        if not self.disk.holds(path):
            return False
        node = self.disk.find(path)
        created = node is None
        if node is None:
            if path.endswith("lock.mdb"):
                return False  # LMDB's lock file is a memory map: what is in it counts for the living only
            assert "O_CREAT" in call.text, call.text
            node = File()
            self.disk.change((path, node))
        elif "O_TRUNC" in call.text:
            assert isinstance(node, File)
            node.write(0, None)
        self._table[call.result] = (node, call.text, [0])
        return created or "O_TRUNC" in call.text
