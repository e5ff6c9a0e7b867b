"""Takes away what is not needed: rows first, files when that is on disk."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from pear_store.errors import DamagedError, DamagedIndexError
from pear_store.format.container import Header
from pear_store.format.digest import Digest, is_digest
from pear_store.format.pack import Records
from pear_store.local.catalog import Recorded
from pear_store.local.directory import WRITTEN_NAME, open_folder
from pear_store.local.index import View
from pear_store.local.mark import MANIFEST
from pear_store.local.opened import OpenStore
from pear_store.local.packs import bare_header, is_unfinished, pack_path, read_records, unlink_pack
from pear_store.local.rows import ManifestRow, RemovedRow, TensorRow


def refuse_unknown(path: Path, unknown: list[bytes]) -> None:
    if unknown:
        names = ", ".join(pack.hex() for pack in unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise DamagedIndexError(
            path / "index", f"{len(unknown)} packs record what it never had, and nothing was removed: {names}"
        )


def unknown_packs(opened: OpenStore) -> list[bytes]:
    """Packs that record what the index never had; without the write lock."""
    for _ in range(_LOOKS):
        with opened.read() as view:
            found = Recorded(opened.path).find_unlisted(view)
            state = view.state
        # a pack that is being added has its name in tmp/ until the index lists it
        done = [pack for pack in found.unknown if not is_unfinished(opened.path, pack)]
        with opened.read() as view:
            done = [pack for pack in done if pack not in view.packs and pack_path(opened.path, pack).exists()]
            if not done or view.state == state:  # else what was asked of other packs may have been moved
                break
    return done


_LOOKS = 5


def set_aside(path: Path, packs: Iterable[bytes]) -> None:
    """Moves packs that cannot be read into damaged/."""
    for pack in packs:
        name = pack_path(path, pack).name
        with open_folder(path, "packs", name[:2]) as folder, open_folder(path, "damaged", create=True) as damaged:
            folder.rename(name, name, damaged)
            damaged.sync()
            folder.sync()


def keep_copy(path: Path, pack: bytes) -> None:
    """Keeps a pack in damaged/, too."""
    name = pack_path(path, pack).name
    with open_folder(path, "packs", name[:2]) as folder, open_folder(path, "damaged", create=True) as damaged:
        with suppress(FileExistsError):
            folder.link(name, name, damaged)
        damaged.sync()


def clear_tmp(path: Path) -> list[str]:
    """Unlinks what a crashed add left in tmp/; returns the paths of what is not Pear's, which stays."""
    foreign: list[str] = []
    an_hour_ago = time.time() - 3600
    with suppress(FileNotFoundError), open_folder(path, "tmp") as tmp:
        for name in tmp.names():  # a living add takes seconds
            with suppress(FileNotFoundError):
                if not (WRITTEN_NAME.fullmatch(name) and tmp.is_file(name)):
                    foreign.append(str(tmp.path / name))
                elif tmp.look(name).st_mtime < an_hour_ago:
                    tmp.unlink(name)
    return foreign


def drop_settled_removals(path: Path, view: View) -> None:
    """Forgets removals of versions that no file records any more; nothing could bring those back."""
    there: dict[bytes, bool] = {}

    def settled(row: RemovedRow) -> bool:
        pack = row.recorded_in
        if pack not in there:
            there[pack] = pack_path(path, pack).exists()
        return not there[pack]

    view.removed.delete_where(settled)


def drop_manifests(view: View, marks: bytearray) -> None:
    """Deletes the manifests that no version has. Those that one has were found whole when they were marked."""

    def dead(number: int, checked: Callable[[], ManifestRow]) -> bool:
        if number < len(marks) and marks[number] == MANIFEST:
            return False
        if checked().number >= len(marks):
            raise DamagedError("the index's count of numbers", "too small")
        return True

    view.manifests.delete_where(dead)


def drop_packs(
    path: Path,
    view: View,
    packs: Sequence[bytes],
    headers: Mapping[bytes, Header] = MappingProxyType({}),
    recorded: Recorded | None = None,
) -> None:
    """Deletes the rows of packs that nothing needs any more, and of the tensors that they hold; with `recorded`, looks
    whether all is known that they record. `headers` are those of packs that were read already.

    Raises:
        DamagedError: a tensor's row names such a pack, the pack's own row does not list it; or it is not known.
    """
    unread: dict[bytes, set[int]] = {}
    for pack in packs:
        listed = set(view.contents.get(pack).numbers)
        header = headers.get(pack)
        if header is None:
            header, records = _read(pack_path(path, pack))
            if recorded is not None and not recorded.knows(view, pack, records):
                refuse_unknown(path, [pack])
        for name in filter(is_digest, header.places if header else ()):
            row = view.tensors.peek(Digest(name))
            if row is not None and row.pack == pack:
                _check_listed(view.tensors.get(Digest(name)), listed)
                view.tensors.delete(Digest(name))
        if listed:
            unread[pack] = listed
    if unread:  # missing or damaged

        def dead(row: TensorRow, checked: Callable[[], TensorRow]) -> bool:
            listed = unread.get(row.pack)
            if listed is not None:
                _check_listed(checked(), listed)
            return listed is not None

        view.tensors.delete_where(dead)
    for pack in packs:
        view.packs.drop(pack)


def _read(file: Path) -> tuple[Header | None, Records]:
    """A pack's header and records, as far as they can be read."""
    try:
        header, records, _ = read_records(file)
    except DamagedError:
        return bare_header(file), Records()
    return header, records


def _check_listed(row: TensorRow | None, listed: set[int]) -> None:
    assert row is not None
    if row.number not in listed:
        raise DamagedError(f"contents of pack {row.pack.hex()}", f"its tensor {row.number} is not listed")
    listed.remove(row.number)


def unlink_packs(opened: OpenStore, packs: Sequence[bytes]) -> None:
    """Unlinks packs that no row names any more; under the write lock, for a rebuild may have come to name one again."""

    def unlink(view: View) -> None:
        fans = set()
        for pack in packs:
            if pack not in view.packs:
                unlink_pack(opened.path, pack)
                fans.add(pack.hex()[:2])
        for fan in fans:
            with suppress(FileNotFoundError), open_folder(opened.path, "packs", fan) as folder:
                folder.sync()

    opened.write(unlink)
