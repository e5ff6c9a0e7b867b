"""Makes a store's index anew from the packs."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pear_store.counted import counted
from pear_store.errors import DamagedError, from_os_error
from pear_store.format.container import Header
from pear_store.format.pack import Commit, Records
from pear_store.local.applying import Applying
from pear_store.local.directory import open_folder, require_packs, store_path
from pear_store.local.index import View, open_index, release_index
from pear_store.local.locks import write_lock
from pear_store.local.log import Operation, info, is_on
from pear_store.local.opened import finish_rebuild
from pear_store.local.packs import bare_header, find_unfinished, pack_path, read_records, unlink_written
from pear_store.local.repair import rewrite_packs
from pear_store.local.sweep import keep_copy, set_aside
from pear_store.local.worker import run_python


@dataclass
class Rebuilt:
    """What a rebuild found.

    Args:
        packs: packs that the new index lists. Likewise tensors, tasks and versions.
        problems: what could not be restored, one line each.
        old_index: where the old index is now. None: there was none.
    """

    packs: int = 0
    tensors: int = 0
    tasks: int = 0
    versions: int = 0
    problems: list[str] = field(default_factory=list)
    old_index: str | None = None


def rebuild(path: str | Path, progress: Callable[[int, int], None] = lambda done, all_: None) -> Rebuilt:
    """Makes the index anew from the packs alone. The old index is kept beside it as ``index.old-…``.

    Only the packs' headers are read, and tensors that two packs hold. Writers wait meanwhile. Processes that have the
    old index open switch to the new one by themselves. If the rebuild is killed, the old index stays in its place.

    Args:
        path: the store's directory.
        progress: called with the packs done, and all packs.

    Raises:
        NotFoundError: there are no packs.
        DiskFullError: there is no space for a second index. Nothing was changed.
        AccessError: this process may not write the store.
    """
    path = store_path(path)
    require_packs(path)
    with Operation(__name__, "rebuild", path) as operation:
        result = _rebuild(path, progress)
        if is_on(__name__):
            operation.size_bytes = sum(file.stat().st_size for file in _pack_files(path))
        return result


def _rebuild(path: Path, progress: Callable[[int, int], None]) -> Rebuilt:
    result = Rebuilt()
    try:
        with write_lock(path), open_folder(path) as store:
            finish_rebuild(path)
            unsure = _set_aside_unfinished(path, result)
            store.remove_index("index.new")
            store.remove_index("index.build")
            with store.folder("index.build", create=True), store.folder("tmp", create=True):
                index = open_index(path / "index.build", create=True)
            try:
                result, contradicted = index.fill(lambda view: _fill(view, path, unsure, result, progress))
            finally:
                release_index(index)
            with store.folder("index.build") as built:
                built.sync()
            store.rename("index.build", "index.new")
            store.sync()  # after each rename: else a power loss may undo the first and keep the second
            with suppress(FileNotFoundError):
                old = f"index.old-{time.time_ns()}"
                store.rename("index", old)  # this also renames a link, without following it
                store.sync()
                result.old_index = str(path / old)
            store.rename("index.new", "index")
            store.sync()
        if contradicted:
            info(__name__, "rebuild %s: packs that others contradicted, written anew: %d", path, len(contradicted))
            rewrite_packs(path, contradicted)
    except OSError as error:
        raise from_os_error(error, path) from None
    return result


def _set_aside_unfinished(path: Path, result: Rebuilt) -> set[bytes]:
    """Moves packs that were never committed into damaged/. No caller was told of them.

    The old index says which these are. If it cannot be read, returns all packs that may be uncommitted.
    """
    unfinished = find_unfinished(path)
    if not unfinished:
        return set()
    code = (  # it never waits for the lock, as opening a store may
        "import sys; from pathlib import Path; from pear_store.local.index import open_index\n"
        "path, *packs = sys.argv[1:]\n"
        "with open_index(Path(path)).read() as view:\n"
        "    print(*[pack for pack in packs if bytes.fromhex(pack) not in view.packs])"
    )
    names = [pack.hex() for pack in unfinished]
    exit_code, printed = run_python(code, str(path.resolve() / "index"), *names)
    if exit_code:
        return set(unfinished)
    never = [bytes.fromhex(name) for name in printed.split()]
    set_aside(path, never)
    unlink_written(path, unfinished)
    result.problems += [f"pack {pack.hex()}: the index does not list it; moved to {path / 'damaged'}" for pack in never]
    return set()


def _fill(
    view: View, path: Path, unsure: set[bytes], result: Rebuilt, progress: Callable[[int, int], None]
) -> tuple[Rebuilt, set[bytes]]:
    """Fills an empty index. Returns the result, and the packs whose records differ from the index.

    It runs again if the index needs more space. So it only adds to `result` what it does to files.
    """
    problems: list[str] = []
    applying = Applying(path, view)
    commits: dict[bytes, Commit] = {}
    files = _pack_files(path)
    for done, file in enumerate(files):
        progress(done, len(files))
        found = _read_pack(path, file, problems, result)
        if found is not None:
            pack, header, records = found
            applying.apply(pack, header, records)
            commits[pack] = records.commit
    progress(len(files), len(files))
    followed = {pack for commit in commits.values() for pack in commit.after}
    for pack in sorted(unsure & commits.keys() - followed):
        problems.append(f"pack {pack.hex()}: it may never have been committed; its records were kept")
    settled = applying.settle()
    problems += settled.problems
    contradicted = set(settled.contradicted)
    if settled.refused:
        contradicted |= _name_refused(path, files, settled.refused, problems)
    filled = replace(
        result, packs=len(view.packs), versions=len(view.versions), tensors=len(view.tensors),
        tasks=sum(1 for name in view.names.rows() if name.newest), problems=[*result.problems, *problems],
    )  # fmt: skip
    return filled, contradicted


def _read_pack(path: Path, file: Path, problems: list[str], result: Rebuilt) -> tuple[bytes, Header, Records] | None:
    """What can be read of a pack. A pack of which nothing can be read is moved to damaged/."""
    try:
        pack = bytes.fromhex(file.stem)
    except ValueError:
        return None
    if file != pack_path(path, pack):  # a copy in another place
        return None
    try:
        header, records, damaged = read_records(file)
        problems += [f"pack {file.stem}: {what} is damaged" for what in damaged]
        return pack, header, records
    except DamagedError as error:
        bare = bare_header(file)
        if bare is None:
            set_aside(path, [pack])  # else gc would not know what it records
            result.problems.append(f"{error.what}: {error.found}; moved to {path / 'damaged'}")
            return None
        problems.append(f"{error.what}: {error.found}; its tensors are kept, the versions it recorded are not")
        return pack, bare, Records()


def _name_refused(path: Path, files: list[Path], refused: dict[bytes, str], problems: list[str]) -> set[bytes]:
    """Adds a problem for each version whose manifest was refused, and keeps copies of their packs in damaged/.

    Returns:
        these packs, which the caller rewrites without the versions.
    """
    packs = set()
    for file in files:
        with suppress(DamagedError):
            _, records, _ = read_records(file)
            left_out = [version for version in records.versions if version.hash in refused]
            for version in left_out[:_NAMED]:
                problems.append(
                    f"pack {file.stem}: version {version.task}@{version.version} was left out: "
                    f"{refused[version.hash]}; the pack is kept in {path / 'damaged'}"
                )
            if len(left_out) > _NAMED:
                problems.append(f"pack {file.stem}: left out {counted(len(left_out) - _NAMED, 'more version')}")
            if left_out:
                packs.add(bytes.fromhex(file.stem))
                keep_copy(path, bytes.fromhex(file.stem))
    return packs


_NAMED = 20


def _pack_files(path: Path) -> list[Path]:
    return sorted((path / "packs").glob("*/*.safetensors"))
