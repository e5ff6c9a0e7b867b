"""Sends packs to a remote, while the next ones are made."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType

from pear_store.format.digest import Digest, RawTensor
from pear_store.pools import ThreadPool
from pear_store.remote.commit import lay_out_pack
from pear_store.remote.log import PackListing, pack_name
from pear_store.remote.place import Place

SENDERS = 4
"""How many packs are sent at once"""
MOST_BYTES = 64 << 20
"""The most tensor bytes under way. A pack that has more is sent alone."""


class PackUnderWay:
    """A pack that is laid out and then sent. Its contents are known before it has arrived."""

    def __init__(self) -> None:
        self._laid_out: Future[tuple[bytes, PackListing]] = Future()
        self._arrived: Future[None] = Future()

    def known(self) -> tuple[bytes, PackListing]:
        """Waits until it is laid out. Returns its hash and the places of its tensors, or raises the error."""
        return self._laid_out.result()

    def await_arrival(self) -> None:
        """Waits until it has arrived. Raises the error if it cannot be sent."""
        self._arrived.result()

    def lay_out(self, tensors: Mapping[Digest, RawTensor]) -> tuple[str, bytes]:
        """The name and the bytes of its object."""
        pack, data, listing = lay_out_pack(tensors)
        self._laid_out.set_result((pack, listing))
        return pack_name(pack), data

    def end(self, error: BaseException | None = None) -> None:
        """Notes that it has arrived, or the error that kept it from that."""
        for future in (self._laid_out, self._arrived):
            if error is not None and not future.done():
                future.set_exception(error)
        if error is None:
            self._arrived.set_result(None)


class PackSender:
    """Sends packs in threads of its own. The end of its context waits until none is under way.

    No entry names a pack before it was sent. So if a push is interrupted, packs under way become orphans, which gc
    deletes.

    Args:
        release: called when a pack's tensors are not needed any more, in any thread.
    """

    def __init__(self, place: Place, release: Callable[[], None]) -> None:
        self._place, self._release = place, release
        self._pool = ThreadPool(SENDERS, "pear-sender")
        self._changed = threading.Condition()
        self._bytes_under_way = 0
        self._problem: BaseException | None = None
        self.sent_bytes = 0

    def __enter__(self) -> "PackSender":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def send(self, tensors: Mapping[Digest, RawTensor]) -> PackUnderWay:
        """Begins to send tensors in a new pack. First waits until there is room for it in memory.

        Raises:
            PlaceError, DiskFullError, AccessError: an earlier pack could not be sent.
        """
        size_bytes = sum(tensor.size_bytes for tensor in tensors.values())
        with self._changed:
            self._changed.wait_for(
                lambda: self._problem or self._bytes_under_way + size_bytes <= MOST_BYTES or not self._bytes_under_way
            )
            if self._problem is not None:
                raise self._problem
            self._bytes_under_way += size_bytes
        pack = PackUnderWay()
        self._pool.submit(self._send, pack, tensors, size_bytes)
        return pack

    def _send(self, pack: PackUnderWay, tensors: Mapping[Digest, RawTensor], size_bytes: int) -> None:
        problem: BaseException | None = None
        sent_bytes = 0
        try:
            name, data = pack.lay_out(tensors)
            del tensors
            self._release()
            self._place.put(name, data)
            sent_bytes = len(data)
        except BaseException as error:  # those who wait for the pack get it
            problem = error
        with self._changed:
            self._bytes_under_way -= size_bytes
            self._problem = self._problem or problem
            self.sent_bytes += sent_bytes
            self._changed.notify_all()
        pack.end(problem)
