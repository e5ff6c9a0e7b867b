"""Moves tensors of a remote into new packs, because their packs will be dropped."""

from collections.abc import Callable, Collection, Iterator

from pear_store.format.digest import Digest, RawTensor
from pear_store.pools import ThreadPool
from pear_store.remote.commit import put_pack
from pear_store.remote.log import PackListing
from pear_store.remote.place import Place
from pear_store.remote.pull import find_tensors
from pear_store.remote.whole import WholeMirror

PACK_BYTES = 64 << 20
"""The most tensor bytes of a pack, unless one tensor has more. So much is held in memory."""


class Rewriter:
    """Packs that were sent for the next entry, which should name them.

    Args:
        elsewhere: returns good copies of tensors, for those that have none on the remote.
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
        """Sends the tensors that it has not sent yet. Stops at tensors that have no good copy, and returns these."""
        for pack in [pack for pack in self.packs if self._whole.is_dropped(pack)]:  # another gc took it for an orphan
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
        """The tensors that have no good copy. Sends nothing."""
        return set().union(*(missing for _, missing in self._read(list(digests))))

    def _read(self, digests: list[Digest]) -> Iterator[tuple[dict[Digest, RawTensor], set[Digest]]]:
        """Good copies in groups, each with the tensors of the group that have none."""
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
