"""Sets and removes tags."""

import time

from pear_store.format.pack import PackedTag, Records
from pear_store.local.catalog import enter
from pear_store.local.index import View
from pear_store.local.log import Operation
from pear_store.local.opened import OpenStore
from pear_store.local.packs import WrittenPack, write_pack
from pear_store.local.references import Version, all_tags, resolve, version_of
from pear_store.local.rows import NO_PACK, TagRow


def set_tag(opened: OpenStore, reference: str, tag: str, delete: bool) -> Version:
    """Sets a tag on the version that a reference names; or with `delete`, removes the tag."""
    packs: list[WrittenPack] = []

    def change(view: View) -> Version:
        name, number, row = resolve(view, reference, opened.path)
        before = view.tags.get(name, tag) or TagRow(0, 0, NO_PACK)
        if before.version != (0 if delete else number):
            now = max(time.time_ns(), before.time_ns + 1)
            tagged = PackedTag(name, tag, None, now) if delete else PackedTag(name, tag, number, now, row.manifest)
            records = Records(tags=[tagged])
            packs[:] = [write_pack(opened.path, {}, records, view.next_commit())]
            enter(opened.path, view, packs[0], records, {})
        return version_of(view, name, number, all_tags(view))

    with Operation(__name__, "tag", f"{reference} of {opened.path}") as operation:
        version = opened.write_packs(change, packs)
        operation.size_bytes = sum(pack.file_bytes for pack in packs)
        return version
