"""Splits what a push sends into groups. A group is what one log entry brings, in a few packs."""

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
"""The most tensor bytes in one entry, unless one version has more"""
PACK_BYTES = 16 << 20
"""The most tensor bytes in one of its packs, unless one version has more"""
FIRST_PACK_BYTES = 4 << 20
"""The same until a pack has arrived. The first packs leave sooner, and show how fast the line is."""
GROUP_VERSIONS = 500
_GROUP_MANIFEST_BYTES = 4 << 20
_GROUP_TENSORS = 40_000


@dataclass
class Group:
    """What one entry should say, and the packs that were sent for it."""

    versions: list[LoggedVersion] = field(default_factory=list)
    manifests: dict[bytes, bytes] = field(default_factory=dict)
    needs: dict[bytes, list[Digest]] = field(default_factory=dict)
    """The tensors of each manifest"""
    digests: dict[Digest, Numbered] = field(default_factory=dict)
    """The tensors that the versions need, and for each a version that has it"""
    is_last: bool = False
    packs: dict[bytes, PackListing] = field(default_factory=dict)
    under_way: list[PackUnderWay] = field(default_factory=list)
    """Packs that may not have arrived yet"""

    def know_packs(self) -> None:
        """Waits until all its packs are laid out, so that their contents are known."""
        self.packs.update(pack.known() for pack in self.under_way)

    def await_packs(self) -> None:
        """Waits until all its packs have arrived. Raises the error of a pack that could not be sent."""
        for pack in self.under_way:
            pack.await_arrival()
        self.under_way.clear()


def groups(opened: OpenStore, mirror: Mirror, changes: Changes, sender: PackSender) -> Iterator[Group]:
    """The versions to push, by name and number, in groups of what one entry takes. The last group brings the rest, too.

    When a group is given, its tensors are being sent. Only the group before it may not be in the log yet.
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
    """The group that is being made, and its tensors that are in no pack yet."""

    def __init__(self, sender: PackSender) -> None:
        self._sender = sender
        self._group = Group()
        self._before = Group()
        self._size_bytes = self._manifest_bytes = self._unknown_bytes = self._pack_bytes = 0
        self._tensors: dict[Digest, RawTensor] = {}

    def new_of(self, digests: Iterable[Digest], mirror: Mirror) -> list[Digest]:
        """Tensors that the remote may lack, and that are not under way."""
        mine = (self._group.digests, self._before.digests)
        unsent = [digest for digest in digests if not any(digest in one for one in mine)]
        known = mirror.known_of(unsent)
        return [digest for digest in unsent if digest not in known]

    def costs_more_than_knowing(self, tensors: Mapping[Digest, RawTensor], mirror: Mirror) -> bool:
        """Whether sending tensors that may be there already costs more than reading what all packs hold."""
        self._unknown_bytes += bytes_of(tensors)
        return 0 < mirror.left_bytes("packs") <= self._unknown_bytes

    def forget_known(self, mirror: Mirror) -> None:
        """Drops tensors that are on the remote, as is known now."""
        known = mirror.known_of(self._tensors)
        self._tensors = {digest: tensor for digest, tensor in self._tensors.items() if digest not in known}
        self._pack_bytes = bytes_of(self._tensors)

    def is_full(self, manifest: bytes, digests: Collection[Digest], tensors: Mapping[Digest, RawTensor]) -> bool:
        """Whether a version does not fit this group any more."""
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
        """Adds a version, and its tensors that are new. They are side by side in one pack."""
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
        """Sends the rest of the group, returns the group, and begins the next one."""
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
