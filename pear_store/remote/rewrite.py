"""Sends tensors that a remote has already, in new packs: what lives in packs that go."""

from collections.abc import Callable, Collection, Iterator

from pear_store.format.digest import Digest, RawTensor
from pear_store.pools import ThreadPool
from pear_store.remote.commit import put_pack
from pear_store.remote.log import PackListing
from pear_store.remote.place import Place
from pear_store.remote.pull import find_tensors
from pear_store.remote.whole import WholeMirror

PACK_BYTES = 64 << 20
"""Tensor bytes of a pack, if one tensor has no more: what is held in memory"""


class Rewriter:
    """Packs that were sent for the next entry, which is to name them.

    Args:
        elsewhere: gives good copies of tensors that no pack of the remote has one of.
    """

    def __init__(
        self,
        place: Place,
        whole: WholeMirror,
        pool: ThreadPool,
        elsewhere: Callable[[Collection[Digest]], dict[Digest, RawTensor]] = lambda digests: {},
    ) -> None:
        self._place, self._whole, self._pool, self._elsewhere = place, whole, pool, elsewhere
        self.packs: dict[bytes, PackListing] = {}
        self.sent_bytes = 0

    def cover(self, digests: Collection[Digest]) -> set[Digest]:
        """Sends those that it has not sent yet. It ends where some have no good copy, and returns these."""
        for pack in [pack for pack in self.packs if self._whole.is_dropped(pack)]:  # an orphan to another gc
            del self.packs[pack]
        sent = {digest for listing in self.packs.values() for digest in listing.places}
        for tensors, missing in self._read([digest for digest in digests if digest not in sent]):
            if missing:
                return missing
            pack, listing = put_pack(self._place, tensors)
            self.packs[pack] = listing
            self.sent_bytes += listing.file_bytes
        return set()

    def lost(self, digests: Collection[Digest]) -> set[Digest]:
        """Those that have no good copy; nothing is sent."""
        return set().union(*(missing for _, missing in self._read(list(digests))))

    def _read(self, digests: list[Digest]) -> Iterator[tuple[dict[Digest, RawTensor], set[Digest]]]:
        """Good copies in groups, and what has none."""
        for group in self._groups(digests):
            tensors, _ = find_tensors(self._place, self._whole.places_of(group), self._pool)
            if missing := {digest for digest in group if digest not in tensors}:
                tensors |= self._elsewhere(missing)
            yield tensors, missing - tensors.keys()

    def _groups(self, digests: list[Digest]) -> Iterator[list[Digest]]:
        group: list[Digest] = []
        size = 0
        places = self._whole.places_of(digests)
        for digest in digests:
            more = places[digest][0][1].length if places[digest] else 0
            if group and size + more > PACK_BYTES:
                yield group
                group, size = [], 0
            group.append(digest)
            size += more
        if group:
            yield group
