"""Removes versions. The next gc removes their tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pear_store.errors import NotFoundError, TaggedError
from pear_store.local.catalog import enter, take_out
from pear_store.local.index import View
from pear_store.local.log import Operation
from pear_store.local.opened import OpenStore
from pear_store.local.packs import WrittenPack, write_pack
from pear_store.local.references import Version, all_tags, parse_reference, resolve, version_of

RECORDS_A_PACK = 100_000


def remove(opened: OpenStore, references: Sequence[str], dry_run: bool) -> list[Version]:
    """See :meth:`pear_store.Store.remove`."""
    packs: list[WrittenPack] = []

    def change(view: View) -> list[Version]:
        found: dict[tuple[str, int], Version] = {}
        tags = all_tags(view)
        for reference in references:
            name, which = parse_reference(reference)
            if isinstance(which, str):
                raise NotFoundError(f"{reference!r}: expected a task or a version, found a tag; name its version")
            _, newest, _ = resolve(view, reference, opened.path)
            numbers = [newest] if which is not None else [number for number, _ in view.versions.of(name)]
            for number in numbers:
                version = version_of(view, name, number, tags)
                if version.tags:
                    raise TaggedError(version.task, version.version, version.tags[0])
                found[version.task, version.version] = version
        if not dry_run:
            packs[:] = remove_versions(opened, view, list(found))
        return list(found.values())

    with Operation(__name__, "remove", f"{', '.join(references)} of {opened.path}") as operation:
        if dry_run:
            return opened.look(change)
        removed = opened.write_packs(change, packs)
        operation.size_bytes = sum(pack.file_bytes for pack in packs)
        return removed


def remove_versions(opened: OpenStore, view: View, found: Iterable[tuple[str, int]]) -> list[WrittenPack]:
    """Removes versions' rows, and records that in packs. Returns the packs that it placed."""
    packs: list[WrittenPack] = []
    commit = view.next_commit()
    taken = take_out(view, found)
    for start in range(0, len(taken.removed), RECORDS_A_PACK):
        records = replace(taken, removed=taken.removed[start : start + RECORDS_A_PACK])
        packs.append(write_pack(opened.path, {}, records, commit))
        enter(opened.path, view, packs[-1], records, {})
    return packs
