"""What a push sends, in groups: each is what one entry of the log brings, in a few packs."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from pear_store.errors import NotFoundError
from pear_store.format.digest import Digest, RawTensor
from pear_store.format.manifest import manifest_digests
from pear_store.local.opened import OpenStore
from pear_store.local.sync import Numbered, manifest_in, tensors_in
from pear_store.remote.changes import Changes
from pear_store.remote.log import LoggedVersion, PackListing
from pear_store.remote.mirror import Mirror
from pear_store.remote.sender import PackSender, PackUnderWay

GROUP_BYTES = 64 << 20
"""Tensor bytes that one entry brings, if one version has no more"""
PACK_BYTES = 16 << 20
"""Tensor bytes of one of its packs, if one version has no more"""
FIRST_PACK_BYTES = 4 << 20
"""The same before a pack has arrived: the first ones are soon on their way, and show how fast the line is"""
GROUP_VERSIONS = 500
_GROUP_MANIFEST_BYTES = 4 << 20
_GROUP_TENSORS = 40_000


@dataclass
class Group:
    """What one entry is to say, and the packs that were sent for it."""

    versions: list[LoggedVersion] = field(default_factory=list)
    manifests: dict[bytes, bytes] = field(default_factory=dict)
    needs: dict[bytes, list[Digest]] = field(default_factory=dict)
    """The tensors of each manifest"""
    digests: dict[Digest, Numbered] = field(default_factory=dict)
    """Tensors that the versions need, and a version that has each"""
    is_last: bool = False
    packs: dict[bytes, PackListing] = field(default_factory=dict)
    under_way: list[PackUnderWay] = field(default_factory=list)
    """Packs that may not have arrived"""

    def know_packs(self) -> None:
        """Waits until it is known what its packs hold."""
        self.packs.update(pack.known() for pack in self.under_way)

    def await_packs(self) -> None:
        """Raises what kept a pack from being sent."""
        for pack in self.under_way:
            pack.await_arrival()
        self.under_way.clear()


def groups(opened: OpenStore, mirror: Mirror, changes: Changes, sender: PackSender) -> Iterator[Group]:
    """The versions to push by name and number, in runs of what one entry takes; the last one takes all else, too.

    Each one's tensors are being sent when it is given. The one before it may not have been entered yet, but no more.
    """
    maker = _Maker(sender)
    for version in sorted(changes.push, key=lambda version: (version.task, version.number)):
        what = f"version {version.task}@{version.number}"
        try:
            manifest = manifest_in(opened, version.task, version.number)
        except NotFoundError:  # removed here since the push began
            continue
        if sha256(manifest).digest() != version.manifest:  # a pull gave this number to another version meanwhile
            continue
        digests = manifest_digests(manifest)
        tensors = tensors_in(opened, maker.new_of(digests, mirror), what)
        if maker.costs_more_than_knowing(tensors, mirror):
            mirror.need_all("packs")
            maker.forget_known(mirror)
            tensors = {digest: tensors[digest] for digest in maker.new_of(tensors, mirror)}
        if maker.is_full(manifest, digests, tensors):
            yield maker.finished()
        maker.add(version, manifest, digests, tensors)
    yield maker.finished(is_last=True)


class _Maker:
    """The group that is made, and its tensors of which no pack is under way yet."""

    def __init__(self, sender: PackSender) -> None:
        self._sender = sender
        self._group = Group()
        self._before = Group()
        self._size_bytes = self._manifest_bytes = self._unknown_bytes = self._pack_bytes = 0
        self._tensors: dict[Digest, RawTensor] = {}

    def new_of(self, digests: Iterable[Digest], mirror: Mirror) -> list[Digest]:
        """Those that the remote may lack, and that are not under way."""
        mine = (self._group.digests, self._before.digests)
        unsent = [digest for digest in digests if not any(digest in one for one in mine)]
        known = mirror.known_of(unsent)
        return [digest for digest in unsent if digest not in known]

    def costs_more_than_knowing(self, tensors: Mapping[Digest, RawTensor], mirror: Mirror) -> bool:
        """Whether to send what may be there for nothing costs more than to know all packs."""
        self._unknown_bytes += bytes_of(tensors)
        return 0 < mirror.left_bytes("packs") <= self._unknown_bytes

    def forget_known(self, mirror: Mirror) -> None:
        """Leaves out tensors that turn out to be on the remote."""
        known = mirror.known_of(self._tensors)
        self._tensors = {digest: tensor for digest, tensor in self._tensors.items() if digest not in known}
        self._pack_bytes = bytes_of(self._tensors)

    def is_full(self, manifest: bytes, digests: Collection[Digest], tensors: Mapping[Digest, RawTensor]) -> bool:
        """Whether a version is too much for this group."""
        group = self._group
        return bool(group.versions) and (
            self._size_bytes + bytes_of(tensors) > GROUP_BYTES
            or self._manifest_bytes + len(manifest) > _GROUP_MANIFEST_BYTES
            or len(group.versions) == GROUP_VERSIONS
            or len(group.digests) + len(digests) > _GROUP_TENSORS
        )

    def add(
        self, version: LoggedVersion, manifest: bytes, digests: list[Digest], tensors: Mapping[Digest, RawTensor]
    ) -> None:
        """Adds a version and those of its tensors that are new. They lie side by side in one pack."""
        more = bytes_of(tensors)
        if self._pack_bytes + more > (PACK_BYTES if self._sender.sent_bytes else FIRST_PACK_BYTES):
            self._send()
        self._group.versions.append(version)
        self._group.manifests[version.manifest], self._group.needs[version.manifest] = manifest, digests
        for digest in digests:
            self._group.digests.setdefault(digest, (version.task, version.number))
        self._tensors.update(tensors)
        self._pack_bytes += more
        self._size_bytes += more
        self._manifest_bytes += len(manifest)

    def finished(self, is_last: bool = False) -> Group:
        """The group, all of whose packs are under way; the next one is begun."""
        self._send()
        self._before, self._group = self._group, Group()
        self._size_bytes = self._manifest_bytes = 0
        self._before.is_last = is_last
        return self._before

    def _send(self) -> None:
        if self._tensors:
            self._group.under_way.append(self._sender.send(self._tensors))
            self._tensors, self._pack_bytes = {}, 0


def bytes_of(tensors: Mapping[Digest, RawTensor]) -> int:
    return sum(tensor.size_bytes for tensor in tensors.values())
